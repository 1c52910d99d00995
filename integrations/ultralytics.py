"""Ultralytics YOLO detection from shards: `from rinr_loader.integrations.ultralytics import YOLO` is the only line that changes.

`data=` takes the directory that `rinr convert` wrote, its data.yaml, or any Ultralytics data.yaml. Each split is shards or plain images:
a split of plain images, and every task and dataset without shards, is left to Ultralytics itself. Written against the behaviour of
Ultralytics 8.4; no code of it is copied here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch.distributed
from ultralytics import YOLO as _YOLO
from ultralytics.data.utils import get_split_fraction
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.torch_utils import unwrap_model

from rinr_loader import RinrDataset
from rinr_loader.errors import ConfigError
from rinr_loader.integrations.ultralytics_data import Augmentation, ShardDetectionDataset
from rinr_loader.integrations.ultralytics_loader import ShardLoader, Share

__all__ = ["YOLO", "ShardDetectionTrainer", "ShardDetectionValidator"]

SPLITS = ("train", "val", "test")


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What becomes of each key of Ultralytics' default.yaml where a split is shards. A test walks that file, so that a key of a new version
# cannot be ignored in silence.
HONOURED = _keys(
    "data imgsz batch workers device seed deterministic compile split fraction classes single_cls rect cache multi_scale cls_pw close_mosaic "
    "mosaic hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr"
)
REFUSED: Mapping[str, str] = {  # when active
    "mixup": "set mixup=0",
    "cutmix": "set cutmix=0",
    "copy_paste": "set copy_paste=0, it needs polygons",
    "augmentations": "leave it out, Albumentations needs one CPU array an image",
}
UNRELATED = _keys(  # to how images and labels of a detection dataset are loaded: Ultralytics' own affair
    "task mode model epochs time patience save save_period project name exist_ok pretrained cls_remap optimizer verbose cos_lr resume amp "
    "profile freeze channels_last overlap_mask mask_ratio dropout val save_json conf iou max_det quantize dnn plots nms source vid_stride "
    "stream_buffer visualize augment agnostic_nms retina_masks embed show save_frames save_txt save_conf save_crop show_labels show_conf "
    "show_boxes line_width format optimize dynamic simplify opset workspace lr0 lrf momentum weight_decay warmup_epochs warmup_momentum "
    "warmup_bias_lr distill_model dis box cls dfl pose kobj rle angle dlog dgrad dlam nbs copy_paste_mode auto_augment erasing cfg tracker"
)


class ShardDetectionTrainer(DetectionTrainer):
    """Ultralytics' detection trainer, with shards where a split is shards. Importable by name, for its relaunch on several GPUs."""

    def get_dataset(self) -> dict[str, Any]:
        """Check the data and the settings before a model is built.

        Raises:
            ConfigError: The data lacks a split, is not for detection or has other classes, or a setting does not work on shards.
        """
        check_data(self.args.data, splits=("train", self.args.split))
        data: dict[str, Any] = super().get_dataset()
        names = YAML.load(self.args.data).get("names") if self.args.single_cls else data["names"]  # there they are one name for all
        train, val = (check_split(data[split], data, names=names) for split in ("train", self.args.split))
        if train or val:
            check_settings(self.args, training=train)
        return data

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """Build the dataset of one split; see the base class."""
        if not find_shards(img_path):
            return super().build_dataset(img_path, mode, batch)
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        return build_shard_dataset(self.args, img_path, train=mode == "train", rect=mode == "val", batch=batch, stride=stride, device=self.device)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Build the loader of one split; see the base class. `rank` is the local one: only -1, no other processes, is taken from it."""
        if not find_shards(dataset_path):
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        train = mode == "train"
        share = Share(contiguous=not train)
        if rank != -1 and torch.distributed.is_initialized():
            share = Share(torch.distributed.get_rank(), torch.distributed.get_world_size(), contiguous=not train)
        return ShardLoader(
            self.build_dataset(dataset_path, mode, batch_size),
            batch_size=batch_size,
            share=share,
            epoch=lambda: getattr(self, "epoch", 0),
            drop_last=train and bool(self.args.compile),
            read_ahead=self.args.workers > 0,
        )

    def get_validator(self) -> Any:
        """Return the validator that knows shards."""
        return ShardDetectionValidator(self.test_loader, save_dir=self.save_dir, args=copy(self.args), _callbacks=self.callbacks)


class ShardDetectionValidator(DetectionValidator):
    """Ultralytics' detection validator, with shards where the split is shards."""

    def __call__(self, trainer: Any = None, model: Any = None, **kwargs: Any) -> Any:
        """Validate; see the base class.

        Raises:
            ConfigError: The data lacks the split, is not for detection or has other classes, or a setting does not work on shards.
        """
        if trainer is None:
            check_data(self.args.data, splits=(self.args.split,))
        return super().__call__(trainer, model, **kwargs)

    def build_dataset(self, img_path: str, mode: str = "val", batch: int | None = None) -> Any:
        """Build the dataset of the split; see the base class."""
        if not check_split(img_path, self.data, names=self.data["names"]):
            return super().build_dataset(img_path, mode, batch)
        check_settings(self.args, training=False)
        return build_shard_dataset(self.args, img_path, train=False, rect=False, batch=batch, stride=int(self.stride), device=self.device)

    def get_dataloader(self, dataset_path: str, batch_size: int) -> Any:
        """Build the loader of the split; see the base class."""
        if not find_shards(dataset_path):
            return super().get_dataloader(dataset_path, batch_size)
        dataset = self.build_dataset(dataset_path, batch=batch_size)
        if self.names and len(self.names) < self.data["nc"]:
            LOGGER.warning(f"Leaving out labels of classes that the model (nc={len(self.names)}) cannot predict.")
            dataset.update_labels(list(range(len(self.names))))
        return ShardLoader(dataset, batch_size=batch_size, read_ahead=self.args.workers > 0)


class YOLO(_YOLO):
    """Ultralytics' YOLO, whose detection trainer and validator also take shards.

    Example:
        >>> model = YOLO("yolo11n.yaml")  # doctest: +SKIP
        >>> model.train(data="shards", epochs=100)  # doctest: +SKIP
    """

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Classes for each task: those of Ultralytics, but for detection."""
        detect = {"trainer": ShardDetectionTrainer, "validator": ShardDetectionValidator}
        classes: dict[str, dict[str, Any]] = super().task_map
        return {**classes, "detect": {**classes["detect"], **detect}}

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """Train the model; arguments as in Ultralytics.

        Raises:
            ConfigError: The data is shards, and the task is not detection or a setting does not work on shards.
        """
        data = kwargs.get("data")
        if isinstance(data, (list, tuple)) and any(map(holds_shards, data)):
            trainer = trainer or self._smart_load("trainer")  # without one, each training is a `yolo` process that knows no shards
        self._detection_only(data, kwargs)
        return super().train(trainer, **kwargs)

    def val(self, validator: Any = None, **kwargs: Any) -> Any:
        """Validate the model; arguments as in Ultralytics.

        Raises:
            ConfigError: The data is shards, and the task is not detection or a setting does not work on shards.
        """
        self._detection_only(kwargs.get("data") or self.overrides.get("data"), kwargs)
        return super().val(validator, **kwargs)

    def tune(self, use_ray: bool = False, iterations: int = 300, *args: Any, **kwargs: Any) -> Any:
        """Tune hyperparameters; arguments as in Ultralytics.

        Raises:
            ConfigError: The data is shards: tuning trains in processes that know none.
        """
        _images_only(kwargs.get("data") or self.overrides.get("data"), "tune()")
        return super().tune(use_ray, iterations, *args, **kwargs)

    def export(self, **kwargs: Any) -> Any:
        """Export the model; arguments as in Ultralytics.

        Raises:
            ConfigError: The calibration data is shards.
        """
        _images_only(kwargs.get("data"), "export()")
        return super().export(**kwargs)

    def benchmark(self, data: str | None = None, format: str = "", verbose: bool | float = False, **kwargs: Any) -> Any:  # noqa: A002 - Ultralytics' name
        """Benchmark exported models; arguments as in Ultralytics.

        Raises:
            ConfigError: The data is shards.
        """
        _images_only(data, "benchmark()")
        return super().benchmark(data, format, verbose, **kwargs)

    def _detection_only(self, data: Any, settings: dict[str, Any]) -> None:
        task = settings.get("task") or self.task
        for each in data if isinstance(data, (list, tuple)) else [data]:
            if task != "detect" and holds_shards(each):
                raise ConfigError(f"{each}: expected task=detect for shards, got task={task}; use a detection model, or a dataset of plain images")


def build_shard_dataset(args: Any, folder: str, *, train: bool, rect: bool, batch: int | None, stride: int, device: Any) -> ShardDetectionDataset:
    """Build the dataset of one split of shards from the settings of a trainer or validator.

    Args:
        args: The settings.
        folder: The split's folder.
        train: Whether to shuffle and augment.
        rect: Whether batches are rectangular whatever the settings say.
        batch: Samples of a rectangular batch.
        stride: Of the model.
        device: Where images are decoded.
    """
    shards = find_shards(folder)
    if shards is None:
        raise ConfigError(f"{folder}: expected a split of shards, got something else; point to DEST/train of a converted dataset")
    root, split = shards
    imgsz = args.imgsz if isinstance(args.imgsz, int) else tuple(args.imgsz)
    return ShardDetectionDataset(
        RinrDataset(root, split, device=device, antialias=False),
        imgsz=imgsz,
        augmentation=Augmentation.from_args(args, long_side=args.imgsz) if train else None,
        rect=args.rect or rect,
        batch_size=batch or args.batch,
        stride=stride,
        pad=0.0 if train else 0.5,
        fraction=get_split_fraction(args.fraction, "train" if train else args.split or "val"),
        classes=[args.classes] if isinstance(args.classes, int) else args.classes,
        single_cls=bool(args.single_cls),
        cache=bool(args.cache),
        shuffle=train,
        seed=args.seed,
        device=device,
    )


def _images_only(data: Any, caller: str) -> None:
    if holds_shards(data):
        raise ConfigError(f"{data}: expected a dataset of plain images in {caller}, got shards; write one with `rinr export` and pass its data.yaml")


def find_shards(folder: Any) -> tuple[Path, str] | None:
    """Root and name of a split of shards; None where the folder is anything else."""
    if not isinstance(folder, (str, Path)):
        return None
    path = Path(folder)
    return (path.parent, path.name) if path.is_dir() and path.name in _metadata(path.parent).get("splits", {}) else None


def holds_shards(data: Any) -> bool:
    """Whether a dataset directory or data.yaml has a split that is shards."""
    if not isinstance(data, (str, Path)):
        return False
    path = Path(data)
    if path.is_dir():
        return bool(_metadata(path))
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        return False
    entries = YAML.load(path)
    root = Path(entries.get("path") or path.parent)
    return any(isinstance(entries.get(split), str) and find_shards(root / entries[split]) for split in SPLITS)


def _metadata(root: Path) -> dict[str, Any]:
    """What dataset.json says; empty where there is none, or it is some other program's."""
    try:
        metadata = json.loads((root / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) and metadata.get("format") == "rinr" else {}


def check_data(data: Any, *, splits: Iterable[str]) -> None:
    """Check what only a directory of shards can get wrong, before Ultralytics looks for images.

    Raises:
        ConfigError: `data` is a URL of an object store, one split's folder, or a dataset that lacks one of `splits`.
    """
    text = str(data)
    if text.startswith(("s3://", "gs://", "az://", "abfs://", "r2://")):
        raise ConfigError(f"{text}: expected a local directory, got a URL; copy the dataset to a local disk first")
    if find_shards(text):
        raise ConfigError(f"{text}: expected a dataset, got one split of it; use data={Path(text).parent}")
    path = Path(text)
    if path.name == "data.yaml" and _metadata(path.parent):
        present = {split for split in SPLITS if YAML.load(path).get(split)}
    else:
        present = set(_metadata(path).get("splits", SPLITS))
    for split in splits:
        if split not in present:
            raise ConfigError(
                f"{text}: expected a split {split!r}, got {', '.join(sorted(present))}; convert again with `--val-fraction 0.1`, or pass a "
                f"data.yaml whose `{split}:` is a folder of images"
            )


def check_split(folder: Any, data: Mapping[str, Any], *, names: Any) -> bool:
    """Tell whether a split is shards, and check that they fit what the data.yaml says.

    Args:
        folder: The split's folder, or several.
        data: What Ultralytics made of the data.yaml.
        names: Class names of the data.yaml.

    Raises:
        ConfigError: The split mixes shards and images, or is not for detection, or its class names are not those of the data.yaml.
    """
    if isinstance(folder, list):
        if any(map(find_shards, folder)):
            raise ConfigError(f"{folder}: expected one folder of shards, got a list; convert all of it into one dataset")
        return False
    if _metadata(Path(folder)):
        raise ConfigError(f"{folder}: expected the folder of a split, got a whole dataset; point to {Path(folder, 'train')} or another split")
    shards = find_shards(folder)
    if shards is None:
        return False
    metadata = _metadata(shards[0])
    if metadata.get("task") != "detect":
        raise ConfigError(f"{folder}: expected shards with boxes, got task={metadata.get('task')}; convert a detection dataset")
    if data.get("channels", 3) != 3:
        raise ConfigError(f"{folder}: expected channels=3, got {data['channels']}; shards decode to RGB")
    given = list(names.values()) if isinstance(names, Mapping) else list(names or [])
    if metadata["names"] and given != metadata["names"]:
        raise ConfigError(f"{folder}: expected the classes {metadata['names']}, got {given}; use the `names:` of {shards[0] / 'data.yaml'}")
    if shards[1] != "train" and metadata["codec"].get("val_residuals"):
        LOGGER.warning(f"{folder}: encoded with more detail where its labels are, so metrics flatter; convert again without `--val-residuals`")
    return True


def check_settings(args: Any, *, training: bool) -> None:
    """Check that no setting is ignored in silence.

    Args:
        args: Settings of a trainer or validator that has a split of shards.
        training: Whether the training split is one of them.

    Raises:
        ConfigError: A setting does not work on shards, or is not known to this adapter.
    """
    if isinstance(args.cache, str) and args.cache.lower() == "disk":
        raise ConfigError("cache: expected False or 'ram', got 'disk'; shards are read from disk as they are, use cache=False")
    if not training:
        return
    for key, advice in REFUSED.items():
        if getattr(args, key, None):
            raise ConfigError(f"{key}: expected it to be off for shards, got {getattr(args, key)}; {advice}, or train on plain images")
    if args.batch < 1:
        raise ConfigError(f"batch: expected a number of images, got {args.batch}; AutoBatch measures before the decoder has its memory, use batch=16")
    if args.perspective * 2 * args.imgsz >= 1:  # a corner of the mosaic would be behind the camera
        raise ConfigError(
            f"perspective: expected less than {1 / (2 * args.imgsz):.6f} at imgsz={args.imgsz}, got {args.perspective}; make it smaller"
        )
    for key, default in DEFAULT_CFG_DICT.items():
        if key not in HONOURED | REFUSED.keys() | UNRELATED and getattr(args, key) != default:
            raise ConfigError(f"{key}: expected {default} for shards, got {getattr(args, key)}; this setting is newer than this adapter")
