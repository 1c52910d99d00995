"""The order of an epoch and how it is dealt to ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rinr_loader.plan import Deal, epoch_order

SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(SHARDS, st.integers(0, 2**31), st.integers(0, 100), st.integers(1, 9))
def test_every_sample_stands_in_an_epoch_once(shards: list[int], seed: int, epoch: int, window: int) -> None:
    order = epoch_order(shards, seed=seed, epoch=epoch, shuffle=True, shuffle_shards=window)
    assert sorted(order.tolist()) == list(range(sum(shards)))


@given(SHARDS)
def test_without_shuffling_the_order_is_the_stored_one(shards: list[int]) -> None:
    assert epoch_order(shards, seed=1, epoch=2, shuffle=False, shuffle_shards=1).tolist() == list(range(sum(shards)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order([10, 10, 10], seed=seed, epoch=epoch, shuffle=True, shuffle_shards=2).tolist()

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_a_window_holds_whole_shards_and_mixes_them() -> None:
    size, window = 20, 3
    order = epoch_order([size] * 9, seed=5, epoch=0, shuffle=True, shuffle_shards=window)
    shards_in_order = []
    for first in range(0, len(order), size * window):
        part = order[first : first + size * window] // size
        assert len(set(part.tolist())) == window
        assert sorted(part.tolist()) != part.tolist(), "a window is permuted, not read shard by shard"
        shards_in_order.append(sorted(set(part.tolist())))
    assert shards_in_order != [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "the shards are shuffled too"


def test_the_first_release_keeps_its_order() -> None:
    order = epoch_order([4, 4, 4], seed=0, epoch=0, shuffle=True, shuffle_shards=2)
    assert order.tolist() == [4, 7, 3, 5, 6, 0, 2, 1, 8, 10, 11, 9]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_ranks_get_the_same_number_of_batches_of_the_same_sizes(samples: int, batch: int, world: int, drop_last: bool) -> None:
    deals = [Deal(samples, batch, drop_last, rank, world) for rank in range(world)]
    sizes = [[len(deal.positions(i)) for i in range(deal.batches())] for deal in deals]
    assert all(row == sizes[0] for row in sizes)
    seen = np.concatenate([deal.positions(i) for deal in deals for i in range(deal.batches())] or [np.zeros(0, int)])
    if drop_last:
        assert sorted(seen.tolist()) == list(range(samples // (batch * world) * batch * world))
    else:
        assert set(range(samples)) <= set(seen.tolist()), "no sample is left out"
        assert len(seen) == len(set(seen.tolist())), "no position is dealt twice"
        assert len(seen) - samples < world, "no more is repeated than it takes to fill the last batch evenly"


@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 9))
def test_the_rest_of_an_epoch_continues_where_it_was(samples: int, batch: int, done: int) -> None:
    deal = Deal(samples, batch)
    done = min(done, deal.batches())
    start = min(samples, done * batch)
    rest = [deal.positions(i, start).tolist() for i in range(deal.batches(start))]
    assert rest == [deal.positions(i).tolist() for i in range(done, deal.batches())]


@pytest.mark.parametrize(("samples", "batch", "expected"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3])])
def test_alone_the_last_batch_is_shorter(samples: int, batch: int, expected: list[int]) -> None:
    deal = Deal(samples, batch)
    assert [len(deal.positions(i)) for i in range(deal.batches())] == expected
