"""WebDataset shards of pictures: `*.tar` with members `KEY.jpg` (or .png, .webp and the like), `KEY.cls` and `KEY.json`.

SOURCE is one shard, a folder of shards, or a folder with `train/`, `val/`, `test/` of shards; in a folder without those, a split word in the shard's
name counts (`imagenet-val-000003.tar`), else it is `train`. As in WebDataset, a key ends at the first dot of the file name.

- `.cls` is the class id of the picture, a whole number in ASCII. The names are the numbers, because shards have none.
- `.json` goes into `extra` as it is. If it is an object with `boxes` (xyxy in pixels) and `classes` (ids), or with `annotations` (COCO: `bbox` as
  xywh in pixels and `category_id`), these become the boxes.

Pixels are not read here: a sample names the byte range of its picture in the shard. So shards must be plain tars, not compressed ones.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rinr_loader.converters.files import IMAGE_SUFFIXES, MAX_UNNAMED_ID, box_array, class_array, split_folders, split_in_name
from rinr_loader.errors import ConvertError
from rinr_loader.source import ByteRange, Problem, Sample, Source, Split

NAME = "webdataset"

_TAR = frozenset({".tar"})
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<suffix>[^/]+)")
_LIMIT = 1 << 26  # a label member above 64 MiB is not a label


@dataclass
class _Group:
    """The members of one key."""

    image: ByteRange | None = None
    label: int = -1
    annotations: Any = None
    problems: list[Problem] = field(default_factory=list)


def detect(path: Path) -> bool:
    """Whether this is a shard with pictures among its first members, or a folder of such shards."""
    shard = next(iter(_shards(path)), None)
    if shard is None:
        return False
    try:
        with tarfile.open(shard, "r:") as tar:
            for _ in range(100):
                member = tar.next()
                if member is None:
                    return False
                match = _MEMBER.fullmatch(member.name)
                if match and _is_picture(_last(match["suffix"])):
                    return True
    except tarfile.TarError:
        return False
    return False


def read(path: Path) -> Source:
    """List the pictures in all shards.

    Raises:
        ConvertError: There are no shards.
    """
    samples: list[Sample] = []
    problems: list[Problem] = []
    shards = _shards(path)
    if not shards:
        msg = f"{path}: expected .tar shards, got none; give a shard or the folder of shards"
        raise ConvertError(msg)
    for shard, split in shards.items():
        for key, group in _read_shard(shard, problems).items():
            problems += group.problems
            if group.image is None:
                problems.append(Problem(f"{shard}: {key}", "has no picture"))
            else:
                samples.append(_sample(key, split, group.image, group, problems))
    ids = [int(sample.classes.max()) for sample in samples if sample.classes.size] + [sample.label for sample in samples]
    return Source(NAME, samples, tuple(str(i) for i in range(max(ids, default=-1) + 1)), tuple(problems))


def _shards(path: Path) -> dict[Path, Split]:
    """List the shards with the split of each."""
    if path.is_file():
        return {path: split_in_name(path.stem) or "train"} if path.suffix.lower() in _TAR else {}
    if not path.is_dir():
        return {}
    folders = split_folders(path, _TAR)
    if folders:
        return {shard: split for split, folder in folders.items() for shard in sorted(folder.glob("*.tar"))}
    return {shard: split_in_name(shard.stem) or "train" for shard in sorted(path.glob("*.tar"))}


def _last(suffix: str) -> str:
    """What kind of member it is: `KEY.left.jpg` is a picture, as WebDataset decodes it."""
    return suffix.rpartition(".")[2].lower()


def _is_picture(suffix: str) -> bool:
    return f".{suffix}" in IMAGE_SUFFIXES


def _read_shard(shard: Path, problems: list[Problem]) -> dict[str, _Group]:
    """List the members of one shard by key."""
    groups: dict[str, _Group] = {}
    length = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name.removeprefix("./"))
                if match is None or not member.isreg() or member.sparse is not None:
                    if not member.isdir():
                        problems.append(Problem(f"{shard}: {member.name}", "is not a plain file named KEY.SUFFIX"))
                    continue
                if member.offset_data + member.size > length:
                    problems.append(Problem(f"{shard}: {member.name}", f"expected {member.size} bytes, the shard ends before; it is truncated"))
                    continue
                _add(groups.setdefault(match["key"], _Group()), shard, tar, member, _last(match["suffix"]))
    except tarfile.TarError as error:
        problems.append(Problem(str(shard), f"cannot be read as a plain tar: {error}; decompress it or fetch it again"))
    return groups


def _add(group: _Group, shard: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    """Add one member to its sample."""
    subject = f"{shard}: {member.name}"
    if _is_picture(suffix):
        if group.image is not None:
            group.problems.append(Problem(subject, "is a second picture of the same key; the first was taken"))
            return
        group.image = ByteRange(shard, member.offset_data, member.size)
        return
    if suffix not in {"cls", "json"}:
        return
    stream = tar.extractfile(member) if member.size <= _LIMIT else None
    content = stream.read() if stream else b""
    try:
        if suffix == "json":
            group.annotations = json.loads(content)
            return
        group.label = int(content)
        if 0 <= group.label <= MAX_UNNAMED_ID:
            return
    except (ValueError, RecursionError):
        pass
    group.label = -1 if suffix == "cls" else group.label
    group.problems.append(
        Problem(subject, f"expected {f'a class id from 0 to {MAX_UNNAMED_ID}' if suffix == 'cls' else 'JSON'}, got {content[:40]!r}")
    )


def _sample(key: str, split: Split, image: ByteRange, group: _Group, problems: list[Problem]) -> Sample:
    annotations = group.annotations
    boxes: list[list[float]] = []
    classes: list[int] = []
    for number, (box, label) in enumerate(_objects(annotations), start=1):
        try:
            values = np.array(box, np.float64)
            if values.shape != (4,) or not np.isfinite(values).all() or int(label) != label or not 0 <= label <= MAX_UNNAMED_ID:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            reason = f"object {number}: expected 4 finite numbers and a class id, got {box!r:.60}, {label!r:.20}"
            problems.append(Problem(f"{image.path}: {key}.json", reason))
            continue
        boxes.append(values.tolist())
        classes.append(int(label))
    return Sample(
        key,
        split,
        image,
        boxes=box_array(boxes),
        classes=class_array(classes),
        label=group.label,
        extra=annotations if isinstance(annotations, dict) else {} if annotations is None else {"json": annotations},
    )


def _objects(annotations: object) -> list[tuple[Any, Any]]:
    """Boxes as xyxy with class ids, as far as the JSON has them."""
    if not isinstance(annotations, Mapping):
        return []
    boxes, classes, rows = (annotations.get(name) for name in ("boxes", "classes", "annotations"))
    if isinstance(boxes, list) and isinstance(classes, list) and len(boxes) == len(classes):
        return list(zip(boxes, classes, strict=True))
    if isinstance(rows, list):
        return [(_xyxy(row.get("bbox")), row.get("category_id")) for row in rows if isinstance(row, dict)]
    return []


def _xyxy(box: object) -> object:
    if isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box):
        x, y, w, h = box
        return [x, y, x + w, y + h]
    return box
