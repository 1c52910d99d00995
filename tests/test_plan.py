"""The order of an epoch and how it is dealt to ranks: pure functions, pinned, complete."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rinr_loader.plan import Deal, epoch_order

SHARDS = st.lists(st.integers(0, 9), max_size=8)


def order(shards: list[int], seed: int = 0, epoch: int = 0, *, shuffle: bool = True, shuffle_shards: int = 2) -> list[int]:
    found: list[int] = epoch_order(shards, seed=seed, epoch=epoch, shuffle=shuffle, shuffle_shards=shuffle_shards).tolist()
    return found


@given(SHARDS, st.integers(-5, 2**40), st.integers(0, 10**6), st.booleans(), st.integers(1, 10))
def test_every_sample_once(shards: list[int], seed: int, epoch: int, shuffle: bool, window: int) -> None:
    found = epoch_order(shards, seed=seed, epoch=epoch, shuffle=shuffle, shuffle_shards=window)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(sum(shards)))
    if not shuffle:
        assert found.tolist() == list(range(sum(shards)))


@given(SHARDS, st.integers(0, 99), st.integers(1, 10))
def test_a_stream_needs_one_window_of_shards_at_a_time(shards: list[int], seed: int, window: int) -> None:
    starts = np.cumsum([0, *shards])
    found = order(shards, seed, shuffle_shards=window)
    shard_of = np.searchsorted(starts, found, side="right") - 1
    seen: list[int] = []
    at = 0
    while at < len(found):
        # The shortest stretch that holds whole shards only is one window, or a part of one.
        length = next(n for n in range(1, len(found) - at + 1) if sum(shards[s] for s in set(shard_of[at : at + n].tolist())) == n)
        group = set(shard_of[at : at + length].tolist())
        assert len(group) <= window
        assert not group & set(seen)
        seen += group
        at += length


def test_the_order_is_pinned() -> None:
    """These numbers never change: a resumed run of an older version goes on in the same order."""
    assert order([2] * 8) == [3, 14, 15, 2, 8, 13, 12, 9, 7, 6, 0, 1, 4, 5, 10, 11]
    assert order([3, 2, 4], seed=7, epoch=3, shuffle_shards=8) == [3, 5, 0, 7, 4, 1, 2, 8, 6]
    assert order([3, 2, 4], shuffle=False) == list(range(9))


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    shards = [10] * 10
    base = order(shards)
    assert order(shards) == base
    assert order(shards, epoch=1) != base
    assert order(shards, seed=1) != base
    assert order(shards, shuffle_shards=3) != base
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    assert order(shards) == base


def test_the_order_of_shards_changes_with_seed_and_epoch_too() -> None:
    def shards(**arguments: int) -> list[int]:
        return [sample // 2 for sample in order([2] * 20, shuffle_shards=1, **arguments)[::2]]

    assert shards() != shards(epoch=1)
    assert shards() != shards(seed=1)


def test_shards_and_samples_are_both_shuffled() -> None:
    shards = [20] * 12
    found = np.array(order(shards, shuffle_shards=1))
    first = found[::20] // 20
    assert first.tolist() != sorted(first.tolist())
    for k in range(0, 240, 20):
        inside = found[k : k + 20]
        assert len(set((inside // 20).tolist())) == 1
        assert inside.tolist() != sorted(inside.tolist())


def test_the_shards_of_a_window_are_mixed() -> None:
    found = np.array(order([20] * 9, shuffle_shards=3)) // 20
    for first in range(0, 180, 60):
        part = found[first : first + 60].tolist()
        assert len(set(part)) == 3
        assert sum(a != b for a, b in pairwise(part)) > 20, "not shard after shard"


def test_a_window_as_large_as_the_dataset_is_a_full_permutation() -> None:
    # Every sample is as likely to come first as last: mean position of each over many epochs.
    positions = np.zeros(12)
    for epoch in range(600):
        positions[order([3, 3, 3, 3], epoch=epoch, shuffle_shards=4)] += np.arange(12)
    means = positions / 600
    assert np.abs(means - 5.5).max() < 5 * 3.5 / math.sqrt(600)


# --- the deal ---


def dealt(samples: int, batch: int, drop_last: bool, world: int, start: int = 0) -> list[list[list[int]]]:
    """Positions by rank and batch."""
    deals = [Deal(samples, batch, drop_last, rank, world) for rank in range(world)]
    return [[deal.positions(i, start).tolist() for i in range(deal.batches(start))] for deal in deals]


@given(st.integers(0, 40), st.integers(1, 7), st.booleans(), st.integers(1, 5), st.integers(0, 45))
def test_all_ranks_get_as_much_and_together_the_epoch(samples: int, batch: int, drop_last: bool, world: int, start: int) -> None:
    ranks = dealt(samples, batch, drop_last, world, start)
    shapes = [[len(positions) for positions in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(0 < size <= batch for size in shapes[0])
    given_out = sorted(p for batches in ranks for positions in batches for p in positions)
    left = max(0, samples - start)
    if drop_last:
        assert len(shapes[0]) == left // (batch * world)
        assert given_out == list(range(start, start + len(given_out)))
        assert set(shapes[0]) <= {batch}
    else:
        assert len(shapes[0]) == math.ceil(left / (batch * world))
        # Once each; filled up from beyond the end by less than one sample a rank.
        assert given_out == list(range(start, start + len(given_out)))
        assert left <= len(given_out) < left + world
    if world == 1:
        assert len(given_out) <= left


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_go_round_the_ranks_in_the_order_of_the_epoch(world: int) -> None:
    ranks = dealt(12, 2, False, world)
    flat = [p for i in range(len(ranks[0])) for rank in range(world) for p in ranks[rank][i]]
    assert flat == list(range(12))


def test_a_deal_resumed_at_a_batch_is_the_rest_of_it() -> None:
    for drop_last in (False, True):
        for world in (1, 2, 3):
            whole = dealt(31, 4, drop_last, world)
            for k in range(len(whole[0])):
                assert dealt(31, 4, drop_last, world, start=k * 4 * world) == [batches[k:] for batches in whole]
