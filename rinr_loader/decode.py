"""Placements to pixels: the plain-torch reference, grouped by network shape, on any device.

Samples of the families `tile` and `jpeg` are drawn from surfaces, see `surfaces.py`; the rest is about sine networks. A *job* is one
network seen through one placement: which output pixels it can reach, a box of them. Jobs of one group are cut into tiles of output
pixels and evaluated many tiles at a time, so memory stays bounded whatever the batch: besides the result and a float32 scratch of
`16 * N * H * W` bytes at most, a launch works on `POINTS[device]` points, each with up to `8 * width + 128` bytes, and takes at most as
much again for the parameters of its networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rinr_loader.bundle import NetworkSpec
from rinr_loader.codecs import siren
from rinr_loader.dictionary import Dictionary
from rinr_loader.geometry import Placements
from rinr_loader.reader import ShardBuffer, buffer_of
from rinr_loader.surfaces import paint, split_families
from rinr_loader.view import Jobs, View, feather, inside, map_points, points_a_side, reach, scales, stored_view

# Points evaluated by one launch. On a CPU the activations of a launch should stay in the cache of its cores.
POINTS = {"cpu": 32768, "cuda": 1 << 20}
TILE = 1024  # output pixels of a job that are evaluated together

Normalize = tuple[Sequence[float], Sequence[float]]


def decode(
    buffer: ShardBuffer,
    placements: Placements,
    *,
    size: tuple[int, int],
    fill: float = 114,
    antialias: bool = True,
    dtype: torch.dtype = torch.uint8,
    channels_last: bool = False,
    normalize: Normalize | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode samples into images, each where its placements say.

    A pixel is the mean over its sample points of the background plus the residuals there, clamped once, at the end. It shows a
    placement where its centre falls into the placement's clip rectangle. A `direct` network covers what is under it by its mean weight.

    Args:
        buffer: Samples in memory; decoding happens on its device.
        placements: Where samples land. The number of images is the highest output index plus one, or `out.shape[0]`.
        size: Height and width of the images, in pixels.
        fill: Value of pixels that show nothing, in [0, 255].
        antialias: Average n x n points a pixel, n = ceil(stored pixels per output pixel), at most 8; one point otherwise.
        dtype: uint8 in [0, 255], or a floating type in [0, 1].
        channels_last: Memory format of the result.
        normalize: Mean and standard deviation of each channel, in [0, 1], applied to a floating result as torchvision does.
        out: Where to put the result; its dtype and memory format then decide.

    Returns:
        RGB images, `(N, 3, H, W)`, on the buffer's device.

    Raises:
        ValueError: `normalize` is asked of uint8, or `out` has another shape or too few images.
    """
    count = int(placements.output.max()) + 1 if len(placements) else 0
    height, width = size
    if out is not None:
        if out.ndim != 4 or out.shape[0] < count or tuple(out.shape[1:]) != (3, height, width):
            raise ValueError(f"out: expected shape {(count, 3, height, width)} or more images, got {tuple(out.shape)}")
        count, dtype = out.shape[0], out.dtype
    if normalize is not None and not dtype.is_floating_point:
        raise ValueError(f"normalize: expected a floating dtype, got {dtype}; pass dtype=torch.float32")
    with torch.no_grad(), full_precision(buffer.device):
        view = stored_view(buffer, placements.to(buffer.device))
        networks, surfaces = split_families(buffer, view)
        finish = _finisher(dtype, normalize, buffer.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if len(networks):
            pixels, covered = _scratch(buffer, view, networks, (count, height, width), antialias)
            pixels[~covered] = fill / 255
            colour = finish(pixels.view(count, height, width, 3).permute(0, 3, 1, 2))
            images = colour.to(dtype, memory_format=layout) if out is None else out.copy_(colour)
        else:
            images = torch.empty(count, 3, height, width, dtype=dtype, device=buffer.device, memory_format=layout) if out is None else out
            images.copy_(finish(torch.full((3, 1, 1), fill / 255, device=buffer.device)))
        paint(buffer, view, surfaces, antialias, images, finish)
        return images


def decode_batch(
    bundles: Sequence[bytes],
    *,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    shared: Mapping[bytes, Dictionary] | None = None,
) -> Tensor:
    """Decode a handful of bundles into images of one size, each stretched to fill it.

    Args:
        bundles: One encoded image each; sizes and network shapes may differ.
        size: Height and width of the output, in pixels; None takes the stored size, which must then be the same for all.
        device: Where the images are decoded and returned.
        shared: Shared parameters of bundles of the family `tile`, by the first 8 bytes of their SHA-256; those that come with the package
            need not be given.

    Returns:
        RGB images, uint8 in [0, 255], shape `(N, 3, H, W)`, contiguous, on `device`.

    Raises:
        BundleError: A bundle is truncated, damaged or of an unknown version.
        ValueError: No size was given and the stored sizes differ.

    Example:
        >>> decode_batch([bundle], size=(32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    buffer = buffer_of(bundles, shared=shared).to(device)
    if size is None:
        sizes = {(height, width) for height, width in buffer.stored_size.tolist()}
        if len(sizes) != 1:
            raise ValueError(f"size: expected one size for images stored at {sorted(sizes)}, got None; pass size=(height, width)")
        size = sizes.pop()
    return decode(buffer, whole(buffer, size), size=size)


def whole(buffer: ShardBuffer, size: tuple[int, int]) -> Placements:
    """Every sample of a buffer as an image of its own, stretched to `size`."""
    count, device = len(buffer), buffer.device
    source = buffer.source_size.flip(1).float()  # [S, 2] x, y
    matrix = torch.zeros(count, 3, 3, device=device)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = source[:, 0] / size[1], source[:, 1] / size[0], 1
    index = torch.arange(count, device=device)
    return Placements(output=index, sample=index, matrix=matrix, clip=torch.cat([torch.zeros_like(source), source], 1))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 as it is written: no autocast, no TF32, whatever the caller has chosen for training."""
    # One setting a backend: torch refuses to tell the precision of all of them where a caller has set only one.
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [(place, place.fp32_precision) for place in places if place.fp32_precision not in ("none", "ieee")]
    try:
        for place, _ in before:
            place.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, precision in before:
            place.fp32_precision = "none"  # as inherited, where that is the same
            if place.fp32_precision != precision:
                place.fp32_precision = precision


def _scratch(buffer: ShardBuffer, view: View, placement: Tensor, shape: tuple[int, int, int], antialias: bool) -> tuple[Tensor, Tensor]:
    """Colour `(N * H * W, 3)` of placements of sine networks, before it is limited, and which pixels they cover."""
    pixels = torch.zeros(math.prod(shape), 3, device=buffer.device)
    covered = torch.zeros(math.prod(shape), dtype=torch.bool, device=buffer.device)
    for level in _levels(buffer, view, placement, shape[1:], antialias):
        for group, spec in enumerate(buffer.groups):
            if isinstance(spec, NetworkSpec):
                mine = level[buffer.network_group[level.network] == group]
                for samples in torch.unique(mine.samples).tolist():
                    _evaluate(buffer, view, mine[mine.samples == samples], spec, samples, shape[1:], pixels, covered)
    return pixels, covered


def _levels(buffer: ShardBuffer, view: View, placement: Tensor, size: tuple[int, int], antialias: bool) -> Iterator[Jobs]:
    """Jobs of placements in the order in which they may be evaluated: backgrounds, then residuals.

    Residuals are added, so they need no order. A `direct` network covers what is under it: of several that overlap in one sample,
    each waits for those before it.
    """
    if not len(placement):
        return
    samples = points_a_side(scales(view).amax(1))[placement] if antialias else torch.ones_like(placement)
    sample = view.sample[placement]
    first, last = buffer.network_start[sample], buffer.network_start[sample + 1]
    yield reach(buffer, view, Jobs(first, placement, first.new_zeros(len(first), 4), samples), size)
    counts = last - first - 1
    of = torch.arange(len(placement), device=buffer.device).repeat_interleave(counts)
    order = torch.arange(len(of), device=buffer.device) - (counts.cumsum(0) - counts)[of]
    residuals = Jobs(first[of] + 1 + order, placement[of], first.new_zeros(len(of), 4), samples[of])
    direct = torch.tensor([spec.kind == "direct" for spec in buffer.groups], device=buffer.device)
    if len(of) and bool(direct[buffer.network_group[residuals.network]].any()):
        for k in range(int(order.max()) + 1):
            yield reach(buffer, view, residuals[order == k], size)
    elif len(of):
        yield reach(buffer, view, residuals, size)


def _evaluate(
    buffer: ShardBuffer, view: View, jobs: Jobs, spec: NetworkSpec, samples: int, size: tuple[int, int], pixels: Tensor, covered: Tensor
) -> None:
    """Evaluate jobs of one shape and add them to the scratch."""
    if not len(jobs.network):
        return
    extent = jobs.box[:, 2:] - jobs.box[:, :2]
    area = extent.prod(1)
    budget = POINTS["cuda" if area.is_cuda else "cpu"]
    tile = min(TILE, int(area.max()), max(1, budget // samples**2))
    tiles = (area + tile - 1) // tile
    job = torch.arange(len(area), device=area.device).repeat_interleave(tiles)
    start = (torch.arange(len(job), device=area.device) - (tiles.cumsum(0) - tiles)[job]) * tile
    # Parameters pass through up to 32 bytes a weight on their way to floats: small tiles of many networks are bounded by those.
    at_once = max(1, min(budget // (tile * samples**2), budget * (8 * spec.width + 128) // (32 * spec.weights)))
    for chunk in range(0, len(job), at_once):
        these = job[chunk : chunk + at_once]
        distinct, rank = torch.unique_consecutive(these, return_inverse=True)
        offset = buffer.network_offset[jobs.network[distinct]]
        raw = buffer.data[offset[:, None] + torch.arange(spec.nbytes, device=offset.device)]
        parameters = siren.from_bytes(raw, spec)[rank]
        place = start[chunk : chunk + at_once, None] + torch.arange(tile, device=area.device)
        _evaluate_tiles(buffer, view, jobs[these], spec, parameters, place, samples, size, pixels, covered)


def _evaluate_tiles(
    buffer: ShardBuffer,
    view: View,
    jobs: Jobs,
    spec: NetworkSpec,
    parameters: Tensor,
    place: Tensor,
    samples: int,
    size: tuple[int, int],
    pixels: Tensor,
    covered: Tensor,
) -> None:
    """Evaluate one tile of each job, `place` (K, T) counting its output pixels row by row."""
    box, clip, rect = jobs.box, view.clip[jobs.placement], buffer.rect[jobs.network]
    width = (box[:, 2] - box[:, 0])[:, None]
    row, column = box[:, 1, None] + place // width, box[:, 0, None] + place % width  # [K, T]
    matrix = view.matrix[jobs.placement]
    centre = map_points(matrix, column + 0.5, row + 0.5)  # [K, 2, T]
    shown = (place < ((box[:, 3] - box[:, 1])[:, None] * width)) & inside(centre, clip)
    if samples == 1:
        points = centre
    else:
        step = (torch.arange(samples, device=box.device) + 0.5) / samples
        x, y = (column[..., None, None] + step).expand(-1, -1, samples, -1), (row[..., None, None] + step[:, None]).expand(-1, -1, -1, samples)
        points = map_points(matrix, x.flatten(1), y.flatten(1))  # [K, 2, T * n * n]
    # Beyond the outermost pixel centres there was nothing to fit, so a network repeats its edge there, as an image does.
    stored = buffer.stored_size[view.sample[jobs.placement]]
    points = torch.minimum(points.clamp(min=0.5), stored.flip(1)[:, :, None] - 0.5)
    low, high = rect[:, :2, None], rect[:, 2:, None]
    coordinates = (points.clamp(low + 0.5, high - 0.5) - low) / (high - low) * 2 - 1
    value = siren.forward(parameters, spec, coordinates).mul_(buffer.scale[jobs.network][:, None, None])
    if spec.kind == "background":
        value = value.add_(0.5)
        weight = None
    else:
        weight = feather(points, rect, buffer.feather[jobs.network], stored)
        value = (value + 0.5 if spec.kind == "direct" else value).mul_(weight[:, None])
    value = value.unflatten(2, (-1, samples * samples)).mean(3)  # [K, 3, T]
    target = (view.output[jobs.placement][:, None] * size[0] + row) * size[1] + column
    flat, values = target[shown], value.transpose(1, 2)[shown]
    if weight is None:
        covered[flat] = True
        pixels[flat] = values  # not added: where rounding lets two placements claim a pixel of their seam, one of them wins
        return
    if spec.kind == "direct":
        pixels[flat] *= 1 - weight.unflatten(1, (-1, samples * samples)).mean(2)[shown][:, None]
    pixels.index_add_(0, flat, values)


def _finisher(dtype: torch.dtype, normalize: Normalize | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The last steps, once for every pixel: limit, normalise, round. In place: colour is as large as a result in float32."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in normalize or ((0.0,) * 3, (1.0,) * 3))

    def finish(colour: Tensor) -> Tensor:
        colour.clamp_(0, 1)
        if normalize is not None:
            colour.sub_(mean).div_(std)
        if not dtype.is_floating_point:
            colour.mul_(255).round_()
        return colour

    return finish
