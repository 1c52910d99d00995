"""Pascal VOC: one XML a picture, in `Annotations/` beside `JPEGImages/`, or beside the picture itself.

Splits come from `ImageSets/Main/{train,val,test,trainval}.txt`, else from folders called train, val and test, else everything is `train`.
Class ids are the places of the names in alphabetical order.

Coordinates count pixels from 1 and both ends belong to the box: the annotation files of VOC2006 state "Top left pixel co-ordinates : (1, 1)", and the
development kit measures a width as xmax - xmin + 1. So the box covers [xmin - 1, xmax] x [ymin - 1, ymax]. A 0 cannot be such a coordinate: it is
left as it is. A box whose ends are equal or crossed is an empty click in every labelling tool, not a box of one pixel: it is handed on as empty.

A picture without a readable XML is left out and reported: nobody looked at it, so it is no background. An XML without objects makes a background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rinr_loader.converters.files import (
    IMAGE_SUFFIXES,
    box_array,
    class_array,
    holds,
    is_image,
    key_of,
    list_files,
    list_images,
    read_text,
    split_folders,
    subfolders,
)
from rinr_loader.converters.voc_xml import Annotation, read_annotation
from rinr_loader.errors import ConvertError
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "voc"

_XML = frozenset({".xml"})
_ANNOTATION_FOLDERS = ("Annotations", "annotations", "Annotation", "labels", "xmls")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")


@dataclass(frozen=True)
class _Entry:
    key: str
    split: Split
    image: Path
    file: Path
    annotation: Annotation


def detect(path: Path) -> bool:
    """Whether XML files with `<annotation>` lie in `Annotations/`, or directly beside pictures (of the set or of a split)."""
    if not path.is_dir():
        return False
    places = [_voc_root(path), *split_folders(path).values()]
    file = next((file for place in places for file in _first_xml(place)), None)
    if file is None:
        return False
    try:
        read_annotation(file)
    except ConvertError as error:
        return "<annotation>" not in str(error)  # broken XML may be anything; another root is another format
    return True


def _first_xml(place: Path) -> list[Path]:
    annotations = _folders(place)[0]
    return list_files(annotations, _XML)[:1] if annotations != place else sorted(place.glob("*.xml"))[:1]


def read(path: Path) -> Source:
    """List the pictures with their boxes.

    Raises:
        ConvertError: The folder holds several VOC sets, or a list in ImageSets cannot be read.
    """
    root = _voc_root(path)
    problems: list[Problem] = []
    entries: list[_Entry] = []
    if not _has_annotations(root) and (parts := split_folders(root)):
        for split, part in parts.items():
            entries += _read_part(part, split, problems)
    else:
        entries = _assign(_read_part(root, "train", problems), root / "ImageSets" / "Main", problems)
    names = tuple(sorted({name for entry in entries for name in entry.annotation.names}))
    ids = {name: index for index, name in enumerate(names)}
    return Source(NAME, [_sample(entry, ids) for entry in entries], names, tuple(problems))


def _has_annotations(folder: Path) -> bool:
    return any(holds(folder / name, _XML) for name in _ANNOTATION_FOLDERS)


def _voc_root(path: Path) -> Path:
    """The folder that has `Annotations/`: the given one, or the only one inside (VOCdevkit/VOC2007)."""
    if _has_annotations(path):
        return path
    inside = [folder for folder in subfolders(path) if holds(folder, IMAGE_SUFFIXES)]
    if not all(_has_annotations(folder) and (folder / "JPEGImages").is_dir() for folder in inside):
        return path
    if len(inside) > 1:
        msg = f"{path}: expected one VOC set, got {', '.join(folder.name for folder in inside)}; give one of these folders"
        raise ConvertError(msg)
    return inside[0] if inside else path


def _folders(root: Path) -> tuple[Path, Path]:
    """Folder of the XML files and folder of the pictures; the root itself where they lie side by side."""
    annotations = next((root / name for name in _ANNOTATION_FOLDERS if holds(root / name, _XML)), root)
    images = next((root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()), root)
    return annotations, images


def _read_part(root: Path, split: Split, problems: list[Problem]) -> list[_Entry]:
    """Read all XML files below one folder."""
    annotations, folder = _folders(root)
    images: dict[str, list[Path]] = {}
    for image in list_images(folder):
        images.setdefault(key_of(image, folder), []).append(image)
    entries: list[_Entry] = []
    for file in list_files(annotations, _XML):
        found = images.pop(key_of(file, annotations), [])
        if not found:
            problems.append(Problem(str(file), "its picture does not exist"))
        try:
            annotation = read_annotation(file)
        except (ConvertError, OSError) as error:
            problems += [Problem(str(image), f"its annotation cannot be read: {error}") for image in found]
            continue
        problems += [Problem(str(file), reason) for reason in annotation.problems]
        entries += [_Entry(key_of(image, folder), split, image, file, annotation) for image in found]
    for left in images.values():
        problems += [Problem(str(image), "has no XML file; add one without objects to keep it as a background") for image in left]
    return entries


def _assign(entries: list[_Entry], lists: Path, problems: list[Problem]) -> list[_Entry]:
    """Give entries the splits that ImageSets/Main states; without such lists they stay as they are."""
    keys = {entry.key for entry in entries}
    files = {name: lists / f"{name}.txt" for name, _ in _SET_SPLITS}
    sets = {name: _image_set(file, keys, problems) for name, file in files.items() if file.is_file()}
    if not sets:
        return entries
    split_of: dict[str, Split] = {}
    for name, split in _SET_SPLITS:
        for key in sets.get(name, ()):
            if key in split_of and name != "trainval":
                problems.append(Problem(f"{lists / name}.txt: {key}", f"is listed for {split_of[key]} too and stays there"))
            split_of.setdefault(key, split)
    problems += [Problem(str(entry.image), f"is in no list of {lists}") for entry in entries if entry.key not in split_of]
    return [_Entry(e.key, split_of[e.key], e.image, e.file, e.annotation) for e in entries if e.key in split_of]


# trainval repeats train and val; what only it lists is for training.
_SET_SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "val"), ("test", "test"), ("trainval", "train"))


def _image_set(file: Path, keys: set[str], problems: list[Problem]) -> list[str]:
    """Read one list of picture names; a second column (1, 0, -1 in the lists of one class) is passed over."""
    found: list[str] = []
    for line in read_text(file).splitlines():
        name = line.strip()
        if not name:
            continue
        candidates = [name, name.split()[0]]
        candidates += [Path(c).with_suffix("").as_posix() for c in candidates if is_image(Path(c))]
        key = next((candidate for candidate in candidates if candidate in keys), None)
        if key is None:
            problems.append(Problem(f"{file}: {name}", "has no picture with an annotation"))
        else:
            found.append(key)
    return found


def corners(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Turn VOC's inclusive pixel numbers from 1 into continuous xyxy; see the top of this file."""
    xmin, ymin, xmax, ymax = box
    x, y = (xmin - 1 if xmin >= 1 else xmin), (ymin - 1 if ymin >= 1 else ymin)
    return x, y, xmax if xmax > xmin else x, ymax if ymax > ymin else y


def _sample(entry: _Entry, ids: Mapping[str, int]) -> Sample:
    annotation = entry.annotation
    return Sample(
        entry.key,
        entry.split,
        entry.image,
        boxes=box_array([corners(box) for box in annotation.boxes]),
        classes=class_array([ids[name] for name in annotation.names]),
        declared_size=annotation.size,
        extra={"objects": annotation.objects} if any(annotation.objects) else {},
    )
