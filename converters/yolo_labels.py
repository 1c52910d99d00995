"""The rows of a YOLO label file: `class x y w h` in fractions of the image, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rinr_loader.converters.files import MAX_UNNAMED_ID, numbers

_TOLERANCE = 0.01  # Ultralytics accepts coordinates that leave the image by at most 1 %


@dataclass
class Labels:
    """What one label file says.

    Args:
        boxes: xyxy in fractions of the image.
        classes: Class ids.
        objects: What a row has beyond its box (`polygon`, `keypoints`), one dict per box, in fractions too.
        problems: Row number and reason of every row that was dropped.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    objects: list[dict[str, object]] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse_labels(text: str, *, class_count: int | None = None, keypoint_columns: int = 0) -> Labels:
    """Read the rows of one label file.

    Every row is judged by itself and a bad one is dropped with its reason, the good ones stay. (Ultralytics leaves out the whole image.)

    Args:
        text: Contents of the file; empty means an image without objects.
        class_count: Number of classes; None where nothing names them, which accepts every id up to `MAX_UNNAMED_ID`.
        keypoint_columns: Columns after the box in a pose dataset (`kpt_shape` multiplied out).
    """
    labels = Labels()
    seen: dict[tuple[float, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        values = numbers(fields)
        reason = _fault(fields, values, class_count=class_count, keypoint_columns=keypoint_columns)
        if values is None or reason:
            labels.problems.append((number, reason))
            continue
        first = seen.setdefault(tuple(values), number)
        if first != number:
            labels.problems.append((number, f"repeats row {first}"))
            continue
        extra: dict[str, object] = {}
        if len(values) == 5 or len(values) == 5 + keypoint_columns:
            x, y, w, h = values[1:5]
            box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            if len(values) > 5:
                extra["keypoints"] = values[5:]
        else:
            box = (min(values[1::2]), min(values[2::2]), max(values[1::2]), max(values[2::2]))
            extra["polygon"] = values[1:]
        labels.boxes.append(box)
        labels.classes.append(int(values[0]))
        labels.objects.append(extra)
    return labels


def _fault(fields: list[str], values: list[float] | None, *, class_count: int | None, keypoint_columns: int) -> str:
    """Say what is wrong with a row, or nothing."""
    if values is None:
        return f"expected numbers, got {' '.join(fields)[:80]!r}"
    columns = len(values)
    pose = bool(keypoint_columns) and columns == 5 + keypoint_columns
    if not pose and columns != 5 and (columns < 7 or columns % 2 == 0):
        return f"expected 5 columns (class x y w h) or a class and at least 3 points, got {columns} columns"
    if not all(map(math.isfinite, values)):
        return f"expected finite numbers, got {' '.join(fields)[:80]!r}"
    if values[0] < 0 or values[0] != int(values[0]):
        return f"expected a whole class id from 0, got {fields[0]}"
    highest = MAX_UNNAMED_ID if class_count is None else class_count - 1
    if values[0] > highest:
        return f"expected a class id from 0 to {highest}, got {fields[0]}; add its name to `names`"
    position = values[1:5] if pose else values[1:]
    if max(position) > 1 + _TOLERANCE or min(position) < -_TOLERANCE:
        return f"expected fractions of the image from 0 to 1, got {' '.join(fields)[:80]!r}"
    return ""
