"""ImageFolder: one folder per class, optionally below `train/`, `val/` and `test/`.

Class ids are the places of the folder names in alphabetical order, as torchvision's `ImageFolder` numbers them, over all splits together.
"""

from __future__ import annotations

from pathlib import Path

from rinr_loader.converters.files import IMAGE_SUFFIXES, holds, is_image, key_of, list_images, split_folders, subfolders
from rinr_loader.converters.images import label_files
from rinr_loader.source import Problem, Sample, Source, Split

NAME = "image_folder"

# Folders that say what kind of file they hold, not which class.
_NOT_CLASSES = frozenset({"images", "image", "img", "imgs", "jpegimages", "labels", "masks", "mask", "annotations"})


def detect(path: Path) -> bool:
    """Whether pictures lie in at least two class folders (one is enough below train/ and val/), and nothing looks like other labels."""
    if not path.is_dir():
        return False
    splits = split_folders(path)
    roots = list(splits.values()) or [path]
    if any(is_image(file) for root in {*roots, path} for file in root.iterdir()):
        return False
    classes = {folder.name for root in roots for folder in subfolders(root) if holds(folder, IMAGE_SUFFIXES)}
    if {name.lower() for name in classes} & _NOT_CLASSES:
        return False
    return len(classes) >= (1 if splits else 2) and not label_files(path)


def read(path: Path) -> Source:
    """List the pictures with the class of the folder that they lie in (at any depth)."""
    splits = split_folders(path)
    roots: dict[Split, Path] = splits or {"train": path}
    names = tuple(sorted({folder.name for root in roots.values() for folder in subfolders(root)}))
    samples: list[Sample] = []
    problems: list[Problem] = []
    for split, root in roots.items():
        problems += [Problem(str(image), "lies in no class folder") for image in sorted(root.iterdir()) if is_image(image) and not image.is_dir()]
        for folder in subfolders(root):
            label = names.index(folder.name)
            samples += [Sample(key_of(image, root), split, image, label=label) for image in list_images(folder)]
    if splits:
        used = set(splits.values())
        problems += [Problem(str(f), "is no split") for f in subfolders(path) if f not in used and holds(f, IMAGE_SUFFIXES)]
    filled = {sample.label for sample in samples}
    problems += [Problem(name, "the class folder holds no pictures; the class keeps its id") for i, name in enumerate(names) if i not in filled]
    return Source(NAME, samples, names, tuple(problems))
