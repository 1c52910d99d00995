"""Do the columns of an index fit each other, the bytes of its shard, and the limits of a bundle?

What passes can be read and decoded without looking further: every offset lies inside its sample, every number inside its limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rinr_loader.bundle import ALIGNMENT, HEADER, NETWORK, OBJECT, Spec
from rinr_loader.errors import ShardError
from rinr_loader.specs import CODES, FAMILIES, KINDS, spec_of

Array = NDArray[Any]
Check = Callable[["bool | np.bool_", object, object], None]
TAR_BLOCK = 512

# Each column: what it has a row for (`+` for one more, where rows begin and end), dtype, and the shape of a row.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "key": ("key byte", "uint8", ()),
    "key_start": ("sample+", "int64", ()),
    "offset": ("sample", "int64", ()),
    "size": ("sample", "int64", ()),
    "checksum": ("sample", "uint32", ()),
    "stored_size": ("sample", "uint16", (2,)),
    "source_size": ("sample", "uint16", (2,)),
    "label": ("sample", "int32", ()),
    "source_hash": ("sample", "uint8", (4,)),
    "psnr": ("sample", "float32", ()),
    "object_psnr": ("sample", "float32", ()),
    "object_start": ("sample+", "int64", ()),
    "box": ("object", "float32", (4,)),
    "class_id": ("object", "int32", ()),
    "crowd": ("object", "uint8", ()),
    "network_start": ("sample+", "int64", ()),
    "network_group": ("network", "uint16", ()),
    "network_object": ("network", "int32", ()),
    "network_offset": ("network", "int64", ()),
    "rect": ("network", "uint16", (4,)),
    "scale": ("network", "float32", ()),
    "feather": ("network", "uint8", ()),
}
LEADERS = {"key byte": "key", "sample": "offset", "object": "box", "network": "network_group"}  # the column that tells how many there are


def read_groups(rows: Any, check: Check) -> tuple[Spec, ...]:
    """The network shapes of an index, from its metadata."""
    check(isinstance(rows, list), "a list of network shapes", type(rows).__name__)
    groups = []
    for row in rows:
        check(isinstance(row, list) and [type(value) for value in row] == [str, int, int, str, float], "a network shape", row)
        kind, depth, width, dtype, w0 = row
        check(kind in KINDS and dtype in CODES, "a network shape", row)
        groups.append(spec_of((kind, depth, width, dtype, w0), lambda good, *_, row=row: check(good, "a network shape", row)))
    return tuple(groups)


def check_columns(columns: Mapping[str, Array], groups: Sequence[Spec], shard_bytes: int, check: Check) -> None:
    """Check everything that decoding relies on; `check` raises where its first argument is false."""
    check(set(columns) == set(COLUMNS), f"columns {', '.join(COLUMNS)}", ", ".join(sorted(columns)))
    for name, (_, dtype, shape) in COLUMNS.items():
        found = columns[name]
        check(found.dtype == dtype and found.ndim == 1 + len(shape) and found.shape[1:] == shape, f"{name} of {dtype} (n, *{shape})", _type(found))
    counts = {of: len(columns[leader]) for of, leader in LEADERS.items()}
    for name, (of, *_) in COLUMNS.items():
        length = counts[of.rstrip("+")] + of.endswith("+")
        check(len(columns[name]) == length, f"{length} values of {name}", len(columns[name]))
    for name, of in (("key_start", "key byte"), ("object_start", "object"), ("network_start", "network")):
        start = columns[name]
        rising = start[0] == 0 and start[-1] == counts[of] and (start[1:] >= start[:-1]).all()
        check(rising, f"{name} rising from 0 to {counts[of]}", start[:8].tolist())
    _check_samples(columns, shard_bytes, check)
    _check_objects(columns, check)
    _check_networks(columns, groups, check)


def _type(column: Array) -> str:
    return f"{column.dtype} {column.shape}"


def _check_samples(columns: Mapping[str, Array], shard_bytes: int, check: Check) -> None:
    offset, size, start = columns["offset"], columns["size"], columns["key_start"]
    check(((offset >= 0) & (offset <= shard_bytes)).all(), f"offsets from 0 to {shard_bytes}", offset[:8].tolist())
    apart = (offset % TAR_BLOCK == 0).all() and (offset + size <= np.append(offset[1:], shard_bytes)).all()
    check(apart, f"samples one after the other in {shard_bytes} bytes", offset[:8].tolist())
    text = columns["key"].tobytes()
    try:
        keys = [text[first:last].decode() for first, last in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)]
    except UnicodeDecodeError as error:
        keys = []
        check(False, "keys in UTF-8", error)
    check(len(set(keys)) == len(keys), "each key once", f"{len(keys) - len(set(keys))} twice")
    stored, source = columns["stored_size"], columns["source_size"]
    check((stored <= source).all(), "stored sizes up to the source's", stored[:4].tolist())
    check((columns["label"] >= -1).all(), "labels from -1", columns["label"].min(initial=0))


def _check_objects(columns: Mapping[str, Array], check: Check) -> None:
    box = columns["box"]
    limit = np.repeat(columns["source_size"][:, ::-1], np.diff(columns["object_start"]), axis=0)
    inside = (box[:, :2] >= 0).all() and (box[:, 2:] <= limit).all() and (box[:, :2] < box[:, 2:]).all()
    check(inside, "boxes with an area, inside their pictures", box[:4].tolist())
    check((columns["class_id"] >= 0).all(), "class ids from 0", columns["class_id"].min(initial=0))
    check((columns["crowd"] <= 1).all(), "crowd 0 or 1", columns["crowd"].max(initial=0))


def _check_networks(columns: Mapping[str, Array], groups: Sequence[Spec], check: Check) -> None:
    objects, networks = np.diff(columns["object_start"]), np.diff(columns["network_start"])
    check((networks >= 1).all(), "a network in every sample", networks[:8].tolist())
    group = columns["network_group"]
    check((group < len(groups)).all(), f"network groups below {len(groups)}", group.max(initial=0))
    sample = np.repeat(np.arange(len(networks)), networks)
    first = np.zeros(len(group), np.bool_)
    first[columns["network_start"][:-1]] = True
    background = np.array([spec.kind == "background" for spec in groups], np.bool_)[group] if len(group) else first
    check((background == first).all(), "one background a sample, first", group[:8].tolist())
    rect, (height, width) = columns["rect"], columns["stored_size"][sample].T
    inside = (rect[:, :2] < rect[:, 2:]).all() and (rect[:, 2] <= width).all() and (rect[:, 3] <= height).all()
    whole = np.stack([np.zeros_like(width), np.zeros_like(width), width, height], axis=1)[first]
    check(inside and (rect[first] == whole).all(), "rectangles inside their pictures, that of a background all of it", rect[:4].tolist())
    check((np.isfinite(columns["scale"]) & (columns["scale"] > 0)).all(), "scales above 0", columns["scale"][:4].tolist())
    family = np.array([FAMILIES.index(spec.family) for spec in groups], np.int64)[group] if len(group) else np.zeros(0, np.int64)
    check((family == np.repeat(family[first], networks)).all(), "networks of one family in a sample", family[:8].tolist())
    check((columns["scale"][family == FAMILIES.index("jpeg")] == 1).all(), "JPEGs of scale 1", columns["scale"][:4].tolist())
    owner = columns["network_object"]
    check(((owner >= -1) & (owner < objects[sample])).all(), "network objects of their own sample", owner[:8].tolist())
    _check_offsets(columns, groups, objects, networks, sample, first, check)


def _check_offsets(
    columns: Mapping[str, Array], groups: Sequence[Spec], objects: Array, networks: Array, sample: Array, first: Array, check: Check
) -> None:
    """The weights stand where a bundle has them: after its tables, one after the other, to its end."""
    stated = np.array([-1 if spec.nbytes is None else spec.nbytes for spec in groups], np.int64)[columns["network_group"]] if len(sample) else sample
    tables = HEADER.size + OBJECT.itemsize * objects + NETWORK.itemsize * networks
    found = columns["network_offset"]
    start = found - columns["offset"][sample]
    nbytes = np.where(stated < 0, columns["size"][sample] - start, stated)
    before = np.where(first, tables[sample], np.roll(start + nbytes, 1))
    good = (start == np.where(nbytes == 0, before, -(-before // ALIGNMENT) * ALIGNMENT)).all() and ((nbytes > 0) | (stated == 0)).all()
    last = np.roll(first, -1)
    check(good and ((start + nbytes)[last] == columns["size"]).all(), "weights one after the other", found[:8].tolist())


def refuse(name: str) -> Check:
    """A `check` that raises ShardError about the index `name`."""

    def check(good: bool | np.bool_, expected: object, found: object) -> None:
        if not good:
            raise ShardError(f"{name}: expected {expected}, got {found}; make it again with `rinr index`")

    return check
