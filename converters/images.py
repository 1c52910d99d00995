"""A folder of pictures, at any depth, without labels; or a single picture.

Where the folders directly inside are called `train`, `val` or `test`, they are the splits; otherwise everything is `train`.
"""

from __future__ import annotations

from pathlib import Path

from rinr_loader.converters.files import is_image, key_of, list_files, list_images, split_folders
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "images"

# Files like these usually are labels: a folder that has some is only read as bare pictures when that is asked for.
_LABEL_SUFFIXES = frozenset({".xml", ".json", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".mat", ".tfrecord", ".parquet"})
_NOT_LABELS = ("readme", "license", "licence", "copying", "requirements")


def label_files(path: Path) -> list[Path]:
    """List the files below a folder that look like annotations of some format."""
    return [file for file in list_files(path, _LABEL_SUFFIXES) if not file.name.lower().startswith(_NOT_LABELS)]


def detect(path: Path) -> bool:
    """Whether this is a picture, or a folder of pictures without anything that looks like labels."""
    if path.is_file():
        return is_image(path)
    return bool(list_images(path)) and not label_files(path)


def read(path: Path) -> Source:
    """List the pictures; labels that may lie beside them are not read."""
    if path.is_file():
        return Source(NAME, [Sample(path.stem, "train", path)])
    splits: dict[Split, Path] = split_folders(path)
    roots: dict[Split, Path] = splits or {"train": path}
    samples = [Sample(key_of(image, root), split, image) for split, root in roots.items() for image in list_images(root)]
    inside = {sample.image for sample in samples}
    problems = [Problem(str(image), "lies outside the train, val and test folders") for image in list_images(path) if image not in inside]
    return Source(NAME, samples, problems=tuple(problems))
