"""Entropy tables from latents: classes, scales and contexts that fit what the quantizer gives under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.codecs.rans import PROBABILITY_BITS
from rinr_loader.dictionary import BUCKETS, CONTEXTS

TOTAL = 1 << PROBABILITY_BITS
SCALES = 64  # symbol tables of each kind of lattice
LEAST, MOST = 0.0005, 60.0  # mean magnitudes that they stand for
REACH = 9  # radius of a table in mean magnitudes
SMOOTHING = 30.0  # observations that the geometric distribution counts as


@dataclass(frozen=True)
class Observed:
    """Latents of one lattice as coded.

    Args:
        symbols: Integers, `(T, C)`.
        classes: int64 `(T, groups)`.
        columns: Tiles of a row.
        extra: Context of the first group, int64 `(T,)`.
    """

    symbols: Tensor
    classes: Tensor
    columns: int
    extra: Tensor


def fit_tables(observed: Sequence[Observed], ends: Sequence[int], classes: int, kind: str) -> dict[str, NDArray[Any]]:
    """Tables for one kind of lattice, as `dictionary.dump` takes them, `symbols` and `radius` of this kind alone.

    Args:
        observed: What was coded.
        ends, classes: Channel groups, and the number of classes of each.
        kind: `background` or `residual`.
    """
    channels = ends[-1]
    total = torch.zeros(classes, channels, dtype=torch.float64)
    count = torch.zeros(classes, len(ends), dtype=torch.float64)
    bounds = list(zip((0, *ends[:-1]), ends, strict=True))
    for part in observed:
        size = part.symbols.abs().double()
        for g, (a, b) in enumerate(bounds):
            one_hot = torch.nn.functional.one_hot(part.classes[:, g], classes).double()
            total[:, a:b] += one_hot.T @ size[:, a:b]
            count[:, g] += one_hot.sum(0)
    group_of = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor([b - a for a, b in bounds]))
    seen = count[:, group_of]
    # A class that is rare borrows from its group: the mean profile of the channels at the class's own level.
    profile = total.sum(0) / seen.sum(0)
    mean = (total + 4 * _expected(total, count, profile, bounds)) / (seen + 4)
    grid = torch.logspace(np.log10(LEAST), np.log10(MOST), SCALES, dtype=torch.float64)
    nearest = (mean.clamp(LEAST, MOST).log()[..., None] - grid.log()).abs().argmin(-1)  # [K, C]

    histogram = np.zeros((SCALES, 129))
    for part in observed:
        table = nearest[part.classes[:, group_of], torch.arange(channels)]
        coded = part.classes[:, group_of] > 0
        index = table[coded] * 129 + part.symbols.abs().clamp_max(128).long()[coded]
        histogram += torch.bincount(index, minlength=SCALES * 129).view(SCALES, 129).numpy()
    radius = np.clip(np.ceil(grid.numpy() * REACH), 1, 127).astype(np.int64)
    symbols = np.stack([_symbol_table(histogram[i], float(grid[i]), int(radius[i])) for i in range(SCALES)])

    level = np.stack([[float(mean[k, a:b].sum()) if k else 0.0 for k in range(classes)] for a, b in bounds])
    usage = count.T.numpy()
    buckets = np.zeros((len(ends), classes), np.int64)
    for g in range(len(ends)):
        order = np.argsort(level[g], kind="stable")
        share = np.cumsum(usage[g, order]) - usage[g, order] / 2
        buckets[g, order] = np.clip((share / max(usage[g].sum(), 1) * BUCKETS).astype(np.int64), 0, BUCKETS - 1)
    return {
        "symbols": symbols,
        "radius": radius.astype(np.uint8),
        f"{kind}.ends": np.array(ends, np.uint16),
        f"{kind}.tables": nearest.numpy().astype(np.uint8),
        f"{kind}.buckets": buckets.astype(np.uint8),
        f"{kind}.classes": _class_tables(observed, buckets, classes),
    }


def _expected(total: Tensor, count: Tensor, profile: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Mean magnitudes of each class if its channels had their group's profile."""
    expected = torch.zeros_like(total)
    for g, (a, b) in enumerate(bounds):
        level = (total[:, a:b].sum(1) + profile[a:b].sum()) / (count[:, g] + 1)
        expected[:, a:b] = level[:, None] * profile[a:b] / profile[a:b].sum().clamp_min(1e-9)
    return expected


def _symbol_table(histogram: NDArray[np.float64], mean: float, radius: int) -> NDArray[np.uint16]:
    """Integer frequencies of symbols -radius..radius and the escape, 256 wide, symmetric."""
    ratio = (np.sqrt(1 + mean**2) - 1) / mean  # of a two-sided geometric distribution with this mean magnitude
    geometric = ratio ** np.arange(129)
    geometric[1:] *= 2
    geometric /= geometric.sum()
    share = (histogram + SMOOTHING * geometric) / (histogram.sum() + SMOOTHING)
    sides = share[1 : radius + 1] / 2
    full = np.concatenate([sides[::-1], share[:1], sides, [share[radius + 1 :].sum()]])
    table = np.zeros(256, np.uint16)
    table[: len(full)] = integers(full)
    # What ties gave to one side alone goes to zero: costs are looked up by magnitude.
    both = table[: 2 * radius + 1]
    even = np.minimum(both, both[::-1])
    even[radius] += both.sum(dtype=np.int64) - even.sum(dtype=np.int64)
    table[: 2 * radius + 1] = even
    return table


def _class_tables(observed: Sequence[Observed], buckets: NDArray[np.int64], classes: int) -> NDArray[np.uint16]:
    """Frequencies of classes in every context, `(groups * CONTEXTS**2, K)`; contexts that are rare borrow from wider ones."""
    groups = len(buckets)
    counts = np.zeros((groups, CONTEXTS, CONTEXTS, classes))
    for part in observed:
        k = part.classes.numpy()
        bucket = buckets[np.arange(groups), k]
        left = np.roll(bucket, 1, 0)
        left[:: part.columns] = CONTEXTS - 1
        above = np.concatenate([part.extra.numpy()[:, None], bucket[:, :-1]], 1)
        for g in range(groups):
            np.add.at(counts[g], (left[:, g], above[:, g], k[:, g]), 1)
            np.add.at(counts[g, CONTEXTS - 1], (above[:, g], k[:, g]), 0.02)  # no tile on the left: also at the start of every lane
    tables = np.zeros_like(counts, dtype=np.uint16)
    for g in range(groups):
        whole = counts[g].sum((0, 1)) + 0.5
        whole /= whole.sum()
        for a in range(CONTEXTS):
            for b in range(CONTEXTS):
                wider = counts[g, a].sum(0) + counts[g, :, b].sum(0)
                wider = (wider + 20 * whole) / (wider.sum() + 20)
                tables[g, a, b] = integers((counts[g, a, b] + 10 * wider) / (counts[g, a, b].sum() + 10))
    return tables.reshape(-1, classes)


def integers(share: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Integer frequencies, each at least 1, that sum to 4096."""
    share = share / share.sum()
    result = np.maximum(1, np.floor(share * TOTAL)).astype(np.int64)
    while (rest := TOTAL - result.sum()) != 0:
        # where one more (or less) gains the most bits (loses the fewest)
        gain = (
            share * np.log2((result + 1) / result)
            if rest > 0
            else np.where(result > 1, -share * np.log2(result / np.maximum(result - 1, 1)), -np.inf)
        )
        result[np.argmax(gain)] += 1 if rest > 0 else -1
    return result.astype(np.uint16)
