"""YOLO: a data.yaml with `train`, `val`, `test` and `names`, and one label file beside each image.

The rules are those that Ultralytics documents and follows, written anew from its behaviour:

- A split is a folder (read at any depth), a text file of image paths, or a list of those, below the folder that `path` names.
- The label file of `.../images/x.jpg` is `.../labels/x.txt` (the last `images` of the path), or lies beside the image where no folder is called so.
- An image without a label file, or with an empty one, is a background.

`train` and `val` must exist when the yaml names them, as in Ultralytics; a missing `test` is reported. A relative `path` is looked up beside the
yaml, then in the working directory; when neither holds the splits (the dataset was moved), the yaml's own folder is taken. A folder whose yaml names
no split that exists, or that has no yaml, is read by its layout: `images/train` or `train/images`, or `images/` alone, which becomes `train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rinr_loader.converters.files import box_array, class_array, is_image, key_of, list_images, read_text, split_folders, split_of_folder, subfolders
from rinr_loader.converters.yolo_labels import Labels, parse_labels
from rinr_loader.converters.yolo_yaml import Config, find_yaml, read_yaml
from rinr_loader.errors import ConvertError
from rinr_loader.source import SPLITS, Problem, Sample, Source, Split

NAME = "yolo"


@dataclass
class _Listing:
    """Images of every split with their keys, and what was left out."""

    images: dict[Split, dict[Path, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def detect(path: Path) -> bool:
    """Whether this is a data.yaml, a folder with one, or a folder with `images/` and `labels/*.txt`."""
    if path.is_file():
        return path.suffix.lower() in {".yaml", ".yml"}
    try:
        config = find_yaml(path)
    except ConvertError:  # several: reading then says which
        return True
    return bool(config and config.splits) or any(_has_layout(folder) for folder in (path, *_split_named(path)))


def read(path: Path) -> Source:
    """List the images with their boxes.

    Raises:
        ConvertError: The yaml cannot be used, or names a train or val split that does not exist.
    """
    path = path.absolute()  # a label path is found by the folder names above the image
    folder = path if path.is_dir() else path.parent
    config = find_yaml(path) if path.is_dir() else read_yaml(path)
    root = config.root() if config else None
    if config and config.splits and (root or path.is_file() or not _has_images(folder)):
        listing = _declared(config, root or config.folder)
    else:
        listing = _by_layout(folder)
        if config:
            listing.problems += [Problem(f"{config.path}: {split}", "does not exist; the folders were read instead") for split in config.splits]
    names = config.names if config and config.names else _class_list(folder)
    return _samples(listing, names, keypoint_columns=config.keypoint_columns if config else 0)


def _has_images(folder: Path) -> bool:
    return any((place / "images").is_dir() for place in (folder, *_split_named(folder)))


def _split_named(folder: Path) -> list[Path]:
    return [child for child in subfolders(folder) if split_of_folder(child.name)]


def _has_layout(folder: Path) -> bool:
    labels = folder / "labels"
    return (folder / "images").is_dir() and labels.is_dir() and next(labels.rglob("*.txt"), None) is not None


def _declared(config: Config, root: Path) -> _Listing:
    """List the splits that the yaml names."""
    listing = _Listing()
    for split in SPLITS:
        entries = config.splits.get(split, ())
        images: dict[Path, str] = {}
        for entry in entries:
            place = config.locate(root, entry)
            if place is None and split == "test":
                listing.problems.append(Problem(f"{config.path}: test", f"{root / entry} does not exist"))
            elif place is None:
                msg = f"{config.path}: {split}: expected images at {root / entry}, got nothing there; correct `path` or `{split}`, or drop that line"
                raise ConvertError(msg)
            else:
                for image, key in _images_at(place, root, alone=len(entries) == 1):
                    if image in images:
                        listing.problems.append(Problem(str(image), f"is listed twice in {split}"))
                    images[image] = key
        if images:
            listing.images[split] = images
    return listing


def _images_at(place: Path, root: Path, *, alone: bool) -> Iterator[tuple[Path, str]]:
    """List the images of one entry with their keys: below its folder, or below the root where a split has several entries."""
    if place.is_dir():
        for image in list_images(place):
            yield image, key_of(image, place if alone else root)
    elif is_image(place):
        yield place, key_of(place, root)
    else:
        for line in read_text(place).splitlines():
            entry = line.strip().replace("\\", "/")
            if entry and is_image(Path(entry)):
                image = _listed(entry, place.parent, root)
                yield image, key_of(image, _last_images(image) or root)


def _listed(entry: str, beside: Path, root: Path) -> Path:
    """Find an image named in a list file: `./` is relative to the list; other paths are tried there, then below the root."""
    if entry.startswith("./") or (beside / entry).exists() or not (root / entry).exists():
        return beside / entry
    return root / entry


def _last_images(image: Path) -> Path | None:
    return next((folder for folder in image.parents if folder.name == "images"), None)


def _by_layout(folder: Path) -> _Listing:
    images = folder / "images"
    roots: dict[Split, Path]
    if images.is_dir():
        roots = split_folders(images) or {"train": images}
    else:
        roots = {split: place / "images" for split, place in split_folders(folder).items() if (place / "images").is_dir()}
    if not roots:
        msg = f"{folder}: expected a data.yaml with `train`, or images/ with labels/, got neither; give the yaml file or another folder"
        raise ConvertError(msg)
    return _Listing({split: {image: key_of(image, root) for image in list_images(root)} for split, root in roots.items()})


def _class_list(folder: Path) -> tuple[str, ...]:
    """Read the classes.txt that labelling tools write, one name a line."""
    for place in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if place.is_file():
            return tuple(line.strip() for line in read_text(place).splitlines() if line.strip())
    return ()


def _label_file(image: Path) -> Path:
    folder = _last_images(image)
    if folder is not None:
        image = folder.with_name("labels") / image.relative_to(folder)
    return image.with_suffix(".txt")


def _samples(listing: _Listing, names: tuple[str, ...], *, keypoint_columns: int) -> Source:
    """Read the label files of all images."""
    samples: list[Sample] = []
    problems = listing.problems
    for split, images in listing.images.items():
        for image, key in images.items():
            file = _label_file(image)
            try:
                text = read_text(file) if file.is_file() else ""
            except (ConvertError, OSError) as error:
                problems.append(Problem(str(image), f"its label file cannot be read: {error}"))
                continue
            labels = parse_labels(text, class_count=len(names) or None, keypoint_columns=keypoint_columns)
            problems += [Problem(f"{file}:{row}", reason) for row, reason in labels.problems]
            samples.append(_sample(key, split, image, labels))
    if not names:  # nothing names the classes: number them
        count = max((int(sample.classes.max()) + 1 for sample in samples if sample.classes.size), default=0)
        names = tuple(f"class_{i}" for i in range(count))
    return Source(NAME, samples, names, tuple(problems))


def _sample(key: str, split: Split, image: Path, labels: Labels) -> Sample:
    return Sample(
        key,
        split,
        image,
        boxes=box_array(labels.boxes),
        classes=class_array(labels.classes),
        relative=True,
        extra={"objects": labels.objects} if any(labels.objects) else {},
    )
