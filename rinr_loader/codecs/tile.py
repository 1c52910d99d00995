"""The family `tile`: latents on a lattice of 16x16-pixel tiles, turned into colour by a basis that a whole dataset shares.

Synthesis is linear and overlaps: a tile's basis covers 24x24 pixels. What would reach over the picture's border is folded back, as if the
picture went on mirrored, so that no border darkens. A light filter over the result (`tile-2`) mends what a linear basis cannot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16  # pixels between tiles
SUPPORT = 24  # pixels that a tile's basis covers
OVERLAP = (SUPPORT - TILE) // 2  # pixels by which it reaches over each edge of its tile
FILTER_WIDTH = 24  # channels inside the filter
RESIDUAL_TILE = 8  # pixels
RESIDUAL_CHANNELS = 3 * RESIDUAL_TILE**2


def synthesise(latents: Tensor, basis: Tensor) -> Tensor:
    """Overlapping tiles of colour, at the size for which the basis was made.

    Args:
        latents: `(N, C, h, w)`, steps multiplied in.
        basis: `(C, 3, s, s)` with s = 1.5 tiles of an even number of pixels t.

    Returns:
        Colour around 0, where 1 is 255, `(N, 3, h * t, w * t)`.
    """
    h, w = latents.shape[2:]
    size, half = basis.shape[-1], basis.shape[-1] // 3
    cells = basis.flatten(1).T @ latents.flatten(2)
    canvas = F.fold(cells, ((2 * h + 1) * half, (2 * w + 1) * half), size, stride=2 * half)
    return _fold(_fold(canvas, 2, half // 2), 3, half // 2)


def _fold(canvas: Tensor, axis: int, reach: int) -> Tensor:
    """Mirror what reaches over both ends of an axis back inside, in place; a view of what is inside."""
    size = canvas.shape[axis] - 2 * reach
    inside = canvas.narrow(axis, reach, size)
    inside.narrow(axis, 0, reach).add_(canvas.narrow(axis, 0, reach).flip(axis))
    inside.narrow(axis, size - reach, reach).add_(canvas.narrow(axis, reach + size, reach).flip(axis))
    return inside


def smooth(image: Tensor, weights: Mapping[str, Tensor], step: Tensor) -> Tensor:
    """The filter of `tile-2`: three 3x3 convolutions over 2x2 pixels at a time, added to the picture.

    Args:
        image: What `synthesise` gave, `(N, 3, H, W)` with even H and W.
        weights: `filter.{0,1,2}.{weight,bias}`, and `filter.{0,1}.step`: what the logarithm of the step adds to a channel.
        step: The latents' step for each image, over `TYPICAL_STEP`, `(N,)`.

    Returns:
        Float32, shaped as `image`, which is colour around 0 in units of `UNIT` grey levels.
    """
    hidden = F.pixel_unshuffle(image, 2).contiguous(memory_format=torch.channels_last)  # so few channels take a CPU 1.6 times as long the other way
    level = step.log()[:, None, None, None]
    for i in range(2):
        hidden = F.conv2d(hidden, weights[f"filter.{i}.weight"], weights[f"filter.{i}.bias"], padding=1)
        hidden = F.leaky_relu(hidden + level * weights[f"filter.{i}.step"][:, None, None], 0.1)
    change = F.conv2d(hidden, weights["filter.2.weight"], weights["filter.2.bias"], padding=1)
    return image + F.pixel_shuffle(change, 2)


def lattice_of(rect: tuple[int, int, int, int], tile: int) -> tuple[int, int]:
    """Rows and columns of the tiles that cover a rectangle, from its upper left corner."""
    x0, y0, x1, y1 = rect
    return -(-(y1 - y0) // tile), -(-(x1 - x0) // tile)


def blocks_of(image: Tensor) -> Tensor:
    """Cut a picture `(3, 8h, 8w)` of any type into blocks, row by row, `(h * w, 3, 8, 8)`."""
    size = RESIDUAL_TILE
    blocks = image.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # colour, row, y, column, x
    listed: Tensor = blocks.permute(1, 3, 0, 2, 4).flatten(0, 1)
    return listed


def image_of(blocks: Tensor, columns: int) -> Tensor:
    """The inverse of `blocks_of`: `(h * w, 3, 8, 8)` with w `columns` to a picture `(3, 8h, 8w)`."""
    grid = blocks.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # colour, row, y, column, x
    image: Tensor = grid.flatten(3, 4).flatten(1, 2)
    return image


BAND = 8192  # tiles that are synthesised together: 7 KB each at full size
UNIT = 64.0  # grey levels that the filter sees as 1
TYPICAL_STEP = 70.0  # grey levels; the filter is told the logarithm of a step over this one


def scaled_basis(basis: Tensor, k: int) -> Tensor:
    """A basis for pictures at 1/k of their size, k 1, 2 or 4: means of k x k pixels, as a mean is linear too."""
    return basis if k == 1 else F.avg_pool2d(basis, k)


def picture(
    latents: Tensor, basis: Tensor, weights: Mapping[str, Tensor] | None, step: float, region: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Background of one picture, a band of tiles at a time, so that memory beyond the result stays bounded.

    Args:
        latents: Integers as float32, `(C, h, w)`.
        basis: See `scaled_basis`.
        weights: Of the filter; None for none.
        step: Quantization step in grey levels.
        region: First column and row of the tiles that are wanted, and those behind the last; all without. The others stay 0.

    Returns:
        Grey levels around 0, `(3, h * t, w * t)`, t pixels a tile.
    """
    height, width = latents.shape[1:]
    tile = basis.shape[-1] * TILE // SUPPORT
    left, top, right, bottom = region or (0, 0, width, height)
    # One more on each side: what a cut would change reaches less far, through basis and filter together.
    west, east = max(0, left - 1), min(width, right + 1)
    latents = latents[:, :, west:east]
    used = latents[:, max(0, top - 1) : bottom + 1].flatten(1).any(1).nonzero()[:, 0]
    latents, basis = latents[used], basis[used]
    image: Tensor | None = None
    rows = max(1, BAND // (east - west))
    for first in range(top, bottom, rows):
        last = min(bottom, first + rows)
        low, high = max(0, first - 1), min(height, last + 1)
        part = synthesise(latents[None, :, low:high] * step, basis)
        if weights is not None:
            part = smooth(part / UNIT, weights, torch.full((1,), step / TYPICAL_STEP, device=part.device)) * UNIT
        if (west, low, east, high) == (0, 0, width, height):
            return part[0]
        if image is None:
            image = part.new_zeros(3, height * tile, width * tile)
        inside = part[0, :, (first - low) * tile : (last - low) * tile, (left - west) * tile : (right - west) * tile]
        image[:, first * tile : last * tile, left * tile : right * tile] = inside
    return latents.new_zeros(3, height * tile, width * tile) if image is None else image


def residual(latents: Tensor, basis: Tensor, step: float, rect: tuple[int, int, int, int]) -> Tensor:
    """What a residual adds inside its rectangle, not feathered yet: grey levels, `(3, y1 - y0, x1 - x0)`.

    Args:
        latents: Integers as float32, `(T, 192)`.
        basis: `(192, 3, 8, 8)`.
        step: Quantization step in grey levels.
        rect: Stored pixels that it covers.
    """
    columns = lattice_of(rect, RESIDUAL_TILE)[1]
    blocks = (latents * step) @ basis.flatten(1)
    whole = image_of(blocks.unflatten(1, basis.shape[1:]), columns)
    return whole[:, : rect[3] - rect[1], : rect[2] - rect[0]]
