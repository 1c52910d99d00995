"""COCO JSON: `annotations/instances_train.json` and the like, with the pictures in a folder beside it.

SOURCE is a JSON file, or a folder that has such files directly inside, in `annotations/`, or in its split folders (`train/_annotations.coco.json`).
The split is the word in the file's name, else in its folder's name, else `train`. Category ids become 0, 1, ... in their order. Boxes are xywh with
the corner at continuous coordinates, so x + w is the right edge. All other fields of an annotation go into `extra`, segmentations included.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rinr_loader.converters.files import box_array, class_array, key_of, read_text, split_folders, split_in_name, split_of_folder, subfolders
from rinr_loader.errors import ConvertError
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "coco"

_PARTS = ("images", "annotations", "categories")
_HEAD = re.compile(r'"(images|annotations|categories)"\s*:')
# Files of COCO's own release that describe the same pictures again, for other tasks.
_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


def detect(path: Path) -> bool:
    """Whether this is a COCO JSON file or a folder with one, judged by the first 64 KiB of each JSON."""
    return bool(_find_json(path))


def read(path: Path) -> Source:
    """List the pictures that the JSON files name, with their boxes.

    Raises:
        ConvertError: There is no COCO JSON, several for one split, they disagree about the categories, or none of their pictures is found.
    """
    files = _files_by_split(path)
    samples: list[Sample] = []
    problems: list[Problem] = []
    categories: dict[int, str] = {}
    contents = {split: _load(file) for split, file in files.items()}
    for split, content in contents.items():
        for category in content["categories"]:
            number, name = _category(files[split], category)
            if categories.setdefault(number, name) != name:
                msg = f"{files[split]}: category {number}: expected {categories[number]!r} as elsewhere, got {name!r}; convert the files separately"
                raise ConvertError(msg)
    ids = {number: index for index, number in enumerate(sorted(categories))}
    for split, content in contents.items():
        _read_split(files[split], split, content, ids, samples, problems)
    return Source(NAME, samples, tuple(categories[number] for number in ids), tuple(problems))


def _find_json(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if _looks_like_coco(path) else []
    folders = [path, path / "annotations", *(folder for folder in subfolders(path) if split_of_folder(folder.name))]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    return [file for file in files if _looks_like_coco(file)]


def _looks_like_coco(file: Path) -> bool:
    if file.suffix.lower() != ".json" or file.name.startswith("."):
        return False
    with file.open("rb") as stream:
        head = stream.read(65536).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    return head.startswith("{") and _HEAD.search(head) is not None


def _files_by_split(path: Path) -> dict[Split, Path]:
    found: dict[Split, list[Path]] = defaultdict(list)
    for file in _find_json(path):
        split = split_in_name(file.stem) or split_of_folder(file.absolute().parent.name) or "train"
        found[split].append(file)
    if not found:
        msg = f"{path}: expected a COCO JSON with images, annotations and categories, got none; give the JSON file"
        raise ConvertError(msg)
    files: dict[Split, Path] = {}
    for split, several in found.items():
        chosen = [file for file in several if not file.name.startswith(_OTHER_TASKS)] or several
        chosen = [file for file in chosen if file.name.startswith("instances_")] or chosen
        if len(chosen) > 1:
            msg = f"{path}: expected one COCO JSON for {split}, got {', '.join(file.name for file in chosen)}; give the file instead of the folder"
            raise ConvertError(msg)
        files[split] = chosen[0]
    return files


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        msg = f"{file}: expected JSON, got {error}; the file is damaged or truncated, fetch it again"
        raise ConvertError(msg) from error
    missing = [part for part in _PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        msg = f"{file}: expected the lists images, annotations and categories, got no {', '.join(missing)}; give the instances file"
        raise ConvertError(msg)
    return dict(content)


def _category(file: Path, category: object) -> tuple[int, str]:
    if isinstance(category, dict) and isinstance(category.get("id"), int):
        return category["id"], str(category.get("name", category["id"]))
    msg = f"{file}: expected categories with a whole id and a name, got {category!r:.80}; correct it"
    raise ConvertError(msg)


class _Finder:
    """Finds pictures by their `file_name` in the places where COCO datasets keep them."""

    def __init__(self, file: Path, split: Split) -> None:
        here, above = file.absolute().parent, file.absolute().parent.parent
        words = [word for word in (file.stem.rpartition("_")[2], split, *split_folders(above).values()) if isinstance(word, str)]
        words += [folder.name for folder in split_folders(above).values() if split_of_folder(folder.name) == split]
        places = [here, here / "images"]
        places += [root / prefix / word for root in (here, above) for prefix in ("", "images") for word in dict.fromkeys(words)]
        places += [above / "images", above]
        self.places = list(dict.fromkeys(places))

    def find(self, name: str) -> tuple[Path, Path] | None:
        """Find a picture and the folder that its name is relative to."""
        for index, place in enumerate(self.places):
            if (place / name).is_file():
                if index:  # the next one is most likely there too
                    self.places.insert(0, self.places.pop(index))
                return place / name, place
        return None


def _read_split(file: Path, split: Split, content: Mapping[str, Any], ids: Mapping[int, int], samples: list[Sample], problems: list[Problem]) -> None:
    """Add the samples of one JSON file."""
    rows: dict[object, list[dict[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        if isinstance(row, dict) and isinstance(row.get("image_id"), (int, str)):
            rows[row["image_id"]].append(row)
        else:
            problems.append(Problem(str(file), f"annotation without an image_id: {row!r:.80}"))
    finder = _Finder(file, split)
    missing = 0
    for image in content["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        number = image.get("id") if isinstance(image, dict) else None
        if not isinstance(name, str) or not isinstance(number, (int, str)):
            problems.append(Problem(str(file), f"image without a file_name or an id: {image!r:.80}"))
            continue
        annotations = rows.pop(number, [])
        found = finder.find(name.replace("\\", "/"))
        if found is None:
            missing += 1
            problems.append(Problem(name, "the picture does not exist"))
            continue
        samples.append(_sample(image, number, found, split, annotations, ids, problems))
    problems += [Problem(f"{file}: image_id {number}", f"{len(left)} annotations of a picture that is not listed") for number, left in rows.items()]
    if missing and missing == len(content["images"]):
        places = ", ".join(str(place) for place in finder.places)
        msg = f"{file}: expected its {missing} pictures in one of {places}, got none there; put the JSON beside the picture folder"
        raise ConvertError(msg)


def _sample(
    image: Mapping[str, Any],
    number: int | str,
    found: tuple[Path, Path],
    split: Split,
    annotations: list[dict[str, Any]],
    ids: Mapping[int, int],
    problems: list[Problem],
) -> Sample:
    """Make the sample of one picture."""
    boxes: list[list[float]] = []
    classes: list[int] = []
    crowd: list[bool] = []
    objects: list[dict[str, object]] = []
    for row in annotations:
        box, category = _box(row.get("bbox")), row.get("category_id")
        subject = f"{image['file_name']}: annotation {row.get('id', '')}".rstrip()
        if box is None:
            problems.append(Problem(subject, f"expected bbox with 4 finite numbers, got {row.get('bbox')!r:.80}"))
        elif not isinstance(category, int) or category not in ids:
            problems.append(Problem(subject, f"category {category!r} is not in categories"))
        else:
            boxes.append(box)
            classes.append(ids[category])
            crowd.append(bool(row.get("iscrowd", 0)))
            objects.append({name: value for name, value in row.items() if name not in {"image_id", "bbox"}})
    width, height = image.get("width"), image.get("height")
    return Sample(
        key_of(*found),
        split,
        found[0],
        boxes=box_array(boxes),
        classes=class_array(classes),
        crowd=np.array(crowd, np.bool_) if any(crowd) else None,
        declared_size=(width, height) if isinstance(width, int) and isinstance(height, int) else None,
        extra={"image_id": number, "objects": objects} if objects else {"image_id": number},
    )


def _box(box: object) -> list[float] | None:
    """Turn xywh into xyxy, None where it is not four finite numbers."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in box):
        return None
    try:
        x, y, w, h = map(float, box)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return [x, y, x + w, y + h] if all(map(math.isfinite, (x, y, w, h))) else None
