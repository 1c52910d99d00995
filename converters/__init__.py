"""Source datasets, one file per format. Each has a `NAME`, `detect(path)` and `read(path)`; `open_source` chooses and checks.

Formats are named in `CONVERTERS`, the most specific first. When none is given, every format with labels is tried: exactly one must fit. Class folders
and bare pictures are tried only when none does, so that labels are never left behind without a word.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rinr_loader.converters import coco, dac_sdc, image_folder, images, sequence, voc, webdataset, yolo
from rinr_loader.converters.files import list_images
from rinr_loader.converters.selection import check_keys, hold_out
from rinr_loader.errors import ConvertError, StorageError
from rinr_loader.source import SPLITS, Source

__all__ = ["CONVERTERS", "open_source"]


class Converter(Protocol):
    """What every file here offers."""

    NAME: str

    def detect(self, path: Path) -> bool:
        """Whether a path holds this format; cheap, reads no pixels."""

    def read(self, path: Path) -> Source:
        """List the samples of a path, their pixels not opened."""


CONVERTERS: dict[str, Converter] = {
    module.NAME: module
    for module in (
        dac_sdc,
        yolo,
        coco,
        voc,
        sequence,
        webdataset,
        image_folder,
        images,
    )
}
_FALLBACKS = (image_folder.NAME, images.NAME)


def open_source(path: str | Path, *, source_format: str | None = None, val_fraction: float = 0.0, limit: int | None = None) -> Source:
    """List the samples of a source dataset.

    Args:
        path: Folder or file, as the format asks for.
        source_format: One of `CONVERTERS`; None detects it.
        val_fraction: Share of the train samples, from 0 up to but not including 1, that becomes `val` where the source has no val split. Samples are
            chosen by a hash of their key, and where there are sequences, whole sequences by a hash of their name.
        limit: Keep only the first so many samples of every split, in the order of their keys.

    Returns:
        The samples sorted by split (train, val, test), then key.

    Raises:
        ConvertError: Nothing is there, no format or several fit, nothing was found, or two samples have the same key.
        StorageError: Reading failed.
        ValueError: `val_fraction` or `limit` is out of range.
    """
    if not 0 <= val_fraction < 1:
        msg = f"val_fraction: expected a share from 0 up to but not including 1, got {val_fraction}"
        raise ValueError(msg)
    if limit is not None and limit < 1:
        msg = f"limit: expected at least 1 sample, got {limit}"
        raise ValueError(msg)
    path = Path(path)
    try:
        source = _converter(path, source_format).read(path)
    except OSError as error:
        msg = f"{error.filename or path}: expected a readable dataset, got {error.strerror or error}; check the path and its permissions"
        raise StorageError(msg) from error
    if not source.samples:
        msg = f"{path}: expected pictures in the {source.format} format, got none; {_advice(source)}"
        raise ConvertError(msg)
    samples = sorted(source.samples, key=lambda sample: (SPLITS.index(sample.split), sample.key))
    check_keys(samples)
    if val_fraction and not any(sample.split == "val" for sample in samples):
        samples = hold_out(samples, val_fraction)
    if limit is not None:
        samples = [sample for split in SPLITS for sample in [s for s in samples if s.split == split][:limit]]
    return replace(source, samples=tuple(samples))


def _converter(path: Path, source_format: str | None) -> Converter:
    known = ", ".join(CONVERTERS)
    if source_format is not None and source_format not in CONVERTERS:
        msg = f"source format: expected one of {known}, got {source_format!r}"
        raise ConvertError(msg)
    if not path.exists():
        msg = f"{path}: expected a dataset, got nothing there; check the path"
        raise ConvertError(msg)
    dataset = (path if path.is_dir() else path.parent) / "dataset.json"
    if dataset.is_file() and '"rinr"' in dataset.read_text(encoding="utf-8", errors="replace")[:4096]:
        msg = f"{path}: expected a dataset of pictures, got one that is converted already; give the source that it was made from"
        raise ConvertError(msg)
    if source_format is not None:
        return CONVERTERS[source_format]
    fitting = [name for name in CONVERTERS if name not in _FALLBACKS and CONVERTERS[name].detect(path)]
    fitting = fitting or [name for name in _FALLBACKS if CONVERTERS[name].detect(path)][:1]
    if len(fitting) > 1:
        msg = f"{path}: expected one format, got signs of {' and '.join(fitting)}; choose with --source-format (source_format=)"
        raise ConvertError(msg)
    if not fitting:
        msg = f"{path}: expected a dataset in one of the formats {known}, {_seen(path)}; choose with --source-format (source_format=)"
        raise ConvertError(msg)
    return CONVERTERS[fitting[0]]


def _seen(path: Path) -> str:
    """Say what is in a folder that fits no format."""
    if path.is_file():
        return "got another file"
    pictures = list_images(path)
    labels = images.label_files(path)
    if not pictures:
        return "got no pictures and no shards" if not labels else f"got no pictures, only files such as {labels[0]}"
    return f"got {len(pictures)} pictures and label files such as {labels[0]}; images takes the pictures without labels"


def _advice(source: Source) -> str:
    if not source.problems:
        return "give the folder that holds them"
    first = source.problems[0]
    return f"{len(source.problems)} were left out, the first: {first.subject}: {first.reason}"
