"""Small datasets of drawn scenes, converted with networks that hardly fit at all: for tests of what comes after a conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import SCENE_NAMES, draw_scene
from tiny_shards import png, write_shards

from rinr_loader.source import Sample, Split


def drawn(key: str, seed: int, *, split: Split = "train", objects: int = 2, crowd: int = 0, width: int = 32, height: int = 24) -> Sample:
    """A sample of a drawn scene; its first `crowd` objects mark crowds, and then it has a sidecar."""
    scene = draw_scene(seed, width=width, height=height, objects=objects)
    flags = np.arange(len(scene.boxes)) < crowd
    extra = {"seed": seed} if crowd else {}
    return Sample(key, split, png(scene.image), scene.boxes, scene.classes, crowd=flags, extra=extra)


def write_detection(dest: Path) -> Path:
    """Two shards of train and one of val: dotted and nested keys, a picture without objects, one with a crowd, one of another size."""
    train = [
        drawn("a.left", 1),
        drawn("dir/b", 2, objects=0),
        drawn("dir/c", 3, crowd=1),
        drawn("dir/images/d", 4, width=40, height=30),
        drawn("e", 5, objects=3),
    ]
    write_shards(dest, [*train, drawn("a.left", 6, split="val"), drawn("z", 7, split="val")], names=SCENE_NAMES, shard_samples=3)
    return dest


def tree_hash(folder: Path) -> str:
    """A hash of every file's path and bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file's bytes in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
