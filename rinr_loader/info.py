"""What a converted dataset holds: counts, bytes and where they go, PSNR, shapes, classes, its worst pictures.

Opens no shard but for a sheet, and for where the bytes of `tile` streams go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.dataset import RinrDataset, load_metadata
from rinr_loader.errors import ConfigError
from rinr_loader.pictures import decode_pictures
from rinr_loader.shared import listed
from rinr_loader.sheet import Cell, draw_sheet
from rinr_loader.source import SPLITS
from rinr_loader.specs import FAMILIES
from rinr_loader.tiles import stream_bytes

STREAMS = 64  # samples of a split whose streams are looked into


@dataclass(frozen=True)
class Quality:
    """PSNR in dB over the pictures of a split that have one: mean and worst, None where none has."""

    mean: float | None
    worst: float | None


@dataclass(frozen=True)
class SplitInfo:
    """One split.

    Args:
        samples, objects, shards: How many.
        psnr, object_psnr: As measured when it was converted, against the pictures as stored.
        residuals: Networks besides the backgrounds.
        saw_labels: Whether its pictures were encoded with a look at their labels.
    """

    samples: int
    objects: int
    shards: int
    psnr: Quality
    object_psnr: Quality
    residuals: int
    saw_labels: bool


@dataclass(frozen=True)
class FamilyInfo:
    """Samples of one family, and the bytes of their bundles."""

    samples: int
    bytes: int


@dataclass(frozen=True)
class ByteInfo:
    """Where the bytes of the whole dataset are; the parts add up to `total`.

    Args:
        background, residual: Weights, biases and scales of the networks; of a `jpeg` its file, of a `tile` its stream, all counted as background.
        header: Headers, tables and padding of the bundles.
        tar: What tars add: their own headers and padding, and other members such as `KEY.json`.
        index: The indexes.
        shared: Shared parameters.
        other: `dataset.json`, `data.yaml` and `report.json`.
        total: All files.
        source: The picture files it was made from.
    """

    background: int
    residual: int
    header: int
    tar: int
    index: int
    shared: int
    other: int
    total: int
    source: int


@dataclass(frozen=True)
class WorstPicture:
    """One of the pictures with the lowest PSNR, in dB."""

    split: str
    key: str
    psnr: float
    object_psnr: float | None


@dataclass(frozen=True)
class StreamInfo:
    """Where the bytes of `tile` streams go.

    Args:
        samples: How many were looked at, evenly spread over each split.
        bytes: Mean bytes a sample of each part, see `stream.count_bytes`.
    """

    samples: int
    bytes: dict[str, float]


@dataclass(frozen=True)
class Info:
    """All of it.

    `families` counts samples by family, `groups` networks by shape, `classes` objects (or pictures, of a classification set) by class name.
    """

    path: str
    task: str
    names: tuple[str, ...]
    codec: dict[str, Any]
    source_format: str | None
    splits: dict[str, SplitInfo]
    bytes: ByteInfo
    psnr: Quality
    object_psnr: Quality
    families: dict[str, FamilyInfo]
    groups: dict[str, int]
    classes: dict[str, int]
    worst: tuple[WorstPicture, ...]
    streams: StreamInfo

    @property
    def samples(self) -> int:
        return sum(split.samples for split in self.splits.values())


def describe(path: str | Path, *, worst: int = 10) -> Info:
    """Describe a dataset from `dataset.json` and its indexes.

    Args:
        path: The directory that `rinr convert` wrote, or its data.yaml.
        worst: How many of the worst pictures to list.

    Raises:
        ConfigError: There is no dataset.
        ShardError: An index is damaged, or a shard is missing or has another size.
        BundleError: A stream that is looked at is damaged.
    """
    root, metadata = load_metadata(path)
    datasets = [RinrDataset(root, split) for split in SPLITS if split in metadata["splits"]]
    if not datasets:
        raise ConfigError(f"{root}: expected a split, got none; convert again")
    return Info(
        path=str(root),
        task=metadata["task"],
        names=tuple(metadata["names"]),
        codec={name: value for name, value in metadata["codec"].items() if name != "job"},
        source_format=metadata["source"].get("format"),
        splits={dataset.split: _split(dataset) for dataset in datasets},
        bytes=_bytes(root, metadata, datasets),
        psnr=_quality(datasets, "psnr"),
        object_psnr=_quality(datasets, "object_psnr"),
        families=_families(datasets),
        groups=dict(sorted(metadata["groups"].items())),
        classes=_classes(metadata, datasets),
        worst=tuple(_worst(datasets, worst)),
        streams=_streams(datasets),
    )


def _split(dataset: RinrDataset) -> SplitInfo:
    indexes = [index for _, index in dataset.shards]
    residuals = sum(len(index.network_group) - len(index) for index in indexes)
    return SplitInfo(
        samples=len(dataset),
        objects=sum(len(index.box) for index in indexes),
        shards=len(indexes),
        psnr=_quality([dataset], "psnr"),
        object_psnr=_quality([dataset], "object_psnr"),
        residuals=residuals,
        saw_labels=residuals > 0 or (dataset.split != "train" and bool(dataset.metadata["codec"].get("val_residuals"))),
    )


def _quality(datasets: Sequence[RinrDataset], column: str) -> Quality:
    values = np.concatenate([dataset.column(column) for dataset in datasets])
    values = values[np.isfinite(values)]
    return Quality(float(values.mean(dtype=np.float64)), float(values.min())) if len(values) else Quality(None, None)


def _bytes(root: Path, metadata: dict[str, Any], datasets: Sequence[RinrDataset]) -> ByteInfo:
    rows = [row for table in metadata["splits"].values() for row in table["shards"]]
    indexes = [index for dataset in datasets for _, index in dataset.shards]
    background, residual = sum(i.background_bytes for i in indexes), sum(i.residual_bytes for i in indexes)
    bundles = sum(int(index.size.sum()) for index in indexes)
    shards, beside = sum(row["bytes"] for row in rows), sum(row["index_bytes"] for row in rows)
    shared = sum(listed(metadata).values())
    other = sum(path.stat().st_size for name in ("dataset.json", "data.yaml", "report.json") if (path := root / name).is_file())
    return ByteInfo(
        background=background,
        residual=residual,
        header=bundles - background - residual,
        tar=shards - bundles,
        index=beside,
        shared=shared,
        other=other,
        total=shards + beside + shared + other,
        source=int(metadata["source"].get("bytes", 0)),
    )


def _families(datasets: Sequence[RinrDataset]) -> dict[str, FamilyInfo]:
    """Families that are there, in the order of their numbers."""
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, index in (shard for dataset in datasets for shard in dataset.shards):
        first = index.network_group[index.network_start[:-1]]
        for group, spec in enumerate(index.groups):
            samples[spec.family] += int((first == group).sum())
            sizes[spec.family] += int(index.size[first == group].sum())
    return {family: FamilyInfo(samples[family], sizes[family]) for family in FAMILIES if samples[family]}


def _streams(datasets: Sequence[RinrDataset]) -> StreamInfo:
    """Read some samples of the family `tile` of each split."""
    parts: list[dict[str, float]] = []
    for dataset in datasets:
        if any(spec.family == "tile" for _, index in dataset.shards for spec in index.groups):
            chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), STREAMS)).round().astype(np.int64))
            parts += stream_bytes(dataset.read(chosen))
    names = dict.fromkeys(name for part in parts for name in part)
    return StreamInfo(len(parts), {name: sum(part.get(name, 0.0) for part in parts) / len(parts) for name in names})


def _classes(metadata: dict[str, Any], datasets: Sequence[RinrDataset]) -> dict[str, int]:
    indexes = [index for dataset in datasets for _, index in dataset.shards]
    columns: list[NDArray[Any]] = [index.class_id for index in indexes] if metadata["task"] == "detect" else [index.label for index in indexes]
    counts = Counter(value for column in columns for value in column.tolist() if value >= 0)
    names = list(metadata["names"])
    found = {name: counts.pop(i, 0) for i, name in enumerate(names)}
    return {**found, **{f"class {i}": counts[i] for i in sorted(counts)}}


def _worst(datasets: Sequence[RinrDataset], count: int) -> list[WorstPicture]:
    found = []
    for dataset in datasets:
        psnr, objects = dataset.column("psnr"), dataset.column("object_psnr")
        for i in np.argsort(psnr, kind="stable")[:count].tolist():
            if np.isfinite(psnr[i]):
                own = float(objects[i]) if np.isfinite(objects[i]) else None
                found.append(WorstPicture(dataset.split, dataset.keys[i], float(psnr[i]), own))
    return sorted(found, key=lambda picture: picture.psnr)[:count]


def draw_worst(info: Info, *, width: int = 320, height: int = 240) -> Image.Image:
    """Draw the worst pictures as decoded, with their label boxes, PSNR and key.

    Args:
        info: From `describe`.
        width, height: Of each picture's area, in pixels.

    Raises:
        BundleError: A bundle is damaged.
        ConfigError: No picture has a PSNR.
    """
    if not info.worst:
        raise ConfigError(f"{info.path}: expected pictures whose PSNR was measured, got none; leave out --worst")
    cells = []
    datasets = {split: RinrDataset(info.path, split) for split in {picture.split for picture in info.worst}}
    for picture in info.worst:
        dataset = datasets[picture.split]
        i = dataset.keys.index(picture.key)
        label = dataset.labels[i]
        pixels = next(decode_pictures(dataset, [i]))
        scale = np.tile([pixels.shape[1] / label["size"][1], pixels.shape[0] / label["size"][0]], 2)
        told = f"{picture.psnr:.1f} dB" + ("" if picture.object_psnr is None else f" / {picture.object_psnr:.1f} dB")
        cells.append(Cell(pixels, f"{told}  {picture.split}/{picture.key}", (label["boxes"] * scale).astype(np.float32)))
    return draw_sheet(cells, columns=min(5, len(cells)), width=width, height=height)
