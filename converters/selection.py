"""Checks and choices over the samples of a whole source: keys that collide, and which samples become `val`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rinr_loader.errors import ConvertError
from rinr_loader.source import SPLITS, Sample


def check_keys(samples: Sequence[Sample]) -> None:
    """Refuse two samples of a split with one key; keys become file names, and not every file system tells A from a.

    Raises:
        ConvertError: Two keys are equal, capitals or not; it names both files.
    """
    seen: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        first = seen.setdefault((sample.split, sample.key.casefold()), sample)
        if first is not sample:
            msg = (
                f"{sample.split}: expected different keys, got {first.key!r} for {_place(first)} and {sample.key!r} for {_place(sample)};"
                " rename one of them, or move it to a folder of its own"
            )
            raise ConvertError(msg)


def _place(sample: Sample) -> str:
    image = sample.image
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    return str(image) if isinstance(image, Path) else f"{image.path} at byte {image.offset}"


def hold_out(samples: Sequence[Sample], fraction: float) -> list[Sample]:
    """Move a share of the train samples to val: whole sequences, or single samples where there are none.

    They are taken in the order of their hashes, as near to the share as whole sequences allow, at least one and never all. The choice depends on
    names alone, so it is the same everywhere.

    Raises:
        ConvertError: There is nothing to divide.
    """
    groups: dict[str, int] = {}
    for sample in samples:
        if sample.split == "train":
            name = _group(sample)
            groups[name] = groups.get(name, 0) + 1
    if len(groups) < 2:
        msg = f"val_fraction: expected at least two pictures or sequences in train to divide, got {len(groups)}; leave it out, or add another"
        raise ConvertError(msg)
    target = fraction * sum(groups.values())
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    taken: set[str] = set()
    count = 0
    for name in order:
        if abs(count + groups[name] - target) <= abs(count - target) and len(taken) < len(groups) - 1:
            taken.add(name)
            count += groups[name]
    taken = taken or {min(order, key=lambda name: groups[name])}
    moved = [replace(sample, split="val") if sample.split == "train" and _group(sample) in taken else sample for sample in samples]
    return sorted(moved, key=lambda sample: (SPLITS.index(sample.split), sample.key))


def _group(sample: Sample) -> str:
    return sample.key if sample.sequence is None else f"sequence {sample.sequence}"
