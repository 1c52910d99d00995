"""A small dictionary for tests of the family `tile`: bases that can really show a picture, tables that fit what it gives. Made in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.analysis import Analysis, dump_analysis, mirrored, principal_lapped_basis
from rinr_loader.bundle import Bundle, Network, TileSpec, pack
from rinr_loader.codecs.tile import FILTER_WIDTH, OVERLAP, RESIDUAL_CHANNELS, RESIDUAL_TILE, TILE, lattice_of
from rinr_loader.dictionary import CONTEXTS, Dictionary, Prior, dump, load
from rinr_loader.latents import differences
from rinr_loader.priors import Observed, fit_tables
from rinr_loader.stream import Lattice, Rect, write_stream

CHANNELS, PREDICTED = 16, 3
ENDS, CLASSES = (3, 7), 8  # and the last group ends with the channels
RESIDUAL_ENDS, RESIDUAL_CLASSES = (6, 24, 72, RESIDUAL_CHANNELS), 6


def natural(seed: int, height: int, width: int, *, smoothness: float = 2.2) -> NDArray[np.uint8]:
    """Noise with about the spectrum of photographs, `(height, width, 3)`: what a basis of smooth functions shows well, but never wholly."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
    y, x = torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64)
    field = torch.fft.ifft2(torch.fft.fft2(noise) / (0.01 + (x**2 + y**2).sqrt()) ** smoothness).real
    field /= field.std((1, 2), correction=0, keepdim=True).clamp_min(1e-6)
    colour = field[:1] + 0.25 * field * torch.tensor([0.0, 1, 1], dtype=torch.float64)[:, None, None]
    pixels: NDArray[np.uint8] = (127.5 + 40 * colour).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return pixels


def cosines() -> Tensor:
    """An orthonormal basis of 8x8 blocks, float32 `(192, 3, 8, 8)`: cosines of grey and two colours, from low frequencies to high."""
    k = torch.arange(8, dtype=torch.float64)
    waves = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) / 2
    waves[0] /= 2**0.5
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    order = sorted((y + x + 2 * (c > 0), y, x, c) for y in range(8) for x in range(8) for c in range(3))
    return torch.stack([colours[c][:, None, None] * waves[y][:, None] * waves[x] for _, y, x, c in order]).float()


@cache
def columns_of(channels: int = CHANNELS) -> dict[str, NDArray[Any]]:
    """The tensors of the dictionary, as `dump` takes them."""
    pictures = [torch.from_numpy(natural(seed, 96, 128)).permute(2, 0, 1)[None].float() - 127.5 for seed in range(4)]
    basis = principal_lapped_basis(torch.cat(pictures), channels).half().float()
    generator = torch.Generator().manual_seed(1)
    columns: dict[str, NDArray[Any]] = {"basis": _half(basis), "residual.basis": _half(cosines()), "predicted": np.array([PREDICTED], np.uint8)}
    for i, (out, into) in enumerate(((FILTER_WIDTH, 12), (FILTER_WIDTH, FILTER_WIDTH), (12, FILTER_WIDTH))):
        gain = 0.05 if i == 2 else 0.3
        columns[f"filter.{i}.weight"] = _half(gain * torch.randn(out, into, 3, 3, generator=generator) / into**0.5)
        columns[f"filter.{i}.bias"] = _half(0.01 * torch.randn(out, generator=generator))
        if i < 2:
            columns[f"filter.{i}.step"] = _half(0.05 * torch.randn(out, generator=generator))

    background, residual = [], []
    for picture in pictures:
        latents = torch.nn.functional.conv2d(mirrored(picture, OVERLAP), basis, stride=TILE)[0]
        across = latents.shape[2]
        blocks = torch.nn.functional.unfold(picture - picture.mean(), RESIDUAL_TILE, stride=RESIDUAL_TILE)[0].T / 4
        for step in (15.0, 40.0, 100.0, 400.0):
            coded = differences((latents.flatten(1).T / step).round(), across, PREDICTED)
            background.append(_observed(coded, (*ENDS, channels), CLASSES, across))
            coded = (blocks @ cosines().flatten(1).T / step).round()
            residual.append(_observed(coded, RESIDUAL_ENDS, RESIDUAL_CLASSES, picture.shape[3] // RESIDUAL_TILE))
    first = fit_tables(background, (*ENDS, channels), CLASSES, "background")
    second = fit_tables(residual, RESIDUAL_ENDS, RESIDUAL_CLASSES, "residual")
    second["residual.tables"] = second["residual.tables"] + np.uint8(len(first["symbols"]))
    symbols, radius = (np.concatenate([first.pop(name), second.pop(name)]) for name in ("symbols", "radius"))
    columns |= first | second
    tables = ("background.tables", "residual.tables")
    used = np.unique(np.concatenate([columns[name].ravel() for name in tables]))  # the file is committed beside golden bundles: no table in vain
    columns |= {"symbols": symbols[used], "radius": radius[used]}
    columns |= {name: np.searchsorted(used, columns[name]).astype(np.uint8) for name in tables}
    return columns


def _half(values: Tensor) -> NDArray[np.float16]:
    half: NDArray[np.float16] = values.numpy().astype(np.float16)
    return half


def _observed(symbols: Tensor, ends: Sequence[int], classes: int, across: int) -> Observed:
    """Latents with classes by their size; the context of the first group is none."""
    chosen = []
    for a, b in zip((0, *ends[:-1]), ends, strict=True):
        size = symbols[:, a:b].abs().mean(1)
        level = (size.clamp_min(1e-3).log2() + 5).long().clamp(1, classes - 1)
        chosen.append(torch.where(size > 0, level, 0))
    return Observed(symbols, torch.stack(chosen, 1), across, torch.full((len(symbols),), CONTEXTS - 1))


@cache
def tiny_dictionary(channels: int = CHANNELS) -> Dictionary:
    return load(dump(columns_of(channels), {"made": "for tests"}), "tiny.bin")


@cache
def tiny_analysis(channels: int = CHANNELS) -> bytes:
    return analysis_of(tiny_dictionary(channels))


def analysis_of(dictionary: Dictionary) -> bytes:
    """The analysis of such a dictionary: its basis, and no correction."""
    analysis = Analysis(dictionary.channels)
    with torch.no_grad():
        for value in analysis.parameters():
            value.zero_()
        analysis.linear.weight.copy_(dictionary.basis)
    return dump_analysis(analysis, dictionary.sha256)


def tiny_shared(channels: int = CHANNELS) -> dict[str, bytes]:
    """Dictionary and analysis, as `encode_unit` takes them."""
    dictionary = tiny_dictionary(channels)
    return {dictionary.sha256: dictionary.data, "analysis": tiny_analysis(channels)}


# --- lattices and bundles of random latents ---


def random_lattice(rng: np.random.Generator, prior: Prior, rect: Rect, tile: int, *, busy: float = 0.6, escapes: float = 0.0) -> Lattice:
    """Symbols and classes that belong together, as any encoder might choose them.

    Args:
        busy: Share of the groups that are not of class 0.
        escapes: Share of the symbols that no table holds.
    """
    rows, across = lattice_of(rect, tile)
    groups, kinds = prior.buckets.shape
    classes = rng.integers(1, kinds, (rows * across, groups)) * (rng.random((rows * across, groups)) < busy)
    shape = (rows * across, len(prior.group_of))
    symbols = np.rint(rng.laplace(0, 1.5, shape)).astype(np.int64)
    far = rng.random(shape) < escapes
    symbols[far] = rng.choice([-32767, -5000, -129, 129, 300, 32767], int(far.sum()))
    return Lattice(np.where(classes[:, prior.group_of] > 0, symbols, 0), classes, rect)


def random_tile_bundle(
    seed: int,
    size: tuple[int, int],
    *,
    dictionary: Dictionary | None = None,
    layers: int = 1,
    step: float = 30.0,
    residuals: Sequence[tuple[Rect, float, int]] = (),
    busy: float = 0.6,
) -> bytes:
    """A bundle of random latents: `residuals` are rectangle, step and feather of each."""
    rng, chosen = np.random.default_rng(seed), dictionary or tiny_dictionary()
    whole = (0, 0, size[1], size[0])
    background = random_lattice(rng, chosen.background, whole, TILE, busy=busy)
    background.symbols[:, : chosen.predicted] = np.clip(background.symbols[:, : chosen.predicted], -1, 1)  # their sums should stay in sight
    parts = [random_lattice(rng, chosen.residual, rect, RESIDUAL_TILE, busy=busy) for rect, _, _ in residuals]
    stream, lanes = write_stream(chosen, background, parts)
    networks = [Network(TileSpec("background", layers, lanes), whole, step, stream)]
    networks += [Network(TileSpec("residual"), rect, own, b"", ramp) for rect, own, ramp in residuals]
    return pack(Bundle(size, size, tuple(networks), shared=chosen.key))
