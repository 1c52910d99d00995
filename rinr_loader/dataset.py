"""`RinrDataset`: one split of a converted dataset. Its index and labels are in memory; pixels are decoded on demand."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rinr_loader.boxes import place_objects
from rinr_loader.decode import decode, whole
from rinr_loader.dictionary import Dictionary
from rinr_loader.errors import ConfigError, ShardError, StorageError
from rinr_loader.index import ShardIndex, decode_key, load_index
from rinr_loader.reader import ShardBuffer, read_samples
from rinr_loader.shared import check_shared, load_shared
from rinr_loader.source import SPLITS

DATASET = "dataset.json"
VERSION = 1
AT_ONCE = 16  # samples that iteration decodes together


class RinrDataset(IterableDataset[tuple[Tensor, dict[str, Any]]]):
    """One split of a dataset that `rinr convert` wrote.

    Iterating yields `(image, target)` for each sample in stored order: the image uint8 in [0, 255], `(3, H, W)`; the target a dict with
    `boxes` (float32 xyxy in pixels of the image, `(n, 4)`), `classes` (int64), `crowd` (bool), `label` (int, -1 for none), `key` and
    `index`. Under a torch `DataLoader` with workers, the workers share out the samples. `rinr_loader.DataLoader` is the faster way:
    it decodes whole batches, shuffles, augments and resumes.

    Args:
        path: The directory, or its data.yaml.
        split: Which split.
        size: Height and width of the images when iterating; None gives each at its stored size.
        device: Where to decode when iterating.
        antialias: Filter when images get smaller than stored.

    `shards` holds path and index of each shard.

    Raises:
        ConfigError: The path holds no dataset, or not this split.
        ShardError: An index is damaged or of another shard, or a shard or a file of shared parameters is missing or has another size.

    Example:
        >>> dataset = RinrDataset(path, split="train")
        >>> image, target = next(iter(dataset))
        >>> image.dtype
        torch.uint8
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.path, self.metadata = load_metadata(path)
        if split not in self.metadata["splits"]:
            raise ConfigError(f"{self.path}: expected a split {split!r}, got only {', '.join(self.metadata['splits'])}; choose one of these")
        self.split, self.size, self.device, self.antialias = split, size, torch.device(device), antialias
        self.names: tuple[str, ...] = tuple(self.metadata["names"])
        check_shared(self.path, self.metadata)
        self.shards: list[tuple[Path, ShardIndex]] = [self._open(row) for row in self.metadata["splits"][split]["shards"]]
        self.shard_samples = [len(index) for _, index in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)

    def _open(self, row: dict[str, Any]) -> tuple[Path, ShardIndex]:
        shard, beside = self.path / row["path"], self.path / row["index"]
        try:
            data, size = beside.read_bytes(), shard.stat().st_size
        except OSError as error:
            raise ShardError(f"{error.filename}: expected a file of the dataset, got {error.strerror}; fetch or convert it again") from None
        if size != row["bytes"]:
            raise ShardError(f"{shard.name}: expected {row['bytes']} bytes, got {size}; the shard is damaged, fetch or convert it again")
        digest = hashlib.sha256(data).hexdigest()
        if digest != row["index_sha256"]:
            raise ShardError(f"{beside.name}: expected SHA-256 {row['index_sha256'][:12]}, got {digest[:12]}; make it again with `rinr index`")
        return shard, load_index(data, name=beside.name, shard_bytes=size)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def identity(self) -> str:
        """A hash of the split's content: it stays the same when the directory moves."""
        rows = self.metadata["splits"][self.split]["shards"]
        return hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()[:16]

    @cached_property
    def shared(self) -> dict[bytes, Dictionary]:
        """The shared parameters that the dataset carries, by the hash that bundles name them by."""
        return load_shared(self.path, self.metadata)

    @cached_property
    def keys(self) -> list[str]:
        """Key of each sample, as the source had it."""
        return [decode_key(key) for _, index in self.shards for key in index.keys]

    def column(self, name: str) -> NDArray[Any]:
        """A column of the index that has one row a sample, such as `psnr` or `label`, over all shards."""
        return np.concatenate([getattr(index, name) for _, index in self.shards])

    @cached_property
    def labels(self) -> list[dict[str, Any]]:
        """Annotations of each sample, from the index alone.

        Each is a dict with `key`, `size` and `stored_size` (height and width in pixels, of the source and as stored), `boxes` (float32
        xyxy in source pixels, `(n, 4)`), `classes` (int64), `crowd` (bool) and `label` (-1 for none).
        """
        rows = []
        for _, index in self.shards:
            sizes, stored = index.source_size.tolist(), index.stored_size.tolist()
            for i, key in enumerate(index.keys):
                of = slice(int(index.object_start[i]), int(index.object_start[i + 1]))
                boxes = {"boxes": index.box[of], "classes": index.class_id[of].astype(np.int64), "crowd": index.crowd[of]}
                about = {"key": decode_key(key), "size": tuple(sizes[i]), "stored_size": tuple(stored[i]), "label": int(index.label[i])}
                rows.append({**about, **boxes})
        return rows

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> ShardBuffer:
        """Read samples into memory, in the order given, ready to decode.

        Args:
            indices: Which samples, 0 to `len(self) - 1`; one may stand more than once.

        Raises:
            IndexError: An index is out of range.
            BundleError: A bundle is damaged.
            ConfigError: The shared parameters are of another version.
            ShardError: A shard is cut off, or the shared parameters are damaged.
            StorageError: A shard cannot be read.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"indices: expected 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}")
        shard = np.searchsorted(self._starts, wanted, side="right") - 1
        return read_samples(self.shards, shard, wanted - self._starts[shard], self.shared)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for first in range(number * AT_ONCE, len(self), workers * AT_ONCE):
            yield from self._decode(range(first, min(first + AT_ONCE, len(self))))

    def _decode(self, indices: range) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        buffer = self.read(indices).to(self.device)
        sizes = buffer.stored_size.tolist() if self.size is None else [self.size] * len(buffer)
        together = len({tuple(size) for size in sizes}) == 1
        everything = whole(buffer, tuple(sizes[0]))
        images = decode(buffer, everything, size=tuple(sizes[0]), antialias=self.antialias) if together else None
        for i, index in enumerate(indices):
            size = (int(sizes[i][0]), int(sizes[i][1]))
            placement = whole(buffer, size).select(torch.tensor([i], device=buffer.device))
            alone = type(placement)(placement.output.new_zeros(1), placement.sample, placement.matrix, placement.clip)
            image = images[i] if images is not None else decode(buffer, alone, size=size, antialias=self.antialias)[0]
            boxes, row, _ = place_objects(alone, buffer.box, buffer.object_start, size=size)
            target = {"boxes": boxes, "classes": buffer.class_id[row], "crowd": buffer.crowd[row]}
            yield image, {**target, "label": int(buffer.label[i]), "key": buffer.keys[i], "index": index}


def load_metadata(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Find and read a dataset's `dataset.json`.

    Args:
        path: The directory that `rinr convert` wrote, or the data.yaml in it.

    Returns:
        The directory and what `dataset.json` says.

    Raises:
        ConfigError: It is a URL, or holds no dataset of a version that this build reads.
        StorageError: It cannot be read.
    """
    if "://" in str(path):
        raise ConfigError(f"{path}: expected a local directory, got a URL; copy the dataset to disk first")
    root = Path(path)
    root = root.parent if root.suffix in (".yaml", ".yml", ".json") else root
    try:
        described = json.loads((root / DATASET).read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a directory with {DATASET}, got none; make one with `rinr convert SOURCE DEST`") from None
    except NotADirectoryError:
        raise ConfigError(f"{path}: expected a directory with {DATASET}, got a file; pass the directory that `rinr convert` wrote") from None
    except OSError as error:
        raise StorageError(f"{root / DATASET}: expected a readable file, got {error.strerror}; check the path") from None
    except ValueError as error:
        raise ConfigError(f"{root / DATASET}: expected JSON, got {error}; fetch or convert the dataset again") from None
    if not isinstance(described, dict) or described.get("format") != "rinr":
        raise ConfigError(f"{root / DATASET}: expected a rinr dataset, got something else; pass the directory that `rinr convert` wrote")
    if described.get("version") != VERSION:
        raise ConfigError(f"{root / DATASET}: expected version {VERSION}, got {described.get('version')}; upgrade rinr_loader to read it")
    if not _is_sound(described):
        raise ConfigError(f"{root / DATASET}: expected what docs/FORMAT.md lists, got other entries or types; fetch or convert the dataset again")
    return root, described


_TOP: dict[str, type] = {"task": str, "names": list, "splits": dict, "groups": dict, "codec": dict, "source": dict}
_SHARD: dict[str, type] = dict.fromkeys(("path", "sha256", "index", "index_sha256"), str) | dict.fromkeys(
    ("samples", "objects", "bytes", "index_bytes"), int
)
_SPLIT: dict[str, type] = {"samples": int, "objects": int, "shards": list}


def _is_sound(described: dict[str, Any]) -> bool:
    """Whether `dataset.json` has every entry that is read without looking, and nothing that leads out of its directory."""
    if not _has(described, _TOP) or not all(isinstance(name, str) for name in described["names"]):
        return False
    shared = described.get("shared", {})
    if shared != [] and not (
        isinstance(shared, dict) and all(re.fullmatch("[0-9a-f]{64}", name) and type(size) is int for name, size in shared.items())
    ):
        return False
    tables = described["splits"].values()
    if not set(described["splits"]) <= set(SPLITS) or not all(_has(table, _SPLIT) for table in tables):
        return False
    rows = [row for table in tables for row in table["shards"]]
    return all(_has(row, _SHARD) and not {"", ".", ".."} & {*row["path"].split("/"), *row["index"].split("/")} for row in rows)


def _has(value: object, entries: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in entries.items())
