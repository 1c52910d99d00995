"""One annotation file in Pascal VOC's XML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rinr_loader.errors import ConvertError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ATTRIBUTES = ("pose", "truncated", "difficult", "occluded")
_SAYS_NOTHING = frozenset({"", "0", "Unspecified"})


@dataclass
class Annotation:
    """What one XML file says.

    Args:
        boxes: xmin, ymin, xmax, ymax as written.
        names: Class name of every box.
        objects: `pose`, `truncated`, `difficult` and `occluded` of every box, where they say something.
        size: Width and height, None where the file has none.
        problems: Reason of every object that was dropped.
        bare: Whether objects are a name and a box and nothing else, as in DAC-SDC.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    objects: list[dict[str, object]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    problems: list[str] = field(default_factory=list)
    bare: bool = True


def read_annotation(file: Path) -> Annotation:
    """Read one XML file.

    Raises:
        ConvertError: It is not XML, or its root is not `<annotation>`.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        msg = f"{file}: expected XML, got {error}; correct it"
        raise ConvertError(msg) from error
    if root.tag != "annotation":
        msg = f"{file}: expected <annotation>, got <{root.tag}>; is it another format?"
        raise ConvertError(msg)
    annotation = Annotation(size=_size(root), bare=root.find("size/depth") is None)
    for number, element in enumerate(root.findall("object"), start=1):
        annotation.bare = annotation.bare and all(child.tag in {"name", "bndbox"} for child in element)
        name = _text(element, "name")
        corners = [_number(element, f"bndbox/{corner}") for corner in _CORNERS]
        if not name:
            annotation.problems.append(f"object {number}: expected a name, got none")
        elif not all(map(math.isfinite, corners)):
            given = ", ".join(f"{corner} {_text(element, f'bndbox/{corner}')!r}" for corner in _CORNERS)
            annotation.problems.append(f"object {number} ({name}): expected 4 finite numbers, got {given}")
        else:
            xmin, ymin, xmax, ymax = corners
            annotation.boxes.append((xmin, ymin, xmax, ymax))
            annotation.names.append(name)
            texts = {attribute: _text(element, attribute) for attribute in _ATTRIBUTES}
            annotation.objects.append({key: int(text) if text.isdecimal() else text for key, text in texts.items() if text not in _SAYS_NOTHING})
    return annotation


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ElementTree.Element, path: str) -> float:
    """Number at a path, NaN where there is none."""
    try:
        return float(_text(element, path))
    except ValueError:
        return math.nan


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    width, height = _text(root, "size/width"), _text(root, "size/height")
    if width.isdecimal() and height.isdecimal() and int(width) and int(height):  # some tools write 0 x 0
        return int(width), int(height)
    return None
