"""The data.yaml of a YOLO dataset: which folders are the splits, and what the classes are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rinr_loader.converters.files import read_text
from rinr_loader.errors import ConvertError
from rinr_loader.source import Split

_SPLIT_KEYS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NOTHING = frozenset({"", "~", "null", "Null", "NULL", "None"})


@dataclass(frozen=True)
class Config:
    """What a data.yaml says.

    Args:
        path: The yaml file.
        base: Its `path` entry, empty where it has none.
        splits: The entries of every split that it names, as written.
        names: Class names by id; empty where it has none.
        keypoint_columns: Numbers per object after the box, from `kpt_shape`.
    """

    path: Path
    base: str
    splits: Mapping[Split, tuple[str, ...]]
    names: tuple[str, ...]
    keypoint_columns: int

    @property
    def folder(self) -> Path:
        """The folder that the yaml lies in."""
        return self.path.parent

    def root(self) -> Path | None:
        """Find the folder below which at least one split exists, None where there is none."""
        for root in (self.folder / self.base, Path.cwd() / self.base, self.folder):
            if any(self.locate(root, entry) for entries in self.splits.values() for entry in entries):
                return root
        return None

    @staticmethod
    def locate(root: Path, entry: str) -> Path | None:
        """Find one entry below a root; as in Ultralytics, a leading `../` that leads nowhere is passed over (Roboflow writes it)."""
        places = (root / entry, root / entry[3:]) if entry.startswith("../") else (root / entry,)
        return next((place for place in places if place.exists()), None)


def find_yaml(folder: Path) -> Config | None:
    """Find the yaml of a dataset folder: `data.yaml` or `dataset.yaml`, or the only one that names classes or splits.

    Raises:
        ConvertError: There are several, or data.yaml cannot be used.
    """
    if not folder.is_dir():
        return None
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return read_yaml(folder / name)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in {".yaml", ".yml"} and not file.name.startswith("."))
    configs: list[Config] = []
    for file in files:
        try:
            config = read_yaml(file)
        except ConvertError:  # a yaml of something else
            continue
        if config.names or config.splits:
            configs.append(config)
    if len(configs) > 1:
        msg = f"{folder}: expected one dataset yaml, got {', '.join(config.path.name for config in configs)}; give the file instead of the folder"
        raise ConvertError(msg)
    return configs[0] if configs else None


def read_yaml(file: Path) -> Config:
    """Read a data.yaml.

    Raises:
        ConvertError: It is not UTF-8, not YAML, not a mapping, or its `names` do not fit together.
    """
    try:
        # BaseLoader keeps every value as the text that was written: a class called `no` stays `no`, and nothing is constructed.
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        msg = f"{file}: expected YAML, got {' '.join(str(error).split())}; correct it"
        raise ConvertError(msg) from error
    if not isinstance(content, dict):
        msg = f"{file}: expected `train:`, `val:` and `names:`, got {_kind(content)}; give the dataset's data.yaml"
        raise ConvertError(msg)
    splits: dict[Split, tuple[str, ...]] = {}
    for word, split in _SPLIT_KEYS.items():
        entries = content.get(word, "")
        entries = entries if isinstance(entries, list) else [entries]
        if not all(isinstance(entry, str) for entry in entries):
            msg = f"{file}: {word}: expected a path or a list of paths, got {_kind(entries[0])}; correct it"
            raise ConvertError(msg)
        given = tuple(entry.replace("\\", "/") for entry in entries if entry not in _NOTHING)
        if given and split not in splits:
            splits[split] = given
    base = content.get("path", "")
    if not isinstance(base, str):
        msg = f"{file}: path: expected a folder, got {_kind(base)}; correct it"
        raise ConvertError(msg)
    return Config(
        path=file.absolute(),
        base="" if base in _NOTHING else base.replace("\\", "/"),
        splits=splits,
        names=_names(file, content),
        keypoint_columns=_keypoint_columns(file, content),
    )


def _names(file: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    names = content.get("names", "")
    count = content.get("nc", "")
    if not isinstance(count, str) or (count not in _NOTHING and not count.isdecimal()):
        msg = f"{file}: nc: expected a whole number, got {count!r}; correct it or delete the line"
        raise ConvertError(msg)
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(map(str, range(len(names)))):
            msg = f"{file}: names: expected the ids 0 to {len(names) - 1}, got {', '.join(map(str, names))[:200]}; give every id its name"
            raise ConvertError(msg)
        found = tuple(names[str(i)] for i in range(len(names)))
    elif isinstance(names, list):
        found = tuple(names)
    elif names in _NOTHING:
        return tuple(f"class_{i}" for i in range(int(count))) if count not in _NOTHING else ()
    else:
        msg = f"{file}: names: expected a list or ids with names, got {_kind(names)}; write them as `0: person`"
        raise ConvertError(msg)
    if not all(isinstance(name, str) for name in found):
        msg = f"{file}: names: expected a text for every class, got {_kind(next(n for n in found if not isinstance(n, str)))}; correct it"
        raise ConvertError(msg)
    if count not in _NOTHING and int(count) != len(found):
        msg = f"{file}: expected {count} names as `nc` says, got {len(found)}; make them agree"
        raise ConvertError(msg)
    return found


def _keypoint_columns(file: Path, content: Mapping[str, Any]) -> int:
    shape = content.get("kpt_shape", [])
    if not isinstance(shape, list) or not all(str(n).isdecimal() for n in shape):
        msg = f"{file}: kpt_shape: expected [points, 2 or 3], got {shape!r}; correct it"
        raise ConvertError(msg)
    return math.prod(map(int, shape)) if shape else 0


def _kind(value: object) -> str:
    return f"{value[:80]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
