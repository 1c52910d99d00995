"""Random numbers are a pure function of (seed, epoch, position, stream), and as good as independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rinr_loader.rng import Draws, uniform

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64's finalizer on Python's unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def one_number(seed: int, epoch: int, stream: int, position: int, column: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = 0
    for part in (seed, epoch, stream):
        key = mix((key + part + golden) & MASK)
    row = mix((position * golden + key) & MASK)
    return (mix((row + (column + 1) * golden) & MASK) >> 40) / 2**24


def test_numbers_are_those_of_the_first_release() -> None:
    # A change here changes what every saved run would train on after a resume.
    assert (uniform(0, 0, torch.tensor([0, 1]), 2) * 2**24).tolist() == [[6369901, 8617950], [7908954, 12159322]]
    assert (uniform(7, 3, torch.tensor([123_456_789_012]), 3, stream=2) * 2**24).tolist() == [[9365529, 9669456, 14424609]]


int64 = st.integers(-(2**63), 2**63 - 1)


@given(seed=int64, epoch=st.integers(0, 10**6), stream=st.integers(0, 100), positions=st.lists(int64, min_size=1, max_size=4))
def test_tensor_arithmetic_equals_python_integers(seed: int, epoch: int, stream: int, positions: list[int]) -> None:
    numbers = uniform(seed, epoch, torch.tensor(positions), 3, stream=stream)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [[one_number(seed, epoch, stream, p, c) for c in range(3)] for p in positions]


@given(order=st.permutations(list(range(12))), cut=st.integers(1, 11))
def test_a_row_does_not_depend_on_the_rest_of_the_batch(order: list[int], cut: int) -> None:
    positions = torch.arange(1000, 1012)
    whole = uniform(5, 1, positions, 4)
    chosen = torch.tensor(order[:cut])
    assert torch.equal(uniform(5, 1, positions[chosen], 4), whole[chosen])
    assert torch.equal(uniform(5, 1, positions, 2), whole[:, :2])


def test_empty_batch_and_no_numbers() -> None:
    assert uniform(0, 0, torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)
    assert uniform(0, 0, torch.arange(3), 0).shape == (3, 0)


def variants(kind: str) -> torch.Tensor:
    """4 x 20,000 numbers that differ only in `kind`, neighbours in it side by side."""
    positions = torch.arange(20_000)
    if kind == "column":
        return uniform(0, 0, positions, 4).T
    if kind == "position":
        return torch.stack([uniform(0, 0, positions + k, 1)[:, 0] for k in range(4)])
    return torch.stack([uniform(**{"seed": 0, "epoch": 0, "stream": 0, kind: k}, positions=positions, count=1)[:, 0] for k in range(4)])


@pytest.mark.parametrize("kind", ["seed", "epoch", "stream", "column", "position"])
def test_numbers_are_uniform_and_uncorrelated(kind: str) -> None:
    numbers = variants(kind)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    for row in numbers:
        observed = torch.histc(row, 64, 0, 1)
        expected = len(row) / 64
        chi_square = float(((observed - expected) ** 2 / expected).sum())
        assert 63 - 5 * 126**0.5 < chi_square < 63 + 5 * 126**0.5  # 63 degrees of freedom, 5 standard deviations
    limit = 5 / numbers.shape[1] ** 0.5
    off_diagonal = torch.corrcoef(numbers) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < limit
    # Pairs fill the square evenly: a shifted or mirrored copy would have correlation 0 in places and still fail here.
    first, second = numbers[:2]
    cells = torch.bincount((first * 8).long() * 8 + (second * 8).long(), minlength=64).float()
    expected = len(first) / 64
    assert float(((cells - expected) ** 2 / expected).sum()) < 63 + 5 * 126**0.5


def test_draws_gives_a_new_stream_at_each_call() -> None:
    positions = torch.tensor([4, 9])
    draws = Draws(3, 2, positions)
    assert torch.equal(draws(5), uniform(3, 2, positions, 5, stream=0))
    assert torch.equal(draws(2), uniform(3, 2, positions, 2, stream=1))
    assert torch.equal(Draws(3, 2, positions, stream=1)(2), uniform(3, 2, positions, 2, stream=1))


@pytest.mark.cuda
def test_every_device_gives_the_same_numbers() -> None:
    positions = torch.arange(-500, 500) * 1_000_003
    numbers = uniform(11, 4, positions.cuda(), 7, stream=3)
    assert numbers.is_cuda
    assert torch.equal(numbers.cpu(), uniform(11, 4, positions, 7, stream=3))
