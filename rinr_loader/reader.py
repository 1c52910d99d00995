"""Shards to a `ShardBuffer`: raw bytes in one arena and the index columns of its samples as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.bundle import SHARED_AT, JpegSpec, Spec, check_bytes
from rinr_loader.dictionary import Dictionary
from rinr_loader.errors import ShardError, StorageError
from rinr_loader.index import Row, ShardIndex, build_index, decode_key, row_of
from rinr_loader.specs import rank

OTHER_SHARD = "the index is of another shard, make it again with `rinr index`"
GAP = 64 * 1024  # members this near to each other are fetched by one read


@dataclass(frozen=True)
class ShardBuffer:
    """Samples in memory, as stored, ready to decode. All tensors are on one device.

    Args:
        data: The bytes, uint8, one dimension; every network's weights start at a multiple of 16.
        keys: Key of each sample, as its source had it.
        groups: The network shapes that `network_group` points into.
        stored_size, source_size: Height and width of each sample in pixels, int64, `(S, 2)`.
        label: Class id of each picture or -1, int64, `(S,)`.
        object_start: First object of each sample, int64, `(S + 1,)`; likewise `network_start`. A sample's first network is its background.
        box: Label boxes, float32 xyxy in source pixels, `(O, 4)`.
        class_id, crowd: Of each object, int64 and bool, `(O,)`.
        network_group, network_offset, network_bytes: Shape of each network, and first byte and number of bytes of its weights in `data`,
            int64, `(W,)`.
        network_object: Index of the object that each network belongs to, in its sample, or -1, int64, `(W,)`.
        rect: Stored pixels that each network covers, x0 y0 x1 y1, float32, `(W, 4)`.
        scale, feather: Of each network, float32, `(W,)`.
        shared_hash: What each sample names its shared parameters by, 8 bytes; zeros for none.
        shared: Shared parameters by that hash; those that come with the package need not be here.
        host: Where `data` is on another device and samples are JPEGs: the same bytes in host memory, from which those are decoded.
    """

    data: Tensor
    keys: tuple[str, ...]
    groups: tuple[Spec, ...]
    stored_size: Tensor
    source_size: Tensor
    label: Tensor
    object_start: Tensor
    box: Tensor
    class_id: Tensor
    crowd: Tensor
    network_start: Tensor
    network_group: Tensor
    network_offset: Tensor
    network_bytes: Tensor
    network_object: Tensor
    rect: Tensor
    scale: Tensor
    feather: Tensor
    shared_hash: tuple[bytes, ...]
    shared: Mapping[bytes, Dictionary] = field(default_factory=dict)
    host: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> ShardBuffer:
        """The same samples on another device; one copy a column."""
        if self.device == torch.device(device):
            return self
        columns = {f.name: value for f in fields(self) if f.name != "host" and isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: column.to(device, non_blocking=True) for name, column in columns.items()}
        if self.device.type == "cpu" and any(isinstance(spec, JpegSpec) for spec in self.groups):
            moved["host"] = self.data
        return replace(self, **moved)


def read_samples(
    shards: Sequence[tuple[Path, ShardIndex]], shard: NDArray[np.int64], sample: NDArray[np.int64], shared: Mapping[bytes, Dictionary] | None = None
) -> ShardBuffer:
    """Read chosen samples, in the order given, fetching only their byte ranges.

    Args:
        shards: Path and index of each shard.
        shard: For each wanted sample, which of `shards` holds it.
        sample: And its place there.
        shared: Shared parameters of the dataset, by the hash that bundles name them by.

    Returns:
        The samples on the CPU. A sample that is wanted twice is held once in `data`.

    Raises:
        BundleError: A bundle's length or checksum is wrong.
        ShardError: The shard ends before the sample does, or the index was made from other samples.
        StorageError: A shard cannot be opened.
    """
    arena: list[bytes] = []
    filled = 0
    bases = np.zeros(len(sample), np.int64)
    parts: list[tuple[ShardIndex, NDArray[np.int64], NDArray[np.int64]]] = []
    for s in np.unique(shard):
        path, index = shards[s]
        wanted = np.flatnonzero(shard == s)
        offsets, sizes = index.offset[sample[wanted]], index.size[sample[wanted]]
        for first, last in _ranges(offsets, sizes):
            raw = _read_range(path, first, last)
            inside = wanted[(offsets >= first) & (offsets < last)]
            bases[inside] = filled - first
            arena.append(raw + bytes(-len(raw) % 16))
            for i in np.unique(sample[inside]).tolist():
                start, size, name = int(index.offset[i]) - first, int(index.size[i]), f"{path.name}:{index.keys_at([i])[0]}.rinr"
                checksum, wanted_checksum = check_bytes(memoryview(raw)[start : start + size], name), int(index.checksum[i])
                if checksum != wanted_checksum:
                    raise ShardError(f"{name}: expected checksum {wanted_checksum:#010x} as in the index, got {checksum:#010x}; {OTHER_SHARD}")
            filled += len(arena[-1])
        parts.append((index, wanted, sample[wanted]))
    data = torch.frombuffer(bytearray(b"".join(arena) or bytes(16)), dtype=torch.uint8)
    return _collect(parts, bases, data, shared)


def buffer_of(bundles: Sequence[bytes], keys: Sequence[str] | None = None, shared: Mapping[bytes, Dictionary] | None = None) -> ShardBuffer:
    """A buffer of bundles that are already in memory.

    Args:
        bundles: The bytes of each.
        keys: Their keys as in the tar; numbers from 0 without it.
        shared: Shared parameters, by the hash that bundles name them by.

    Raises:
        BundleError: A bundle is damaged; the message names its key.
    """
    parsed: list[Row] = []
    arena, filled = [], 0
    for i, bundle in enumerate(bundles):
        key, name = (str(i), f"bundle {i}") if keys is None else (keys[i], f"{keys[i]}.rinr")
        parsed.append(row_of(key, filled, bundle, name))
        arena.append(bundle + bytes(-len(bundle) % 16))
        filled += len(arena[-1])
    everything = np.arange(len(bundles), dtype=np.int64)
    data = torch.frombuffer(bytearray(b"".join(arena) or bytes(16)), dtype=torch.uint8)
    return _collect([(build_index(parsed), everything, everything)], np.zeros(len(bundles), np.int64), data, shared)


def _read_range(path: Path, first: int, last: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(first)
            raw = file.read(last - first)
    except OSError as error:
        raise StorageError(f"{path}: expected a readable shard, got {error.strerror}; check the path, or convert again") from None
    if len(raw) != last - first:
        raise ShardError(f"{path.name}: expected bytes {first} to {last}, got {len(raw)} bytes; the shard is truncated, fetch or convert it again")
    return raw


def _ranges(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Byte ranges that cover the members, joined where the gap is small. Each starts where a member does."""
    ranges: list[tuple[int, int]] = []
    for i in np.argsort(offsets, kind="stable"):
        first, last = int(offsets[i]), int(offsets[i] + sizes[i])
        if ranges and first - ranges[-1][1] <= GAP:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return ranges


def spread(start: NDArray[np.int64], chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that belong to the chosen samples, and where each sample's rows begin in that selection."""
    counts = start[chosen + 1] - start[chosen]
    ends = np.cumsum(counts)
    starts = np.concatenate([[0], ends]).astype(np.int64)
    rows = np.arange(starts[-1]) + np.repeat(start[chosen] - starts[:-1], counts)
    return rows, starts


def _collect(
    parts: Sequence[tuple[ShardIndex, NDArray[np.int64], NDArray[np.int64]]],
    bases: NDArray[np.int64],
    data: Tensor,
    shared: Mapping[bytes, Dictionary] | None,
) -> ShardBuffer:
    """Columns of the samples in the order asked for. Each part is (index, places in the result, places in the shard)."""
    if not parts:
        parts = [(build_index([]), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    groups: list[Spec] = sorted({spec for index, *_ in parts for spec in index.groups}, key=rank)
    columns: dict[str, list[NDArray[Any]]] = {}
    place = np.concatenate([wanted for _, wanted, _ in parts])
    keys: list[str] = []

    def add(name: str, value: NDArray[Any]) -> None:
        columns.setdefault(name, []).append(value)

    for index, wanted, sample in parts:
        keys += [decode_key(key) for key in index.keys_at(sample.tolist())]
        for name in ("stored_size", "source_size", "label"):
            add(name, getattr(index, name)[sample].astype(np.int64))
        objects, starts = spread(index.object_start, sample)
        add("object_count", np.diff(starts))
        for name in ("box", "class_id", "crowd"):
            add(name, getattr(index, name)[objects])
        networks, starts = spread(index.network_start, sample)
        add("network_count", np.diff(starts))
        numbers = np.array([groups.index(spec) for spec in index.groups], np.int64)
        add("network_group", numbers[index.network_group[networks]])
        add("network_offset", index.network_offset[networks] + np.repeat(bases[wanted], np.diff(starts)))
        add("network_bytes", index.network_bytes[networks])
        add("network_object", index.network_object[networks].astype(np.int64))
        add("shared_hash", data.numpy()[(bases[wanted] + index.offset[sample])[:, None] + np.arange(SHARED_AT, SHARED_AT + 8)])
        for name in ("rect", "scale", "feather"):
            add(name, getattr(index, name)[networks].astype(np.float32))
    flat = {name: np.concatenate(values) for name, values in columns.items()}
    back = np.empty(len(place), np.int64)
    back[place] = np.arange(len(place))
    hashes = flat.pop("shared_hash")[back]
    object_rows, object_start = spread(_starts(flat.pop("object_count")), back)
    network_rows, network_start = spread(_starts(flat.pop("network_count")), back)
    order = {"stored_size": back, "source_size": back, "label": back, "box": object_rows, "class_id": object_rows, "crowd": object_rows}
    tensors = {name: torch.from_numpy(value[order.get(name, network_rows)]) for name, value in flat.items()}
    tensors["class_id"] = tensors["class_id"].long()
    return ShardBuffer(
        data=data,
        keys=tuple(keys[i] for i in back),
        groups=tuple(groups),
        object_start=torch.from_numpy(object_start),
        network_start=torch.from_numpy(network_start),
        shared_hash=tuple(row.tobytes() for row in hashes),
        shared=shared or {},
        **tensors,
    )


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
