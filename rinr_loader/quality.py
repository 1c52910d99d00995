"""How good a decoded picture is: PSNR in dB over RGB, after rounding to uint8."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

IDENTICAL = 99.0  # what a picture without any error counts as
Pixels = NDArray[np.uint8]
_ROWS = 1 << 20  # pixels that are compared at a time


def psnr(decoded: Pixels, source: Pixels, mask: NDArray[np.bool_] | None = None) -> float:
    """PSNR between two pictures.

    Args:
        decoded, source: uint8, `(H, W, 3)`.
        mask: Pixels that count, bool, `(H, W)`; all of them without it.

    Returns:
        dB; 99 for equal pictures, NaN where no pixel counts.
    """
    total = count = 0
    rows = max(1, _ROWS // max(1, decoded.shape[1]))
    for top in range(0, len(decoded), rows):  # a large picture as integers of 4 bytes would take many times its own memory
        part = slice(top, top + rows)
        wrong = (decoded[part].astype(np.int32) - source[part].astype(np.int32)) ** 2
        if mask is not None:
            wrong = wrong[mask[part]]
        total, count = total + int(wrong.sum(dtype=np.int64)), count + wrong.size
    if not count:
        return math.nan
    mean = total / count
    return IDENTICAL if mean == 0 else min(IDENTICAL, 10 * math.log10(255**2 / mean))


def box_mask(boxes: NDArray[np.floating], height: int, width: int) -> NDArray[np.bool_]:
    """Union of boxes (xyxy in pixels of this picture, rounded outward), bool, `(height, width)`."""
    mask = np.zeros((height, width), np.bool_)
    for x0, y0, x1, y1 in boxes.astype(np.float64):
        mask[max(0, math.floor(y0)) : max(0, math.ceil(y1)), max(0, math.floor(x0)) : max(0, math.ceil(x1))] = True
    return mask


def jpeg(pixels: Pixels, quality: int, *, full_colour: bool = False) -> bytes:
    """A picture as an optimized JPEG.

    Args:
        pixels: RGB, uint8, `(H, W, 3)`; or gray, `(H, W)`.
        quality: 1 to 100.
        full_colour: Store colour at full resolution (4:4:4), and not at half (4:2:0).
    """
    image, subsampling = Image.fromarray(pixels), 0 if full_colour or pixels.ndim == 2 else 2

    def save() -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True, subsampling=subsampling)
        return buffer.getvalue()

    # An optimized JPEG is made in one piece, for which Pillow leaves one or two bytes a pixel: too few for noise in full colour.
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, pixels.size + (1 << 16))
    try:
        return save()
    except OSError:
        ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 2 * pixels.size + (1 << 16))
        return save()


def jpeg_bytes(pixels: Pixels, quality: int) -> int:
    """Size of a picture as an optimized JPEG."""
    return len(jpeg(pixels, quality))


def mean_of(columns: Sequence[NDArray[np.float32]]) -> float | None:
    """Mean over all columns without their NaNs; None where nothing is left."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns]) if columns else np.zeros(0)
    return float(values.mean(dtype=np.float64)) if len(values) else None
