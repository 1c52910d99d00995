"""A converted dataset beside the same pictures as JPEG: bytes and PSNR, on the source's own pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.dataset import RinrDataset
from rinr_loader.errors import ConfigError, ConvertError
from rinr_loader.image import fit_inside, read_image
from rinr_loader.quality import box_mask, jpeg, jpeg_bytes, mean_of, psnr
from rinr_loader.source import Sample, Source

QUALITIES = (10, 25, 50, 75, 95)
HIGHEST = 95  # above it, files grow and errors hardly shrink


@dataclass(frozen=True)
class Rate:
    """One way to store the same pictures.

    Args:
        name: Which.
        bytes: Mean per picture; of shards with their part of tar and index.
        psnr, object_psnr: Means in dB, None where there is nothing to measure.
    """

    name: str
    bytes: float
    psnr: float | None
    object_psnr: float | None


@dataclass(frozen=True)
class Comparison:
    """Rates of one split, all on the same pictures. The first is the dataset's own, the second the best JPEG that takes no more bytes."""

    split: str
    pictures: int
    rates: tuple[Rate, ...]


def compare_with_jpeg(dataset: RinrDataset, source: Source, *, samples: int = 32, qualities: Sequence[int] = QUALITIES) -> Comparison:
    """Encode pictures of the source as optimized JPEGs and measure them as the dataset's were.

    Args:
        dataset: One split.
        source: What it was converted from.
        samples: Pictures at most, evenly spread.
        qualities: Of the JPEGs; the best one that takes no more bytes than the dataset comes first.

    Raises:
        ConfigError: The source holds none of the dataset's pictures.
    """
    size = dataset.metadata["codec"].get("size")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).round().astype(np.int64))
    pixels: list[NDArray[np.uint8]] = []
    used: list[int] = []
    exact: dict[tuple[str, str], Sample] = {(sample.split, sample.key): sample for sample in source.samples}
    by_key = {sample.key: sample for sample in source.samples}  # where a share of train became val
    hashes = dataset.column("source_hash")
    for i in chosen.tolist():
        key = dataset.keys[i]
        sample = exact.get((dataset.split, key)) or by_key.get(key)
        try:
            image = None if sample is None else read_image(sample.image)
        except ConvertError:
            image = None
        if image is not None and image.source_hash == hashes[i].tobytes():
            pixels.append(fit_inside(image.pixels, None if size is None else (size[0], size[1])))
            used.append(i)
    if not used:
        raise ConfigError(f"source: expected the pictures that {dataset.path} was made from, got none of the {len(chosen)} tried; pass that source")
    masks = [_mask(dataset, i, picture) for i, picture in zip(used, pixels, strict=True)]
    own = _own_rate(dataset, used)
    equal = _quality_of(pixels, own.bytes)
    as_many = _jpeg_rate(pixels, masks, equal)
    rates = (own, Rate(f"{as_many.name}, no more bytes", as_many.bytes, as_many.psnr, as_many.object_psnr))
    return Comparison(dataset.split, len(used), rates + tuple(_jpeg_rate(pixels, masks, quality) for quality in qualities))


def _mask(dataset: RinrDataset, i: int, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The union of a sample's label boxes in stored pixels; crowds do not count."""
    label = dataset.labels[i]
    height, width = pixels.shape[:2]
    scale = np.tile([width / label["size"][1], height / label["size"][0]], 2)
    return box_mask(label["boxes"][~label["crowd"]] * scale, height, width)


def _own_rate(dataset: RinrDataset, used: Sequence[int]) -> Rate:
    rows = dataset.metadata["splits"][dataset.split]["shards"]
    bundles = dataset.column("size")
    around = (sum(row["bytes"] + row["index_bytes"] for row in rows) - int(bundles.sum())) / len(bundles)
    columns = [dataset.column(name)[list(used)] for name in ("psnr", "object_psnr")]
    return Rate("rinr, as stored", float(bundles[list(used)].mean()) + around, *(mean_of([column]) for column in columns))


def _quality_of(pixels: Sequence[NDArray[np.uint8]], wanted: float) -> int:
    """The highest quality at which JPEGs take at most `wanted` bytes each; 1 where none does."""
    low, high = 1, HIGHEST
    while low < high:
        middle = (low + high + 1) // 2
        fits = np.mean([jpeg_bytes(picture, middle) for picture in pixels]) <= wanted
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _jpeg_rate(pixels: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.bool_]], quality: int) -> Rate:
    sizes, whole, objects = [], [], []
    for picture, mask in zip(pixels, masks, strict=True):
        data = jpeg(picture, quality)
        decoded = np.asarray(Image.open(io.BytesIO(data)))
        sizes.append(len(data))
        whole.append(psnr(decoded, picture))
        objects.append(psnr(decoded, picture, mask))
    means = [mean_of([np.array(values, np.float32)]) for values in (whole, objects)]
    return Rate(f"JPEG quality {quality}", float(np.mean(sizes)), *means)
