"""One split of shards as Ultralytics' trainer sees a dataset: labels, files, rectangular batches, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader import RinrDataset
from rinr_loader.boxes import ULTRALYTICS_FILTER, BoxFilter, place_boxes
from rinr_loader.color import adjust_hsv, hsv_gains
from rinr_loader.decode import decode
from rinr_loader.geometry import Letterbox, Placements, fit_long_side, letterbox_gain
from rinr_loader.integrations.ultralytics_loader import Batch, BatchPlan
from rinr_loader.mosaic import RandomAffine, mosaic_affine
from rinr_loader.plan import epoch_order
from rinr_loader.reader import ShardBuffer
from rinr_loader.rng import Draws

# A mosaic's partners are among this many positions before it, as Ultralytics takes them from the images it read last.
PARTNER_WINDOW = 1024
SHUFFLE_SHARDS = 8  # shards whose samples are shuffled together, as `rinr_loader.DataLoader` does


@dataclass(frozen=True)
class Augmentation:
    """What training does to images, with the meaning of Ultralytics' settings.

    Args:
        affine: Scale, translation, rotation, shear, perspective and mirroring.
        mosaic: Probability of a mosaic.
        hsv: Ranges of hue, saturation and value.
        bgr: Probability of swapping red and blue.
    """

    affine: RandomAffine
    mosaic: float
    hsv: tuple[float, float, float]
    bgr: float

    @classmethod
    def from_args(cls, args: Any, *, long_side: int) -> Augmentation:
        """Take the settings of a trainer; `long_side` is the size to which a single image is fitted first."""
        affine = RandomAffine(
            scale=tuple(args.scale) if isinstance(args.scale, (tuple, list)) else args.scale,
            translate=args.translate,
            degrees=args.degrees,
            shear=args.shear,
            perspective=args.perspective,
            horizontal=args.fliplr,
            vertical=args.flipud,
            long_side=long_side,
        )
        return cls(affine, mosaic=args.mosaic, hsv=(args.hsv_h, args.hsv_s, args.hsv_v), bgr=args.bgr)


@dataclass(frozen=True)
class Prepared:
    """A batch whose bytes are in memory and whose geometry is decided: all that is left is device work.

    Args:
        buffer: The bytes.
        placements: Where its samples land.
        size: Height and width of the images.
        targets: `cls`, `bboxes` and `batch_idx`, on the CPU.
        colour: Uniform numbers for hue, saturation, value and channel swap, `(N, 4)`; None in validation.
        about: What the validator wants to know of each image.
    """

    buffer: ShardBuffer
    placements: Placements
    size: tuple[int, int]
    targets: dict[str, Tensor]
    colour: Tensor | None
    about: dict[str, list[Any]]


class ShardDetectionDataset:
    """One split of shards, with what Ultralytics reads from a dataset: `labels`, `im_files`, `mosaic`, `close_mosaic`, `len`.

    Crowd boxes and exact duplicates are left out, as Ultralytics does when it converts COCO and when it reads labels.

    Args:
        source: The split.
        imgsz: Size to which images are fitted: the side of a square, or height and width.
        augmentation: What training does to images; None for validation.
        rect: Whether batches are rectangular, of samples sorted by aspect ratio.
        batch_size: Samples of a rectangular batch.
        stride: Rectangular batches are multiples of it.
        pad: Added to a rectangular batch's sides, in strides, before rounding up.
        fraction: Share (float) or number (int) of the samples that are used, from the first.
        classes: Class ids that are kept; None keeps all.
        single_cls: Whether all classes become class 0.
        cache: Whether all bytes are read once and stay on the device.
        shuffle: Whether every epoch has an order of its own.
        seed: Seed of order and augmentation.
        device: Where images are decoded.
    """

    def __init__(
        self,
        source: RinrDataset,
        *,
        imgsz: int | tuple[int, int],
        augmentation: Augmentation | None = None,
        rect: bool = False,
        batch_size: int = 16,
        stride: int = 32,
        pad: float = 0.5,
        fraction: float = 1.0,
        classes: Sequence[int] | None = None,
        single_cls: bool = False,
        cache: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.augmentation, self.rect, self.batch_size = source, augmentation, rect, batch_size
        self.imgsz, self.single_cls, self.seed, self.device = imgsz, single_cls, seed, torch.device(device)
        self.cache = cache
        self.cached: ShardBuffer | None = None
        self._order: tuple[int, Tensor] | None = None
        count = fraction if isinstance(fraction, int) else max(1, round(len(source) * fraction))
        labels = source.labels[:count]
        sizes = np.array([label["size"] for label in labels], np.int64).reshape(-1, 2)
        self.batch_shapes: NDArray[np.int64] | None = None
        self._row = np.arange(len(labels))  # of each sample in the split
        if rect:
            self._row, self.batch_shapes = rectangles(sizes, batch_size=batch_size, long_side=self._long_side, stride=stride, pad=pad)
        self._sample_of_row = np.full(len(source), -1)
        self._sample_of_row[self._row] = np.arange(len(self._row))
        labels = [labels[i] for i in self._row]
        self._size = torch.from_numpy(sizes[self._row])
        self.im_files = [str(Path(source.path, source.split, f"{label['key']}.rinr")) for label in labels]
        self._set_objects(*unique_objects(labels))
        self.update_labels(classes)
        self.shuffle = shuffle and (self.batch_shapes is None or bool((self.batch_shapes == self.batch_shapes[0]).all()))

    def __len__(self) -> int:
        return len(self.im_files)

    @property
    def mosaic(self) -> bool:
        """Whether training makes mosaics; the trainer sets it to False before `close_mosaic`."""
        return self.augmentation is not None and self.augmentation.mosaic > 0 and not self.rect

    @mosaic.setter
    def mosaic(self, on: bool) -> None:
        if self.augmentation is not None and not on:
            self.augmentation = replace(self.augmentation, mosaic=0.0)

    def close_mosaic(self, hyp: Any) -> None:
        """Make no mosaics from the next batch on; everything else follows the trainer's settings `hyp`."""
        if self.augmentation is not None:
            self.augmentation = replace(Augmentation.from_args(hyp, long_side=self._long_side), mosaic=0.0)

    def update_labels(self, include_class: Sequence[int] | None) -> None:
        """Keep only the objects of some classes; None keeps all."""
        if include_class is not None:
            kept = np.isin(self._class_id, include_class)
            self._set_objects(self._sample[kept], self._box[kept], self._class_id[kept])
        if self.single_cls:
            self._class_id[:] = 0
        self.labels = self._labels()

    def order(self, epoch: int) -> Tensor:
        """Samples in the order of an epoch, int64, shape `(len,)`: a pure function of the seed and the epoch."""
        if not self.shuffle:
            return torch.arange(len(self))
        if self._order is None or self._order[0] != epoch:
            rows = epoch_order(self.source.shard_samples, seed=self.seed, epoch=epoch, shuffle=True, shuffle_shards=SHUFFLE_SHARDS)
            samples = self._sample_of_row[rows]
            self._order = (epoch, torch.from_numpy(samples[samples >= 0]))
        return self._order[1]

    def read(self, plan: BatchPlan) -> Prepared:
        """Read the bytes of a batch and its mosaic partners, and decide its geometry."""
        draws = Draws(self.seed, plan.epoch, plan.positions)
        size = self._batch_size_of(plan)
        if self.augmentation is None:
            letterbox = Letterbox(scaleup=False, long_side=self._long_side)
            placements = letterbox(self._size[plan.samples], size=size, random=draws)
            placements = replace(placements, sample=plan.samples[placements.sample])
        else:
            samples = torch.cat([plan.samples[:, None], self.partners(plan, draws(4))], dim=1)
            placements = mosaic_affine(self._size, samples, self.augmentation.affine, size=size, random=draws)
        needed, local = torch.unique(placements.sample, return_inverse=True)
        return Prepared(
            buffer=self._fetch(needed),
            placements=replace(placements, sample=placements.sample if self.cache else local),
            size=size,
            targets=self._targets(placements, size),
            colour=None if self.augmentation is None else draws(4),
            about=self._about(plan.samples, size),
        )

    def build(self, plan: BatchPlan, fetched: Prepared) -> Batch:
        """Decode a batch: uint8 RGB `img` `(N, 3, H, W)` on the device, because the trainer divides by 255; and its targets."""
        images = torch.empty(len(plan.samples), 3, *fetched.size, dtype=torch.uint8, device=self.device)
        decode(fetched.buffer, fetched.placements, size=fetched.size, antialias=False, out=images)
        if fetched.colour is not None and self.augmentation is not None:
            hue, saturation, value = self.augmentation.hsv
            if hue or saturation or value:
                images = adjust_hsv(images, hsv_gains(fetched.colour[:, :3], hue=hue, saturation=saturation, value=value))
            if self.augmentation.bgr:
                swap = (fetched.colour[:, 3] < self.augmentation.bgr).to(self.device)
                images = torch.where(swap[:, None, None, None], images.flip(1), images)
        return {"img": images, **fetched.targets, **fetched.about}

    def release(self) -> None:
        """Give back the memory of the device; what is needed again is read again."""
        self.cached = None

    @property
    def _long_side(self) -> int:
        return self.imgsz if isinstance(self.imgsz, int) else max(self.imgsz)

    def _batch_size_of(self, plan: BatchPlan) -> tuple[int, int]:
        if self.batch_shapes is not None:
            height, width = self.batch_shapes[int(plan.samples[0]) // self.batch_size].tolist()
            return height, width
        return (self.imgsz, self.imgsz) if isinstance(self.imgsz, int) else self.imgsz

    def partners(self, plan: BatchPlan, numbers: Tensor) -> Tensor:
        """The three samples that join each image in a mosaic, -1 where it stays alone, int64 `(N, 3)`, from uniform numbers `(N, 4)`."""
        order = self.order(plan.epoch)
        back = (numbers[:, 1:] * min(PARTNER_WINDOW, len(order))).long()
        partners = order[(plan.positions[:, None] - back) % len(order)]
        probability = self.augmentation.mosaic if self.augmentation is not None and self.mosaic else 0.0
        partners[numbers[:, 0] >= probability] = -1
        return partners

    def _fetch(self, samples: Tensor) -> ShardBuffer:
        if not self.cache:
            return self.source.read(self._row[samples.numpy()].tolist()).to(self.device)
        if self.cached is None:
            self.cached = self.source.read(self._row.tolist()).to(self.device)
        return self.cached

    def _targets(self, placements: Placements, size: tuple[int, int]) -> dict[str, Tensor]:
        columns = (torch.from_numpy(self._box), torch.from_numpy(self._class_id), torch.from_numpy(self._start))
        box_filter = BoxFilter() if self.augmentation is None else ULTRALYTICS_FILTER
        boxes, classes, batch_index = place_boxes(placements, *columns, size=size, box_filter=box_filter)
        low, high = boxes[:, :2], boxes[:, 2:]
        extent = torch.tensor([size[1], size[0]] * 2)
        centres = torch.cat([(low + high) / 2, high - low], dim=1) / extent
        return {"cls": classes[:, None].float(), "bboxes": centres, "batch_idx": batch_index.float()}

    def _about(self, samples: Tensor, size: tuple[int, int]) -> dict[str, list[Any]]:
        source = self._size[samples]
        if self.augmentation is not None:
            ratio: list[Any] = [tuple(pair) for pair in (fit_long_side(source, self._long_side) / source).tolist()]
        else:
            gain, offset = letterbox_gain(source, size, scaleup=False, long_side=self._long_side)
            ratio = [((gy, gx), (int(left), int(top))) for (gx, gy), (left, top) in zip(gain.tolist(), offset.tolist(), strict=True)]
        return {
            "im_file": [self.im_files[i] for i in samples.tolist()],
            "ori_shape": [tuple(pair) for pair in source.tolist()],
            "resized_shape": [size] * len(samples),
            "ratio_pad": ratio,
        }

    def _set_objects(self, sample: NDArray[np.int64], box: NDArray[np.float32], class_id: NDArray[np.int64]) -> None:
        self._sample, self._box, self._class_id = sample, box, class_id.copy()
        self._start = np.searchsorted(sample, np.arange(len(self.im_files) + 1)).astype(np.int64)

    def _labels(self) -> list[dict[str, Any]]:
        """Labels in Ultralytics' form: classes (n, 1) and boxes (n, 4) as centre and size, fractions of the image."""
        width_height = self._size.numpy()[self._sample][:, ::-1]
        low, high = self._box[:, :2], self._box[:, 2:]
        boxes = np.concatenate([(low + high) / 2 / width_height, (high - low) / width_height], axis=1).astype(np.float32)
        classes = self._class_id[:, None].astype(np.float32)
        form: dict[str, Any] = {"segments": [], "keypoints": None, "normalized": True, "bbox_format": "xywh"}
        spans = zip(self._start[:-1].tolist(), self._start[1:].tolist(), strict=True)
        return [
            {"im_file": file, "shape": tuple(size), "cls": classes[a:b], "bboxes": boxes[a:b], **form}
            for file, size, (a, b) in zip(self.im_files, self._size.tolist(), spans, strict=True)
        ]


def rectangles(sizes: NDArray[np.int64], *, batch_size: int, long_side: int, stride: int, pad: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort samples by aspect ratio and give each batch the smallest rectangle that holds its images.

    Args:
        sizes: Height and width of each sample, `(N, 2)`.
        batch_size: Samples of a batch.
        long_side: Pixels of the longer side of each image.
        stride: Sides are multiples of it.
        pad: Added to each side, in strides, before rounding up.

    Returns:
        Samples by height over width, `(N,)`, and height and width of each batch, `(B, 2)`.
    """
    aspect = sizes[:, 0] / sizes[:, 1]
    order = aspect.argsort()  # the kind that Ultralytics takes: it decides which of equal samples share a batch
    starts = np.arange(0, len(sizes), batch_size)
    low, high = (function.reduceat(aspect[order], starts) if len(starts) else starts * 1.0 for function in (np.minimum, np.maximum))
    height, width = np.where(high < 1, high, 1.0), np.where(low > 1, 1 / low, 1.0)
    shapes = np.ceil(np.stack([height, width], axis=1) * long_side / stride + pad).astype(np.int64) * stride
    return order, shapes


def unique_objects(labels: Sequence[dict[str, Any]]) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Sample, box and class of every object that is no crowd and no repetition, in order.

    Args:
        labels: Labels of a `RinrDataset`.
    """
    sample = np.repeat(np.arange(len(labels)), [len(label["boxes"]) for label in labels])
    box = np.concatenate([np.zeros((0, 4), np.float32), *(label["boxes"] for label in labels)])
    class_id = np.concatenate([np.zeros(0, np.int64), *(label["classes"] for label in labels)])
    crowd = np.concatenate([np.zeros(0, np.bool_), *(label["crowd"] for label in labels)])
    rows = np.concatenate([sample[:, None], class_id[:, None], box.astype(np.float64)], axis=1)
    _, first = np.unique(rows, axis=0, return_index=True)
    kept = np.zeros(len(sample), np.bool_)
    kept[first] = True
    kept &= ~crowd
    return sample[kept], box[kept], class_id[kept]
