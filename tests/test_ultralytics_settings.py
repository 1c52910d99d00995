"""What the Ultralytics adapter refuses, and that it knows every key of default.yaml. TRAINERS points 6 and 7."""

from __future__ import annotations

import inspect
import json
import re
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from detection_scenes import draw, write_images, write_model, write_shards, write_yaml

needs("ultralytics")

import ultralytics
from ultralytics.data.augment import v8_transforms
from ultralytics.data.base import BaseDataset
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, DEFAULT_CFG_PATH, YAML

from rinr_loader.errors import ConfigError
from rinr_loader.integrations.ultralytics import HONOURED, REFUSED, UNRELATED, YOLO, check_settings, holds_shards

pytestmark = pytest.mark.filterwarnings("default")

# A value of every key that this adapter answers for, other than its default.
REFUSED_VALUES: dict[str, Any] = {
    "mixup": 0.1,
    "cutmix": 0.1,
    "copy_paste": 0.1,
    "augmentations": [{"__class_fullname__": "Blur"}],
    "cache": "disk",
    "batch": -1,
    "perspective": 0.01,
}
# Where each key that is honoured has its test: in test_ultralytics_data.py (d), test_ultralytics_train.py (t) or here (h).
HONOURED_TESTS = {
    **dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective"), "d"),
    **dict.fromkeys(("flipud", "fliplr", "bgr", "imgsz", "batch", "seed", "fraction", "classes", "single_cls", "rect", "cache"), "d"),
    **dict.fromkeys(("data", "split", "close_mosaic", "multi_scale", "cls_pw", "workers", "device", "deterministic"), "t"),
    "compile": "h",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), train=[draw(f"{k}") for k in range(4)], val=[draw(f"{k}") for k in range(2)])


def settings(**changes: Any) -> Any:
    args = copy(DEFAULT_CFG)
    for key, value in changes.items():
        setattr(args, key, value)
    return args


def tiny(tmp_path: Path) -> YOLO:
    return YOLO(write_model(tmp_path / "tiny.yaml"))


# --- point 7: no setting is ignored in silence ---


def test_every_key_of_default_yaml_has_one_answer() -> None:
    keys = set(YAML.load(DEFAULT_CFG_PATH))
    answered = [*HONOURED, *REFUSED, *UNRELATED]
    assert keys - set(answered) == set(), "new keys: decide whether the adapter honours, refuses or does not meet them"
    assert set(answered) - keys == {"augmentations"}, "keys that are gone; Albumentations is an argument without a key"
    assert len(answered) == len(set(answered))


def test_every_key_that_is_honoured_or_refused_has_a_test() -> None:
    assert HONOURED_TESTS.keys() == HONOURED
    assert REFUSED_VALUES.keys() >= REFUSED.keys()


def test_the_keys_that_ultralytics_datasets_and_transforms_read_are_honoured_or_refused() -> None:
    """The tables say that the rest does not concern data; Ultralytics' own source is the witness."""
    source = "".join(map(inspect.getsource, (v8_transforms, build_yolo_dataset, BaseDataset, YOLODataset)))
    read = set(re.findall(r"\b(?:hyp|cfg)\.(\w+)", source)) & DEFAULT_CFG_DICT.keys()
    assert {"mosaic", "fraction", "single_cls", "hsv_h", "rect"} <= read
    # The task decides what is loaded at all; masks and the mode of copy_paste mean nothing without polygons.
    assert read - HONOURED - REFUSED.keys() == {"task", "mask_ratio", "overlap_mask", "copy_paste_mode"}


@pytest.mark.parametrize("key", REFUSED_VALUES)
def test_a_setting_that_cannot_be_honoured_is_refused_before_training(shards: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: expected .*, got .*; "):
        check_settings(settings(**{key: REFUSED_VALUES[key]}), training=True)
    if key == "augmentations":
        return  # Ultralytics opens it itself, with a package that is not there
    model = tiny(tmp_path)
    with pytest.raises(ConfigError, match=f"^{key}: "):
        model.train(data=str(shards), project=str(tmp_path), device="cpu", imgsz=64, **{key: REFUSED_VALUES[key]})


@pytest.mark.parametrize(("key", "advised"), [("mixup", 0), ("cutmix", 0), ("copy_paste", 0), ("cache", False), ("cache", "ram"), ("batch", 16)])
def test_the_advice_of_a_refusal_is_accepted(key: str, advised: Any) -> None:
    check_settings(settings(**{key: advised}), training=True)


def test_the_largest_perspective_named_by_the_refusal_is_accepted() -> None:
    check_settings(settings(imgsz=64, perspective=0.0078), training=True)
    with pytest.raises(ConfigError, match=r"less than 0\.007812 at imgsz=64"):
        check_settings(settings(imgsz=64, perspective=0.0079), training=True)


def test_a_setting_newer_than_the_adapter_is_refused_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULT_CFG_DICT, "grid_mask", 0.0)
    check_settings(settings(grid_mask=0.0), training=True)
    with pytest.raises(ConfigError, match=r"grid_mask: .* newer than this adapter"):
        check_settings(settings(grid_mask=0.3), training=True)


def test_compile_drops_the_incomplete_batch_as_ultralytics_does(shards: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path)
    model.train(data=str(shards), project=str(tmp_path), epochs=1, batch=3, imgsz=64, device="cpu", plots=False)
    trainer = model.trainer
    for compiled, batches in ((False, 2), (True, 1)):
        trainer.args.compile = compiled
        assert len(trainer.get_dataloader(str(shards / "train"), batch_size=3, rank=-1, mode="train")) == batches
        assert not trainer.get_dataloader(str(shards / "val"), batch_size=3, rank=-1, mode="val").drop_last


# --- the contract: what of Ultralytics this adapter stands on ---


@pytest.mark.parametrize(
    ("where", "uses"),
    [
        (BaseTrainer._do_train, ("enumerate(self.train_loader)", "self.train_loader.sampler.set_epoch", "self.train_loader.reset()", ".num_workers")),
        (
            BaseTrainer._do_train,
            ("self.train_loader.close()", "self.epoch = epoch", "loader.close()", "self.validator.dataloader = self.test_loader"),
        ),
        (
            BaseTrainer._build_train_pipeline,
            ("self.get_dataloader(", "len(self.train_loader.sampler)", ".drop_last", ".batch_size", "rank=LOCAL_RANK"),
        ),
        (BaseTrainer._close_dataloader_mosaic, ("dataset.mosaic = False", "dataset.close_mosaic(hyp=")),
        (BaseTrainer.__init__, ("self.data = self.get_dataset()",)),
        (BaseTrainer.get_dataset, ("check_det_dataset(self.args.data, split=self.args.split)", 'self.args.data = data["yaml_file"]')),
        (DetectionTrainer.preprocess_batch, ("/ 255", "self.args.multi_scale")),
        (DetectionTrainer.plot_training_labels, ('lb["bboxes"]', 'lb["cls"]', "self.train_loader.dataset.labels")),
        (DetectionTrainer.auto_batch, ("self.build_dataset(",)),
        (BaseValidator.__call__, ("check_det_dataset(self.args.data, split=self.args.split)", "self.dataloader or self.get_dataloader(")),
        (DetectionValidator.init_metrics, ("list(self.dataloader.sampler)", "self.dataloader.dataset.im_files")),
        (DetectionValidator._prepare_batch, ('batch["ori_shape"][si]', 'batch["ratio_pad"][si]', 'batch["im_file"][si]')),
        (DetectionValidator.get_dataloader, ("dataset.update_labels(",)),
    ],
)
def test_ultralytics_uses_what_this_adapter_gives(where: Any, uses: tuple[str, ...]) -> None:
    source = inspect.getsource(where)
    assert [use for use in uses if use not in source] == []


# --- data that is not what it should be: point 6 ---


def test_shards_are_told_from_other_datasets(shards: Path, tmp_path: Path) -> None:
    plain = write_yaml(tmp_path / "data.yaml", train="images/train", val="images/val")
    mixed = write_yaml(tmp_path / "mixed.yaml", train="images/train", val=shards / "val")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text(json.dumps({"splits": {"train": 1}}))
    assert [holds_shards(data) for data in (shards, str(shards), shards / "data.yaml", mixed)] == [True] * 4
    assert [holds_shards(data) for data in (plain, tmp_path, tmp_path / "other", "coco8.yaml", None, 3, tmp_path / "no.yaml")] == [False] * 7


def both(shards: Any, tmp_path: Path, *, match: str, **settings: Any) -> None:
    """Training and validating must both fail with this message."""
    keywords = {"data": str(shards), "project": str(tmp_path), "device": "cpu", "imgsz": 64, **settings}
    with pytest.raises(ConfigError, match=match):
        tiny(tmp_path).train(epochs=1, **keywords)
    with pytest.raises(ConfigError, match=match):
        tiny(tmp_path).val(**keywords)


def test_a_url_is_refused(tmp_path: Path) -> None:
    both("s3://bucket/shards", tmp_path, match=r"expected a local directory, got a URL; copy")


def test_the_folder_of_one_split_is_refused_with_what_to_write(shards: Path, tmp_path: Path) -> None:
    both(shards / "train", tmp_path, match=rf"use data={shards}$")


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    only = write_shards(tmp_path / "only", train=[draw("a")])
    for data in (only, only / "data.yaml"):
        both(data, tmp_path, match=r"expected a split 'val', got train; convert again with `--val-fraction")
    two = write_shards(tmp_path / "two", train=[draw("a")], val=[draw("b")])
    both(two, tmp_path, split="test", match=r"expected a split 'test', got train, val")


def test_classes_in_another_order_are_refused(shards: Path, tmp_path: Path) -> None:
    wrong = write_yaml(tmp_path / "wrong.yaml", train=shards / "train", val=shards / "val")
    wrong.write_text(wrong.read_text().replace("red", "x").replace("green", "red"))
    both(wrong, tmp_path, match=r"expected the classes \['red', 'green'\], got \['x', 'red'\]; use the `names:` of")


def test_a_whole_dataset_in_the_place_of_a_split_is_refused(shards: Path, tmp_path: Path) -> None:
    both(write_yaml(tmp_path / "whole.yaml", train=shards, val=shards), tmp_path, match=r"expected the folder of a split, got a whole dataset")


def test_several_folders_of_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "several.yaml"
    path.write_text(f"train: {shards / 'train'}\nval: [{shards / 'val'}, {shards / 'train'}]\nnames: [red, green]\n")
    both(path, tmp_path, match=r"expected one folder of shards, got a list")


@pytest.mark.parametrize(("change", "match"), [({"task": "classify"}, "got task=classify"), ({"task": "none"}, "got task=none")])
def test_shards_without_boxes_are_refused(tmp_path: Path, change: dict[str, str], match: str) -> None:
    root = write_shards(tmp_path / "shards", train=[draw("a")], val=[draw("b")])
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(about | change))
    both(root, tmp_path, match=match)


@pytest.mark.parametrize(("codec", "warned"), [({"val_residuals": True}, True), ({"val_residuals": False}, False), ({}, False)])
def test_a_split_whose_pixels_know_its_labels_is_warned_of(
    tmp_path: Path, codec: dict[str, bool], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_shards(tmp_path / "shards", codec=codec, train=[draw("a")], val=[draw("b")])
    tiny(tmp_path).val(data=str(root), project=str(tmp_path), device="cpu", imgsz=64, plots=False)
    assert ("metrics flatter; convert again without `--val-residuals`" in caplog.text) == warned


def test_a_dataset_without_class_names_takes_those_of_the_yaml(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", train=[draw("a")], val=[draw("b")])
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(about | {"names": []}))
    tiny(tmp_path).val(data=str(root), project=str(tmp_path), device="cpu", imgsz=64, plots=False)


def test_other_channels_are_refused(shards: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "gray.yaml", train=shards / "train", val=shards / "val")
    path.write_text(path.read_text() + "channels: 1\n")
    both(path, tmp_path, match=r"expected channels=3, got 1")


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_other_tasks_are_refused_on_shards_and_left_alone_elsewhere(shards: Path, tmp_path: Path, task: str) -> None:
    suffix = {"segment": "seg", "classify": "cls"}.get(task, task)
    model = YOLO(f"yolov8n-{suffix}.yaml")
    for call in (model.train, model.val):
        with pytest.raises(ConfigError, match=f"expected task=detect for shards, got task={task}"):
            call(data=str(shards), project=str(tmp_path))
    assert model.task_map[task] == ultralytics.YOLO(f"yolov8n-{suffix}.yaml").task_map[task]


def test_what_works_on_images_only_says_so(shards: Path, tmp_path: Path) -> None:
    model = tiny(tmp_path)
    for call in (model.tune, model.export, model.benchmark):
        with pytest.raises(ConfigError, match=r"expected a dataset of plain images in \w+\(\), got shards; write one with `rinr export`"):
            call(data=str(shards))


def test_a_model_with_fewer_classes_is_validated_on_those_it_knows(shards: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path, "val", [draw(f"{k}") for k in range(2)])
    plain = write_yaml(tmp_path / "plain.yaml", train=folder, val=folder)
    path = tmp_path / "one.yaml"
    path.write_text(write_model(tmp_path / "tiny.yaml").read_text().replace("nc: 2", "nc: 1"))
    counts = []
    for model, data in ((YOLO, shards), (ultralytics.YOLO, plain)):
        metrics = model(path).val(data=str(data), project=str(tmp_path), imgsz=64, device="cpu", plots=False)
        counts.append(metrics.nt_per_class.tolist())
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0
