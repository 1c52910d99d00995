"""Real shards of tiny drawn pictures, written by the converter itself with networks that take a second to fit."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_scene
from PIL import Image

from rinr_loader import presets
from rinr_loader.convert import Job, Report, convert
from rinr_loader.fit import Schedule
from rinr_loader.presets import Settings
from rinr_loader.source import Sample, Source

TINY = replace(presets.PRESETS["fast"], backgrounds=((3, 16),), background=Schedule(80, 5e-3, 512), residual=Schedule(20, 3e-3, 64))


def png(pixels: object) -> bytes:
    """The bytes of a PNG with these pixels, uint8 `(H, W, 3)`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")  # type: ignore[arg-type]
    return file.getvalue()


def write_shards(
    dest: Path, samples: Sequence[Sample], *, names: Sequence[str] = (), shard_samples: int = 1024, size: tuple[int, int] | None = None
) -> Report:
    """Convert samples with a preset that hardly fits at all; `size` is the width and height that they are shrunk to fit inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "fast", TINY)
        job = Job(Settings(preset="fast", object_psnr=1.0, family="siren"), size=size, shard_samples=shard_samples)
        return convert(Source("drawn", samples, tuple(names)), dest, job)


def members(dest: Path, split: str = "train") -> tuple[list[Path], dict[str, bytes]]:
    """The shards of a split and every member of them, as `tarfile` reads it."""
    shards = sorted((dest / split).glob("*.tar"))
    found: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return shards, found


# Names that break readers of tars: dots, folders with dots, spaces, letters beyond ASCII, percent signs, what looks like metadata or hidden, and the
# longest that USTAR holds (155 bytes of folders and 100 of name, with the suffix of the sidecar).
KEYS = (
    "plain",
    "v1.2/frame.0001.left",
    "archive.tar.gz",
    "a.json",
    ".hidden/.file",
    "__meta__/a",
    "__b__",
    "sub/__c__/d",
    "with space/and\ttab",
    "straße/日本.語",
    "100%/50%.off",
    "UPPER/Case",
    "quote'd/brackets[0]{1}",
    "f" * 100 + "/" + "g" * 54 + "/" + "n" * 95,
    "n" * 95,
)


def write_named(dest: Path) -> Path:
    """Two shards, a picture for each of `KEYS`, in sizes of their own; every second one has a sidecar, every third one no objects."""
    samples = []
    for k, key in enumerate(sorted(KEYS)):
        scene = draw_scene(k, width=24 + k, height=20, objects=k % 3)
        crowd = np.arange(len(scene.boxes)) == 1
        extra = {"track": k} if k % 2 else {}
        samples.append(Sample(key, "train", png(scene.image), scene.boxes, scene.classes, crowd=crowd, label=k % 4 - 1, extra=extra))
    write_shards(dest, samples, names=("a", "b", "c"), shard_samples=8)
    return dest
