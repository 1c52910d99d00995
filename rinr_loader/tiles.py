"""The surfaces of samples of the family `tile`: streams to latents, latents to colour, residuals on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rinr_loader.bundle import TileSpec
from rinr_loader.codecs.tile import TILE, lattice_of, picture, residual, scaled_basis
from rinr_loader.dictionary import Dictionary, find
from rinr_loader.reader import ShardBuffer
from rinr_loader.stream import Rect, count_bytes, read_streams
from rinr_loader.view import feather

LINEAR = 4  # the coarsest basis; beyond it pictures are averaged


def open_tiles(buffer: ShardBuffer, samples: Sequence[int]) -> Callable[[Sequence[int], Sequence[int], Sequence[Rect]], list[Tensor]]:
    """Decode the streams of samples of the family `tile`, all together: a step takes the same time for many as for a few.

    At 1/2 and below `tile-2` is not filtered: halving its size takes away most of what the filter mends.

    Args:
        buffer: Where they are.
        samples: Which, distinct.

    Returns:
        What makes surfaces: a function of some of the samples, in any order, k of each, and the stored pixels that matter of each. What is
        far from those is not decoded.

    Raises:
        BundleError: A stream is damaged, or its shared parameters are not there.
    """
    latents: dict[int, list[Tensor]] = {}
    rects: dict[int, list[Rect]] = {}
    dictionaries: dict[int, Dictionary] = {}
    for mine, streams in _streams(buffer, samples):
        for sample, rect, parts in zip(mine, streams[4], read_streams(*streams), strict=True):
            rects[sample], dictionaries[sample] = rect, streams[0]
            latents[sample] = [torch.from_numpy(part).to(buffer.device) for part in parts]
    row = dict(zip(samples, buffer.network_start[list(samples)].tolist(), strict=True))

    bases: dict[tuple[str, int], Tensor] = {}

    def basis_of(dictionary: Dictionary, k: int) -> Tensor:
        if (dictionary.sha256, k) not in bases:
            bases[dictionary.sha256, k] = scaled_basis(dictionary.basis.to(buffer.device), k)
        return bases[dictionary.sha256, k]

    def surface(sample: int, k: int, region: Rect) -> Tensor:
        dictionary = dictionaries[sample]
        basis = basis_of(dictionary, min(k, LINEAR))
        return _surface(buffer, row[sample], dictionary, basis, latents[sample], rects[sample], k, region)

    def make(some: Sequence[int], reduce: Sequence[int], regions: Sequence[Rect]) -> list[Tensor]:
        return [surface(*wanted) for wanted in zip(some, reduce, regions, strict=True)]

    return make


_Streams = tuple[Dictionary, NDArray[np.uint8], list[tuple[int, int]], list[int], list[list[Rect]], list[str]]


def _streams(buffer: ShardBuffer, samples: Sequence[int]) -> list[tuple[list[int], _Streams]]:
    """The streams of samples, by dictionary: which samples, and what `read_streams` takes."""
    data = (buffer.data.cpu() if buffer.host is None else buffer.host).numpy()
    by_dictionary: dict[str, tuple[Dictionary, list[int]]] = {}
    for sample in samples:
        dictionary = _dictionary(buffer, sample)
        by_dictionary.setdefault(dictionary.sha256, (dictionary, []))[1].append(sample)
    found = []
    for dictionary, mine in by_dictionary.values():
        first, last = buffer.network_start[mine].tolist(), buffer.network_start[[sample + 1 for sample in mine]].tolist()
        offsets, sizes = buffer.network_offset[first].tolist(), buffer.network_bytes[first].tolist()
        spans = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
        rects = [[(a, b, c, d) for a, b, c, d in buffer.rect[i:j].long().tolist()] for i, j in zip(first, last, strict=True)]
        names = [f"{buffer.keys[sample]}.rinr" for sample in mine]
        found.append((mine, (dictionary, data, spans, [_spec(buffer, row).lanes for row in first], rects, names)))
    return found


def stream_bytes(buffer: ShardBuffer) -> list[dict[str, float]]:
    """Where the bytes of the streams of `tile` samples go, see `stream.count_bytes`; samples of other families are left out."""
    rows = buffer.network_group[buffer.network_start[:-1]].tolist()
    samples = [sample for sample, group in enumerate(rows) if isinstance(buffer.groups[group], TileSpec)]
    return [parts for _, streams in _streams(buffer, samples) for parts in count_bytes(*streams)]


def _spec(buffer: ShardBuffer, row: int) -> TileSpec:
    spec = buffer.groups[int(buffer.network_group[row])]
    if not isinstance(spec, TileSpec):
        raise TypeError(f"samples: expected the family tile, got {spec}")
    return spec


def _dictionary(buffer: ShardBuffer, sample: int) -> Dictionary:
    key = buffer.shared_hash[sample]
    found = buffer.shared.get(key)
    return found if isinstance(found, Dictionary) else find(key, f"{buffer.keys[sample]}.rinr")


def _surface(
    buffer: ShardBuffer, row: int, dictionary: Dictionary, basis: Tensor, latents: Sequence[Tensor], rects: Sequence[Rect], k: int, region: Rect
) -> Tensor:
    """One surface: the background at 1/k, and the block means of its residuals, as far as they touch the tiles of a region."""
    height, width = rects[0][3], rects[0][2]
    scale, feathers = buffer.scale[row : row + len(rects)].tolist(), buffer.feather[row : row + len(rects)].tolist()
    rows, columns = lattice_of(rects[0], TILE)
    device = buffer.device
    weights = {name: value.to(device) for name, value in dictionary.filter.items()} if _spec(buffer, row).layers == 2 and k == 1 else None
    x0, y0, x1, y1 = tiles = (region[0] // TILE, region[1] // TILE, min(columns, -(-region[2] // TILE)), min(rows, -(-region[3] // TILE)))
    image = picture(latents[0].float().T.unflatten(1, (rows, columns)), basis, weights, scale[0], tiles)
    if k > LINEAR:
        image = F.avg_pool2d(image, k // LINEAR)
    image = image[:, : -(-height // k), : -(-width // k)]
    for part, rect, step, ramp in zip(latents[1:], rects[1:], scale[1:], feathers[1:], strict=True):
        if rect[0] < x1 * TILE and x0 * TILE < rect[2] and rect[1] < y1 * TILE and y0 * TILE < rect[3]:
            weight = weight_of(rect, ramp, (height, width), device)
            _add(image, residual(part.float(), dictionary.residual_basis.to(device), step, rect) * weight, rect, (height, width), k)
    return image.add_(127.5).div_(255)


def weight_of(rect: Rect, ramp: float, size: tuple[int, int], device: torch.device) -> Tensor:
    """Feather of a residual at the centres of its pixels, `(y1 - y0, x1 - x0)`."""
    x0, y0, x1, y1 = rect
    y, x = torch.meshgrid(torch.arange(y0, y1, device=device) + 0.5, torch.arange(x0, x1, device=device) + 0.5, indexing="ij")
    points, corners = torch.stack([x.flatten(), y.flatten()])[None], torch.tensor([rect], device=device).float()
    return feather(points, corners, torch.tensor([float(ramp)], device=device), torch.tensor([size], device=device)).view(y1 - y0, -1)


def _add(image: Tensor, change: Tensor, rect: Rect, size: tuple[int, int], k: int) -> None:
    """Add a rectangle of the picture to its surface at 1/k."""
    x0, y0, x1, y1 = rect
    left, top = x0 // k, y0 // k
    if k > 1:
        padding = (x0 - left * k, -x1 % k, y0 - top * k, -y1 % k)
        change = F.avg_pool2d(F.pad(change, padding)[None], k)[0]
        for axis, start in ((1, top), (2, left)):  # the picture's last pixels may be means of fewer than k
            first = (start + torch.arange(change.shape[axis], device=change.device)) * k
            share = k / (size[axis - 1] - first).clamp(max=k)
            change = change * (share[:, None] if axis == 1 else share)
    image[:, top : top + change.shape[1], left : left + change.shape[2]] += change
