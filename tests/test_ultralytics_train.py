"""Training and validating with the Ultralytics adapter, as a user's script does. TRAINERS points 2, 3, 5, 6, 8, 9 and 10."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs, psnr
from detection_scenes import Scene, draw, write_images, write_model, write_shards, write_yaml

needs("ultralytics")

import ultralytics
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator

from rinr_loader import Job, Settings
from rinr_loader.convert import convert
from rinr_loader.converters import open_source
from rinr_loader.integrations.ultralytics import YOLO, ShardDetectionTrainer, ShardDetectionValidator
from rinr_loader.integrations.ultralytics_data import ShardDetectionDataset
from rinr_loader.integrations.ultralytics_loader import ShardLoader

pytestmark = pytest.mark.filterwarnings("default")  # Ultralytics and Matplotlib warn of their own affairs

SHORT = {"imgsz": 64, "batch": 8, "device": "cpu", "plots": False, "verbose": False, "optimizer": "AdamW", "lr0": 0.01, "nbs": 8}
EVENTS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_val_start",
    "on_val_end",
    "on_fit_epoch_end",
    "on_model_save",
    "on_train_end",
)


@dataclass
class Data:
    """The same pictures as shards and as PNGs."""

    root: Path
    shards: Path
    images: Path

    def yaml(self, train: Path, val: Path) -> str:
        return str(write_yaml(self.root / f"{train.parent.name}-{val.parent.name}.yaml", train=train, val=val))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("data")
    scenes: dict[str, list[Scene]] = {
        "train": [draw(f"{k:02d}", size=(48, 64)) for k in range(32)],
        "val": [draw(f"seq{k % 2}/frame.{k:02d}", size=(64, 48) if k % 2 else (48, 64)) for k in range(8)],
    }
    for split, some in scenes.items():
        some.sort(key=lambda scene: scene.key)
        write_images(root / "plain", split, some)
    return Data(root, write_shards(root / "shards", **scenes), write_yaml(root / "plain" / "data.yaml", train="images/train", val="images/val"))


@dataclass
class Run:
    """A finished training: what its model, callbacks and loaders saw."""

    model: Any
    events: list[str]
    batches: list[tuple[int, list[int]]]  # epoch and samples of each training batch
    mosaics: list[tuple[int, bool]]  # epoch, and whether any image of the batch was one
    metrics: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def train(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    return lambda **settings: _train(data, tmp_path, monkeypatch, **settings)


def _train(
    pictures: Data, folder: Path, monkeypatch: pytest.MonkeyPatch, *, model: Any = None, on: dict[str, Any] | None = None, **settings: Any
) -> Run:
    model = YOLO(model or write_model(folder / "tiny.yaml"))
    run = Run(model, [], [], [])
    for event in EVENTS:
        model.add_callback(event, lambda _, event=event: run.events.append(event))
    for event, function in (on or {}).items():
        model.add_callback(event, function)
    build = ShardDetectionDataset.build

    def spy(self: ShardDetectionDataset, plan: Any, fetched: Any) -> Any:
        if self.augmentation is not None:
            run.batches.append((plan.epoch, plan.samples.tolist()))
            run.mosaics.append((plan.epoch, len(fetched.placements) > len(plan.samples)))
        return build(self, plan, fetched)

    monkeypatch.setattr(ShardDetectionDataset, "build", spy)
    try:
        model.train(**{"data": str(pictures.shards), "project": str(folder), "name": "run", **SHORT, **settings})
    finally:
        monkeypatch.setattr(ShardDetectionDataset, "build", build)
    run.metrics = {key: float(value) for key, value in model.metrics.results_dict.items()}
    return run


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One training long enough to find the objects, with every plot."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield _train(data, tmp_path_factory.mktemp("trained"), monkeypatch, epochs=20, mosaic=0.3, close_mosaic=10, warmup_epochs=1, plots=True)


def val(model: Any, **settings: Any) -> dict[str, float]:
    metrics = model.val(**{"imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "verbose": False, **settings})
    return {key: float(value) for key, value in metrics.results_dict.items()}


# --- a training, and what it leaves ---


def test_a_yolo_learns_from_shards(trained: Run) -> None:
    assert trained.metrics["metrics/mAP50(B)"] > 0.3
    saved = Path(trained.model.trainer.save_dir)
    rows = (saved / "results.csv").read_text().splitlines()
    assert len(rows) == 21
    first, last = (dict(zip(rows[0].split(","), map(float, row.split(",")), strict=True)) for row in (rows[1], rows[-1]))
    assert last["val/cls_loss"] < first["val/cls_loss"]


def test_plots_are_drawn(trained: Run) -> None:
    saved = Path(trained.model.trainer.save_dir)
    expected = [
        "results.png",
        "labels.jpg",
        "train_batch0.jpg",
        "val_batch0_labels.jpg",
        "val_batch0_pred.jpg",
        "confusion_matrix.png",
        "BoxPR_curve.png",
    ]
    deadline = time.monotonic() + 20  # they are drawn in threads
    while time.monotonic() < deadline and not all((saved / name).is_file() for name in expected):
        time.sleep(0.1)
    assert [name for name in expected if not (saved / name).is_file()] == []


def test_callbacks_come_as_often_as_with_images(trained: Run) -> None:
    counts = {event: trained.events.count(event) for event in EVENTS}
    assert counts == {
        "on_train_start": 1,
        "on_train_epoch_start": 20,
        "on_train_batch_end": 80,
        "on_val_start": 21,  # and once more for best.pt
        "on_val_end": 21,
        "on_fit_epoch_end": 21,
        "on_model_save": 20,
        "on_train_end": 1,
    }


def test_mosaics_end_with_close_mosaic(trained: Run) -> None:
    assert any(mosaic for epoch, mosaic in trained.mosaics if epoch < 10)
    assert not any(mosaic for epoch, mosaic in trained.mosaics if epoch >= 10)


def test_every_epoch_takes_every_sample_in_an_order_of_its_own(trained: Run) -> None:
    orders = {}
    for epoch, samples in trained.batches:
        orders.setdefault(epoch, []).extend(samples)
    assert sorted(orders) == list(range(20))
    assert {tuple(sorted(order)) for order in orders.values()} == {tuple(range(32))}
    assert len(set(map(tuple, orders.values()))) == 20


# --- validation ---


@pytest.mark.parametrize("settings", [{}, {"rect": False}, {"batch": 3}, {"imgsz": 96}, {"single_cls": True}, {"classes": [1]}, {"augment": True}])
def test_metrics_on_shards_are_those_on_the_same_pixels_in_files(trained: Run, data: Data, tmp_path: Path, settings: dict[str, Any]) -> None:
    mine = val(trained.model, data=str(data.shards), project=str(tmp_path), **settings)
    expected = val(ultralytics.YOLO(trained.model.trainer.best), data=str(data.images), project=str(tmp_path), **settings)
    assert expected["metrics/mAP50(B)"] > 0.2
    if "imgsz" in settings:  # enlarged: networks are asked for values between pixels, OpenCV interpolates
        assert mine["metrics/mAP50(B)"] == pytest.approx(expected["metrics/mAP50(B)"], abs=0.1)
    else:
        assert mine == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["directory", "yaml", "own yaml", "checkpoint"])
def test_data_may_be_named_in_every_way(trained: Run, data: Data, tmp_path: Path, form: str) -> None:
    given = {
        "directory": {"data": str(data.shards)},
        "yaml": {"data": str(data.shards / "data.yaml")},
        "own yaml": {"data": data.yaml(data.shards / "train", data.shards / "val")},
        "checkpoint": {},
    }[form]
    model = YOLO(trained.model.trainer.best)
    assert val(model, batch=16, project=str(tmp_path), **given) == pytest.approx(trained.metrics, abs=1e-6)


def test_saved_predictions_are_named_as_with_files(trained: Run, data: Data, tmp_path: Path) -> None:
    written = {}
    for name, model, source in (("mine", trained.model, data.shards), ("theirs", ultralytics.YOLO(trained.model.trainer.best), data.images)):
        val(model, data=str(source), project=str(tmp_path), name=name, save_json=True, save_txt=True, save_conf=True)
        predictions = json.loads((tmp_path / name / "predictions.json").read_text())
        labels = {file.name: np.loadtxt(file, ndmin=2) for file in (tmp_path / name / "labels").iterdir()}
        written[name] = predictions, labels
    (mine, my_labels), (theirs, their_labels) = written["mine"], written["theirs"]
    assert [(p["image_id"], p["category_id"]) for p in mine] == [(p["image_id"], p["category_id"]) for p in theirs]
    assert {Path(p["file_name"]).stem for p in mine} <= {f"frame.{k:02d}" for k in range(8)}
    assert my_labels.keys() == their_labels.keys()
    for name, rows in my_labels.items():
        np.testing.assert_allclose(rows, their_labels[name], atol=1e-4)


def test_validation_in_training_and_after_it_agree(trained: Run, data: Data, tmp_path: Path) -> None:
    """The trainer's validation is rectangular too; another shape of batches would give another mAP."""
    again = val(trained.model, data=str(data.shards), batch=16, project=str(tmp_path))
    assert again == pytest.approx(trained.metrics, abs=1e-6)


# --- stopping, resuming, recovering: the epoch is the trainer's ---


def test_training_stops_early(trained: Run, train: Callable[..., Run]) -> None:
    run = train(model=trained.model.trainer.best, epochs=9, patience=2, lr0=0.0, warmup_epochs=0)
    assert {epoch for epoch, _ in run.batches} < set(range(6))


class CrashError(Exception):
    """Stands for a crash."""


def interrupt(trainer: Any) -> None:
    if trainer.epoch == 1:
        raise CrashError


def test_a_resumed_training_takes_the_batches_that_were_left(train: Callable[..., Run], tmp_path: Path) -> None:
    whole = train(epochs=4, name="whole", close_mosaic=1)
    with pytest.raises(CrashError):
        train(epochs=4, name="cut", close_mosaic=1, on={"on_model_save": interrupt})
    rest = train(model=str(tmp_path / "cut" / "weights" / "last.pt"), resume=True)
    assert isinstance(rest.model.trainer, ShardDetectionTrainer)
    assert rest.batches == [(epoch, samples) for epoch, samples in whole.batches if epoch >= 2]
    assert rest.mosaics == [(epoch, mosaic) for epoch, mosaic in whole.mosaics if epoch >= 2]


def test_an_epoch_repeated_after_nan_has_the_same_batches(train: Callable[..., Run]) -> None:
    spoiled: list[int] = []

    def spoil(trainer: Any) -> None:
        if trainer.epoch == 1 and not spoiled:
            spoiled.append(1)
            trainer.loss = torch.tensor(float("nan"))

    run = train(epochs=3, on={"on_train_epoch_end": spoil})
    assert [epoch for epoch, _ in run.batches] == [0] * 4 + [1] * 8 + [2] * 4
    assert run.batches[4:8] == run.batches[8:12]


class OutOfMemoryOnce(ShardDetectionTrainer):
    """Runs out of memory in the second batch."""

    seen = 0

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.seen += 1
        if self.seen == 2:
            raise RuntimeError("CUDA out of memory")
        return super().preprocess_batch(batch)


def test_an_epoch_is_retried_with_half_the_batch_when_memory_runs_out(train: Callable[..., Run]) -> None:
    loaders: list[Any] = []
    run = train(epochs=1, trainer=OutOfMemoryOnce, cache="ram", on={"on_train_batch_start": lambda t: loaders.append(t.train_loader)})
    assert [len(samples) for _, samples in run.batches] == [8, 8] + [4] * 8
    assert {epoch for epoch, _ in run.batches} == {0}
    assert loaders[0] is not loaders[-1]
    assert loaders[0].dataset.cached is None  # closed, and its memory given back


def test_training_goes_on_after_a_validation_in_inference_mode(train: Callable[..., Run]) -> None:
    run = train(epochs=2, cache="ram", workers=2)
    assert [epoch for epoch, _ in run.batches] == [0] * 4 + [1] * 4


# --- kinds of splits: point 10 ---


@pytest.mark.parametrize(("train_kind", "val_kind"), [("shards", "plain"), ("plain", "shards"), ("plain", "plain")])
def test_each_split_is_shards_or_images(data: Data, tmp_path: Path, train_kind: str, val_kind: str) -> None:
    folders = {"shards": data.shards, "plain": data.images.parent / "images"}
    model = YOLO(write_model(tmp_path / "tiny.yaml"))
    mixup = {"mixup": 0.5} if train_kind == "plain" else {}  # what is refused for shards is none of our business here
    model.train(data=data.yaml(folders[train_kind] / "train", folders[val_kind] / "val"), project=str(tmp_path), epochs=1, **SHORT, **mixup)
    kinds = {"shards": ShardLoader, "plain": InfiniteDataLoader}
    assert type(model.trainer.train_loader) is kinds[train_kind]
    assert type(model.trainer.test_loader) is kinds[val_kind]


def test_other_splits_can_be_validated(trained: Run, data: Data, tmp_path: Path) -> None:
    assert val(trained.model, data=str(data.shards), split="train", project=str(tmp_path))["metrics/mAP50(B)"] > 0.2


# --- settings that the loader or the trainer's own code must honour ---


def test_images_of_several_scales_are_made_by_the_trainer(train: Callable[..., Run]) -> None:
    sizes: set[int] = set()

    class Sizes(ShardDetectionTrainer):
        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch = super().preprocess_batch(batch)
            sizes.add(batch["img"].shape[-1])
            assert batch["img"].max() <= 1
            return batch

    train(epochs=3, multi_scale=0.5, trainer=Sizes)
    assert len(sizes) > 1
    assert sizes <= {32, 64, 96}


def test_class_weights_come_from_the_labels_of_the_shards(data: Data, tmp_path: Path) -> None:
    weights = []
    for model, source in ((YOLO, data.shards), (ultralytics.YOLO, data.images)):
        made = model(write_model(tmp_path / "tiny.yaml"))
        seen: list[Any] = []
        made.add_callback("on_train_start", lambda trainer, seen=seen: seen.append(trainer.model.class_weights))
        made.train(data=str(source), project=str(tmp_path), epochs=1, cls_pw=0.5, **SHORT)
        weights.append(seen[0])
    torch.testing.assert_close(*weights)


def test_max_det_follows_the_labels(data: Data, tmp_path: Path) -> None:
    crowded = write_shards(tmp_path / "crowded", train=[draw("many", objects=320), *(draw(f"{k}") for k in range(3))], val=[draw("v")])
    model = YOLO(write_model(tmp_path / "tiny.yaml"))
    model.train(data=str(crowded), project=str(tmp_path), epochs=1, **{**SHORT, "batch": 4})
    assert model.trainer.args.max_det == 320


def test_a_list_of_datasets_is_trained_in_turn(data: Data, tmp_path: Path) -> None:
    model = YOLO(write_model(tmp_path / "tiny.yaml"))
    results = model.train(data=[str(data.shards), str(data.images)], project=str(tmp_path), epochs=1, **SHORT)
    assert len(results) == 2
    assert all(results.values())


# --- several GPUs: point 8 ---


def test_the_trainer_can_be_imported_by_name_in_a_relaunched_process() -> None:
    """Ultralytics pickles the class for its processes on other GPUs, by reference."""
    chosen = YOLO("yolov8n.yaml").task_map["detect"]
    assert chosen["trainer"] is ShardDetectionTrainer
    assert chosen["validator"] is ShardDetectionValidator
    assert issubclass(ShardDetectionTrainer, DetectionTrainer)
    assert issubclass(ShardDetectionValidator, DetectionValidator)
    assert b"rinr_loader.integrations.ultralytics" in pickle.dumps(ShardDetectionTrainer)
    assert pickle.loads(pickle.dumps(ShardDetectionTrainer)) is ShardDetectionTrainer  # noqa: S301 - what Ultralytics does


def test_a_rank_takes_its_share_by_its_global_rank(trained: Run, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained.model.trainer
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    taken: dict[str, list[int]] = {"train": [], "val": []}
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        for mode, samples in taken.items():
            loader = trainer.get_dataloader(str(data.shards / mode), batch_size=2, rank=rank % 2, mode=mode)  # two machines of two GPUs
            samples += list(loader.sampler)
    assert sorted(taken["train"]) == list(range(32))
    assert taken["val"] == list(range(8))
    whole = trainer.get_dataloader(str(data.shards / "train"), batch_size=2, rank=-1, mode="train")
    assert len(whole.sampler) == 32


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("cache", [False, "ram"])
def test_a_gpu_trains_and_validates_like_a_cpu(trained: Run, data: Data, tmp_path: Path, train: Callable[..., Run], cache: bool | str) -> None:
    devices: set[str] = set()
    decode = ShardDetectionDataset.build

    class Devices(ShardDetectionTrainer):
        def get_dataloader(self, *args: Any, **keywords: Any) -> Any:
            loader = super().get_dataloader(*args, **keywords)
            loader.dataset.build = lambda plan, fetched: note(decode(loader.dataset, plan, fetched))
            return loader

    def note(batch: dict[str, Any]) -> dict[str, Any]:
        devices.add(batch["img"].device.type)
        return batch

    train(epochs=2, device=0, amp=False, workers=2, cache=cache, trainer=Devices)  # the check of amp=True downloads a model
    assert devices == {"cuda"}
    on_gpu = val(YOLO(trained.model.trainer.best), data=str(data.shards), device=0, batch=16, project=str(tmp_path))
    assert on_gpu == pytest.approx(trained.metrics, abs=0.02)


# --- from a folder of images to a trained model ---


@pytest.mark.slow
def test_a_converted_dataset_trains_with_the_labels_of_its_source(write_yolo: Callable[..., Path], tmp_path: Path, train: Callable[..., Run]) -> None:
    source = write_yolo(tmp_path / "source", train=5, val=3)
    report = convert(open_source(source), tmp_path / "shards", Job(Settings(preset="fast", family="siren")))
    run = train(data=str(report.dest), epochs=1, batch=4)
    plain = ultralytics.YOLO(write_model(tmp_path / "tiny.yaml"))
    plain.train(data=str(source), epochs=1, project=str(tmp_path), **{**SHORT, "batch": 4})
    for name in ("train_loader", "test_loader"):
        mine, theirs = (getattr(model.trainer, name).dataset for model in (run.model, plain))
        assert [Path(file).stem for file in mine.im_files] == [Path(file).stem for file in theirs.im_files]
        for a, b in zip(mine.labels, theirs.labels, strict=True):
            np.testing.assert_array_equal(a["cls"], b["cls"])
            np.testing.assert_allclose(a["bboxes"], b["bboxes"], atol=1e-5)
    mine_val, their_val = (next(iter(model.trainer.test_loader)) for model in (run.model, plain))
    assert psnr(mine_val["img"], their_val["img"]) > 20
