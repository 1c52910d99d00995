"""Families that are decoded to whole pictures, `tile` and `jpeg`: placements are sampled from *surfaces*.

A surface is a sample's picture at 1, 1/2, 1/4 or 1/8 of its stored size: each of its pixels is the mean of k x k stored ones. Where fewer are left
at the right and lower border, `jpeg` takes the mean of those, and `tile` lets its tiles go on beyond the border. It is float32
`(3, ceil(H / k), ceil(W / k))`, colour 0 to 1, not clamped. Each is made once for all placements that want it, and `PIXELS[device]` pixels of
them stand in memory together (but one, however large).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rinr_loader.bundle import JpegSpec, NetworkSpec, Spec, TileSpec
from rinr_loader.codecs.jpeg import decode_files
from rinr_loader.reader import ShardBuffer
from rinr_loader.tiles import open_tiles
from rinr_loader.view import Jobs, View, inside, map_points, points_a_side, reach, scales

MAX_REDUCTION = 8
PIXELS = {"cpu": 1 << 21, "cuda": 1 << 27}  # of surfaces, 12 bytes each, and of pictures that are decoded to make them
OPENED = {"cpu": 1 << 24, "cuda": 1 << 27}  # pixels of samples that are opened together, some 10 bytes each: see `SURFACES`
POINTS = {"cpu": 1 << 15, "cuda": 1 << 23}  # sampled by one launch; on a CPU they should stay in the cache of a core
UNIT = 1e-3  # pixels by which a placement may miss the pixels of a surface and still copy them

Box = tuple[int, int, int, int]
Finish = Callable[[Tensor], Tensor]
MakeSurfaces = Callable[[Sequence[int], Sequence[int], Sequence[Box]], list[Tensor]]
OpenSurfaces = Callable[[ShardBuffer, Sequence[int]], MakeSurfaces]


def open_jpegs(buffer: ShardBuffer, samples: Sequence[int]) -> MakeSurfaces:
    """What makes the surfaces of samples of the family `jpeg`: nothing is worth doing for all of them at once."""
    return partial(jpeg_surfaces, buffer)


def jpeg_surfaces(buffer: ShardBuffer, samples: Sequence[int], reduce: Sequence[int], regions: Sequence[Box]) -> list[Tensor]:
    """The surfaces of samples of the family `jpeg`.

    Args:
        buffer: Where they are.
        samples: Which, in any order; one that stands in several places is decoded once.
        reduce: k of each.
        regions: The stored pixels that matter of each; a JPEG is decoded whole.

    Raises:
        BundleError: A JPEG is damaged.
    """
    data = buffer.data.cpu() if buffer.host is None else buffer.host
    distinct = sorted(set(samples))
    rows = buffer.network_start[distinct]
    first, nbytes = buffer.network_offset[rows].tolist(), buffer.network_bytes[rows].tolist()
    sizes = [(height, width) for height, width in buffer.stored_size[distinct].tolist()]
    found: list[Tensor | None] = [None] * len(samples)
    for chunk in _parts(range(len(sizes)), lambda i: math.prod(sizes[i]), PIXELS[_kind(buffer.device)]):
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
        k: A power of two.

    Returns:
        Float32, `(C, ceil(H / k), ceil(W / k))`, new.
    """
    if k == 1:
        return image.to(torch.float32, copy=True)
    _, height, width = image.shape
    missing = -height % k, -width % k
    channels = []
    for channel in image.unbind():  # one by one: in between, only one of them is as large as four bytes a pixel
        total = F.pad(channel.float(), (0, missing[1], 0, missing[0]))
        step = k
        while step > 1:  # halving sums is several times as fast as pooling
            total, step = total[0::2] + total[1::2], step // 2
            total = total[:, 0::2] + total[:, 1::2]
        total[-1] *= k / (k - missing[0])
        total[:, -1] *= k / (k - missing[1])
        channels.append(total)
    return torch.stack(channels).div_(k * k)


# How each family makes its surfaces: a function of the buffer and samples, distinct, does what is better done for many at once, and gives a
# function of some of these samples, k of each, and the stored pixels that matter of each. Equal samples stand side by side.
SURFACES: dict[type[Spec], OpenSurfaces] = {JpegSpec: open_jpegs, TileSpec: open_tiles}


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


def paint(buffer: ShardBuffer, view: View, rows: Tensor, antialias: bool, images: Tensor, finish: Finish) -> None:
    """Draw placements of samples that have surfaces.

    Args:
        buffer: Samples in memory.
        view: All placements.
        rows: Which of them are meant, int64.
        antialias: Average over each output pixel; one point at its centre otherwise.
        images: Where to draw, `(N, 3, H, W)`; what they show does not change where no placement is seen.
        finish: From colour `(3, h, w)`, which it may overwrite, to what `images` hold.

    Raises:
        BundleError: What a sample is stored as is damaged.
    """
    if not len(rows):
        return
    placed = _placed(buffer, view, rows, (images.shape[2], images.shape[3]), antialias)
    stored = buffer.stored_size.tolist()
    specs = [type(buffer.groups[group]) for group in buffer.network_group[buffer.network_start[:-1]].tolist()]
    for family in dict.fromkeys(specs[one.sample] for one in placed):
        # sample -> k -> its placements
        mine: dict[int, dict[int, list[_Placed]]] = {}
        for one in placed:
            if specs[one.sample] is family:
                mine.setdefault(one.sample, {}).setdefault(one.reduce, []).append(one)
        for opened in _parts(list(mine), lambda sample: math.prod(stored[sample]), OPENED[_kind(buffer.device)]):
            make = SURFACES[family](buffer, opened)
            areas = {sample: sum(math.prod(-(-side // k) for side in stored[sample]) for k in mine[sample]) for sample in opened}
            for part in _parts(opened, areas.__getitem__, PIXELS[_kind(buffer.device)]):
                wanted = [(sample, k) for sample in part for k in mine[sample]]
                regions = [_region(mine[sample][k], stored[sample]) for sample, k in wanted]
                for (sample, k), surface in zip(wanted, make([sample for sample, _ in wanted], [k for _, k in wanted], regions), strict=True):
                    for one in mine[sample][k]:
                        _draw(one, surface, images[one.output], finish)


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


def _region(placed: Sequence[_Placed], size: Sequence[int]) -> Box:
    """The stored pixels that placements of one sample show, and those beside them that interpolation and reduction reach."""
    height, width = size
    corners = []
    for one in placed:
        if one.numbers[6:] != (0, 0, 1) or not all(map(math.isfinite, one.numbers)):
            return 0, 0, width, height
        a, b, c, d, e, f, *_ = one.numbers
        x0, y0, x1, y1 = one.box
        border = 2 * one.reduce
        for x, y in ((x0, y0), (x1, y0), (x0, y1), (x1, y1)):
            corners += [(a * x + b * y + c + more, d * x + e * y + f + more) for more in (-border, border)]
    left, right = (min(max(math.floor(pick(x for x, _ in corners)), 0), width) for pick in (min, max))
    top, bottom = (min(max(math.floor(pick(y for _, y in corners)), 0), height) for pick in (min, max))
    # What lies beyond the picture shows its border.
    return min(left, width - 1), min(top, height - 1), max(right, 1), max(bottom, 1)


def _draw(one: _Placed, surface: Tensor, image: Tensor, finish: Finish) -> None:
    """Draw one placement into its image `(3, H, W)`."""
    _, b, _, c, _, _, *last = one.numbers
    if (b, c, last) == (0, 0, [0, 0, 1]) and all(map(math.isfinite, one.numbers)):
        _draw_upright(one, surface, image, finish)
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
        place = image[:, top : top + len(rows), x0:x1]
        place.copy_(torch.where(visible, finish(colour[0]), place))


def _grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, row by row, `(1, P)` each."""
    return x.repeat(len(y))[None], y.repeat_interleave(len(x))[None]


def _draw_upright(one: _Placed, surface: Tensor, image: Tensor, finish: Finish) -> None:
    """Draw a placement that is neither turned nor askew: rows, then columns, which is several times as fast as points."""
    matrix = torch.tensor(one.numbers).view(1, 3, 3)
    colour, places = surface, []
    for axis in (1, 0):  # y first: rows lie together in memory
        out = torch.arange(one.box[axis], one.box[axis + 2]) + 0.5
        still = torch.full_like(out, 0.5)
        points = (out[None], still[None]) if axis == 0 else (still[None], out[None])
        centre = map_points(matrix, *points)[0, axis].numpy()
        seen = np.flatnonzero((centre >= one.bounds[axis]) & (centre < one.bounds[axis + 2]))
        if not len(seen):
            return
        first, last = one.box[axis] + int(seen[0]), one.box[axis] + int(seen[-1]) + 1
        places.append(slice(first, last))
        factor, offset = one.numbers[4 * axis] / one.reduce, one.numbers[3 * axis + 2] / one.reduce
        colour = _resample(colour, 2 - axis, np.arange(first, last), factor, offset, one.points)
    place = image[:, places[0], places[1]]
    band = max(1, POINTS[_kind(image.device)] // place.shape[2])
    for target, part in zip(place.split(band, 1), colour.split(band, 1), strict=True):
        target.copy_(finish(part.clone()))  # a copy: it may be a part of the surface, which others draw too


def _resample(picture: Tensor, axis: int, out: NDArray[np.int64], factor: float, offset: float, n: int) -> Tensor:
    """Colour at output pixels along one axis: means over n points each, interpolated between pixel centres.

    Args:
        picture: `(3, H, W)`.
        axis: 1 for rows, 2 for columns.
        out: Consecutive output pixels.
        factor, offset: From output coordinates to those of the picture.
        n: Points an output pixel.
    """
    end = picture.shape[axis] - 1
    at = factor * (out + (np.arange(n)[:, None] + 0.5) / n) + offset - 0.5  # [n, O] in pixel centres, the first one 0
    nearest = np.rint(at[0]).astype(np.int64)
    if n == 1 and np.abs(at[0] - nearest).max() <= UNIT:
        return _take(picture, axis, nearest)
    at = at.clip(0, end)
    low = np.floor(at).astype(np.int64)
    base, share = low.min(0), at - low
    weight = np.zeros((int((low - base).max()) + 2, len(out)), np.float32)
    column = np.arange(len(out))
    for below, part in zip(low - base, share, strict=True):
        weight[below, column] += (1 - part) / n
        weight[below + 1, column] += part / n
    rows = picture if axis == 1 else picture.transpose(1, 2).contiguous()
    index = torch.from_numpy(np.minimum(base + np.arange(len(weight))[:, None], end)).to(picture.device)
    shares = torch.from_numpy(weight).to(picture.device)[:, :, None]
    total = rows.index_select(1, index[0]).mul_(shares[0])
    for i in range(1, len(weight)):
        total.addcmul_(rows.index_select(1, index[i]), shares[i])
    return total if axis == 1 else total.transpose(1, 2)


def _take(picture: Tensor, axis: int, chosen: NDArray[np.int64]) -> Tensor:
    """Rows or columns as they are; beyond its border a picture goes on as its border."""
    last, count = picture.shape[axis] - 1, len(chosen)
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high > last or high - low + 1 != count:
        return picture.index_select(axis, torch.from_numpy(chosen.clip(0, last)).to(picture.device))
    part = picture.narrow(axis, low, count)
    return part if chosen[0] <= chosen[-1] else part.flip(axis)


def _parts(samples: Sequence[int], weight_of: Callable[[int], int], most: int) -> Iterator[list[int]]:
    """Consecutive samples whose weights add up to at most `most`, or one alone."""
    part: list[int] = []
    total = 0
    for sample in samples:
        weight = weight_of(sample)
        if part and total + weight > most:
            yield part
            part, total = [], 0
        part.append(sample)
        total += weight
    if part:
        yield part


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
