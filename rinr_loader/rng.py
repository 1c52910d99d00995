"""Counter-based random numbers: a pure function of seed, epoch, position and stream.

A generator with a state would give a sample other numbers when the batch size, the worker count or the place of resume changes. Here
every number is a hash of its own coordinates, in integer arithmetic that wraps alike on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (2014); the finalizer is Stafford's variant 13.
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer: torch has no unsigned arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of int64 copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(_MULTIPLY_1)
    value = (value ^ _shift(value, 27)) * _signed(_MULTIPLY_2)
    return value ^ _shift(value, 31)


def uniform(seed: int, epoch: int, positions: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Draw uniform numbers that depend on nothing but the arguments.

    Args:
        seed: Any integer; taken modulo 2**64, like `epoch` and `stream`.
        epoch: Epoch number.
        positions: Global positions in the epoch's order, int64, shape `(N,)`, on any device.
        count: Numbers for each position.
        stream: Independent numbers for the same positions.

    Returns:
        Numbers in [0, 1), multiples of 2**-24, float32, shape `(N, count)`, on the device of `positions`. A row depends on its own
        position only, and its first numbers do not depend on `count`.

    Example:
        >>> bool((uniform(0, 0, torch.tensor([3, 7]), 2)[1] == uniform(0, 0, torch.tensor([7]), 2)[0]).all())
        True
    """
    key = 0
    for part in (seed, epoch, stream):
        key = _mix_int((key + (part & _MASK) + _GOLDEN) & _MASK)
    rows = _mix(positions.to(torch.int64) * _signed(_GOLDEN) + _signed(key))  # [N]
    columns = torch.arange(1, count + 1, device=positions.device) * _signed(_GOLDEN)  # [count]
    return _shift(_mix(rows[:, None] + columns), 40).to(torch.float32) * 2.0**-24  # [N, count]


@dataclass
class Draws:
    """Uniform numbers for one batch, a new stream at each call: the `random` that a `Transform` gets.

    Args:
        seed: Seed of the run.
        epoch: Epoch number.
        positions: Global positions of the batch's samples, int64, shape `(N,)`.
        stream: Stream of the next call.
    """

    seed: int
    epoch: int
    positions: Tensor
    stream: int = 0

    def __call__(self, count: int) -> Tensor:
        """Return uniform numbers in [0, 1), float32, shape `(N, count)`, on the device of `positions`."""
        numbers = uniform(self.seed, self.epoch, self.positions, count, stream=self.stream)
        self.stream += 1
        return numbers
