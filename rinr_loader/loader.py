"""`DataLoader`: batches of decoded images and their targets. The only class with state: how far the epoch is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.boxes import BoxFilter, place_objects
from rinr_loader.dataset import RinrDataset
from rinr_loader.decode import Normalize, decode
from rinr_loader.errors import ConfigError
from rinr_loader.geometry import Resize, Transform
from rinr_loader.pipeline import ahead
from rinr_loader.plan import Deal, epoch_order
from rinr_loader.reader import ShardBuffer
from rinr_loader.rng import Draws

STATE_VERSION = 1
# Arguments of torch's DataLoader that say how its worker processes work; there are none here.
_WITHOUT_MEANING = (
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


@dataclass(frozen=True)
class Targets:
    """Labels of one batch, on the images' device.

    Args:
        boxes: Float32 xyxy in pixels of the output images, `(M, 4)`.
        classes: Class id of each box, int64, `(M,)`.
        crowd: Whether a box marks a crowd or an ignored region, bool, `(M,)`.
        batch_index: Which image each box is in, int64, `(M,)`.
        labels: Class id of each image or -1, int64, `(N,)`.
        keys: Key of each image, as its source had it.
    """

    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    batch_index: Tensor
    labels: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Images `(N, 3, H, W)` and their targets; unpacks as `images, targets = batch`."""

    images: Tensor
    targets: Targets

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.targets))


class DataLoader:
    """Batches of a dataset, decoded together on one device.

    Arguments have torch `DataLoader`'s names and meaning where it has them. The order is a pure function of seed, epoch and arguments;
    a transform's random numbers are one of seed, epoch and the sample's position in the epoch. Every iteration is a whole epoch, the one
    after `load_state_dict` the rest of one.

    Args:
        dataset: A directory that `rinr convert` wrote, or a `RinrDataset`.
        batch_size: Images in a batch.
        shuffle: Shuffle anew each epoch.
        split: Which split, where `dataset` is a path.
        size: Height and width of the images. None takes the stored size, which must then be the same everywhere.
        transform: Where samples land, see `rinr_loader.geometry`; stretched to `size` without one.
        box_filter: Which boxes to keep after a transform; those with an area left, without one.
        device: Where images are decoded and returned; CUDA where there is one.
        seed: Of order and transforms.
        drop_last: Leave out a last batch that is not full.
        num_workers: Threads that read ahead; 0 reads when a batch is asked for.
        prefetch_factor: Batches that each of them may be ahead.
        shuffle_shards: Shards that are shuffled together.
        antialias: Filter when images get smaller than stored.
        dtype: uint8 in [0, 255], or a floating type in [0, 1].
        channels_last: Memory format of the images.
        normalize: Mean and standard deviation of each channel, as torchvision's `Normalize`; needs a floating `dtype`.
        fill: Value of pixels that show nothing, in [0, 255].
        rank, world_size: Of this process; from `torch.distributed` where it is initialised.
        ignored: Torch's arguments about worker processes: accepted, with one warning that they mean nothing here.

    Raises:
        ConfigError: The arguments do not fit together or do not fit the dataset.

    Example:
        >>> loader = DataLoader(path, batch_size=2, shuffle=True, size=(32, 32), device="cpu")
        >>> images, targets = next(iter(loader))
        >>> images.shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        dataset: str | Path | RinrDataset,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        split: str = "train",
        size: tuple[int, int] | None = None,
        transform: Transform | None = None,
        box_filter: BoxFilter | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        shuffle_shards: int = 8,
        antialias: bool = True,
        dtype: torch.dtype = torch.uint8,
        channels_last: bool = False,
        normalize: Normalize | None = None,
        fill: float = 114,
        rank: int | None = None,
        world_size: int | None = None,
        **ignored: Any,
    ) -> None:
        _check_ignored(ignored)
        numbers = {"batch_size": (batch_size, 1), "prefetch_factor": (prefetch_factor, 1), "shuffle_shards": (shuffle_shards, 1)}
        for name, (value, least) in {**numbers, "num_workers": (num_workers, 0)}.items():
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")
        if size is not None and min(size) < 1:
            raise ConfigError(f"size: expected height and width of at least 1, got {size}")
        if normalize is not None and not dtype.is_floating_point:
            raise ConfigError(f"normalize: expected a floating dtype, got {dtype}; pass dtype=torch.float32")
        self.dataset = dataset if isinstance(dataset, RinrDataset) else RinrDataset(dataset, split)
        self.batch_size, self.shuffle, self.drop_last, self.seed = batch_size, shuffle, drop_last, seed
        self.num_workers, self.prefetch_factor, self.shuffle_shards = num_workers, prefetch_factor, shuffle_shards
        self.transform: Transform = transform or Resize()
        self.box_filter = box_filter or BoxFilter()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = size or self._stored_size()
        self.antialias, self.dtype, self.channels_last, self.normalize, self.fill = antialias, dtype, channels_last, normalize, fill
        found = _distributed() if rank is None and world_size is None else (rank or 0, world_size or 1)
        self._deal = Deal(len(self.dataset), batch_size, drop_last, *found)
        if not 0 <= self._deal.rank < self._deal.world_size:
            raise ConfigError(f"rank: expected 0 to {self._deal.world_size - 1}, got {self._deal.rank}")
        self.epoch = 0
        self._consumed = 0  # samples of this epoch that all ranks together have been given
        self._begun = False  # whether an iteration of this epoch has begun and not come to its end

    def _stored_size(self) -> tuple[int, int]:
        sizes = np.unique(self.dataset.column("stored_size"), axis=0).tolist()
        if len(sizes) != 1:
            raise ConfigError(f"size: expected one stored size or an argument, got {len(sizes)} sizes; pass size=(height, width)")
        return (int(sizes[0][0]), int(sizes[0][1]))

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self._deal.batches()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its beginning. Without it, epochs count up by themselves."""
        self.epoch, self._consumed, self._begun = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: small, of plain values, for `load_state_dict`."""
        return {"version": STATE_VERSION, "seed": self.seed, "epoch": self.epoch, "consumed": self._consumed, **self._order_arguments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader of the same dataset was: the next iteration gives the rest of its epoch, without replay.

        Raises:
            ConfigError: The state is of another dataset, or of arguments that give another order.
        """
        for name, value in {"version": STATE_VERSION, **self._order_arguments()}.items():
            if state.get(name) != value:
                raise ConfigError(f"state: expected {name} {value!r}, got {state.get(name)!r}; make the loader as it was when the state was saved")
        self.seed, self.epoch, self._consumed, self._begun = int(state["seed"]), int(state["epoch"]), int(state["consumed"]), False

    def _order_arguments(self) -> dict[str, Any]:
        return {"dataset": self.dataset.identity, "shuffle": self.shuffle, "shuffle_shards": self.shuffle_shards}

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:  # what was broken off is not continued unasked: as with torch, every iteration is an epoch of its own
            self.set_epoch(self.epoch + 1)
        start, epoch, self._begun = self._consumed, self.epoch, True
        shards = self.dataset.shard_samples
        order = epoch_order(shards, seed=self.seed, epoch=epoch, shuffle=self.shuffle, shuffle_shards=self.shuffle_shards)
        batches = [self._deal.positions(i, start) for i in range(self._deal.batches(start))]
        jobs: Iterator[Callable[[], ShardBuffer]] = (partial(self.dataset.read, order[positions % len(order)]) for positions in batches)
        depth = self.prefetch_factor * max(1, self.num_workers)
        if not batches:
            self.set_epoch(epoch + 1)
        # Closed here and not by the garbage collector: an error's traceback would keep the threads alive.
        with closing(ahead(jobs, threads=self.num_workers, depth=depth)) as buffers:
            for i, buffer in enumerate(buffers):
                batch = self._decode(buffer, batches[i], epoch)
                if i + 1 == len(batches):
                    self.set_epoch(epoch + 1)
                else:
                    self._consumed = start + (i + 1) * self.batch_size * self._deal.world_size
                yield batch

    def _decode(self, buffer: ShardBuffer, positions: NDArray[np.int64], epoch: int) -> Batch:
        draws = Draws(self.seed, epoch, torch.from_numpy(positions))
        placements = self.transform(buffer.source_size, size=self.size, random=draws)
        boxes, row, batch_index = place_objects(placements, buffer.box, buffer.object_start, size=self.size, box_filter=self.box_filter)
        targets = Targets(
            boxes=boxes.to(self.device),
            classes=buffer.class_id[row].to(self.device),
            crowd=buffer.crowd[row].to(self.device),
            batch_index=batch_index.to(self.device),
            labels=buffer.label.to(self.device),
            keys=buffer.keys,
        )
        images = decode(
            buffer.to(self.device),
            placements.to(self.device),
            size=self.size,
            fill=self.fill,
            antialias=self.antialias,
            dtype=self.dtype,
            channels_last=self.channels_last,
            normalize=self.normalize,
        )
        return Batch(images, targets)


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _check_ignored(arguments: dict[str, Any]) -> None:
    unknown = [name for name in arguments if name not in (*_WITHOUT_MEANING, "sampler", "batch_sampler", "collate_fn")]
    if unknown:
        raise TypeError(f"DataLoader: expected arguments of its signature, got {unknown[0]!r}")
    for name in ("sampler", "batch_sampler", "collate_fn"):
        if arguments.get(name) is not None:
            raise ConfigError(f"{name}: expected None, got {arguments[name]!r}; use shuffle, transform, rank and world_size instead")
    told = [name for name in arguments if name in _WITHOUT_MEANING]
    if told:
        warnings.warn(f"{', '.join(told)}: without a meaning here, there are no worker processes; leave it out", stacklevel=3)
