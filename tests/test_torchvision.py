"""torchvision's classification from shards: transforms in the decode, the reference script with one import changed, loaders."""

from __future__ import annotations

import importlib
import inspect
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, assert_psnr, draw_scene, needs, psnr
from tiny_shards import png, write_named, write_shards
from torch.utils.data import RandomSampler, Subset

needs("torchvision")

from torchvision import transforms as v1
from torchvision.transforms import v2

from rinr_loader import ConfigError, RinrDataset
from rinr_loader.color import IMAGENET_MEAN, IMAGENET_STD
from rinr_loader.converters import open_source
from rinr_loader.crops import RandomResizedCrop
from rinr_loader.integrations.torchvision import CocoDetection, DataLoader, ImageFolder

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each split with a folder for each class, as torchvision's script takes it."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, first in (("train", 12, 0), ("val", 3, 100)):
        for k in range(count):
            path = root / split / CLASSES[k % 3] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(draw_scene(first + k, width=64 + k, height=48 + 2 * k).image))
    return root


@pytest.fixture(scope="module")
def dest(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(pictures)
    dest = tmp_path_factory.mktemp("shards") / "data"
    write_shards(dest, source.samples, names=source.names, shard_samples=4)
    return dest


@pytest.fixture(scope="module")
def decoded(dest: Path) -> list[torch.Tensor]:
    """Every picture of train, decoded whole at its stored size: what a JPEG loader would hand to the transform."""
    return [image for image, _ in RinrDataset(dest)]


def images(dest: Path, transform: Any, *, seed: int = 0) -> list[torch.Tensor]:
    dataset = ImageFolder(dest / "train", transform, device="cpu")
    torch.manual_seed(seed)
    return [image for image, _ in dataset.__getitems__(range(len(dataset)))]


# --- what the transform does ---


@pytest.mark.parametrize("module", [v1, v2])
@pytest.mark.parametrize(("resize", "crop"), [(24, 20), (48, 40), (70, 64), (30, 30), ((32, 40), 32)])
def test_evaluation_shows_what_torchvision_cuts_from_the_whole_picture(
    module: Any, resize: Any, crop: int, dest: Path, decoded: list[torch.Tensor]
) -> None:
    geometry = module.Compose([module.Resize(resize), module.CenterCrop(crop)])
    found = images(dest, module.Compose([geometry, module.PILToTensor()]))
    for image, whole in zip(found, decoded, strict=True):
        expected = geometry(whole)
        assert image.dtype == torch.uint8
        assert_psnr(image, expected, at_least=36)
        assert psnr(image, expected) > psnr(image[..., 1:], expected[..., :-1]) + 6  # a shift by a pixel would be noticed
        assert psnr(image, expected) > psnr(image[:, 1:], expected[:, :-1]) + 6


@pytest.mark.parametrize("size", [(16, 24), (40, 40), (80, 72)])
def test_a_random_crop_is_what_torchvision_cuts_from_the_whole_picture(size: tuple[int, int], dest: Path, decoded: list[torch.Tensor]) -> None:
    found = images(dest, v2.Compose([v2.RandomResizedCrop(size, scale=(0.2, 0.9)), v2.ToImage()]), seed=3)
    torch.manual_seed(3)
    stored = torch.tensor([whole.shape[1:] for whole in decoded])
    crops = RandomResizedCrop(scale=(0.2, 0.9)).crop(stored, torch.rand(len(decoded), 22)).long().tolist()
    assert len({tuple(crop) for crop in crops}) == len(crops)
    for image, whole, (x, y, width, height) in zip(found, decoded, crops, strict=True):
        assert image.shape == (3, *size)
        assert_psnr(image, v2.functional.resized_crop(whole, y, x, height, width, list(size), antialias=True), at_least=36)


def test_flips_mirror_the_crop(dest: Path) -> None:
    crop = v2.RandomResizedCrop(32)
    plain = images(dest, v2.Compose([crop, v2.ToImage()]))
    mirrored = images(dest, v2.Compose([crop, v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0), v2.ToImage()]))
    some = images(dest, v2.Compose([crop, v2.RandomHorizontalFlip(0.5), v2.ToImage()]))
    for a, b in zip(plain, mirrored, strict=True):
        assert_close(a.flip(-1, -2), b, "pixels")
    flipped = [psnr(a.flip(-1), b) > 40 for a, b in zip(plain, some, strict=True)]
    assert all(psnr(a.flip(-1) if flip else a, b) > 40 for a, b, flip in zip(plain, some, flipped, strict=True))
    assert 0 < sum(flipped) < len(flipped)


def test_a_centre_crop_pads_with_black_as_torchvision_does(dest: Path, decoded: list[torch.Tensor]) -> None:
    transform = v2.Compose([v2.CenterCrop(20), v2.CenterCrop((61, 90))])
    for image, whole in zip(images(dest, transform), decoded, strict=True):
        expected = transform(whole)
        assert_close(image, expected, "pixels")
        assert (image[expected == 0] == 0).all()


def test_conversion_and_normalisation_are_part_of_the_decode(dest: Path) -> None:
    crop = v2.CenterCrop(40)
    whole = images(dest, v2.Compose([crop, v2.ToImage()]))
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    for chain in (
        [crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize, v2.ToPureTensor()],
        [v2.ToImage(), v2.ToDtype(torch.uint8, scale=True), crop, v2.ToDtype(torch.float32, scale=True), normalize],
        [v1.CenterCrop(40), v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)],
        [v1.CenterCrop(40), v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)],
    ):
        for image, expected in zip(images(dest, v1.Compose(chain)), whole, strict=True):
            assert image.dtype == torch.float32
            # A uint8 image is rounded, which the decode into floats is not.
            torch.testing.assert_close(image, normalize(expected / 255), rtol=0, atol=0.51 / 255 / min(IMAGENET_STD))


def test_no_transform_gives_floats_at_the_stored_size(dest: Path, decoded: list[torch.Tensor]) -> None:
    for image, whole in zip(images(dest, None), decoded, strict=True):
        torch.testing.assert_close(image, whole / 255, rtol=0, atol=0.51 / 255)


def test_other_transforms_are_called_on_the_decoded_images(dest: Path) -> None:
    crop = images(dest, v2.Compose([v2.CenterCrop(40), v2.ToImage()]))
    seen: list[torch.Tensor] = []

    def double(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return image // 2

    found = images(dest, v1.Compose([v1.CenterCrop(40), double, v1.PILToTensor(), v1.CenterCrop(20), v1.ToTensor()]))
    for image, decoded, expected in zip(found, seen, crop, strict=True):
        assert decoded.dtype == torch.uint8
        assert_close(decoded, expected, "exact")
        assert_close(image, (expected // 2)[:, 10:30, 10:30] / 255)
    erased = images(dest, v2.Compose([v2.CenterCrop(40), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(1.0, value=7)]))
    assert all((image == 7).any() for image in erased)


def test_nearest_neighbours_and_switched_off_filters_take_one_point_a_pixel(dest: Path) -> None:
    filtered = images(dest, v2.Compose([v2.Resize((6, 8)), v2.ToImage()]))
    for step in (v2.Resize((6, 8), antialias=False), v2.Resize((6, 8), interpolation=v2.InterpolationMode.NEAREST)):
        points = images(dest, v2.Compose([step, v2.ToImage()]))
        assert all(not torch.equal(a, b) for a, b in zip(filtered, points, strict=True))


@pytest.mark.parametrize("resize", [v2.Resize(30), v2.Resize(30, max_size=36), v2.Resize(None, max_size=37), v1.Resize([30]), v1.Resize((20, 31))])
def test_sizes_are_those_of_torchvision(resize: Any, dest: Path, decoded: list[torch.Tensor]) -> None:
    assert [image.shape for image in images(dest, resize)] == [resize(whole).shape for whole in decoded]


# --- the script ---

SCRIPT = """
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

def presets(train):
    geometry = [v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(0.5)] if train else [v2.Resize(36), v2.CenterCrop(32)]
    convert = [v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), v2.ToPureTensor()]
    return v2.Compose(geometry + convert)

torch.manual_seed(0)
dataset = ImageFolder(f"{data_path}/train", presets(train=True))
dataset_test = ImageFolder(f"{data_path}/val", presets(train=False))
train_sampler = torch.utils.data.RandomSampler(dataset)
test_sampler = torch.utils.data.SequentialSampler(dataset_test)
data_loader = DataLoader(dataset, batch_size=5, sampler=train_sampler, num_workers=workers, pin_memory=True)
data_loader_test = DataLoader(dataset_test, batch_size=4, sampler=test_sampler, num_workers=workers, pin_memory=True)

device = torch.device("cpu")
num_classes = len(dataset.classes)
model = torchvision.models.resnet18(weights=None, num_classes=num_classes).to(device)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

before = {name: value.clone() for name, value in model.state_dict().items()}
losses, shapes, epochs = [], [], []
for epoch in range(2):
    model.train()
    epochs.append([])
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        shapes.append(tuple(image.shape))
        epochs[-1] += target.tolist()
moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]

model.eval()
with torch.inference_mode():
    test_images, test_targets = zip(*((image, target) for image, target in data_loader_test))
    predictions = [model(image.to(device)) for image in test_images]
"""
TORCHVISION = "from torch.utils.data import DataLoader\nfrom torchvision.datasets import ImageFolder\n"
OURS = "from rinr_loader.integrations.torchvision import DataLoader, ImageFolder\n"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_reference_script_runs_with_one_import_changed(pictures: Path, dest: Path, tmp_path: Path) -> None:
    ran = {}
    for name, imports, data in (("files", TORCHVISION, pictures), ("shards", OURS, dest)):
        script = tmp_path / f"{name}.py"
        script.write_text(imports + SCRIPT)
        ran[name] = runpy.run_path(str(script), {"data_path": str(data), "workers": 0 if name == "files" else 2})
    for found in ran.values():
        assert found["shapes"] == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)] * 2
        assert torch.isfinite(torch.tensor(found["losses"])).all()
        assert all(prediction.isfinite().all() for prediction in found["predictions"])
        assert "fc.weight" in found["moved"]
        assert "conv1.weight" in found["moved"]
        assert [sorted(epoch) for epoch in found["epochs"]] == [sorted([0, 1, 2] * 4)] * 2
        assert found["epochs"][0] != found["epochs"][1]
    assert [t.tolist() for t in ran["shards"]["test_targets"]] == [t.tolist() for t in ran["files"]["test_targets"]] == [[0, 1, 2]]
    for name in ("num_classes", "shapes"):
        assert ran["shards"][name] == ran["files"][name]
    dataset, reference = ran["shards"]["dataset"], ran["files"]["dataset"]
    assert (dataset.classes, dataset.class_to_idx, dataset.targets) == (reference.classes, reference.class_to_idx, reference.targets)
    assert [key for key, _ in dataset.samples] == [
        Path(path).relative_to(pictures / "train").with_suffix("").as_posix() for path, _ in reference.samples
    ]
    # The networks of this test are poor, but they show the same pictures.
    assert (ran["shards"]["test_images"][0].cpu() - ran["files"]["test_images"][0]).abs().mean() < 0.5


def test_the_reference_presets_are_read(dest: Path) -> None:
    class ClassificationPresetTrain:
        def __init__(self) -> None:
            self.transforms = v2.Compose([v2.RandomResizedCrop(32), v2.PILToTensor(), v2.ConvertImageDtype(torch.float)])

        def __call__(self, image: Any) -> Any:
            raise AssertionError("one image at a time")

    for image, expected in zip(images(dest, ClassificationPresetTrain()), images(dest, ClassificationPresetTrain().transforms), strict=True):
        assert_close(image, expected, "exact")


# --- the dataset ---


def test_items_one_by_one_and_from_the_end(dest: Path) -> None:
    dataset = ImageFolder(dest / "train", v2.CenterCrop(16), lambda label: label + 10, device="cpu")
    together = dataset.__getitems__(range(12))
    for k, (image, label) in enumerate(dataset):  # ends by IndexError
        assert_close(image, together[k][0], "pixels")
        assert label == together[k][1] == dataset.targets[k] + 10
    assert_close(dataset[-1][0], dataset[11][0], "exact")
    with pytest.raises(IndexError, match="expected -12 to 11, got 12"):
        dataset[12]
    assert dataset.get_height_and_width(2) == (48 + 2 * 6, 64 + 6)  # ant/6


def test_a_transform_can_be_replaced(dest: Path) -> None:
    dataset = ImageFolder(dest / "train", v2.CenterCrop(16), device="cpu")
    dataset.transform = v2.CenterCrop(8)
    assert dataset[0][0].shape == (3, 8, 8)


def test_a_seed_repeats_a_run(dest: Path) -> None:
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    dataset = ImageFolder(dest / "train", transform, device="cpu")

    def run(seed: int, workers: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([image for image, _ in DataLoader(dataset, 2, sampler=RandomSampler(dataset), num_workers=workers)])

    assert_close(run(1, 0), run(1, 0), "exact")
    assert_close(run(1, 0), run(1, 3), "exact")  # threads only read
    assert not torch.equal(run(1, 0), run(2, 0))


# --- loaders ---


def test_torchs_own_loader_decodes_in_worker_processes(dest: Path) -> None:
    dataset = ImageFolder(dest / "train", v2.Compose([v2.Resize(20), v2.CenterCrop(16)]), device="cpu")
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    for (image, label), (expected, target) in zip(loader, DataLoader(dataset, batch_size=4, num_workers=2), strict=True):
        assert_close(image, expected, "pixels")
        assert label.tolist() == target.tolist()


def test_worker_processes_cannot_decode_on_a_gpu(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(dest / "train", v2.CenterCrop(16), device="cuda")
    monkeypatch.setattr("rinr_loader.integrations.torchvision.get_worker_info", lambda: "a worker")
    with pytest.raises(ConfigError, match=r"import DataLoader from rinr_loader.integrations.torchvision, or pass num_workers=0"):
        dataset.__getitems__([0, 1])


@pytest.mark.cuda
def test_images_on_a_gpu_stay_there(dest: Path) -> None:
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.ToImage()])
    loaders = [DataLoader(ImageFolder(dest / "train", transform, device=device), 4, num_workers=2, pin_memory=True) for device in ("cpu", "cuda")]
    for (image, _), (found, _) in zip(*loaders, strict=True):
        assert found.is_cuda
        assert_close(found, image, "pixels")


def test_subsets_and_batch_samplers_are_read_ahead(dest: Path) -> None:
    dataset = ImageFolder(dest / "train", v2.CenterCrop(16), device="cpu")
    subset = Subset(Subset(dataset, [8, 7, 6, 5]), [3, 0])
    loader = DataLoader(subset, batch_sampler=[[1], [0, 1]], num_workers=2)
    assert len(loader) == 2
    found = list(loader)
    assert [labels.tolist() for _, labels in found] == [[dataset.targets[8]], [dataset.targets[5], dataset.targets[8]]]
    assert_close(found[1][0][0], dataset[5][0], "pixels")


def test_other_datasets_are_left_to_torch() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(6))
    assert [batch[0].tolist() for batch in DataLoader(data, batch_size=4, num_workers=1, drop_last=True)] == [[0, 1, 2, 3]]


def test_a_loader_without_batches_gives_single_items(dest: Path) -> None:
    dataset = ImageFolder(dest / "train", v2.CenterCrop(16), device="cpu")
    assert [image.shape for image, _ in DataLoader(dataset, batch_size=None)] == [(3, 16, 16)] * 12


def test_the_loader_has_torchs_arguments() -> None:
    ours, torchs = (inspect.signature(loader.__init__).parameters for loader in (DataLoader, torch.utils.data.DataLoader))
    assert list(ours) == list(torchs)
    assert [parameter.kind for parameter in ours.values()] == [parameter.kind for parameter in torchs.values()]


def test_a_dataset_can_be_sent_to_a_worker_process(dest: Path) -> None:
    transform = v2.Compose([v2.CenterCrop(16), v2.RandomErasing(0.0), v1.ToTensor()])
    dataset = pickle.loads(pickle.dumps(ImageFolder(dest / "train", transform, device="cpu")))  # noqa: S301 - what workers are sent
    assert_close(dataset[0][0], ImageFolder(dest / "train", transform, device="cpu")[0][0], "exact")


# --- what is refused ---


def test_the_whole_dataset_is_no_split(dest: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder of a split") as caught:
        ImageFolder(dest)
    assert len(ImageFolder(str(caught.value).split("pass ")[1].split(" or another")[0])) == 12
    with pytest.raises(ConfigError, match=r"expected a directory with dataset\.json"):
        ImageFolder(dest.parent / "nothing" / "train")
    with pytest.raises(ConfigError, match="expected a split 'test', got only train, val"):
        ImageFolder(dest / "test")


def test_pictures_without_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a class for every picture, got 4 of 15 without"):
        ImageFolder(write_named(tmp_path / "data") / "train")


def test_classes_without_boxes_are_refused(dest: Path) -> None:
    with pytest.raises(ConfigError, match="expected boxes, got a dataset with a class for each picture; use ImageFolder"):
        CocoDetection(dest / "train")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("torchvision", "torchvision_transforms"):
        monkeypatch.delitem(sys.modules, f"rinr_loader.integrations.{name}")
    with pytest.raises(ImportError, match=r"pip install 'rinr-loader\[torchvision\]'"):
        importlib.import_module("rinr_loader.integrations.torchvision")
