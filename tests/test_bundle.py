"""Bundles: round trips; and whatever is damaged, cut off, hostile or random gives BundleError and nothing else, at a bounded cost."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from bundles import bundles, header_only, jpeg_bundle, mend, random_network, random_weights, small_bundle, tile_bundle
from hypothesis import example, given
from hypothesis import strategies as st

from rinr_loader.bundle import HEADER, NETWORK, OBJECT, Bundle, JpegSpec, Network, NetworkSpec, TileSpec, check_bytes, pack, parse
from rinr_loader.errors import BundleError

SMALL = pack(small_bundle())
OBJECTS_AT, NETWORKS_AT = 48, 48 + 3 * 24
TABLES_END = NETWORKS_AT + 3 * 32
WEIGHTS_AT = 224  # the next multiple of 16
FACTOR, CONSTANT = 8, 64 * 1024  # docs/FORMAT.md: what a reader allocates


def assert_same(found: Bundle, wanted: Bundle) -> None:
    for field in fields(Bundle):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def changed(at: int, form: str, *values: object) -> bytes:
    """The small bundle with other numbers at a place, the checksum made right again."""
    data = bytearray(SMALL)
    struct.pack_into(form, data, at, *values)
    return mend(bytes(data), length=at != 8)


# --- round trips ---


@given(bundles())
def test_what_is_packed_is_parsed(bundle: Bundle) -> None:
    data = pack(bundle)
    parsed = parse(data)
    assert_same(parsed, bundle)
    assert pack(parsed) == data


def test_the_small_bundle_uses_every_field() -> None:
    assert_same(parse(SMALL), small_bundle())
    defaults = Bundle((1, 1), (1, 1), ())
    unused = [f.name for f in fields(Bundle) if f.name != "networks" and np.array_equal(getattr(small_bundle(), f.name), getattr(defaults, f.name))]
    assert not unused


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_bytes_can_be_parsed(view: type) -> None:
    assert_same(parse(view(SMALL)), small_bundle())


def test_parts_have_the_promised_sizes() -> None:
    assert (HEADER.size, OBJECT.itemsize, NETWORK.itemsize) == (48, 24, 32)
    alone = Bundle((1, 1), (1, 1), (random_network("background", "int8", (0, 0, 1, 1)),))
    assert len(pack(alone)) == 48 + 32 + alone.networks[0].spec.nbytes


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        # the paper's background: 28*2 + 9*28*28 + 3*28 weights, 283 rows with a float16 bias, and with a float16 scale for int8
        (NetworkSpec("background", 10, 28, "int8"), 56 + 9 * 784 + 84 + 4 * 283),
        (NetworkSpec("background", 10, 28, "float16"), 2 * (56 + 9 * 784 + 84 + 283)),
        (NetworkSpec("residual", 3, 10, "float16"), 2 * (20 + 200 + 30 + 33)),
        (NetworkSpec("direct", 1, 1, "int8"), 2 + 3 + 4 * 4),
    ],
)
def test_size_of_a_network(spec: NetworkSpec, size: int) -> None:
    assert spec.nbytes == size == len(random_weights(spec, 0))


@pytest.mark.parametrize(("psnr", "stored"), [(None, None), (float("nan"), None), (27.314, 27.31), (0.0, 0.01), (-3.0, 0.01), (float("inf"), 655.35)])
def test_psnr_is_stored_in_hundredths(psnr: float | None, stored: float | None) -> None:
    assert parse(pack(replace(small_bundle(), psnr=psnr, object_psnr=psnr))).psnr == stored


# --- damage ---


def test_every_truncation_is_noticed() -> None:
    for length in range(len(SMALL)):
        for data in (SMALL[:length], mend(SMALL[:length])):
            with pytest.raises(BundleError):
                parse(data)


def test_bytes_too_many_are_noticed() -> None:
    for extra in range(1, 40):
        for data in (SMALL + bytes(extra), mend(SMALL + bytes(extra)), SMALL + SMALL[:extra]):
            with pytest.raises(BundleError):
                parse(data)


def test_every_flipped_bit_is_noticed() -> None:
    for bit in range(8 * len(SMALL)):
        with pytest.raises(BundleError):
            parse(flipped(SMALL, bit))
        with pytest.raises(BundleError):
            check_bytes(flipped(SMALL, bit))


def test_every_flipped_bit_behind_a_right_checksum_is_an_error_or_another_bundle() -> None:
    for bit in range(8 * len(SMALL)):
        data = mend(flipped(SMALL, bit), length=False)
        try:
            parsed = parse(data)
        except BundleError:
            continue
        assert pack(parsed) == data, f"bit {bit} is not read"


# Where no other value is right: offset in the bundle and number of bytes.
FIXED = {
    "magic, version, family, flags, reserved, length": (0, 12),
    "numbers of objects and networks": (24, 4),
    "kind, dtype and depth of the background": (NETWORKS_AT, 3),
    "width of the background": (NETWORKS_AT + 4, 2),
    "rectangle of the background": (NETWORKS_AT + 8, 8),
    "offset and length of the background": (NETWORKS_AT + 24, 8),
    "offset and length of the residual": (NETWORKS_AT + 32 + 24, 8),
    "offset and length of the direct network": (NETWORKS_AT + 64 + 24, 8),
}


@pytest.mark.parametrize("name", FIXED)
def test_bits_that_decide_the_structure_are_errors_behind_a_right_checksum(name: str) -> None:
    start, size = FIXED[name]
    for bit in range(8 * start, 8 * (start + size)):
        with pytest.raises(BundleError):
            parse(mend(flipped(SMALL, bit), length=False))


def test_padding_must_be_zeros() -> None:
    networks = [struct.unpack_from("<II", SMALL, NETWORKS_AT + 32 * i + 24) for i in range(3)]
    ends = [offset + length for offset, length in networks]
    gaps = [at for (offset, _), end in zip(networks, [TABLES_END, *ends], strict=False) for at in range(end, offset)]
    assert gaps, "the small bundle has padding"
    for at in gaps:
        with pytest.raises(BundleError, match="padding"):
            parse(changed(at, "<B", 1))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_a_few_other_bytes(changes: list[tuple[int, int]], mended: bool) -> None:
    data = bytearray(SMALL)
    for at, value in changes:
        data[at] = value
    raw = mend(bytes(data)) if mended else bytes(data)
    try:
        parsed = parse(raw)
    except BundleError:
        return
    assert pack(parsed) == raw


@given(st.binary(max_size=300))
@example(b"")
@example(b"RINR")
def test_random_bytes(data: bytes) -> None:
    for raw in (data, SMALL[:8] + data, mend(SMALL[:24] + data), mend(SMALL[:48] + data)):
        if raw != SMALL:
            with pytest.raises(BundleError):
                parse(raw)


# --- hostile numbers ---

NAN, INF = float("nan"), float("inf")
HOSTILE = {
    "no such family": (changed(5, "<B", 4), "family 1 to 3"),
    "family 0": (changed(5, "<B", 0), "family 1 to 3"),
    "another family": (changed(5, "<B", 2), "network 0: dtype one of tile: [2], got 0"),
    "flags": (changed(6, "<B", 1), "reserved bytes"),
    "height 0": (changed(16, "<H", 0), "stored size above 0"),
    "stored higher than source": (changed(20, "<2H", 19, 62), "source size at least"),
    "stored wider than source": (changed(20, "<2H", 40, 30), "source size at least"),
    "label": (changed(28, "<i", -2), "label at least -1"),
    "65535 objects": (changed(24, "<H", 65535), "tables within"),
    "65535 networks": (changed(26, "<H", 65535), "tables within"),
    "65535 of both": (changed(24, "<2H", 65535, 65535), "tables within"),
    "no network": (changed(26, "<H", 0), "networks at least 1"),
    "box NaN": (changed(OBJECTS_AT, "<f", NAN), "boxes finite"),
    "box infinite": (changed(OBJECTS_AT + 8, "<f", INF), "boxes finite"),
    "box outside": (changed(OBJECTS_AT + 8, "<f", 62.5), "boxes xyxy"),
    "box below 0": (changed(OBJECTS_AT, "<f", -1.0), "boxes xyxy"),
    "box without an area": (changed(OBJECTS_AT, "<f", 62.0), "boxes xyxy"),
    "class id": (changed(OBJECTS_AT + 16, "<I", 2**31), "class ids below"),
    "object flags": (changed(OBJECTS_AT + 20, "<I", 2), "object flags"),
    "kind": (changed(NETWORKS_AT + 32, "<B", 3), "network 1: kind"),
    "second background": (changed(NETWORKS_AT + 32, "<B", 0), "one background"),
    "no background": (changed(NETWORKS_AT, "<B", 1), "background of the whole picture"),
    "background of a part": (changed(NETWORKS_AT + 8, "<4H", 0, 0, 30, 20), "background of the whole picture"),
    "dtype": (changed(NETWORKS_AT + 33, "<B", 2), "network 1: dtype"),
    "depth 0": (changed(NETWORKS_AT + 2, "<B", 0), "depth x width"),
    "depth 255": (changed(NETWORKS_AT + 2, "<B", 255), "depth x width"),
    "width 0": (changed(NETWORKS_AT + 4, "<H", 0), "depth x width"),
    "width 65535": (changed(NETWORKS_AT + 4, "<H", 65535), "depth x width"),
    "largest network": (changed(NETWORKS_AT + 2, "<BBH", 64, 0, 256), "length"),
    "owner": (changed(NETWORKS_AT + 6, "<H", 3), "network 0: object below 3"),
    "rectangle turned round": (changed(NETWORKS_AT + 40, "<4H", 18, 2, 3, 20), "network 1: rectangle"),
    "rectangle empty": (changed(NETWORKS_AT + 40, "<4H", 3, 2, 3, 20), "network 1: rectangle"),
    "rectangle outside": (changed(NETWORKS_AT + 40, "<4H", 3, 2, 32, 20), "network 1: rectangle"),
    "rectangle below": (changed(NETWORKS_AT + 40, "<4H", 3, 2, 18, 21), "network 1: rectangle"),
    "w0 0": (changed(NETWORKS_AT + 16, "<f", 0.0), "w0 above 0"),
    "w0 NaN": (changed(NETWORKS_AT + 16, "<f", NAN), "w0 above 0"),
    "w0 infinite": (changed(NETWORKS_AT + 16, "<f", INF), "w0 above 0"),
    "scale NaN": (changed(NETWORKS_AT + 20, "<f", NAN), "scale finite"),
    "scale infinite": (changed(NETWORKS_AT + 20, "<f", INF), "scale finite"),
    "scale 0": (changed(NETWORKS_AT + 20, "<f", 0.0), "scale finite and above 0"),
    "offset 0": (changed(NETWORKS_AT + 24, "<I", 0), "network 0: offset"),
    "offset far": (changed(NETWORKS_AT + 24, "<I", 2**32 - 16), "network 0: offset"),
    "length 0": (changed(NETWORKS_AT + 28, "<I", 0), "network 0: length"),
    "length far": (changed(NETWORKS_AT + 28, "<I", 2**32 - 1), "network 0: length"),
    "row scale NaN": (changed(WEIGHTS_AT, "<e", NAN), "network 0: weights finite"),
    "bias infinite": (changed(WEIGHTS_AT + 2 * 9, "<e", INF), "network 0: weights finite"),
    "weight NaN": (changed(struct.unpack_from("<I", SMALL, NETWORKS_AT + 56)[0] + 20, "<e", NAN), "network 1: weights finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_numbers(name: str) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(BundleError, match=re.escape(reason)):
        parse(data)


def test_every_bit_pattern_of_a_half_that_is_no_number() -> None:
    for pattern in [*range(0x7C00, 0x8000, 37), *range(0xFC00, 0x10000, 37)]:
        with pytest.raises(BundleError, match="weights finite"):
            parse(changed(WEIGHTS_AT, "<H", pattern))


# --- other families ---

TILE, JPEG = pack(tile_bundle()), pack(jpeg_bundle())
OTHERS = {"tile": TILE, "jpeg": JPEG}


def other(data: bytes, at: int, form: str, *values: object) -> bytes:
    """A bundle with other numbers at a place, the checksum made right again."""
    damaged = bytearray(data)
    struct.pack_into(form, damaged, at, *values)
    return mend(bytes(damaged))


@pytest.mark.parametrize(("data", "bundle"), [(TILE, tile_bundle()), (JPEG, jpeg_bundle())], ids=OTHERS)
def test_the_other_families_use_every_field(data: bytes, bundle: Bundle) -> None:
    assert_same(parse(data), bundle)
    assert parse(data).family == bundle.networks[0].spec.family
    assert data[5] == {"tile": 2, "jpeg": 3}[bundle.family]
    rows = [struct.unpack_from("<4B2H4H2f2I", data, NETWORKS_AT + 32 * i) for i in range(len(bundle.networks))]
    first = -(-(NETWORKS_AT + 32 * len(rows)) // 16) * 16
    if bundle.family == "tile":
        assert [row[:3] + row[4:5] + row[10:11] for row in rows] == [(0, 2, 2, 16, 0.0), (1, 2, 0, 0, 0.0), (1, 2, 0, 0, 0.0)]
        assert [row[-2:] for row in rows] == [(first, 37), (first + 37, 0), (first + 37, 0)], "residuals have no bytes of their own"
        assert [row[11] for row in rows] == [12.5, 6.0, 7.25]
    else:
        assert rows[0][:3] + rows[0][4:5] + rows[0][10:12] == (0, 3, 0, 0, 0.0, 1.0)
        assert data[first:] == header_only(20, 31)


@pytest.mark.parametrize("name", OTHERS)
def test_damage_to_the_other_families_is_noticed(name: str) -> None:
    data = OTHERS[name]
    for length in range(len(data)):
        for cut in (data[:length], mend(data[:length])):
            # A stream may end anywhere: that it is whole is for its decoder to say. Its length stands in the table.
            with pytest.raises(BundleError):
                parse(cut)
    for extra in range(1, 40):
        with pytest.raises(BundleError):
            parse(mend(data + bytes(extra)))
    for bit in range(8 * len(data)):
        with pytest.raises(BundleError):
            parse(flipped(data, bit))
        changed = mend(flipped(data, bit), length=False)
        try:
            parsed = parse(changed)
        except BundleError:
            continue
        assert pack(parsed) == changed, f"bit {bit} is not read"


N = NETWORKS_AT
HOSTILE_OTHERS = {
    "tile without shared parameters": (other(TILE, 32, "<8s", bytes(8)), "shared parameters a hash for family tile, got zeros"),
    "tile of no layer": (other(TILE, N + 2, "<B", 0), "layers x lanes"),
    "tile of three layers": (other(TILE, N + 2, "<B", 3), "network 0: layers x lanes 1 or 2 x a power of two up to 1024, got 3x16"),
    "tile without lanes": (other(TILE, N + 4, "<H", 0), "layers x lanes"),
    "tile of three lanes": (other(TILE, N + 4, "<H", 3), "layers x lanes"),
    "tile of 2048 lanes": (other(TILE, N + 4, "<H", 2048), "layers x lanes"),
    "tile with a frequency": (other(TILE, N + 16, "<f", 30.0), "network 0: w0 0, got 30"),
    "tile with a frequency of -0": (other(TILE, N + 16, "<f", -0.0), "network 0: w0 0, got -0"),
    "tile of step 0": (other(TILE, N + 20, "<f", 0.0), "scale finite and above 0"),
    "tile of step NaN": (other(TILE, N + 20, "<f", NAN), "scale finite and above 0"),
    "tile of step infinity": (other(TILE, N + 52, "<f", INF), "network 1: scale finite"),
    "tile without a stream": (other(TILE, N + 28, "<I", 0), "network 0: length"),
    "tile with a longer stream": (other(TILE, N + 28, "<I", 38), "network 0: end within"),
    "tile with a shorter stream": (other(TILE, N + 28, "<I", 36), "network 1: offset"),
    "direct tile": (other(TILE, N + 32, "<B", 2), "network 1: kind one of latents, got direct"),
    "residual tile with layers": (other(TILE, N + 34, "<B", 1), "network 1: depth x width 0x0"),
    "residual tile with lanes": (other(TILE, N + 36, "<H", 1), "network 1: depth x width 0x0"),
    "residual tile with bytes": (other(TILE, N + 60, "<I", 1), "network 1: length"),
    "residual tile at a multiple of 16": (other(TILE, N + 56, "<I", 272), "network 1: offset"),
    "a sine network among tiles": (other(TILE, N + 33, "<B", 1), "network 1: dtype one of tile: [2], got 1"),
    "tiles called sine networks": (other(TILE, 5, "<B", 1), "network 0: dtype one of siren: [0, 1], got 2"),
    "a JPEG called tiles": (other(JPEG, 5, "<B", 2), "network 0: dtype one of tile: [2], got 3"),
    "JPEG with shared parameters": (other(JPEG, 32, "<8s", b"12345678"), "shared parameters none for family jpeg, got 3132333435363738"),
    "JPEG of another scale": (other(JPEG, N + 20, "<f", 2.0), "network 0: scale 1 for family jpeg, got 2"),
    "JPEG with depth": (other(JPEG, N + 2, "<B", 1), "depth x width 0x0"),
    "JPEG with width": (other(JPEG, N + 4, "<H", 1), "depth x width 0x0"),
    "JPEG with a frequency": (other(JPEG, N + 16, "<f", 1e-30), "w0 0"),
    "residual JPEG": (other(JPEG, N, "<B", 1), "network 0: kind one of jpeg, got residual"),
    "JPEG of another height": (other(JPEG, 16, "<H", 19), "network 0:"),
    "no JPEG": (other(JPEG, N + 32 + 8, "<H", 0), "network 0: weights a JPEG, gray or YCbCr, got no start of an image"),
    "JPEG of another size": (other(JPEG, N + 40 + 7, ">H", 21), "network 0: weights a JPEG of (20, 31), got (21, 31)"),
}


@pytest.mark.parametrize("name", HOSTILE_OTHERS)
def test_hostile_numbers_of_other_families(name: str) -> None:
    data, reason = HOSTILE_OTHERS[name]
    with pytest.raises(BundleError, match=re.escape(reason)):
        parse(data)


def test_a_jpeg_is_alone() -> None:
    bundle = jpeg_bundle()
    for second in (bundle.networks[0], replace(bundle.networks[0], spec=JpegSpec("residual")), small_bundle().networks[1], tile_bundle().networks[1]):
        with pytest.raises(BundleError):
            pack(replace(bundle, networks=(*bundle.networks, second)))
    for first in (small_bundle().networks[0], tile_bundle().networks[0]):
        with pytest.raises(BundleError, match="network 1: dtype"):
            pack(replace(bundle, networks=(first, *bundle.networks), shared=b"12345678"))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TileSpec("background", 1, 64), "background tile-1 64 lanes"),
        (TileSpec("residual"), "residual tile"),
        (JpegSpec(), "background jpeg"),
        (NetworkSpec("residual", 3, 10, "float16"), "residual 3x10 float16"),
    ],
)
def test_what_parts_are_called(spec: TileSpec | JpegSpec | NetworkSpec, text: str) -> None:
    assert str(spec) == text


# --- messages ---


def test_messages_name_the_bundle_and_say_what_to_do() -> None:
    cases = {
        "expected 48 bytes": SMALL[:40],
        f"expected {len(SMALL)} bytes, got {len(SMALL) - 1}; the bundle is cut off": SMALL[:-1],
        "expected magic": b"JPEG" + SMALL[4:],
        "expected version 1, got 9; upgrade rinr_loader": changed(4, "<B", 9),
        "expected family 1 to 3 (siren, tile, jpeg), got 7; upgrade rinr_loader": changed(5, "<B", 7),
        "expected checksum": flipped(SMALL, 8 * 100),
    }
    for words, data in cases.items():
        with pytest.raises(BundleError) as caught:
            parse(data, "train-000003.tar:frame_0042.rinr")
        message = str(caught.value).replace("at least ", "")
        assert message.startswith("train-000003.tar:frame_0042.rinr: expected ")
        assert words in message
        assert "; " in message


def test_a_newer_version_is_named_before_its_checksum_is_looked_at() -> None:
    data = bytearray(SMALL)
    data[4] = 2
    with pytest.raises(BundleError, match="version 1, got 2"):
        parse(bytes(data))


# --- cost ---


@cache
def heavy() -> dict[str, bytes]:
    """Bundles, and what looks like bundles, that a careless parser would pay for."""
    tiny = random_network("residual", "float16", (0, 0, 1, 1), depth=1, width=1)
    background = random_network("background", "int8", (0, 0, 31, 20), depth=1, width=1)
    many = 800
    boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (many, 1))
    full = pack(Bundle((20, 31), (20, 31), (background, *[tiny] * many), boxes, np.zeros(many, np.int64), np.zeros(many, np.bool_)))
    large = NetworkSpec("background", 64, 256, "float16")
    return {
        "many of everything": full,
        "its last byte missing": mend(full[:-1]),
        "a bad box at the end": mend(full[: 48 + 24 * (many - 1)] + struct.pack("<4f", 5, 5, 5, 5) + full[48 + 24 * many - 8 :]),
        "garbage boxes": mend(SMALL[:24] + struct.pack("<2H", 65535, 1) + SMALL[28:48] + b"\x7f" * (65535 * 24 + 32)),
        "large and random": np.random.default_rng(0).bytes(1_000_000),
        "the largest network": pack(Bundle((1, 1), (1, 1), (Network(large, (0, 0, 1, 1), 1.0, bytes(large.nbytes)),))),
        "one that claims to be": HOSTILE["largest network"][0],
        "65535 of both": HOSTILE["65535 of both"][0],
    }


@pytest.mark.parametrize("name", list(heavy()))
def test_allocation_is_bounded_by_the_input(name: str) -> None:
    data, message = heavy()[name], ""
    tracemalloc.start()
    try:
        parse(data)
    except BundleError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(message) < 2000
    assert peak <= FACTOR * len(data) + CONSTANT, f"{peak / len(data):.1f} times the input"


# --- what cannot be packed ---


def other_network(**changes: object) -> Bundle:
    bundle = small_bundle()
    return replace(bundle, networks=(bundle.networks[0], replace(bundle.networks[1], **changes), bundle.networks[2]))  # type: ignore[arg-type]


def spec(depth: int = 1, width: int = 4, w0: float = 30.0) -> NetworkSpec:
    return NetworkSpec("residual", depth, width, "float16", w0)


REFUSED = {
    "label above 31 bits": replace(small_bundle(), label=2**31),
    "label -2": replace(small_bundle(), label=-2),
    "stored size": replace(small_bundle(), stored_size=(65536, 31)),
    "negative size": replace(small_bundle(), stored_size=(-1, 31)),
    "class id that would wrap round": replace(small_bundle(), classes=np.array([2**32 + 5, 0, 0])),
    "class id -1": replace(small_bundle(), classes=np.array([-1, 0, 0])),
    "box that float32 cannot hold": replace(small_bundle(), boxes=np.array([[0, 0, 1e60, 1]] * 3)),
    "box NaN": replace(small_bundle(), boxes=np.full((3, 4), np.nan, np.float32)),
    "no network": replace(small_bundle(), networks=()),
    "too many networks": replace(small_bundle(), networks=small_bundle().networks[:1] * 65536),
    "too many objects": replace(small_bundle(), boxes=np.zeros((65536, 4)), classes=np.zeros(65536, np.int64), crowd=np.zeros(65536, np.bool_)),
    "rectangle outside": other_network(rect=(0, 0, 70000, 4)),
    "rectangle below 0": other_network(rect=(-1, 0, 4, 4)),
    "feather": other_network(feather=256),
    "owner not there": other_network(object=3),
    "owner 65535": other_network(object=65535),
    "scale infinite in float32": other_network(scale=1e39),
    "scale NaN": other_network(scale=NAN),
    "weights too short": other_network(weights=b"123"),
    "depth": other_network(spec=spec(depth=65)),
    "depth above a byte": other_network(spec=spec(depth=300)),
    "width": other_network(spec=spec(width=257)),
    "w0": other_network(spec=spec(w0=1001.0)),
    "w0 that becomes 0": other_network(spec=spec(w0=1e-60)),
    "hash": replace(small_bundle(), source_hash=b"12345"),
    "shared": replace(small_bundle(), shared=b"1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_read_back_is_not_packed(name: str) -> None:
    with pytest.raises(BundleError, match=r"^bundle: expected .*; |that does not fit"):
        pack(REFUSED[name])


def test_bundles_need_no_torch() -> None:
    code = "import sys, rinr_loader.bundle, rinr_loader.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
