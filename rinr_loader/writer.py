"""Deterministic tar shards, their indexes and `dataset.json`; every file appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rinr_loader.errors import ConvertError, StorageError
from rinr_loader.index import ShardIndex, dump_index, index_shard

DATASET_VERSION = 1
DATASET = "dataset.json"


@contextmanager
def atomic(path: Path, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete and on disk.

    Args:
        path: The file.
        scratch: Folder on the same file system for the unfinished file; beside `path` by default.

    Raises:
        StorageError: There is no space left, or the place cannot be written.
    """
    unfinished = (scratch or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        with suppress(OSError):  # it is not there, or the place is not: the error above says more
            unfinished.unlink()


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where it is not there yet.

    Raises:
        StorageError: There is no space left, or the place cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: no space left; free some and run the same command again, what is finished is kept")
    return StorageError(f"{path}: expected a place that can be written, got {error.strerror}; check the folder and its permissions")


def write_bytes(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write a whole file atomically."""
    with atomic(path, scratch) as file:
        file.write(data)


def dump_json(value: object) -> bytes:
    """JSON that is the same bytes for the same value, readable by people."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def member(name: str, size: int = 0) -> tarfile.TarInfo:
    """The header of a tar member: USTAR, no time, no owner.

    Raises:
        ConvertError: The name is longer than USTAR holds (100 bytes, and 155 for folders before them).
    """
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise ConvertError(f"{name}: expected a name that a USTAR archive holds, got {len(name)} characters ({error}); shorten it") from None
    return info


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], scratch: Path | None = None) -> None:
    """Write a tar whose bytes depend on its members alone."""
    with atomic(path, scratch) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            tar.addfile(member(name, len(data)), io.BytesIO(data))


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Members of a tar that this module wrote."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            yield info.name, file.read() if file else b""


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_index(shard: Path, scratch: Path | None = None) -> ShardIndex:
    """Write the index of a shard beside it, from the shard alone."""
    index = index_shard(shard)
    write_bytes(shard.with_suffix(".safetensors"), dump_index(index, shard_bytes=shard.stat().st_size), scratch)
    return index


def describe_shard(root: Path, shard: Path, index: ShardIndex) -> dict[str, Any]:
    """A shard's row in `dataset.json`."""
    beside = shard.with_suffix(".safetensors")
    return {
        "path": shard.relative_to(root).as_posix(),
        "samples": len(index),
        "objects": len(index.box),
        "bytes": shard.stat().st_size,
        "sha256": hash_file(shard),
        "index": beside.relative_to(root).as_posix(),
        "index_bytes": beside.stat().st_size,
        "index_sha256": hash_file(beside),
    }


def describe_dataset(
    splits: Mapping[str, Sequence[tuple[dict[str, Any], ShardIndex]]],
    *,
    names: Sequence[str],
    codec: Mapping[str, Any],
    source: Mapping[str, Any],
    shared: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """`dataset.json`: what a reader needs before it opens a shard. No times, no host names."""
    groups: Counter[str] = Counter()
    labelled = boxed = False
    table: dict[str, Any] = {}
    for split, shards in splits.items():
        rows = [row for row, _ in shards]
        table[split] = {"samples": sum(r["samples"] for r in rows), "objects": sum(r["objects"] for r in rows), "shards": rows}
        for _, index in shards:
            groups.update(str(index.groups[number]) for number in index.network_group.tolist())
            labelled |= bool((index.label >= 0).any())
            boxed |= len(index.box) > 0
    task = "detect" if boxed else "classify" if labelled else "none"
    return {
        "format": "rinr",
        "version": DATASET_VERSION,
        "task": task,
        "names": list(names),
        "splits": table,
        "groups": dict(groups),
        "codec": dict(codec),
        "source": dict(source),
        "shared": dict(shared or {}),
    }


def data_yaml(splits: Iterable[str], names: Sequence[str]) -> bytes:
    """A data.yaml as Ultralytics reads it: a folder for each split, names by id."""
    lines = [f"{split}: {split}" for split in splits] + ["names:"]
    lines += [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names or ["object"])]
    return ("\n".join(lines) + "\n").encode()
