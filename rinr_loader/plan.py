"""Which samples in which order: a pure function of seed, epoch and arguments, dealt to ranks by global position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rinr_loader.rng import uniform

# Streams of the random numbers that are not drawn by a transform; transforms count up from 0.
_SHARDS, _SAMPLES = -1, -2


def epoch_order(shard_samples: Sequence[int], *, seed: int, epoch: int, shuffle: bool, shuffle_shards: int) -> NDArray[np.int64]:
    """Indices of all samples in the order of one epoch.

    Shuffled, the shards are put in random order, cut into windows of `shuffle_shards`, and the samples of each window permuted: a
    stream needs only a window at a time, and with a window as large as the dataset it is a full permutation.

    Args:
        shard_samples: Number of samples in each shard; samples are numbered through the shards in order.
        seed, epoch: What the order is a function of.
        shuffle: Whether to shuffle at all.
        shuffle_shards: Shards in a window, at least 1.

    Returns:
        Every index once, int64.
    """
    starts = np.concatenate([[0], np.cumsum(np.asarray(shard_samples, np.int64))])
    if not shuffle:
        return np.arange(starts[-1], dtype=np.int64)
    shards = _permutation(len(shard_samples), seed, epoch, _SHARDS)
    windows = []
    for first in range(0, len(shards), shuffle_shards):
        window = np.concatenate([np.arange(starts[s], starts[s + 1], dtype=np.int64) for s in shards[first : first + shuffle_shards]])
        windows.append(window[np.argsort(_keys(window, seed, epoch, _SAMPLES), kind="stable")])
    return np.concatenate(windows) if windows else np.zeros(0, np.int64)


def _permutation(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    return np.argsort(_keys(np.arange(count, dtype=np.int64), seed, epoch, stream), kind="stable")


def _keys(numbers: NDArray[np.int64], seed: int, epoch: int, stream: int) -> NDArray[np.float32]:
    """A random sort key for each number: sorting by them is a permutation that no library version can change."""
    return uniform(seed, epoch, torch.from_numpy(numbers), 1, stream=stream)[:, 0].numpy()


@dataclass(frozen=True)
class Deal:
    """How the positions of an epoch are dealt to ranks, batch by batch.

    Every rank gets the same number of batches of the same sizes. Where the samples do not divide, the last batch is filled up from the
    beginning of the epoch; with one rank it is simply shorter.

    Args:
        samples: Samples in the epoch.
        batch_size: Samples of a rank in a batch.
        drop_last: Leave out a last batch that is not full on every rank.
        rank, world_size: Which rank this is, of how many.
    """

    samples: int
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    def batches(self, start: int = 0) -> int:
        """Number of batches from global position `start` on."""
        together = self.batch_size * self.world_size
        left = max(0, self.samples - start)
        return left // together if self.drop_last else math.ceil(left / together)

    def positions(self, batch: int, start: int = 0) -> NDArray[np.int64]:
        """Global positions of this rank's samples in a batch, counted from `start`; beyond the end they stand for the beginning."""
        first = start + batch * self.batch_size * self.world_size
        size = min(self.batch_size, math.ceil((self.samples - first) / self.world_size))
        return first + self.rank * size + np.arange(size, dtype=np.int64)
