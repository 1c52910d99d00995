"""torchvision's detection from shards: targets in its dict form, boxes that follow its transforms, a Faster R-CNN that trains on them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCENE_NAMES, assert_close, draw_scene, needs
from tiny_shards import png, write_shards

needs("torchvision")

from torchvision import tv_tensors
from torchvision.transforms import v2

from rinr_loader import RinrDataset, Sample
from rinr_loader.crops import RandomResizedCrop
from rinr_loader.integrations.torchvision import CocoDetection, DataLoader

FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def samples() -> list[Sample]:
    """Six pictures of different sizes for train, one of them empty and one with a crowd, and two for val."""
    found = []
    for k in range(8):
        scene = draw_scene(k, width=96 - 4 * k, height=60 + 3 * k, objects=0 if k == 1 else 3)
        crowd = np.arange(len(scene.boxes)) == (0 if k == 2 else -1)
        found.append(Sample(f"{k}", "train" if k < 6 else "val", png(scene.image), scene.boxes, scene.classes, crowd=crowd))
    return found


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("shards") / "data"
    write_shards(dest, samples(), names=SCENE_NAMES, shard_samples=4)
    return dest


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stored to fit inside 48x48."""
    dest = tmp_path_factory.mktemp("smaller") / "data"
    write_shards(dest, samples(), names=SCENE_NAMES, size=(48, 48))
    return dest


def items(dest: Path, transforms: Any = None, *, seed: int = 0, **arguments: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    dataset = CocoDetection(dest / "train", transforms=transforms, device="cpu", **arguments)
    torch.manual_seed(seed)
    return dataset.__getitems__(range(len(dataset)))


def boxes_of(target: dict[str, Any], image: torch.Tensor) -> Any:
    return tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])


# --- targets ---


def test_targets_have_the_form_of_torchvisions_models(dest: Path) -> None:
    labels = RinrDataset(dest).labels
    for k, (image, target) in enumerate(items(dest)):
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        assert image.shape == (3, *labels[k]["size"])
        assert image.is_contiguous()
        kept = ~labels[k]["crowd"]
        assert_close(target["boxes"], labels[k]["boxes"][kept])
        assert target["boxes"].shape == (sum(kept), 4)
        assert target["labels"].dtype == target["iscrowd"].dtype == torch.int64
        assert target["labels"].tolist() == (labels[k]["classes"][kept] + 1).tolist()
        assert target["image_id"] == k
        assert target["iscrowd"].tolist() == [0] * sum(kept)
        extent = labels[k]["boxes"][kept][:, 2:] - labels[k]["boxes"][kept][:, :2]
        assert_close(target["area"], extent.prod(1))
    dataset = CocoDetection(dest / "train", device="cpu")
    assert dataset.classes == ["__background__", *SCENE_NAMES]
    assert [dataset.get_height_and_width(k) for k in range(6)] == [label["size"] for label in labels]


def test_crowds_are_kept_for_evaluation(dest: Path) -> None:
    flags = [target["iscrowd"].tolist() for _, target in items(dest, keep_crowd=True)]
    assert flags == [label["crowd"].astype(int).tolist() for label in RinrDataset(dest).labels]
    assert sum(map(sum, flags)) == 1


def test_boxes_are_in_pixels_of_pictures_stored_smaller(dest: Path, smaller: Path) -> None:
    labels = RinrDataset(smaller).labels
    for (image, target), (_, whole), label in zip(items(smaller), items(dest), labels, strict=True):
        assert image.shape == (3, *label["stored_size"])
        assert max(image.shape) == 48
        height, width = label["size"]
        scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
        assert_close(target["boxes"], whole["boxes"] * scale, "boxes")


# --- transforms ---


def test_flips_are_those_of_torchvision(dest: Path) -> None:
    for chance in (0.0, 0.5, 1.0):
        plain, found = items(dest), items(dest, v2.Compose([v2.RandomHorizontalFlip(chance), *FLOAT]))
        flipped = [not torch.allclose(a, b, atol=2e-3) for (a, _), (b, _) in zip(plain, found, strict=True)]
        assert {0.0: not any(flipped), 0.5: 0 < sum(flipped) < 6, 1.0: all(flipped)}[chance]
        for (image, target), (whole, before), flip in zip(found, plain, flipped, strict=True):
            expected = v2.functional.horizontal_flip(boxes_of(before, whole)) if flip else before["boxes"]
            torch.testing.assert_close(image, whole.flip(-1) if flip else whole, rtol=0, atol=2e-3)
            assert_close(target["boxes"], expected.as_subclass(torch.Tensor), "boxes")
            assert target["labels"].tolist() == before["labels"].tolist()


@pytest.mark.parametrize("resize", [v2.Resize(40), v2.Resize(40, max_size=50), v2.Resize((33, 47))])
def test_boxes_follow_a_resize(resize: Any, dest: Path) -> None:
    for (image, target), (whole, before) in zip(items(dest, v2.Compose([resize, *FLOAT])), items(dest), strict=True):
        expected_image, expected = resize(whole, boxes_of(before, whole))
        assert image.shape == expected_image.shape
        assert_close(target["boxes"], expected.as_subclass(torch.Tensor), "boxes")


def test_boxes_follow_a_crop_and_those_without_an_area_are_dropped(dest: Path) -> None:
    found = items(dest, v2.Compose([v2.RandomResizedCrop((30, 40), scale=(0.1, 0.4)), *FLOAT]), seed=5)
    plain = items(dest)
    torch.manual_seed(5)
    sizes = torch.tensor([image.shape[1:] for image, _ in plain])
    crops = RandomResizedCrop(scale=(0.1, 0.4)).crop(sizes, torch.rand(6, 22)).long().tolist()
    dropped = 0
    for (image, target), (whole, before), (x, y, width, height) in zip(found, plain, crops, strict=True):
        assert image.shape == (3, 30, 40)
        moved = v2.functional.resized_crop(boxes_of(before, whole), y, x, height, width, [30, 40])
        moved = v2.functional.clamp_bounding_boxes(moved).as_subclass(torch.Tensor)
        kept = ((moved[:, 2:] - moved[:, :2]) > 1e-3).all(1)
        dropped += int((~kept).sum())
        assert_close(target["boxes"], moved[kept], "boxes")
        assert target["labels"].tolist() == before["labels"][kept].tolist()
    assert dropped > 0


def test_other_transforms_see_image_and_boxes(dest: Path) -> None:
    zoom = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomZoomOut(fill=0, side_range=(2, 2), p=1.0), v2.SanitizeBoundingBoxes(), *FLOAT])
    for (image, target), (whole, before) in zip(items(dest, zoom), items(dest), strict=True):
        assert image.shape == (3, 2 * whole.shape[1], 2 * whole.shape[2])
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert_close(target["area"], before["area"], "boxes")
        shown = image.flatten(1).amax(0).view(image.shape[1:]).nonzero()
        inside = torch.cat([target["boxes"][:, [1, 0]], target["boxes"][:, [3, 2]]])
        assert (inside >= shown.amin(0) - 0.01).all()
        assert (inside <= shown.amax(0) + 1.01).all()


# --- training ---

SCRIPT = """
import torch
import torchvision
from torchvision.transforms import v2
from rinr_loader.integrations.torchvision import CocoDetection, DataLoader

def presets(train):
    flip = [v2.RandomHorizontalFlip(0.5)] if train else []
    return v2.Compose([*flip, v2.ToImage(), v2.ToDtype(torch.float, scale=True), v2.ToPureTensor()])

def collate_fn(batch):
    return tuple(zip(*batch))

torch.manual_seed(0)
dataset = CocoDetection(f"{data_path}/train", f"{data_path}/annotations.json", transforms=presets(train=True), device="cpu")
dataset_test = CocoDetection(f"{data_path}/val", f"{data_path}/annotations.json", transforms=presets(train=False), device="cpu")
train_sampler = torch.utils.data.RandomSampler(dataset)
train_batch_sampler = torch.utils.data.BatchSampler(train_sampler, 3, drop_last=True)
data_loader = DataLoader(dataset, batch_sampler=train_batch_sampler, num_workers=2, collate_fn=collate_fn)
data_loader_test = DataLoader(dataset_test, batch_size=1, num_workers=2, collate_fn=collate_fn)

device = torch.device("cpu")
model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None, weights_backbone=None, num_classes=len(dataset.classes), min_size=64, max_size=96
).to(device)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
before = {name: value.clone() for name, value in model.state_dict().items()}

model.train()
losses, ids = [], []
for images, targets in data_loader:
    images = list(image.to(device) for image in images)
    targets = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]
    loss_dict = model(images, targets)
    loss = sum(loss_dict.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append({name: value.item() for name, value in loss_dict.items()})
    ids += [target["image_id"] for target in targets]
moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]

model.eval()
results = {}
with torch.inference_mode():
    for images, targets in data_loader_test:
        outputs = model([image.to(device) for image in images])
        results |= {target["image_id"]: output for target, output in zip(targets, outputs)}
"""


def test_a_script_of_the_reference_form_trains_faster_rcnn(dest: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    ran = runpy.run_path(str(tmp_path / "train.py"), {"data_path": str(dest)})
    assert sorted(ran["ids"]) == list(range(6))
    for losses in ran["losses"]:
        assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        assert np.isfinite(list(losses.values())).all()
    assert any(name.startswith("rpn.") for name in ran["moved"])
    assert any(name.startswith("roi_heads.") for name in ran["moved"])
    assert set(ran["results"]) == {0, 1}
    assert all(output["boxes"].shape == (len(output["scores"]), 4) for output in ran["results"].values())


@pytest.mark.cuda
def test_targets_are_on_the_gpu_with_the_images(dest: Path) -> None:
    for image, target in DataLoader(CocoDetection(dest / "train", device="cuda"), batch_size=None):
        assert image.is_cuda
        assert all(target[name].is_cuda for name in ("boxes", "labels", "area", "iscrowd"))
