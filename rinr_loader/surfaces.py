"""Families that are decoded to whole pictures, `tile` and `jpeg`: placements are sampled from *surfaces*.

A surface is a sample's picture at 1, 1/2, 1/4 or 1/8 of its stored size: each of its pixels is the mean of k x k stored ones, at the right
and lower border of as many as are left. It is float32 `(3, ceil(H / k), ceil(W / k))`, colour 0 to 1, not clamped. Each is made once for all
placements that want it, and `PIXELS[device]` pixels of them stand in memory together (but one, however large).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rinr_loader.bundle import JpegSpec, NetworkSpec, Spec, TileSpec
from rinr_loader.codecs.jpeg import decode_files
from rinr_loader.reader import ShardBuffer
from rinr_loader.tiles import tile_surfaces
from rinr_loader.view import Jobs, View, inside, map_points, points_a_side, reach, scales

MAX_REDUCTION = 8
PIXELS = {"cpu": 1 << 22, "cuda": 1 << 27}  # of surfaces, 12 bytes each, and of pictures that are decoded to make them
POINTS = {"cpu": 1 << 15, "cuda": 1 << 23}  # sampled by one launch; on a CPU they should stay in the cache of a core
UNIT = 1e-3  # pixels by which a placement may miss the pixels of a surface and still copy them

Box = tuple[int, int, int, int]
MakeSurfaces = Callable[[ShardBuffer, Sequence[int], Sequence[int]], list[Tensor]]


def jpeg_surfaces(buffer: ShardBuffer, samples: Sequence[int], reduce: Sequence[int]) -> list[Tensor]:
    """The surfaces of samples of the family `jpeg`.

    Args:
        buffer: Where they are.
        samples: Which, in any order; one that stands in several places is decoded once.
        reduce: k of each.

    Raises:
        BundleError: A JPEG is damaged.
    """
    data = buffer.data.cpu() if buffer.host is None else buffer.host
    distinct = sorted(set(samples))
    rows = buffer.network_start[distinct]
    first, nbytes = buffer.network_offset[rows].tolist(), buffer.network_bytes[rows].tolist()
    sizes = [(height, width) for height, width in buffer.stored_size[distinct].tolist()]
    found: list[Tensor | None] = [None] * len(samples)
    for chunk in _chunks([height * width for height, width in sizes], PIXELS[_kind(buffer.device)]):
        files = [data[first[i] : first[i] + nbytes[i]] for i in chunk]
        images = decode_files(files, [sizes[i] for i in chunk], [f"{buffer.keys[distinct[i]]}.rinr" for i in chunk], buffer.device)
        for i, image in zip(chunk, images, strict=True):
            for place in [place for place, sample in enumerate(samples) if sample == distinct[i]]:
                found[place] = block_means(image, reduce[place]).div_(255)
    return [surface for surface in found if surface is not None]


def block_means(image: Tensor, k: int) -> Tensor:
    """Means of blocks of k x k pixels, those at the right and lower border of what is left.

    Args:
        image: `(C, H, W)`, of any type.
        k: 1 or more.

    Returns:
        Float32, `(C, ceil(H / k), ceil(W / k))`, new.
    """
    if k == 1:
        return image.to(torch.float32, copy=True)
    # Channel by channel: in between, only one of them is as large as four bytes a pixel.
    return torch.cat([F.avg_pool2d(channel[None].float(), k, ceil_mode=True, count_include_pad=False) for channel in image])


# How each family makes its surfaces: a function of the buffer, samples and k of each. Equal samples stand side by side.
SURFACES: dict[type[Spec], MakeSurfaces] = {JpegSpec: jpeg_surfaces, TileSpec: tile_surfaces}


@dataclass(frozen=True)
class _Placed:
    """One placement, as plain numbers but for what the device maps points by."""

    output: int
    sample: int
    reduce: int
    points: int  # along one side of an output pixel
    box: Box  # output pixels that it can reach
    numbers: tuple[float, ...]  # the matrix, row by row
    bounds: tuple[float, ...]  # the clip
    matrix: Tensor
    clip: Tensor


def paint(buffer: ShardBuffer, view: View, rows: Tensor, size: tuple[int, int], antialias: bool, pixels: Tensor, covered: Tensor) -> None:
    """Draw placements of samples that have surfaces.

    Args:
        buffer: Samples in memory.
        view: All placements.
        rows: Which of them are meant, int64.
        size: Height and width of the images.
        antialias: Average over each output pixel; one point at its centre otherwise.
        pixels: Where to draw, float32 `(N * H * W, 3)`.
        covered: What has been drawn, bool `(N * H * W,)`.

    Raises:
        BundleError: What a sample is stored as is damaged.
    """
    if not len(rows):
        return
    placed = _placed(buffer, view, rows, size, antialias)
    canvas, shown = pixels.view(-1, *size, 3), covered.view(-1, *size)
    stored = buffer.stored_size.tolist()
    specs = [type(buffer.groups[group]) for group in buffer.network_group[buffer.network_start[:-1]].tolist()]
    for family in dict.fromkeys(specs[one.sample] for one in placed):
        # sample -> k -> its placements
        mine: dict[int, dict[int, list[_Placed]]] = {}
        for one in placed:
            if specs[one.sample] is family:
                mine.setdefault(one.sample, {}).setdefault(one.reduce, []).append(one)
        areas = [sum(math.prod(-(-side // k) for side in stored[sample]) for k in by_reduction) for sample, by_reduction in mine.items()]
        for chunk in _chunks(areas, PIXELS[_kind(buffer.device)]):
            wanted = [(sample, k) for sample in [list(mine)[i] for i in chunk] for k in mine[sample]]
            surfaces = SURFACES[family](buffer, [sample for sample, _ in wanted], [k for _, k in wanted])
            for (sample, k), surface in zip(wanted, surfaces, strict=True):
                for one in mine[sample][k]:
                    _draw(one, surface, canvas[one.output], shown[one.output])


def _placed(buffer: ShardBuffer, view: View, rows: Tensor, size: tuple[int, int], antialias: bool) -> list[_Placed]:
    """The placements that reach an output pixel; one transfer from the device."""
    jobs = Jobs(buffer.network_start[view.sample[rows]], rows, rows.new_zeros(len(rows), 4), torch.ones_like(rows))
    jobs = reach(buffer, view, jobs, size)
    placement = jobs.placement
    reduce = samples = torch.ones_like(placement)
    if antialias:
        scale = scales(view)[placement]
        reduce = (scale.amin(1) * (1 + UNIT)).log2().floor().clamp(0, math.log2(MAX_REDUCTION)).exp2().long()
        samples = points_a_side(scale.amax(1) / reduce)
    integers = torch.stack([view.output[placement], view.sample[placement], reduce, samples], 1)
    reals = torch.cat([view.matrix[placement].flatten(1), view.clip[placement]], 1)
    return [
        _Placed(output, sample, k, n, (x0, y0, x1, y1), tuple(numbers[:9]), tuple(numbers[9:]), matrix, clip)
        for (output, sample, k, n), (x0, y0, x1, y1), numbers, matrix, clip in zip(
            integers.tolist(), jobs.box.tolist(), reals.tolist(), view.matrix[placement], view.clip[placement], strict=True
        )
    ]


def _draw(one: _Placed, surface: Tensor, canvas: Tensor, shown: Tensor) -> None:
    """Draw one placement into its image `(H, W, 3)`, and mark what it shows."""
    steps = _unit_steps(one)
    if steps is not None:
        _copy(one, surface, steps, canvas, shown)
        return
    x0, y0, x1, y1 = one.box
    n, device = one.points, surface.device
    height, width = surface.shape[1:]
    band = max(1, POINTS[_kind(device)] // ((x1 - x0) * n * n))
    step = (torch.arange(n, device=device) + 0.5) / n
    columns = torch.arange(x0, x1, device=device)
    half = torch.tensor([[width], [height]], device=device) * one.reduce / 2
    for top in range(y0, y1, band):
        rows = torch.arange(top, min(y1, top + band), device=device)
        centre = map_points(one.matrix[None], *_grid(columns + 0.5, rows + 0.5))
        visible = inside(centre, one.clip[None]).view(len(rows), len(columns))
        points = centre if n == 1 else map_points(one.matrix[None], *_grid((columns[:, None] + step).flatten(), (rows[:, None] + step).flatten()))
        grid = (points / half - 1).view(1, 2, n * len(rows), n * len(columns)).permute(0, 2, 3, 1)
        colour = F.grid_sample(surface[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
        colour = colour if n == 1 else F.avg_pool2d(colour, n)
        place = slice(int(top), int(top) + len(rows)), slice(x0, x1)
        canvas[place] = torch.where(visible[..., None], colour[0].permute(1, 2, 0), canvas[place])
        shown[place] |= visible


def _grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, row by row, `(1, P)` each."""
    return x.repeat(len(y))[None], y.repeat_interleave(len(x))[None]


def _unit_steps(one: _Placed) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Direction and offset, for x and y, where every output pixel is one pixel of the surface; else None."""
    a, b, tx, c, d, ty, *last = one.numbers
    if one.points != 1 or last != [0, 0, 1] or not all(map(math.isfinite, one.numbers)):
        return None
    steps, far = [], max(one.box[2:])
    for own, other, offset, ends in ((a, b, tx, one.box[::2]), (d, c, ty, one.box[1::2])):
        sign, whole = (1 if own > 0 else -1), round(offset / one.reduce)
        off = max(abs((own * end + offset) / one.reduce - (sign * end + whole)) for end in ends) + abs(other) / one.reduce * far
        if off > UNIT:
            return None
        steps.append((sign, whole))
    return steps[0], steps[1]


def _copy(one: _Placed, surface: Tensor, steps: tuple[tuple[int, int], tuple[int, int]], canvas: Tensor, shown: Tensor) -> None:
    """Draw a placement whose output pixels are pixels of the surface."""
    picture = surface
    places = []
    for axis, (sign, offset) in enumerate(steps):
        out = np.arange(one.box[axis], one.box[axis + 2])
        at = sign * (out + 0.5) + offset  # the centre's coordinate on the surface
        seen = np.flatnonzero((at * one.reduce >= one.bounds[axis]) & (at * one.reduce < one.bounds[axis + 2]))
        if not len(seen):
            return
        places.append(slice(int(out[seen[0]]), int(out[seen[-1]]) + 1))
        picture = _take(picture, 2 - axis, np.floor(at[seen]).astype(np.int64))
    canvas[places[1], places[0]] = picture.permute(1, 2, 0)
    shown[places[1], places[0]] = True


def _take(picture: Tensor, axis: int, chosen: NDArray[np.int64]) -> Tensor:
    """Consecutive rows or columns, forwards or backwards; beyond its border a picture goes on as its border."""
    last = picture.shape[axis] - 1
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high > last:
        return picture.index_select(axis, torch.from_numpy(chosen.clip(0, last)).to(picture.device))
    part = picture.narrow(axis, low, high - low + 1)
    return part if chosen[0] <= chosen[-1] else part.flip(axis)


def _chunks(weights: Iterable[int], most: int) -> Iterator[list[int]]:
    """Consecutive numbers from 0 whose weights add up to at most `most`, or one alone."""
    chunk: list[int] = []
    total = 0
    for i, weight in enumerate(weights):
        if chunk and total + weight > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(i)
        total += weight
    if chunk:
        yield chunk


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def split_families(buffer: ShardBuffer, view: View) -> tuple[Tensor, Tensor]:
    """Which placements are of sine networks, and which of samples that have surfaces: rows of the view."""
    rows = torch.arange(len(view.output), device=view.output.device)
    surfaced = [not isinstance(spec, NetworkSpec) for spec in buffer.groups]
    if not any(surfaced):
        return rows, rows[:0]
    if all(surfaced):
        return rows[:0], rows
    mask = torch.tensor(surfaced, device=rows.device)[buffer.network_group[buffer.network_start[view.sample]]]
    return rows[~mask], rows[mask]
