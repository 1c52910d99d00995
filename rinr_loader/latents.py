"""Latents to integers: which class and which integers are worth their bits, under the tables of a dictionary.

Minimises bits + lambda * squared error. The bases are close to orthonormal, so the squared error of a picture is that of its latents, each times the
energy of its basis function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.codecs.rans import PROBABILITY_BITS
from rinr_loader.codecs.tile import BAND
from rinr_loader.dictionary import CONTEXTS, Prior

ESCAPE_BITS = 16
DEAD_ZONE = 0.6  # magnitudes below it are zero in the first guess
# Bits that a squared error of one step is worth. 8 would be a uniform quantizer's own slope, and is right for the orthonormal basis of residuals
# (of 4, 5, 6, 8, 10 and 14). The background's basis is not orthogonal, and is trained for 24; 16 and 20 give the same curves, 30 and 40 worse ones.
STRENGTH, RESIDUAL_STRENGTH = 24.0, 8.0
FIRST_SHARE, LEAST_SHARE = 0.5, 0.01  # of the latents that a step of refinement takes
ROUNDS = 2  # of choosing integers for the classes and classes for the integers
# Representatives of magnitudes in the choice of a class, where a cost for each would be too much work
LEVELS = (0, 1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63, 95, 128)


@dataclass(frozen=True)
class Costs:
    """Bits, as tables.

    Args:
        prior: What they belong to.
        magnitude: Bits of each magnitude up to 256, for each symbol table, `(T, 257)`.
        table: Symbol table of each class and channel, `(K, C)`.
        classes: Bits of a class in each context, `(groups, CONTEXTS, CONTEXTS, K)`.
        buckets: What each class counts as when it is context, `(groups, K)`.
    """

    prior: Prior
    magnitude: Tensor
    table: Tensor
    classes: Tensor
    buckets: Tensor


def costs_of(symbols: NDArray[np.integer], radius: NDArray[np.int64], prior: Prior) -> Costs:
    """The costs of one kind of lattice.

    Args:
        symbols: Frequencies of the symbol tables, `(T, 256)`.
        radius: Of each, `(T,)`.
        prior: How the lattice is coded.
    """
    rows, magnitude = np.arange(len(radius))[:, None], np.arange(257)
    inside = magnitude <= radius[:, None]
    share = np.where(inside, symbols[rows, np.minimum(radius[:, None] + magnitude, 255)], symbols[rows, 2 * radius[:, None] + 1])
    bits = PROBABILITY_BITS - np.log2(share) + np.where(inside, 0, ESCAPE_BITS)
    groups, classes = prior.buckets.shape
    return Costs(
        prior,
        torch.from_numpy(bits).float(),
        torch.from_numpy(prior.tables),
        torch.from_numpy(PROBABILITY_BITS - np.log2(prior.classes)).float().view(groups, CONTEXTS, CONTEXTS, classes),
        torch.from_numpy(prior.buckets.astype(np.int64)),
    )


def choose_classes(costs: Costs, symbols: Tensor, left: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest class of each tile and group.

    Args:
        costs: Of this kind of lattice.
        symbols: Integers, `(T, C)`.
        left: Context of each tile and group on the left side: a bucket, or the last context for none, int64 `(T, groups)`.
        extra: Context of the first group, int64 `(T,)`.

    Returns:
        Classes, int64 `(T, groups)`, and the bits of everything, `(T, groups)`.
    """
    size = symbols.abs()
    level = torch.bucketize(size, torch.tensor(LEVELS, dtype=size.dtype), right=True) - 1
    chosen, bits = [], []
    above = extra
    for g, (a, b) in enumerate(costs.prior.bounds):
        mine = costs.magnitude[costs.table[:, a:b]]  # [K, c, 257]
        total = costs.classes[g, left[:, g], above].clone()  # [T, K]
        highest = int(level[:, a:b].max()) if len(level) else 0
        zero = mine[:, :, 0]
        total += zero.sum(1)
        for i in range(1, highest + 1):
            total.addmm_((level[:, a:b] == i).float(), (mine[:, :, LEVELS[i]] - zero).T)
        nothing = (size[:, a:b] == 0).all(1)
        total[:, 0] = torch.where(nothing, costs.classes[g, left[:, g], above, 0], torch.inf)
        least = total.min(1)
        chosen.append(least.indices)
        bits.append(least.values)
        above = costs.buckets[g, least.indices]
    return torch.stack(chosen, 1), torch.stack(bits, 1)


def quantise(costs: Costs, values: Tensor, energy: Tensor, strength: float, columns: int, extra: Tensor, exact: int = 0) -> tuple[Tensor, Tensor]:
    """Integers and classes for the latents of one lattice.

    Args:
        costs: Of this kind of lattice.
        values: Latents in steps, row by row, `(T, C)`.
        energy: Of each channel's basis function, `(C,)`.
        strength: Bits that a squared error of one step is worth.
        columns: Tiles of a row.
        extra: See `choose_classes`.
        exact: Channels, the first, that are only rounded and stored as differences: see `Dictionary.predicted`.

    Returns:
        Integers as they are synthesised, float32 `(T, C)`, and classes, int64 `(T, groups)`.
    """
    means = differences(values[:, :exact].round(), columns, exact)
    found = [
        _quantise_band(costs, values[band], means[band], strength * energy, columns, extra[band], exact) for band in _bands(len(values), columns)
    ]
    integers, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    return integers, classes


def recode(costs: Costs, integers: Tensor, classes: Tensor, columns: int, exact: int) -> Tensor:
    """The cheapest classes for integers whose classes were chosen for others, or by parts: see `quantise`."""
    means, left = differences(integers[:, :exact], columns, exact), left_context(costs, classes, columns)
    none = torch.full((len(integers),), CONTEXTS - 1)
    return torch.cat(
        [
            choose_classes(costs, torch.cat([means[band], integers[band, exact:]], 1), left[band], none[band])[0]
            for band in _bands(len(integers), columns)
        ]
    )


def _bands(tiles: int, columns: int) -> list[slice]:
    """Whole rows of tiles whose integers are chosen together: beyond their latents, that takes some 10 KB a tile."""
    rows = max(1, BAND // columns) * columns
    return [slice(i, i + rows) for i in range(0, tiles, rows)]


def _quantise_band(costs: Costs, values: Tensor, means: Tensor, weight: Tensor, columns: int, extra: Tensor, exact: int) -> tuple[Tensor, Tensor]:
    """Whole rows of tiles; `means` is what is coded for the first channels, which no choice changes."""
    size, sign = values.abs(), values.sign()
    rounded = (size + 1 - DEAD_ZONE).floor() * sign
    rounded[:, :exact] = values[:, :exact].round()
    group_of = torch.from_numpy(costs.prior.group_of)
    left = torch.full((len(values), len(costs.prior.ends)), CONTEXTS - 1)
    for _ in range(ROUNDS):
        classes, _ = choose_classes(costs, torch.cat([means, rounded[:, exact:]], 1), left, extra)
        left = left_context(costs, classes, columns)
        table = costs.table[classes[:, group_of], torch.arange(values.shape[1])]
        best, found = _rounding(costs, table, size, weight)
        # A class for a few small values can cost more than they are worth: all zeros is always a choice.
        loss = size.square() * weight
        for g, (a, b) in enumerate(costs.prior.bounds):
            spent = best[:, a:b].sum(1) + costs.classes[g, left[:, g]].mean(1).gather(1, classes[:, g : g + 1])[:, 0]
            saved = loss[:, a:b].sum(1) + costs.classes[g, left[:, g]].mean(1)[:, 0]
            empty = (saved < spent) | (classes[:, g] == 0)
            found[:, a:b] = torch.where(empty[:, None], 0.0, found[:, a:b])
        found = found * sign
        found[:, :exact] = rounded[:, :exact]
        rounded = found
    classes, _ = choose_classes(costs, torch.cat([means, rounded[:, exact:]], 1), left, extra)
    return rounded, classes


def _rounding(costs: Costs, table: Tensor, size: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The best of three magnitudes for each latent, the nearest, the one below and none, and what it costs."""
    nearest = size.round()

    def cost_of(candidate: Tensor) -> Tensor:
        return costs.magnitude[table, candidate.clamp_max(256).long()] + (size - candidate).square() * weight

    best, found = cost_of(nearest), nearest
    for candidate in ((nearest - 1).clamp_min(0), torch.zeros_like(nearest)):
        cost = cost_of(candidate)
        better = cost < best
        best, found = torch.where(better, cost, best), torch.where(better, candidate, found)
    return best, found


def left_context(costs: Costs, classes: Tensor, columns: int) -> Tensor:
    """What the tile on the left is as context, `(T, groups)`; the last context in the first column."""
    bucket = costs.buckets[torch.arange(classes.shape[1]), classes]
    left = torch.roll(bucket, 1, 0)
    left[::columns] = CONTEXTS - 1
    return left


def differences(latents: Tensor, columns: int, predicted: int) -> Tensor:
    """What is coded: the first channels less the tile on the left, in the first column less the tile above."""
    if not predicted:
        return latents
    means = latents[:, :predicted].unflatten(0, (-1, columns))
    coded = means.clone()
    coded[:, 1:] -= means[:, :-1]
    coded[1:, 0] -= means[:-1, 0]
    return torch.cat([coded.flatten(0, 1), latents[:, predicted:]], 1)


def psnr_of(error: float) -> float:
    """PSNR in dB of a mean squared error in grey levels."""
    return 10 * math.log10(255**2 / max(error, 1e-9))


def improve(
    costs: Costs,
    integers: Tensor,
    classes: Tensor,
    measure: Callable[[Tensor], tuple[Tensor, float]],
    energy: Tensor,
    strength: float,
    columns: int,
    exact: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Refine integers by what the decoder really shows.

    Each step takes some of the latents, moves them by a Newton step of the squared error as if the basis were orthogonal, and rounds to what is
    worth its bits. Neighbours that mend the same error overshoot together: a step that makes things worse is taken back, and the next one
    takes half as many latents.

    Args:
        costs, integers, classes, energy, strength, columns, exact: See `quantise`.
        measure: The squared error's gradient in steps `(T, C)`, and the error itself in squared steps, for integers `(T, C)`.
        steps: How many, at most.

    Returns:
        Integers and classes.
    """
    group_of = torch.from_numpy(costs.prior.group_of)
    none = torch.full((len(integers),), CONTEXTS - 1)
    generator = torch.Generator().manual_seed(0)
    channel = torch.arange(integers.shape[1])

    def coded(integers: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        chosen, bits = choose_classes(costs, differences(integers, columns, exact), left_context(costs, classes, columns), none)
        return chosen, float(bits.sum())

    classes, bits = coded(integers, classes)
    gradient, error = measure(integers)
    share = FIRST_SHARE
    for _ in range(steps):
        moved = integers - gradient / (2 * energy)
        mine = torch.rand(integers.shape, generator=generator) < share
        mine[:, :exact] = False
        mine &= classes[:, group_of] > 0
        _, found = _rounding(costs, costs.table[classes[:, group_of], channel], moved.abs(), strength * energy)
        tried = torch.where(mine, found * moved.sign(), integers)
        new_classes, new_bits = coded(tried, classes)
        new_gradient, new_error = measure(tried)
        if new_bits + strength * new_error < bits + strength * error:
            integers, classes, bits, gradient, error = tried, new_classes, new_bits, new_gradient, new_error
        else:
            share /= 2
            if share < LEAST_SHARE:
                break
    return integers, classes
