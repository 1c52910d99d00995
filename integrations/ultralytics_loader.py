"""What Ultralytics' trainer asks of a loader and its sampler, over batches that a dataset builds itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from rinr_loader.pipeline import ahead

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchPlan:
    """One batch before anything was read.

    Args:
        epoch: Epoch number.
        positions: Global positions in the epoch's order, int64, shape `(N,)`: what augmentation depends on.
        samples: Sample of the dataset at each position, int64, shape `(N,)`.
    """

    epoch: int
    positions: Tensor
    samples: Tensor


class BatchSource(Protocol):
    """A dataset that reads and decodes whole batches."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> Tensor:
        """Samples in the order of an epoch, int64, shape `(len,)`: a pure function of the seed and the epoch."""
        ...

    def read(self, plan: BatchPlan) -> Any:
        """Fetch the bytes of a batch; called ahead, in a thread."""
        ...

    def build(self, plan: BatchPlan, fetched: Any) -> Batch:
        """Decode a fetched batch into the dict that the trainer and the validator take."""
        ...

    def release(self) -> None:
        """Give back the memory of the device."""
        ...


@dataclass(frozen=True)
class Share:
    """The part of every epoch that one process takes.

    Args:
        rank: Global rank of this process.
        world_size: Number of processes.
        contiguous: Whole batches side by side, every sample once (validation: a repeated sample would change the metrics). Otherwise
            positions are dealt in turn and the last ones wrap around, so that every rank gets the same number of batches.
    """

    rank: int = 0
    world_size: int = 1
    contiguous: bool = False

    def positions(self, samples: int, batch_size: int) -> range:
        """Positions of this rank in an epoch of `samples`; they may run past the end, and wrap there."""
        if not self.contiguous:
            return range(self.rank, math.ceil(samples / self.world_size) * self.world_size, self.world_size)
        if batch_size >= samples:  # one batch would leave all other ranks idle
            batch_size = 1
        each, left = divmod(math.ceil(samples / batch_size), self.world_size)
        first = self.rank * each + min(self.rank, left)
        last = first + each + (self.rank < left)
        return range(min(first * batch_size, samples), min(last * batch_size, samples))


class EpochSampler:
    """The samples of this process in the order of the current epoch.

    Args:
        source: Gives the order.
        batch_size: Samples of a batch.
        share: Part of each epoch that this process takes.
        epoch: Gives the current epoch; Ultralytics calls `set_epoch` only on several GPUs, and repeats or skips epochs when it resumes
            or recovers, so its own count is the only one to trust.
    """

    def __init__(self, source: BatchSource, *, batch_size: int, share: Share, epoch: Callable[[], int]) -> None:
        self.source = source
        self.positions = share.positions(len(source), batch_size)
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        yield from self.plan().samples.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch from the caller from now on."""
        self._epoch = lambda: epoch

    def plan(self) -> BatchPlan:
        """The whole epoch as one batch."""
        epoch = self._epoch()
        order = self.source.order(epoch)
        positions = torch.tensor(self.positions, dtype=torch.int64)
        return BatchPlan(epoch, positions, order[positions % max(len(order), 1)])


class ShardLoader:
    """Batches of a dataset for the trainer: `len`, lazy iteration and the attributes that Ultralytics reads.

    Iterating starts nothing before the first `next`, because the trainer calls `enumerate(loader)` twice an epoch and drops one. One batch
    is read ahead, never across an epoch's end, so changes between epochs (`close_mosaic`) take effect at once.

    Args:
        dataset: Reads and decodes batches.
        batch_size: Samples of a batch; at most the dataset's length is used.
        share: Part of each epoch that this process takes.
        epoch: Gives the current epoch.
        drop_last: Whether an incomplete last batch is left out, unless it is the only one.
        read_ahead: Whether the next batch's bytes are read while the trainer works.
    """

    def __init__(
        self,
        dataset: BatchSource,
        *,
        batch_size: int,
        share: Share | None = None,
        epoch: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
        read_ahead: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.sampler = EpochSampler(dataset, batch_size=self.batch_size, share=share or Share(), epoch=epoch)
        self.drop_last = drop_last and len(self.sampler) > self.batch_size and len(self.sampler) % self.batch_size != 0
        self.num_workers = 0  # no worker processes: what Ultralytics prints
        self.read_ahead = read_ahead
        self._begun: WeakSet[Generator[Batch, None, None]] = WeakSet()

    def __len__(self) -> int:
        batches = len(self.sampler) / self.batch_size if self.batch_size else 0
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[Batch]:
        iterator = self._batches()
        self._begun.add(iterator)
        return iterator

    def reset(self) -> None:
        """Drop every iterator that was begun, and what it has read ahead."""
        for iterator in list(self._begun):
            iterator.close()

    def close(self) -> None:
        """Drop every iterator that was begun, with its thread and device memory. A new one can be begun at any time."""
        self.reset()
        self.dataset.release()

    def _batches(self) -> Generator[Batch, None, None]:
        whole, size = self.sampler.plan(), self.batch_size
        plans = [BatchPlan(whole.epoch, whole.positions[i : i + size], whole.samples[i : i + size]) for i in range(0, len(self) * size, size)]
        fetched: Any = ahead((partial(self._read, plan) for plan in plans), threads=int(self.read_ahead), depth=1)
        try:
            for plan in plans:
                yield self._build(plan, next(fetched))  # neither has a name here, or it would stay in memory while the trainer works
        finally:
            fetched.close()

    # Neither thread may be in the validator's inference mode: what is kept of its tensors could not be written in place by the training
    # that follows.

    def _read(self, plan: BatchPlan) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return self.dataset.read(plan)

    def _build(self, plan: BatchPlan, fetched: Any) -> Batch:
        with torch.inference_mode(False), torch.no_grad():
            return self.dataset.build(plan, fetched)
