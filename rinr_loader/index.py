"""The table of contents of one shard, in columns: what a trainer and a GPU need without opening the shard.

Imports numpy and safetensors only. docs/FORMAT.md lists the columns.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from rinr_loader.bundle import Bundle, Spec, check_bytes, parse
from rinr_loader.errors import BundleError, ShardError
from rinr_loader.index_check import TAR_BLOCK, check_columns, read_groups, refuse
from rinr_loader.metadata import metadata_of
from rinr_loader.specs import rank, record_of

Array = NDArray[Any]
SUFFIX = ".rinr"
INDEX_VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """Columns of one shard: per sample, per object and per network, in the order of the shard.

    Args:
        groups: The network shapes of this shard; `network_group` points into it.
        key: Keys as in the tar, UTF-8 bytes one after the other; `key_start` (n + 1) says where each begins.
        offset, size: First byte and number of bytes of each bundle in the shard, int64.
        checksum: Of each bundle as in its header, uint32: what lies in the shard is what the index was made from.
        stored_size, source_size: Height and width in pixels, uint16, shape `(n, 2)`.
        label: Class id of the picture or -1, int32.
        source_hash: First 4 bytes of the source file's SHA-256, uint8, shape `(n, 4)`.
        psnr, object_psnr: In dB, float32, NaN where not measured.
        object_start: First object of each sample, int64, `n + 1` values; likewise `network_start`.
        box: Label boxes, float32 xyxy in source pixels, shape `(objects, 4)`.
        class_id, crowd: Of each object, int32 and bool.
        network_group, network_object: Shape and owner (-1 for none) of each network, uint16 and int32.
        network_offset: First byte of each network's weights in the shard, int64.
        rect: Stored pixels that a network covers, x0 y0 x1 y1, uint16, shape `(networks, 4)`.
        scale, feather: Of each network, float32 and uint8.
    """

    groups: tuple[Spec, ...]
    key: Array
    key_start: Array
    offset: Array
    size: Array
    checksum: Array
    stored_size: Array
    source_size: Array
    label: Array
    source_hash: Array
    psnr: Array
    object_psnr: Array
    object_start: Array
    box: Array
    class_id: Array
    crowd: Array
    network_start: Array
    network_group: Array
    network_object: Array
    network_offset: Array
    rect: Array
    scale: Array
    feather: Array

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def keys(self) -> list[str]:
        """Keys as in the tar (see `decode_key`)."""
        return self.keys_at(range(len(self)))

    def keys_at(self, samples: Sequence[int]) -> list[str]:
        """Keys of some samples, as in the tar."""
        return [self.key[self.key_start[i] : self.key_start[i + 1]].tobytes().decode() for i in samples]

    @property
    def background_bytes(self) -> int:
        return int(self.network_bytes[self.network_start[:-1]].sum())

    @property
    def residual_bytes(self) -> int:
        return int(self.network_bytes.sum()) - self.background_bytes

    @property
    def network_bytes(self) -> Array:
        """Bytes of each network's weights, int64."""
        stated = np.array([-1 if spec.nbytes is None else spec.nbytes for spec in self.groups], np.int64)[self.network_group]
        # What states no length is followed by nothing: it ends with its bundle.
        end = np.repeat(self.offset + self.size, np.diff(self.network_start))
        return np.where(stated < 0, end - self.network_offset, stated)


def encode_key(key: str) -> str:
    """The key as a tar member can carry it: dots, whitespace and what is not printable ASCII are percent-encoded.

    WebDataset and DALI split a member's name at its first dot, and WebDataset leaves out what is below a folder `__NAME__`.
    """
    encoded = quote(key, safe="/!$&'()*+,;=@~[]^").replace(".", "%2E")
    return f"%5F{encoded[1:]}" if encoded.startswith("__") else encoded


def decode_key(key: str) -> str:
    """The key as the source had it."""
    return unquote(key)


def index_shard(path: Path, *, on_damage: Callable[[BundleError], None] | None = None) -> ShardIndex:
    """Read a shard and list what it holds.

    Args:
        path: The tar.
        on_damage: Called with each bundle's error, which is then left out; without it the first one is raised.

    Raises:
        BundleError: A bundle is damaged.
        ShardError: The file is not a tar, is cut off, or holds a key twice.
    """
    rows: list[Row] = []
    with path.open("rb") as file:
        for key, offset, size in shard_members(path):
            file.seek(offset)
            try:
                rows.append(row_of(key, offset, file.read(size), f"{path.name}:{key}{SUFFIX}"))
            except BundleError as error:
                if on_damage is None:
                    raise
                on_damage(error)
    return build_index(rows)


def shard_members(path: Path) -> list[tuple[str, int, int]]:
    """Key, first byte and number of bytes of every bundle of a shard, from the tar's headers.

    Raises:
        ShardError: The file is not a tar, is cut off, damaged between its members, or holds a key twice or not in UTF-8.
    """
    found: list[tuple[str, int, int]] = []
    fault = ""
    try:
        with tarfile.open(path, "r:") as tar:
            found.extend((member.name, member.offset_data, member.size) for member in tar)  # keeps those before an error
            after = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        after, fault = 0, str(error)
    end, seen = path.stat().st_size, set()
    members = [(name[: -len(SUFFIX)], offset, size) for name, offset, size in found if name.endswith(SUFFIX)]
    for key, offset, size in members:
        if offset + size > end:
            subject = f"{path.name}:{key}{SUFFIX}"
            raise ShardError(f"{subject}: expected {size} bytes, got {end - offset}; the shard is truncated, fetch or convert it again")
        if any("\ud800" <= letter <= "\udfff" for letter in key):  # how tarfile gives bytes that are not UTF-8
            raise ShardError(f"{path.name}: expected names in UTF-8, got {key!a}; convert it again")
        if key in seen:
            raise ShardError(f"{path.name}: expected each key once, got {key!r} twice; convert it again")
        seen.add(key)
    with path.open("rb") as file:
        file.seek(after)
        # tarfile takes a damaged header for the end, and would quietly leave out what comes after it.
        if not fault and file.read(2 * TAR_BLOCK) != bytes(2 * TAR_BLOCK):
            fault = f"neither a member nor the end at byte {after}"
    if fault:
        raise ShardError(f"{path.name}: expected a tar of bundles, got {fault}; the shard is damaged, fetch or convert it again")
    return members


class Row(NamedTuple):
    """What a sample's row of an index is made from."""

    key: str
    offset: int
    size: int
    checksum: int
    bundle: Bundle


def row_of(key: str, offset: int, data: bytes, name: str) -> Row:
    """Parse a bundle for an index.

    Args:
        key: As in the tar.
        offset: First byte of the bundle in its shard.
        data: The bundle.
        name: What an error calls it.

    Raises:
        BundleError: The bundle is damaged.
    """
    return Row(key, offset, len(data), check_bytes(data, name), parse(data, name))


def build_index(rows: Sequence[Row]) -> ShardIndex:
    """Columns from the rows of all samples."""
    bundles = [row.bundle for row in rows]
    keys = [row.key.encode() for row in rows]
    networks = [network for bundle in bundles for network in bundle.networks]
    groups = tuple(sorted({network.spec for network in networks}, key=rank))
    number = {spec: i for i, spec in enumerate(groups)}

    def starts(counts: list[int]) -> Array:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def rows_of(values: list[Array], dtype: type, width: tuple[int, ...] = ()) -> Array:
        return np.concatenate(values).astype(dtype) if values else np.zeros((0, *width), dtype)

    # The offset of a network inside its bundle is implied by the format: what has weights starts at the next multiple of 16.
    offsets: list[int] = []
    for row in rows:
        end = row.offset + row.size
        inside: list[int] = []
        for network in reversed(row.bundle.networks):
            if network.weights:
                end = (end - len(network.weights)) // 16 * 16
            inside.append(end)
        offsets += reversed(inside)
    return ShardIndex(
        groups=groups,
        key=np.frombuffer(b"".join(keys), np.uint8),
        key_start=starts([len(key) for key in keys]),
        offset=np.array([row.offset for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int64),
        checksum=np.array([row.checksum for row in rows], np.uint32),
        stored_size=np.array([b.stored_size for b in bundles], np.uint16).reshape(-1, 2),
        source_size=np.array([b.source_size for b in bundles], np.uint16).reshape(-1, 2),
        label=np.array([b.label for b in bundles], np.int32),
        source_hash=np.frombuffer(b"".join(b.source_hash for b in bundles), np.uint8).reshape(-1, 4),
        psnr=np.array([b.psnr for b in bundles], np.float32),
        object_psnr=np.array([b.object_psnr for b in bundles], np.float32),
        object_start=starts([len(b.boxes) for b in bundles]),
        box=rows_of([b.boxes for b in bundles], np.float32, (4,)),
        class_id=rows_of([b.classes for b in bundles], np.int32),
        crowd=rows_of([b.crowd for b in bundles], np.bool_),
        network_start=starts([len(b.networks) for b in bundles]),
        network_group=np.array([number[n.spec] for n in networks], np.uint16),
        network_object=np.array([n.object for n in networks], np.int32),
        network_offset=np.array(offsets, np.int64),
        rect=np.array([n.rect for n in networks], np.uint16).reshape(-1, 4),
        scale=np.array([n.scale for n in networks], np.float32),
        feather=np.array([n.feather for n in networks], np.uint8),
    )


def dump_index(index: ShardIndex, *, shard_bytes: int) -> bytes:
    """Serialize an index as a safetensors file; equal indexes give equal bytes.

    Args:
        index: What to write.
        shard_bytes: Size of the shard it belongs to, so that an index of another shard is noticed.
    """
    columns = {f.name: np.ascontiguousarray(getattr(index, f.name)) for f in dataclasses.fields(index) if f.name != "groups"}
    columns["crowd"] = columns["crowd"].astype(np.uint8)
    about = {"version": INDEX_VERSION, "shard_bytes": shard_bytes, "groups": [list(record_of(spec)) for spec in index.groups]}
    # One metadata entry: safetensors writes several in the order of a hash map, which differs from run to run.
    return safetensors.save(columns, {"rinr": json.dumps(about)})


def load_index(data: bytes, *, name: str, shard_bytes: int | None = None) -> ShardIndex:
    """Read an index and check that its columns fit each other and the shard.

    Args:
        data: The file's bytes.
        name: What an error calls it.
        shard_bytes: Size of the shard that it should belong to.

    Raises:
        ShardError: The index is damaged, of an unknown version, or of another shard.
    """
    check = refuse(name)
    try:
        columns = safetensors.load(data)  # first: it limits how deep JSON can nest
        about = json.loads(metadata_of(data)["rinr"])
        version, size, rows = (about[entry] for entry in ("version", "shard_bytes", "groups"))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{name}: expected the index of a shard, got {type(error).__name__}: {error}; make it again with `rinr index`") from None
    if version != INDEX_VERSION:
        raise ShardError(f"{name}: expected index version {INDEX_VERSION}, got {version}; upgrade rinr_loader to read it")
    check(
        type(size) is int and 0 <= size < 2**62 and shard_bytes in (None, size),
        f"the index of a shard of {shard_bytes} bytes",
        f"one of {size} bytes",
    )
    groups = read_groups(rows, check)
    check_columns(columns, groups, size, check)
    columns["crowd"] = columns["crowd"].astype(np.bool_)
    return ShardIndex(groups=groups, **columns)
