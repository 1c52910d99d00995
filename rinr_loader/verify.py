"""Is a dataset whole? Every hash, every member, every bundle parsed and decoded, every index rebuilt; everything that is wrong is listed."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rinr_loader.dataset import DATASET, load_metadata
from rinr_loader.decode import decode, whole
from rinr_loader.dictionary import Dictionary
from rinr_loader.errors import ConfigError, RinrError
from rinr_loader.geometry import Placements
from rinr_loader.index import SUFFIX, ShardIndex, dump_index, index_shard, load_index
from rinr_loader.reader import ShardBuffer, read_samples
from rinr_loader.shared import FOLDER, listed, load_shared, path_of
from rinr_loader.source import SPLITS
from rinr_loader.writer import data_yaml, hash_file

DECODED = (16, 16)  # height and width at which every sample is decoded
AT_ONCE = 64
AGAIN = "fetch or convert it again"
INDEX = "make it again with `rinr index`"


@dataclass(frozen=True)
class Verification:
    """What was looked at and what is wrong with it.

    Args:
        shards, samples, bytes: Read.
        damage: One message for each thing that is wrong, shard by shard; empty where all is well.
    """

    shards: int
    samples: int
    bytes: int
    damage: tuple[str, ...]


@dataclass
class _Found:
    """What the shards were found to hold."""

    root: Path
    names: Sequence[str]
    device: torch.device
    damage: list[str] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    shared: dict[bytes, Dictionary] = field(default_factory=dict)
    bytes: int = 0

    def wrong(self, subject: object, expected: object, found: object, advice: str = AGAIN) -> None:
        self.damage.append(f"{subject}: expected {expected}, got {found}; {advice}")


def verify(path: str | Path, *, device: torch.device | str = "cpu", on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check a dataset; damage does not end the check.

    Args:
        path: The directory that `rinr convert` wrote, or its data.yaml.
        device: Where samples are decoded.
        on_progress: Called with the number of shards checked, and of all shards.

    Raises:
        ConfigError: There is no dataset.
        StorageError: `dataset.json` cannot be read.
    """
    root = Path(path) if Path(path).is_dir() else Path(path).parent
    metadata: dict[str, Any] | None = None
    try:
        root, metadata = load_metadata(path)
        found = _Found(root, metadata["names"], torch.device(device))
        _check_shared(found, metadata)
        rows: list[tuple[str, dict[str, Any]]] = [(split, row) for split, table in metadata["splits"].items() for row in table["shards"]]
    except ConfigError as error:
        if not (root / DATASET).is_file():
            raise
        # The shards can still be looked at by themselves.
        found = _Found(root, (), torch.device(device), [str(error)])
        rows = [(tar.parent.name, {"path": tar.relative_to(root).as_posix()}) for tar in _files(root, ".tar")]
    for done, (split, row) in enumerate(rows):
        if on_progress is not None:
            on_progress(done, len(rows))
        try:
            _check_shard(found, split, row)
        except OSError as error:
            found.wrong(row["path"], "a readable file", error.strerror or error, "check the disk")
    if on_progress is not None:
        on_progress(len(rows), len(rows))
    if metadata is not None:
        _check_dataset(found, metadata)
    return Verification(len(rows), found.samples.total(), found.bytes, tuple(found.damage))


def _files(root: Path, suffix: str) -> list[Path]:
    return [file for split in SPLITS for file in sorted((root / split).glob(f"*{suffix}"))]


def _check_shared(found: _Found, metadata: Mapping[str, Any]) -> None:
    """Check the files of shared parameters, and load those that are sound."""
    named = {path_of(found.root, sha256): (sha256, size) for sha256, size in listed(metadata).items()}
    for path in sorted({*named, *(found.root / FOLDER).glob("*")}):
        name = path.relative_to(found.root).as_posix()
        if path not in named:
            found.wrong(name, f"only the shared parameters of {DATASET}", "another file", "move it away, or list it with `rinr index`")
            continue
        sha256, size = named[path]
        if path.is_file():
            found.bytes += path.stat().st_size
        try:
            found.shared |= load_shared(found.root, {"shared": {sha256: size}})
        except RinrError as error:
            found.damage.append(str(error))
        else:
            if path.stat().st_size != size:
                found.wrong(name, f"{size} bytes", path.stat().st_size, INDEX)


def _check_shard(found: _Found, split: str, row: Mapping[str, Any]) -> None:
    """Check one shard and its index against each other and against the shard's row."""
    name, shard = row["path"], found.root / row["path"]
    if not shard.is_file():
        found.wrong(name, "a shard", "nothing there")
        return
    size = shard.stat().st_size
    found.bytes += size
    if "sha256" in row:
        if size != row["bytes"]:
            found.wrong(name, f"{row['bytes']} bytes", size)
        elif (digest := hash_file(shard)) != row["sha256"]:
            found.wrong(name, f"SHA-256 {row['sha256'][:12]}", digest[:12])
    before = len(found.damage)
    try:
        index = index_shard(shard, on_damage=lambda error: found.damage.append(f"{split}/{error}"))
    except RinrError as error:
        found.damage.append(f"{split}/{error}")
        return
    sound = len(found.damage) == before
    _check_members(found, split, shard)
    _check_samples(found, split, shard, index)
    if "index" in row:
        _check_index(found, row, index if sound else None, size)
        for what, count in (("samples", len(index)), ("objects", len(index.box))):
            if sound and count != row[what]:
                found.wrong(name, f"{row[what]} {what}", count, INDEX)


def _check_members(found: _Found, split: str, shard: Path) -> None:
    """Check what lies beside the bundles: a `KEY.json` is JSON, and of a sample that is there."""
    with tarfile.open(shard, "r:") as tar:
        names = [info.name for info in tar]
        bundles = {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}
        for name in names:
            if not name.endswith(".json"):
                continue
            file = tar.extractfile(name)
            try:
                json.loads(file.read() if file else b"")
            except ValueError as error:
                found.wrong(f"{split}/{shard.name}:{name}", "JSON", error)
            if name.removesuffix(".json") not in bundles:
                found.wrong(f"{split}/{shard.name}:{name}", f"a member {name.removesuffix('.json')}{SUFFIX} beside it", "none")


def _check_samples(found: _Found, split: str, shard: Path, index: ShardIndex) -> None:
    """Check keys and class ids, and decode every sample."""
    place = f"{split}/{shard.name}"
    found.samples[split] += len(index)
    found.objects[split] += len(index.box)
    found.groups.update(str(index.groups[number]) for number in index.network_group.tolist())
    for key in index.keys:
        other = found.keys.setdefault((split, key.casefold()), place)
        if other != place:
            found.wrong(f"{place}:{key}{SUFFIX}", "a key of its own", f"that of a sample in {other}")
    for what, column in (("class", index.class_id), ("label", index.label)):
        if found.names and len(column) and int(column.max()) >= len(found.names):
            found.wrong(place, f"a {what} below {len(found.names)}", int(column.max()))
    for first in range(0, len(index), AT_ONCE):
        some = np.arange(first, min(first + AT_ONCE, len(index)))
        buffer = read_samples([(shard, index)], np.zeros(len(some), np.int64), some, found.shared).to(found.device)
        everything = whole(buffer, DECODED)
        try:
            finite = _are_finite(buffer, everything)
        except RinrError:  # not all of them: one by one then, to tell of each
            finite = [False] * len(buffer)
        for i in [i for i, good in enumerate(finite) if not good]:
            try:
                (good,) = _are_finite(buffer, everything.select(torch.tensor([i], device=buffer.device)))
            except RinrError as error:
                found.damage.append(f"{place}:{error}")
            else:
                if not good:
                    found.wrong(f"{place}:{index.keys_at([first + i])[0]}{SUFFIX}", "a picture", "values that are not finite", "convert it again")


def _are_finite(buffer: ShardBuffer, placed: Placements) -> list[bool]:
    """Decode samples, each to an image of its own, and say which have finite values only."""
    placed = replace(placed, output=torch.arange(len(placed), device=buffer.device))
    images = decode(buffer, placed, size=DECODED, antialias=False, dtype=torch.float32)
    finite: list[bool] = images.isfinite().flatten(1).all(1).tolist()
    return finite


def _check_index(found: _Found, row: Mapping[str, Any], rebuilt: ShardIndex | None, shard_bytes: int) -> None:
    """Check an index file by its hash, by itself, and against the one rebuilt from the shard (None where that is damaged)."""
    name, file = row["index"], found.root / row["index"]
    if not file.is_file():
        found.wrong(name, "an index", "nothing there", INDEX)
        return
    data = file.read_bytes()
    found.bytes += len(data)
    if len(data) != row["index_bytes"]:
        found.wrong(name, f"{row['index_bytes']} bytes", len(data), INDEX)
    elif (digest := hash_file(file)) != row["index_sha256"]:
        found.wrong(name, f"SHA-256 {row['index_sha256'][:12]}", digest[:12], INDEX)
    try:
        load_index(data, name=name, shard_bytes=shard_bytes)
    except RinrError as error:
        found.damage.append(str(error))
    else:
        if rebuilt is not None and dump_index(rebuilt, shard_bytes=shard_bytes) != data:
            found.wrong(name, "what its shard holds", "something else", INDEX)


def _check_dataset(found: _Found, metadata: Mapping[str, Any]) -> None:
    """Check what `dataset.json` says of all shards together, what lies beside them, and data.yaml."""
    listed = {row[name] for table in metadata["splits"].values() for row in table["shards"] for name in ("path", "index")}
    for file in (*_files(found.root, ".tar"), *_files(found.root, ".safetensors")):
        name = file.relative_to(found.root).as_posix()
        if name not in listed:
            found.wrong(name, f"only the shards and indexes of {DATASET}", "another one", "move it away, or bring both in line with `rinr index`")
    whole_so_far = not found.damage
    for split, table in metadata["splits"].items():
        for what, count in (("samples", found.samples[split]), ("objects", found.objects[split])):
            if whole_so_far and count != table[what]:
                found.wrong(f"{DATASET}: {split}", f"{count} {what} as in its shards", table[what], INDEX)
    if whole_so_far and dict(found.groups) != metadata["groups"]:
        found.wrong(f"{DATASET}: groups", dict(sorted(found.groups.items())), metadata["groups"], INDEX)
    yaml = found.root / "data.yaml"
    wanted = data_yaml([split for split in SPLITS if split in metadata["splits"]], metadata["names"])
    if not yaml.is_file():
        found.wrong("data.yaml", "the splits and names for a trainer", "nothing there", INDEX)
    elif yaml.read_bytes() != wanted:
        found.wrong("data.yaml", f"the splits and names of {DATASET}", "something else", INDEX)
