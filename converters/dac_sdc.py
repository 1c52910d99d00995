"""DAC-SDC, the UAV detection contest: 640x360 frames with one object each.

SOURCE holds `ground_truth.txt` with rows `name [xmin, xmax, ymin, ymax]` (both x first, then both y) and the frames beside it or in `images/`; its
one class is `object`. Or SOURCE holds the training set as released: a folder per kind of object, with an XML beside each frame, where `whale1` names
the first video with a whale; classes are the names without that number. Coordinates are taken as continuous, as the contest's own scoring does.

`split.json` with lists `train`, `val` and `test` of frame names gives the splits; otherwise everything is `train`. Frames without an annotation, and
frames that split.json does not list, are left out and reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from rinr_loader.converters.files import (
    box_array,
    class_array,
    is_image,
    key_of,
    list_files,
    list_images,
    numbers,
    read_text,
    split_of_folder,
    subfolders,
)
from rinr_loader.converters.voc_xml import read_annotation
from rinr_loader.errors import ConvertError
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "dac_sdc"

_ROW = re.compile(r"^\s*(?P<name>\S.*?)\s*\[(?P<numbers>[^\]]*)\]\s*$")
_SIZE = (640, 360)


def detect(path: Path) -> bool:
    """Whether this is a ground_truth.txt of this form, its folder, or a folder of category folders with the contest's XML files."""
    file = _ground_truth(path)
    if file is not None:
        with file.open("rb") as stream:
            head = stream.read(4096).decode("utf-8", errors="replace").lstrip("\ufeff").splitlines()
        return any(_ROW.match(line) for line in head[:1])
    return path.is_dir() and next(_released_xml(path), None) is not None


def read(path: Path) -> Source:
    """List the frames with their box.

    Raises:
        ConvertError: There is neither a ground_truth.txt nor an XML of the contest, or split.json cannot be used.
    """
    file = _ground_truth(path)
    if file is None:
        return _read_xml(path)
    root = file.parent
    problems: list[Problem] = []
    rows = _rows(file, problems)
    images = {image.relative_to(root).as_posix(): image for image in list_images(root)}
    folders = ("images/", "JPEGImages/", "")
    split_of = _read_splits(root, problems)
    samples: list[Sample] = []
    for name, boxes in rows.items():
        image = next((images.pop(folder + name) for folder in folders if folder + name in images), None)
        key = Path(name).with_suffix("").as_posix()
        if image is None:
            problems.append(Problem(name, "the frame does not exist"))
        elif split_of and name not in split_of:
            problems.append(Problem(name, "is not listed in split.json"))
        else:
            samples.append(Sample(key, split_of.get(name, "train"), image, boxes=box_array(boxes), classes=class_array([0] * len(boxes))))
    problems += [Problem(name, f"has no row in {file.name}") for name in images]
    return Source(NAME, samples, ("object",), tuple(problems))


def _ground_truth(path: Path) -> Path | None:
    file = path / "ground_truth.txt" if path.is_dir() else path
    return file if file.is_file() and file.suffix.lower() == ".txt" else None


def _rows(file: Path, problems: list[Problem]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Read the boxes of every frame that has a row."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        match = _ROW.match(line)
        values = numbers(match["numbers"].split(",")) if match else None
        if match is None or values is None or len(values) != 4 or not all(map(math.isfinite, values)):
            problems.append(Problem(f"{file}:{number}", f"expected `name [xmin, xmax, ymin, ymax]`, got {line.strip()[:80]!r}"))
            continue
        xmin, xmax, ymin, ymax = values
        rows.setdefault(match["name"].replace("\\", "/"), []).append((xmin, ymin, xmax, ymax))
    return rows


def _read_splits(root: Path, problems: list[Problem]) -> dict[str, Split]:
    """Read split.json: split by frame name, empty where there is no such file."""
    file = root / "split.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        msg = f"{file}: expected JSON, got {error}; correct or delete it"
        raise ConvertError(msg) from error
    found: dict[str, Split] = {}
    for word, names in content.items() if isinstance(content, dict) else ():
        split = split_of_folder(word)
        if split is None or not isinstance(names, list):
            continue
        listed = [str(name) for name in names]
        problems += [Problem(f"{file}: {name}", f"is listed for {found[name]} too and stays there") for name in listed if name in found]
        found = dict.fromkeys(listed, split) | found
    if not found:
        msg = f'{file}: expected {{"train": [...], "test": [...]}} with frame names, got neither; correct or delete it'
        raise ConvertError(msg)
    return found


def _released_xml(path: Path) -> Iterator[Path]:
    """Find XML files beside a frame in category folders, as long as the first is of the contest: its frame size, and bare objects."""
    for folder in subfolders(path):
        for file in sorted(folder.glob("*.xml")):
            if not any(is_image(image) for image in folder.glob(f"{_glob_escape(file.stem)}.*")):
                continue
            try:
                annotation = read_annotation(file)
            except ConvertError:
                continue
            if annotation.size != _SIZE or not annotation.bare:
                return
            yield file


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _read_xml(path: Path) -> Source:
    images = {key_of(image, path): image for image in list_images(path)}
    problems: list[Problem] = []
    found = []
    for file in list_files(path, {".xml"}):
        image = images.pop(key_of(file, path), None)
        if image is None:
            problems.append(Problem(str(file), "its frame does not exist"))
            continue
        try:
            annotation = read_annotation(file)
        except ConvertError as error:
            problems.append(Problem(str(image), f"its annotation cannot be read: {error}"))
            continue
        problems += [Problem(str(file), reason) for reason in annotation.problems]
        found.append((key_of(image, path), image, annotation))
    problems += [Problem(str(image), "has no XML file") for image in images.values()]
    if not found:
        msg = f"{path}: expected ground_truth.txt, or folders of frames with an XML each, got neither; give the folder that holds them"
        raise ConvertError(msg)
    kinds = sorted({_kind(name) for _, _, annotation in found for name in annotation.names})
    samples = [
        Sample(
            key,
            "train",
            image,
            boxes=box_array(annotation.boxes),
            classes=class_array([kinds.index(_kind(name)) for name in annotation.names]),
            declared_size=annotation.size,
            sequence=annotation.names[0] if annotation.names else None,
        )
        for key, image, annotation in found
    ]
    return Source(NAME, samples, tuple(kinds), tuple(problems))


def _kind(name: str) -> str:
    return name.rstrip("0123456789") or name
