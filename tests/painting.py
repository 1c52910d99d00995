"""A slow, plain painter of placements, written from their definition: what tests of geometry compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rinr_loader.geometry import Placements


def centres(size: tuple[int, int]) -> NDArray[np.float64]:
    """Homogeneous coordinates of the pixel centres, shape (H, W, 3)."""
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    return np.stack([x, y, np.ones_like(x)], axis=-1)


def paint(placements: Placements, sources: Sequence[NDArray[np.uint8]], size: tuple[int, int], *, fill: int = 114) -> NDArray[np.uint8]:
    """Paint the source pixel under each output pixel's centre, shape (N, H, W, C); fails where two placements of one output overlap."""
    count = int(placements.output.max()) + 1 if len(placements) else 0
    images = np.full((count, *size, sources[0].shape[2]), fill, np.uint8)
    painted = np.zeros((count, *size), bool)
    for output, sample, matrix, clip in zip(
        placements.output.tolist(), placements.sample.tolist(), placements.matrix.double().numpy(), placements.clip.double().numpy(), strict=True
    ):
        at = centres(size) @ matrix.T
        x, y = at[..., 0] / at[..., 2], at[..., 1] / at[..., 2]
        inside = (x >= clip[0]) & (x < clip[2]) & (y >= clip[1]) & (y < clip[3])
        assert not (inside & painted[output]).any(), "placements of one output image overlap"
        images[output][inside] = sources[sample][np.floor(y[inside]).astype(int), np.floor(x[inside]).astype(int)]
        painted[output] |= inside
    return images


def numbered(height: int, width: int, *, channel: int = 0) -> NDArray[np.uint8]:
    """An image up to 256 x 256 whose every pixel is different: (row, column, channel)."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.full_like(rows, channel)], axis=-1).astype(np.uint8)
