"""Tracking sequences as frames: OTB, UAV123, TinyTLP, VOT and what is laid out like them.

SOURCE is one sequence or a folder of sequences at any depth. A sequence is a folder of numbered frames, in `img/`, `color/`, `imgs/`, `frames/` or
directly inside, with its annotations in

- `groundtruth_rect.txt`, or `groundtruth_rect.1.txt`, `.2.txt` ... for several objects, or `groundtruth.txt`;
- else a file that the folder's name ends with (`wakeboard7.txt` for `uav123_wakeboard7/`), inside or beside the folder, or below a folder `anno/`.

One row a frame, numbers between commas, tabs or spaces: `x y w h`, or `frame x y w h lost` (TLP; lost = 1: no object), or the corners of a polygon,
whose bounds are the box while the polygon goes into `extra`. NaN or all zero means that the object is not there. The class is `object`; with several
objects, `extra` has their numbers as `track`.

OTB (`groundtruth_rect` with four columns) counts pixels from 1 as the MATLAB code of its benchmark does, so 1 is subtracted from x and y; nothing of
that kind is documented for the others, and they are taken as they are. Frames without a row stay, without objects, and are reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rinr_loader.converters.files import (
    IMAGE_SUFFIXES,
    box_array,
    class_array,
    holds,
    is_image,
    key_of,
    numbers,
    read_text,
    split_folders,
    subfolders,
)
from rinr_loader.errors import ConvertError
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "sequence"

_FRAME_FOLDERS = ("img", "color", "imgs", "frames", "")
_SEPARATOR = re.compile(r"[,;\s]+")
# The frame of the first row, where it is not the first frame: http://cvlab.hanyang.ac.kr/tracker_benchmark/datasets.html gives David (300:770).
_OTB_FIRST_FRAME = {"David": 300}

_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Object:
    """One object in one frame: its box, and the corners where it is a polygon."""

    box: _Box
    polygon: tuple[float, ...] = ()


@dataclass
class _Track:
    """What one annotation file says: the object by frame position from 0 (None: not there)."""

    objects: dict[int, _Object | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def detect(path: Path) -> bool:
    """Whether this is a sequence, or most folders of pictures inside are."""
    if not path.is_dir():
        return False
    if _is_sequence(path):
        return True
    inside = [folder for folder in subfolders(path) if holds(folder, IMAGE_SUFFIXES)]
    count = sum(next(_sequences(folder), None) is not None for folder in inside)
    return count > 0 and 2 * count > len(inside)


def read(path: Path) -> Source:
    """List the frames of all sequences with their boxes; keys are `sequence/frame`.

    Raises:
        ConvertError: There is no sequence with annotations.
    """
    path = path.absolute()
    samples: list[Sample] = []
    problems: list[Problem] = []
    roots: dict[Split, Path] = {} if _is_sequence(path) else split_folders(path)
    for split, root in (roots or {"train": path}).items():
        folders = list(_sequences(root))
        for folder in folders:
            _read_sequence(folder, folder.name if folder == root else folder.relative_to(root).as_posix(), split, samples, problems)
        taken = {frame.parent for folder in folders for frame in _frames(folder)}
        problems += [Problem(str(folder), "holds frames but no annotations") for folder in _frame_folders(root) if folder not in taken]
    if not samples:
        msg = f"{path}: expected sequences of frames with groundtruth_rect.txt, groundtruth.txt or NAME.txt, got none; give the folder of a sequence"
        raise ConvertError(msg)
    return Source(NAME, samples, ("object",), tuple(problems))


def _is_sequence(folder: Path) -> bool:
    return bool(_frames(folder)) and bool(_annotation_files(folder))


def _sequences(folder: Path) -> Iterator[Path]:
    """Find the sequences at or below a folder."""
    if _is_sequence(folder):
        yield folder
        return
    for child in subfolders(folder):
        yield from _sequences(child)


def _frame_folders(folder: Path) -> Iterator[Path]:
    if any(is_image(file) for file in folder.iterdir()):
        yield folder
    for child in subfolders(folder):
        yield from _frame_folders(child)


def _frames(folder: Path) -> list[Path]:
    """List the frames of a sequence in the order of their numbers (`2.jpg` before `10.jpg`)."""
    for name in _FRAME_FOLDERS:
        place = folder / name
        if place.is_dir() and (frames := [file for file in place.iterdir() if is_image(file)]):
            return sorted(frames, key=lambda frame: (_number(frame) if _number(frame) is not None else math.inf, frame.name))
    return []


def _number(frame: Path) -> int | None:
    digits = re.search(r"\d+$", frame.stem)
    return int(digits.group()) if digits else None


def _annotation_files(folder: Path) -> list[Path]:
    """Find the annotation files of a sequence, one an object."""
    for pattern in ("groundtruth_rect*.txt", "groundtruth.txt"):
        if files := [file for file in sorted(folder.glob(pattern)) if _has_rows(file)]:
            return files
    name = folder.absolute().name.lower()
    above = list(folder.absolute().parents)[:3]
    places = [folder, *above[:1], *(parent / "anno" for parent in above), *(parent / "anno" / above[0].name for parent in above)]
    for place in places:
        files = [file for file in sorted(place.glob("*.txt")) if file.stem.lower() == name or (place == folder and name.endswith(file.stem.lower()))]
        if files := [file for file in files if _has_rows(file)]:
            return files[:1]
    return []


def _has_rows(file: Path) -> bool:
    """Whether the first row of a file is one of an annotation."""
    with file.open("rb") as stream:
        lines = stream.read(4096).decode("utf-8", errors="replace").lstrip("\ufeff").splitlines()
    row = next((_row(line) for line in lines if line.strip()), None)
    return row is not None and _is_row(row)


def _row(line: str) -> list[float] | None:
    return numbers(_SEPARATOR.split(line.strip().strip(",;")))


def _is_row(row: list[float]) -> bool:
    return len(row) in {4, 6} or (len(row) >= 8 and len(row) % 2 == 0)


def _read_sequence(folder: Path, name: str, split: Split, samples: list[Sample], problems: list[Problem]) -> None:
    """Add the frames of one sequence."""
    frames = _frames(folder)
    files = _annotation_files(folder)
    tracks = [_read_track(file, frames, folder.name) for file in files]
    for track in tracks:
        problems += track.problems
    for position, frame in enumerate(frames):
        found = [(number, track.objects.get(position)) for number, track in enumerate(tracks, start=1)]
        there = [(number, thing) for number, thing in found if thing is not None]
        objects: list[dict[str, object]] = []
        for number, thing in there:
            objects.append(({"track": number} if len(tracks) > 1 else {}) | ({"polygon": list(thing.polygon)} if thing.polygon else {}))
        samples.append(
            Sample(
                f"{name}/{key_of(frame, frame.parent)}",
                split,
                frame,
                boxes=box_array([thing.box for _, thing in there]),
                classes=class_array([0] * len(there)),
                sequence=name,
                extra={"objects": objects} if any(objects) else {},
            ),
        )


def _read_track(file: Path, frames: list[Path], folder: str) -> _Track:
    """Read one annotation file and assign its rows to frames."""
    track = _Track()
    try:
        lines = [(number, line) for number, line in enumerate(read_text(file).splitlines(), start=1) if line.strip()]
    except ConvertError as error:
        track.problems.append(Problem(str(file), str(error)))
        return track
    by_number = {_number(frame): position for position, frame in enumerate(frames)}
    otb = file.name.startswith("groundtruth_rect")
    first = by_number.get(_OTB_FIRST_FRAME.get(folder), 0) if otb and len(lines) < len(frames) else 0
    beyond = 0
    for index, (number, line) in enumerate(lines):
        row = _row(line)
        position: int | None = first + index
        if row is None or not _is_row(row):
            track.problems.append(Problem(f"{file}:{number}", f"expected x y w h, frame x y w h lost, or a polygon, got {line.strip()[:80]!r}"))
            continue
        if len(row) == 6:  # TLP: the row names its frame
            position = by_number.get(int(row[0])) if math.isfinite(row[0]) else None
        if position is None or position >= len(frames):
            beyond += 1
        else:
            track.objects[position] = _object(row, otb=otb)
    if beyond:
        track.problems.append(Problem(str(file), f"has {len(lines)} rows for {len(frames)} frames; {beyond} rows without a frame were left out"))
    missing = [frames[position].name for position in range(len(frames)) if position not in track.objects]
    if missing:
        reason = f"has no usable row for {len(missing)} of {len(frames)} frames, from {missing[0]}; they are kept without this object"
        track.problems.append(Problem(str(file), reason))
    return track


def _object(row: list[float], *, otb: bool) -> _Object | None:
    """Turn a row into an object, None where it is not there."""
    offset = 1.0 if otb and len(row) == 4 else 0.0
    if len(row) == 6:
        if row[5]:
            return None
        row = row[1:5]
    if not all(map(math.isfinite, row)) or not any(row):
        return None
    if len(row) == 4:
        x, y, w, h = row[0] - offset, row[1] - offset, row[2], row[3]
        return _Object((x, y, x + w, y + h))
    return _Object((min(row[::2]), min(row[1::2]), max(row[::2]), max(row[1::2])), tuple(row))
