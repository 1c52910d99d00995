"""A sample's boxes made fit for its picture: in pixels, clipped, with an area; what is dropped is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rinr_loader.errors import ConvertError
from rinr_loader.source import Sample


@dataclass(frozen=True)
class Annotations:
    """What is stored of a sample's boxes.

    Args:
        boxes: Float32 xyxy in source pixels, clipped to the picture, `(n, 4)`.
        classes, crowd: Of each box, int64 and bool, `(n,)`.
        kept: Which of the sample's boxes these are.
        dropped: How many boxes were left out, by reason.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    kept: NDArray[np.int64]
    dropped: Counter[str]


def annotate(sample: Sample, width: int, height: int) -> Annotations:
    """Clip a sample's boxes to its picture; drop and count those that are not finite, outside, or without an area.

    Raises:
        ConvertError: The annotations were made for a picture of another size.
    """
    if sample.declared_size is not None and sample.declared_size != (width, height):
        declared = "x".join(map(str, sample.declared_size))
        raise ConvertError(f"expected a picture of {declared} as its labels state, got {width}x{height}; correct the labels or the picture")
    boxes = np.asarray(sample.boxes, np.float64).reshape(-1, 4)
    if sample.relative:
        boxes = boxes * (width, height, width, height)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(boxes).all(axis=1))
    clipped = np.clip(np.where(finite[:, None], boxes, 0), 0, (width, height, width, height)).astype(np.float32)
    flat = finite & ((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]))
    good = finite & ~flat & (clipped[:, :2] < clipped[:, 2:]).all(1)
    reasons = {"not finite": ~finite, "without an area": flat, "outside the picture": finite & ~flat & ~good}
    kept = np.flatnonzero(good)
    return Annotations(
        boxes=clipped[kept],
        classes=np.asarray(sample.classes, np.int64)[kept],
        crowd=np.zeros(len(kept), np.bool_) if sample.crowd is None else np.asarray(sample.crowd, np.bool_)[kept],
        kept=kept,
        dropped=Counter({reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}),
    )


def sidecar(sample: Sample, annotations: Annotations) -> dict[str, object]:
    """What goes into `KEY.json`; a list of one entry a box loses those of the dropped boxes."""
    extra = dict(sample.extra)
    objects = extra.get("objects")
    if isinstance(objects, list) and len(objects) == len(sample.boxes):
        extra["objects"] = [objects[i] for i in annotations.kept]
    return extra
