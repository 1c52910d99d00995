"""What a converter hands to the encoder: a `Source` of `Sample`s, pixels not opened yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """Something in a source that was left out: which file or sample, and why."""

    subject: str
    reason: str


@dataclass(frozen=True)
class ByteRange:
    """Where an image file lies inside an archive, not compressed: `size` bytes of the file `path`, from byte `offset`."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One image of a source dataset with its annotations.

    Args:
        key: Path below the split, without suffix, with `/` between folders. Stored percent-encoded where a tar needs it.
        split: Which split it belongs to.
        image: The image file, its bytes, or the part of an archive that holds them.
        boxes: Label boxes, float32 xyxy, shape `(n, 4)`, as the source gives them (not clipped, possibly invalid): pixels of the
            upright image (EXIF orientation applied), or fractions of its width and height when `relative`.
        classes: Class ids, int64, shape `(n,)`.
        crowd: Boxes that mark a crowd or an ignored region and so get no residual, bool, shape `(n,)`; None where there are none.
        relative: Whether `boxes` are fractions of the image instead of pixels.
        label: Class id of the whole image, -1 where there is none.
        declared_size: Width and height that the annotations were made for, where the source states it.
        sequence: The sequence or clip that this frame belongs to; a split by fraction never divides one.
        extra: What the source has beyond boxes and classes (polygons, track ids); written as `KEY.json`.
    """

    key: str
    split: Split
    image: Path | bytes | ByteRange
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: NDArray[np.bool_] | None = None
    relative: bool = False
    label: int = -1
    declared_size: tuple[int, int] | None = None
    sequence: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A source dataset, listed but not read.

    Args:
        format: Name of the converter that listed it.
        samples: Every image, in a stable order (sorted by split, then key).
        names: Class names by id; empty where the source has no classes.
        problems: What was left out while listing (unreadable label files and the like).
    """

    format: str
    samples: Sequence[Sample]
    names: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
