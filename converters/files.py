"""What several converters need: image suffixes, listing a folder, keys, the words that name a split, numbers and arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rinr_loader.errors import ConvertError
from rinr_loader.source import Split

# Suffixes of pictures, whether or not the installed Pillow reads them: a file that cannot be read is reported, never passed over.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic", ".heif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".dds"},
)

# The highest class id of a source that does not name its classes: a name is made up for every id below it.
MAX_UNNAMED_ID = 65_535

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def is_image(path: Path) -> bool:
    """Whether a file is named like a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """List the files below a folder that have one of these lower-case suffixes, sorted.

    Hidden names (`.DS_Store`, `._0001.jpg`, `.git`) are passed over; links to folders are followed, except back into a folder around them.
    """
    found = (path for path in _walk(folder, ()) if path.suffix.lower() in suffixes)
    return sorted(found, key=Path.as_posix)


def list_images(folder: Path) -> list[Path]:
    """List the pictures below a folder, sorted."""
    return list_files(folder, IMAGE_SUFFIXES)


def _walk(folder: Path, around: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in around:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*around, real))
            else:  # also a broken link: the encoder reports that it cannot be read
                yield folder / entry.name


def subfolders(folder: Path) -> list[Path]:
    """List the folders directly inside a folder, sorted, hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def holds(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether any file below a folder has one of these suffixes; stops at the first."""
    return folder.is_dir() and any(path.suffix.lower() in suffixes for path in _walk(folder, ()))


def key_of(image: Path, root: Path) -> str:
    """Key of a picture: its path below `root` without suffix, or its bare name where it lies elsewhere."""
    path = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
    return path.with_suffix("").as_posix()


def split_of_folder(name: str) -> Split | None:
    """Split that a folder name states as a whole: `train`, `valid`, `val2017`; None for any other name."""
    return _SPLIT_WORDS.get(name.lower().rstrip("0123456789"))


def split_in_name(name: str) -> Split | None:
    """Split that is one of the words of a file name: `instances_train2017`, `imagenet-val-000001`."""
    words = (_SPLIT_WORDS.get(word) for word in re.findall("[a-z]+", name.lower()))
    return next((split for split in words if split), None)


def split_folders(root: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> dict[Split, Path]:
    """Find the folders that divide a dataset into splits: `train/`, `val/` (also `valid/`, `validation/`, `val2017/`), `test/`.

    A class may be called `train` too (buses, cars, trains), so a lone split word among other folders with data is no split.

    Args:
        root: Folder of the dataset.
        suffixes: What its data files end with; folders without such files do not count.

    Raises:
        ConvertError: Two folders name the same split.
    """
    found: dict[Split, Path] = {}
    others = False
    for folder in subfolders(root):
        if not holds(folder, suffixes):
            continue
        split = split_of_folder(folder.name)
        if split is None:
            others = True
        elif split in found:
            msg = f"{root}: expected one folder for {split}, got {found[split].name}/ and {folder.name}/; move one of them away"
            raise ConvertError(msg)
        else:
            found[split] = folder
    return {} if others and len(found) < 2 else found


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark.

    Raises:
        ConvertError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}; save it as UTF-8"
        raise ConvertError(msg) from error


def numbers(fields: Collection[str]) -> list[float] | None:
    """Turn fields of a text row into numbers (NaN and infinities included), None where one is not a number."""
    try:
        return [float(field) for field in fields]
    except ValueError:
        return None


def box_array(boxes: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Boxes as float32, shape `(n, 4)`; what is too large for float32 becomes infinite, and is dropped with other invalid boxes later."""
    with np.errstate(over="ignore"):
        return np.array(boxes, np.float64).reshape(-1, 4).astype(np.float32)


def class_array(classes: Sequence[int]) -> NDArray[np.int64]:
    """Class ids as int64, shape `(n,)`."""
    return np.array(classes, np.int64)
