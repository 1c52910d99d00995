"""Rebuild the indexes of a dataset from its shards, and with them `dataset.json` and `data.yaml`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rinr_loader.bundle import SHARED_AT
from rinr_loader.dataset import DATASET, load_metadata
from rinr_loader.dictionary import HASH_BYTES, shipped
from rinr_loader.errors import ConfigError, ShardError
from rinr_loader.index import ShardIndex, index_shard
from rinr_loader.shared import FOLDER, SUFFIX, find_shared, listed
from rinr_loader.source import SPLITS
from rinr_loader.writer import data_yaml, describe_dataset, describe_shard, dump_json, write_bytes, write_index


@dataclass(frozen=True)
class Reindexed:
    """What was found: shards and samples, and which index files were changed."""

    shards: int
    samples: int
    changed: tuple[str, ...]


def reindex(path: str | Path) -> Reindexed:
    """Make every index again from the shard beside it.

    Shards that are gone are forgotten with their indexes, new ones are taken in; so are files of shared parameters. Nothing is written before
    every shard has been read and found sound.

    Args:
        path: The directory that `rinr convert` wrote, or its data.yaml.

    Raises:
        BundleError: A bundle is damaged.
        ConfigError: There is no dataset, or it has no shards left.
        ShardError: A shard is not a tar, is cut off, or holds a key twice; or a file of shared parameters is damaged.
        StorageError: The indexes cannot be written.
    """
    root, metadata = load_metadata(path)
    shards = [(split, shard) for split in SPLITS for shard in sorted((root / split).glob("*.tar"))]
    if not shards:
        raise ConfigError(f"{root}: expected shards, got none; fetch or convert the dataset again")
    shared = find_shared(root)
    before = listed(metadata)
    for _, shard in shards:
        _check_named(shard, index_shard(shard), shared, before)
    for split in SPLITS:
        for beside in (root / split).glob("*.safetensors"):
            if not beside.with_suffix(".tar").exists():
                beside.unlink()
    splits: dict[str, list[tuple[dict[str, Any], ShardIndex]]] = {}
    changed = []
    for split, shard in shards:
        beside = shard.with_suffix(".safetensors")
        old = beside.read_bytes() if beside.is_file() else None
        index = write_index(shard)
        if beside.read_bytes() != old:
            changed.append(beside.relative_to(root).as_posix())
        splits.setdefault(split, []).append((describe_shard(root, shard, index), index))
    write_bytes(root / "data.yaml", data_yaml(splits, metadata["names"]))
    codec, source = metadata.get("codec", {}), metadata.get("source", {})
    described = describe_dataset(splits, names=metadata["names"], codec=codec, source=source, shared=shared)
    write_bytes(root / DATASET, dump_json(described))
    return Reindexed(len(shards), sum(len(index) for rows in splits.values() for _, index in rows), tuple(changed))


def _check_named(shard: Path, index: ShardIndex, shared: Iterable[str], before: Iterable[str]) -> None:
    """Check that the shared parameters are there which bundles name: without them, what `dataset.json` knows of them must not be lost.

    Raises:
        ShardError: Some are neither in the dataset nor in the package.
    """
    with shard.open("rb") as file:
        keys = set()
        for offset in index.offset.tolist():
            file.seek(offset + SHARED_AT)
            keys.add(file.read(HASH_BYTES))
    for key in sorted(keys):
        name = key.hex()
        if any(key) and not any(sha256.startswith(name) for sha256 in (*shared, shipped().sha256)):
            known = next((sha256 for sha256 in before if sha256.startswith(name)), f"{name}*")
            raise ShardError(f"{shard}: expected the shared parameters that its bundles name, got no {FOLDER}/{known}{SUFFIX}; fetch that file again")
