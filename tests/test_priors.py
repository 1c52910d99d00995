"""Entropy tables from latents: integers that a coder can take, and shares that are those of what was coded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.dictionary import BUCKETS, CONTEXTS
from rinr_loader.priors import SCALES, TOTAL, Observed, fit_tables, integers

ENDS, CLASSES = (2, 6), 3
NONE = CONTEXTS - 1


def bits(share: NDArray[np.float64], frequency: NDArray[np.integer]) -> float:
    return float(-(share * np.log2(frequency / TOTAL)).sum())


# --- integers ---


@given(st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=2, max_size=256).filter(lambda values: sum(values) > 1e-3))
def test_frequencies_sum_to_4096_and_none_is_zero(values: list[float]) -> None:
    found = integers(np.array(values))
    assert found.dtype == np.uint16
    assert int(found.sum()) == 4096
    assert int(found.min()) >= 1


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_moving_one_saves_next_to_no_bits(values: list[int]) -> None:
    share = np.array(values, float) / sum(values)
    found = integers(share).astype(np.int64)
    for give in range(len(found)):
        for take in range(len(found)):
            if give != take and found[give] > 1:
                moved = found.copy()
                moved[give] -= 1
                moved[take] += 1
                assert bits(share, moved) >= bits(share, found) - 1e-6


def test_shares_that_fit_are_kept() -> None:
    assert integers(np.array([0.5, 0.25, 0.125, 0.125])).tolist() == [2048, 1024, 512, 512]


# --- tables ---


def observed(seed: int = 0, tiles: int = 600) -> Observed:
    """A tile is quiet (class 0: zeros), of small values, or of large ones; both groups are alike, and so are neighbours."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(0, CLASSES, (tiles // 20,), generator=generator).repeat_interleave(20)
    spread = torch.tensor([0.0, 1.0, 12.0])[runs]
    values = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(tiles, ENDS[-1], generator=generator).clamp(1e-6, 1 - 1e-6))
    return Observed((values * spread[:, None]).round(), runs[:, None].repeat(1, 2), 20, torch.full((tiles,), NONE))


@pytest.fixture(scope="module")
def tables() -> dict[str, NDArray[np.generic]]:
    return dict(fit_tables([observed(0, 4000), observed(1, 4000)], ENDS, CLASSES, "background"))


def test_symbol_tables_are_whole_and_symmetric(tables: dict[str, NDArray[np.generic]]) -> None:
    symbols, radius = tables["symbols"].astype(np.int64), tables["radius"].astype(int)
    assert symbols.shape == (SCALES, 256)
    assert (symbols.sum(1) == TOTAL).all()
    for row, reach in zip(symbols, radius, strict=True):
        assert (row[: 2 * reach + 2] > 0).all(), "every symbol and the escape can be coded"
        assert (row[2 * reach + 2 :] == 0).all()
        assert row[: 2 * reach + 1].tolist() == row[: 2 * reach + 1].tolist()[::-1]
        assert row[reach] >= row[: 2 * reach + 1].max() or reach > 9, "zero is the most likely, where magnitudes are small"
    assert (np.diff(radius) >= 0).all()


def test_a_class_gets_the_tables_of_its_magnitudes(tables: dict[str, NDArray[np.generic]]) -> None:
    chosen = tables["background.tables"].astype(int)
    assert chosen.shape == (CLASSES, ENDS[-1])
    assert (chosen[2] > chosen[1]).all(), "large values have the wider tables"
    part = observed(2, 20_000)
    for k in (1, 2):
        mine: Tensor = part.symbols[part.classes[:, 0] == k]
        for c in range(ENDS[-1]):
            row, reach = tables["symbols"][chosen[k, c]].astype(float), int(tables["radius"][chosen[k, c]].astype(int))
            index = torch.where(mine[:, c].abs() <= reach, mine[:, c] + reach, 2 * reach + 1).long()
            share = np.bincount(index.numpy(), minlength=256) / len(mine)
            entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
            spent = -(share[row > 0] * np.log2(row[row > 0] / TOTAL)).sum()
            assert spent < entropy + 0.15, "close to what these values take at least"


def test_classes_are_expected_where_they_come(tables: dict[str, NDArray[np.generic]]) -> None:
    buckets, shares = tables["background.buckets"].astype(int), tables["background.classes"].astype(int)
    assert buckets.shape == (2, CLASSES)
    assert buckets.max() < BUCKETS
    assert (np.diff(buckets, axis=1) > 0).all(), "busier classes count as busier"
    assert shares.shape == (2 * CONTEXTS**2, CLASSES)
    assert (shares.sum(1) == TOTAL).all()
    assert (shares > 0).all()
    table = shares.reshape(2, CONTEXTS, CONTEXTS, CLASSES)
    for k in range(CLASSES):
        left, group = buckets[0, k], buckets[0, k]
        assert table[0, left, NONE].argmax() == k, "a tile is like the one on its left"
        assert table[0, left, NONE, k] > 0.8 * TOTAL
        assert table[1, buckets[1, k], group].argmax() == k, "and a group like the one before it"
        assert table[1, NONE, group].argmax() == k, "also where there is no tile on the left"


def test_tables_are_a_function_of_what_was_coded(tables: dict[str, NDArray[np.generic]]) -> None:
    again = fit_tables([observed(0, 4000), observed(1, 4000)], ENDS, CLASSES, "background")
    assert tables.keys() == again.keys()
    assert all(np.array_equal(tables[name], again[name]) for name in tables)


def test_a_class_that_never_came_can_still_be_coded() -> None:
    part = observed(0)
    quiet = Observed(part.symbols.clamp(-1, 1), part.classes.clamp_max(1), part.columns, part.extra)
    tables = fit_tables([quiet], ENDS, CLASSES, "background")
    assert (tables["background.classes"] > 0).all()
    assert (tables["background.tables"] < SCALES).all()
