"""The picture formats that Pillow writes, for comparison: whole pictures, and pictures whose objects are stored once more."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.picture import Picture, Rect
from rinr_loader.quality import psnr

# AVIF as Pillow writes it unless told otherwise: 4:2:0, speed 6.
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True, "subsampling": "4:2:0"}, "WebP": {"method": 6}, "AVIF": {}}
QUALITIES = range(1, 101)
ROI_MARGIN = 4  # pixels around a label box: where an object's own picture ends
TAR_BLOCK = 512  # bytes: a tar's header, and what its contents are rounded up to


class Stored(NamedTuple):
    """One way to store one picture: bytes of its file or files, how many of them, PSNR in dB of the picture and of its objects."""

    bytes: int
    files: tuple[int, ...]
    psnr: float
    object_psnr: float  # NaN without objects

    @property
    def tar_bytes(self) -> int:
        """The same inside a tar, without its end."""
        return sum(TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK for size in self.files)


def encoded(pixels: NDArray[np.uint8], kind: str, quality: int) -> tuple[int, NDArray[np.uint8]]:
    """Bytes of a picture in another format, and the picture that comes back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind.upper(), quality=quality, **OPTIONS[kind])
    return buffer.tell(), np.array(Image.open(buffer).convert("RGB"))


def measured(frame: Picture, files: tuple[int, ...], decoded: NDArray[np.uint8]) -> Stored:
    mask = frame.object_mask
    return Stored(sum(files), files, psnr(decoded, frame.pixels), psnr(decoded, frame.pixels, mask) if mask.any() else math.nan)


def curve(frame: Picture, kind: str, qualities: Iterable[int] = QUALITIES) -> list[Stored]:
    """The whole picture at each quality."""
    points = []
    for quality in qualities:
        size, decoded = encoded(frame.pixels, kind, quality)
        points.append(measured(frame, (size,), decoded))
    return points


def roi_crops(frame: Picture) -> list[Rect]:
    """The label boxes with a margin, rounded outward, inside the picture; crowds left out, as they do not count."""
    height, width = frame.pixels.shape[:2]
    boxes = frame.stored_boxes[~frame.crowd]
    grown = [(x0 - ROI_MARGIN, y0 - ROI_MARGIN, x1 + ROI_MARGIN, y1 + ROI_MARGIN) for x0, y0, x1, y1 in boxes.tolist()]
    return [(max(0, math.floor(a)), max(0, math.floor(b)), min(width, math.ceil(c)), min(height, math.ceil(d))) for a, b, c, d in grown]


def roi_curve(frame: Picture, kind: str, base: int, qualities: Iterable[int] = QUALITIES) -> list[Stored]:
    """The whole picture at one quality, and each padded object in a file of its own at another; the places of the crops are not counted."""
    size, whole = encoded(frame.pixels, kind, base)
    points = []
    for quality in qualities:
        files, pasted = [size], whole.copy()
        for x0, y0, x1, y1 in roi_crops(frame):
            crop_size, crop = encoded(np.ascontiguousarray(frame.pixels[y0:y1, x0:x1]), kind, quality)
            files.append(crop_size)
            pasted[y0:y1, x0:x1] = crop
        points.append(measured(frame, tuple(files), pasted))
    return points


def cheapest(points: Sequence[Stored], image: float | None = None, obj: float | None = None) -> Stored | None:
    """Fewest bytes at which the targets (dB of the picture, of its objects) hold; None where they never do."""
    good = [point for point in points if (image is None or point.psnr >= image) and (obj is None or point.object_psnr >= obj)]
    return min(good, key=lambda point: point.bytes, default=None)
