"""One sample as bytes: the bundle. docs/FORMAT.md is the specification.

Imports numpy only, so that a bundle can be inspected and validated on any machine.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rinr_loader.errors import BundleError
from rinr_loader.jpeg_header import read_header
from rinr_loader.specs import (
    CODES,
    CODES_OF,
    DTYPES,
    FAMILIES,
    KINDS,
    Code,
    Dtype,
    Family,
    JpegSpec,
    Kind,
    NetworkSpec,
    Spec,
    TileSpec,
    record_of,
    spec_of,
)

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "HEADER",
    "KINDS",
    "NETWORK",
    "NO_OBJECT",
    "OBJECT",
    "SHARED_AT",
    "VERSION",
    "Bundle",
    "Dtype",
    "Family",
    "JpegSpec",
    "Kind",
    "Network",
    "NetworkSpec",
    "Spec",
    "TileSpec",
    "check_bytes",
    "pack",
    "parse",
]

MAGIC = b"RINR"
VERSION = 1
ALIGNMENT = 16  # weights are read in place by a GPU
NO_OBJECT = 0xFFFF

Check = Callable[["bool | np.bool_", str, object, object], None]

HEADER = struct.Struct("<4s4BII4H2Hi8s4s2H")
OBJECT = np.dtype([("box", "<f4", 4), ("class_id", "<u4"), ("flags", "<u4")])
NETWORK = np.dtype(
    [
        ("kind", "u1"),
        ("dtype", "u1"),
        ("depth", "u1"),
        ("feather", "u1"),
        ("width", "<u2"),
        ("object", "<u2"),
        ("rect", "<u2", 4),
        ("w0", "<f4"),
        ("scale", "<f4"),
        ("offset", "<u4"),
        ("length", "<u4"),
    ]
)
_CROWD = 1
_CHECKSUM_AT = 12
SHARED_AT = 32  # where a header names its shared parameters, in 8 bytes


@dataclass(frozen=True)
class Network:
    """One network of a bundle, or what stands for one in a family without networks.

    Args:
        spec: Its shape.
        rect: The stored pixels it covers: x0, y0, x1, y1, exclusive at the end.
        scale: Factor from the network's output to colour, where 1 is 255; of `tile` the quantization step in grey levels, of `jpeg` 1.
        weights: `spec.nbytes` bytes; any number where that is None.
        feather: Width in stored pixels of the ramp at the inner edges of `rect`.
        object: Index of the object it belongs to, or -1.
    """

    spec: Spec
    rect: tuple[int, int, int, int]
    scale: float
    weights: bytes
    feather: int = 0
    object: int = -1


@dataclass(frozen=True)
class Bundle:
    """One sample: labels and networks.

    Args:
        stored_size: Height and width, in pixels, of the picture that the networks were fitted to.
        source_size: Height and width of the original picture.
        networks: The background, then residuals in the order in which they were fitted.
        boxes: Label boxes, float32 xyxy in source pixels, shape `(n, 4)`.
        classes: Class ids, int64, shape `(n,)`.
        crowd: Whether a box marks a crowd or an ignored region, bool, shape `(n,)`.
        label: Class id of the whole picture, or -1.
        psnr: PSNR in dB of the whole stored picture, None where it was not measured.
        object_psnr: The same over the union of the label boxes.
        source_hash: First 4 bytes of the SHA-256 of the source file.
        shared: First 8 bytes of the SHA-256 of the shared parameters, zeros for none.
    """

    stored_size: tuple[int, int]
    source_size: tuple[int, int]
    networks: tuple[Network, ...]
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    label: int = -1
    psnr: float | None = None
    object_psnr: float | None = None
    source_hash: bytes = bytes(4)
    shared: bytes = bytes(8)

    @property
    def family(self) -> Family:
        """What it is decoded by: the family of its first network, and so of all."""
        return self.networks[0].spec.family if self.networks else "siren"


def pack(bundle: Bundle) -> bytes:
    """Serialize a bundle.

    Raises:
        BundleError: The bundle would not be read back: sizes, counts or numbers outside the format's limits.
    """
    try:
        with np.errstate(over="ignore"):  # parse tells of the infinity
            data = _assemble(bundle)
    except (struct.error, OverflowError) as error:
        raise BundleError(f"bundle: expected numbers within the format's limits, got one that does not fit: {error}") from None
    struct.pack_into("<I", data, _CHECKSUM_AT, _checksum(data))
    parse(data)  # what is written can be read: the limits stand in one place
    return bytes(data)


def _assemble(bundle: Bundle) -> bytearray:
    """Everything but the checksum."""
    if (len(bundle.shared), len(bundle.source_hash)) != (8, 4):
        raise BundleError(f"bundle: expected hashes of 8 and 4 bytes, got {len(bundle.shared)} and {len(bundle.source_hash)}; cut them")
    objects = np.zeros(len(bundle.boxes), OBJECT)
    networks = np.zeros(len(bundle.networks), NETWORK)
    objects["box"], objects["flags"] = bundle.boxes, np.where(bundle.crowd, _CROWD, 0)
    objects["class_id"] = np.clip(bundle.classes, -1, 2**31)  # what is out of range stays so when it is cast
    body = bytearray()
    start = HEADER.size + objects.nbytes + networks.nbytes
    for row, network in zip(networks, bundle.networks, strict=True):
        kind, depth, width, dtype, w0 = record_of(network.spec)
        if network.weights:  # nothing needs no place of its own
            body += bytes(-(start + len(body)) % ALIGNMENT)
        row["kind"], row["dtype"], row["depth"] = KINDS.index(kind), CODES.index(dtype), depth
        row["width"], row["w0"], row["scale"], row["feather"] = width, w0, network.scale, network.feather
        if network.object >= NO_OBJECT:
            raise OverflowError(f"object {network.object}")
        row["object"] = NO_OBJECT if network.object < 0 else network.object
        row["rect"], row["offset"], row["length"] = network.rect, start + len(body), len(network.weights)
        body += network.weights
    family = FAMILIES.index(bundle.family) + 1
    head = [MAGIC, VERSION, family, 0, 0, start + len(body), 0, *bundle.stored_size, *bundle.source_size, len(objects), len(networks)]
    tail = [bundle.label, bundle.shared, bundle.source_hash, _centi(bundle.psnr), _centi(bundle.object_psnr)]
    return bytearray(HEADER.pack(*head, *tail) + objects.tobytes() + networks.tobytes() + body)


def parse(data: bytes | bytearray | memoryview, key: str = "bundle") -> Bundle:
    """Read a bundle and check all of it before anything is allocated for it.

    Args:
        data: The bytes of one bundle.
        key: What an error calls it.

    Returns:
        The bundle; its arrays and weights are copies of at most the input's size.

    Raises:
        BundleError: The bytes are damaged, truncated, of an unknown version, or break a limit of the format.
    """

    def check(good: bool | np.bool_, name: str, expected: object, found: object) -> None:
        if not good:
            raise _damaged(key, name, expected, found)

    view = memoryview(data)
    check_bytes(view, key)
    family, flags, reserved, *rest = HEADER.unpack_from(view)[2:]
    _, _, height, width, source_height, source_width, n_objects, n_networks, label, shared, source_hash, psnr, object_psnr = rest
    if not 1 <= family <= len(FAMILIES):
        raise BundleError(f"{key}: expected family 1 to {len(FAMILIES)} ({', '.join(FAMILIES)}), got {family}; upgrade rinr_loader to read it")
    check(flags == 0 and reserved == 0, "reserved bytes", 0, (flags, reserved))
    check(min(height, width) > 0, "stored size", "above 0", (height, width))
    check(source_height >= height and source_width >= width, "source size", f"at least {(height, width)}", (source_height, source_width))
    check(label >= -1, "label", "at least -1", label)
    tables = HEADER.size + n_objects * OBJECT.itemsize + n_networks * NETWORK.itemsize
    check(tables <= len(view), "tables", f"within {len(view)} bytes", tables)
    check(n_networks > 0, "networks", "at least 1", n_networks)

    objects = np.frombuffer(view, OBJECT, n_objects, HEADER.size)
    boxes, classes = objects["box"], objects["class_id"]
    check(np.isfinite(boxes).all(), "boxes", "finite", "NaN or infinity")
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (source_width, source_height)).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    check(inside, "boxes", f"xyxy with an area, inside {source_width}x{source_height}", boxes[:4].tolist())
    check((classes < 2**31).all(), "class ids", "below 2**31", classes[:4].tolist())
    check((objects["flags"] <= _CROWD).all(), "object flags", "0 or 1", objects["flags"][:4].tolist())

    networks = []
    end = tables
    for i, row in enumerate(np.frombuffer(view, NETWORK, n_networks, HEADER.size + objects.nbytes)):
        name = f"network {i}:"
        spec = _parse_spec(row, FAMILIES[family - 1], check, name)
        x0, y0, x1, y1 = rect = tuple(row["rect"].tolist())
        check(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, f"{name} rectangle", f"inside {width}x{height}", rect)
        if i == 0:
            check(spec.kind == "background" and rect == (0, 0, width, height), name, "a background of the whole picture", (spec.kind, rect))
        check((spec.kind == "background") == (i == 0), name, "one background, first", spec.kind)
        check(np.isfinite(row["scale"]) and row["scale"] > 0, f"{name} scale", "finite and above 0", float(row["scale"]))
        check(row["object"] == NO_OBJECT or row["object"] < n_objects, f"{name} object", f"below {n_objects}", int(row["object"]))
        length = int(row["length"])
        start = end if spec.nbytes == 0 else end + -end % ALIGNMENT
        check(int(row["offset"]) == start, f"{name} offset", start, int(row["offset"]))
        check(length == spec.nbytes or (spec.nbytes is None and length > 0), f"{name} length", f"{spec.nbytes or 'some'} bytes for {spec}", length)
        check(start + length <= len(view), f"{name} end", f"within {len(view)} bytes", start + length)
        check(not any(view[end:start]), f"{name} padding", "zeros", bytes(view[end:start]))
        if isinstance(spec, NetworkSpec):
            halves = 2 * spec.rows if spec.dtype == "int8" else spec.rows + spec.weights
            check(np.isfinite(np.frombuffer(view, "<f2", halves, start)).all(), f"{name} weights", "finite", "NaN or infinity")
        end = start + length
        owner = -1 if row["object"] == NO_OBJECT else int(row["object"])
        networks.append(Network(spec, rect, float(row["scale"]), bytes(view[start:end]), int(row["feather"]), owner))
    check(end == len(view), "end of weights", f"{end} bytes", len(view))
    _check_family(networks, shared, (height, width), check)
    return Bundle(
        stored_size=(height, width),
        source_size=(source_height, source_width),
        networks=tuple(networks),
        boxes=boxes.astype(np.float32),
        classes=classes.astype(np.int64),
        crowd=(objects["flags"] & _CROWD).astype(np.bool_),
        label=label,
        psnr=psnr / 100 if psnr else None,
        object_psnr=object_psnr / 100 if object_psnr else None,
        source_hash=source_hash,
        shared=shared,
    )


def check_bytes(data: bytes | bytearray | memoryview, key: str = "bundle") -> int:
    """Check magic, version, length and checksum, nothing else: what a reader does for every sample.

    Returns:
        The checksum.

    Raises:
        BundleError: One of them is wrong.
    """
    if len(data) < HEADER.size:
        raise _damaged(key, "at least", f"{HEADER.size} bytes", len(data))
    magic, version, *_ = HEADER.unpack_from(data)
    length, checksum = struct.unpack_from("<II", data, _CHECKSUM_AT - 4)
    if magic != MAGIC:
        raise _damaged(key, "magic", MAGIC, magic)
    if version != VERSION:
        raise BundleError(f"{key}: expected version {VERSION}, got {version}; upgrade rinr_loader to read it")
    if length != len(data):
        raise BundleError(f"{key}: expected {length} bytes, got {len(data)}; the bundle is cut off, fetch or convert it again")
    found = _checksum(data)
    if checksum != found:
        raise _damaged(key, "checksum", f"{checksum:#010x}", f"{found:#010x}")
    return found


def _damaged(key: str, name: str, expected: object, found: object) -> BundleError:
    return BundleError(f"{key}: expected {name} {expected}, got {found}; the bundle is damaged, fetch or convert it again")


def _parse_spec(row: np.void, family: Family, check: Check, name: str) -> Spec:
    kind, dtype = int(row["kind"]), int(row["dtype"])
    check(kind < len(KINDS), f"{name} kind", f"below {len(KINDS)}", kind)
    codes: dict[int, Code] = {CODES.index(code): code for code in CODES_OF[family]}
    check(dtype in codes, f"{name} dtype", f"one of {family}: {sorted(codes)}", dtype)
    record = (KINDS[kind], int(row["depth"]), int(row["width"]), codes[dtype], float(row["w0"]))
    return spec_of(record, lambda good, what, expected, found: check(good, f"{name} {what}", expected, found))


def _check_family(networks: Sequence[Network], shared: bytes, stored_size: tuple[int, int], check: Check) -> None:
    """Check what a family asks of a bundle as a whole."""
    first = networks[0]
    if first.spec.family == "tile":
        check(any(shared), "shared parameters", "a hash for family tile", "zeros")
    if first.spec.family == "jpeg":
        check(not any(shared), "shared parameters", "none for family jpeg", shared.hex())
        check(first.scale == 1, "network 0: scale", "1 for family jpeg", first.scale)
        try:
            header = read_header(first.weights)
        except ValueError as error:
            check(False, "network 0: weights", "a JPEG, gray or YCbCr", error)
        else:
            check((header.height, header.width) == stored_size, "network 0: weights", f"a JPEG of {stored_size}", (header.height, header.width))


def _checksum(data: bytearray | memoryview | bytes) -> int:
    """CRC-32 of everything, the checksum itself counted as zeros."""
    head = zlib.crc32(bytes(4), zlib.crc32(memoryview(data)[:_CHECKSUM_AT]))
    return zlib.crc32(memoryview(data)[_CHECKSUM_AT + 4 :], head)


def _centi(psnr: float | None) -> int:
    """A PSNR in hundredths of a dB, 1 to 65535; 0 means not measured."""
    return 0 if psnr is None or math.isnan(psnr) else round(min(max(psnr * 100, 1), 0xFFFF))
