"""Bundles of random networks, valid by construction, for tests of the format."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from rinr_loader.bundle import Bundle, Dtype, JpegSpec, Kind, Network, NetworkSpec, TileSpec

SMALL_WIDTH, SMALL_DEPTH = 5, 3


def random_weights(spec: NetworkSpec, seed: int) -> bytes:
    """Finite weights of a shape."""
    rng = np.random.default_rng(seed)
    if spec.dtype == "float16":
        return rng.normal(0, 0.3, spec.rows + spec.weights).astype("<f2").tobytes()
    halves = np.concatenate([rng.uniform(0.001, 0.01, spec.rows), rng.normal(0, 0.3, spec.rows)])
    return halves.astype("<f2").tobytes() + rng.integers(-127, 128, spec.weights, np.int8).tobytes()


def random_network(kind: Kind, dtype: Dtype, rect: tuple[int, int, int, int], *, depth: int = 2, width: int = 3, seed: int = 0) -> Network:
    spec = NetworkSpec(kind, depth, width, dtype)
    return Network(spec, rect, 0.5, random_weights(spec, seed))


def small_bundle() -> Bundle:
    """Every field in use: three objects, one of them a crowd; int8 background, a float16 residual, an int8 direct network."""
    return Bundle(
        stored_size=(20, 31),
        source_size=(40, 62),
        networks=(
            random_network("background", "int8", (0, 0, 31, 20), depth=2, width=3, seed=1),
            replace(random_network("residual", "float16", (3, 2, 18, 20), depth=1, width=4, seed=2), feather=4, object=2, scale=0.25),
            replace(random_network("direct", "int8", (20, 1, 31, 9), depth=1, width=2, seed=3), feather=2, object=0),
        ),
        boxes=np.array([[41.5, 3, 62, 17.25], [0, 0, 62, 40], [9, 5, 33, 39]], np.float32),
        classes=np.array([7, 0, 2**31 - 1], np.int64),
        crowd=np.array([False, True, False]),
        label=5,
        psnr=27.31,
        object_psnr=30.0,
        source_hash=b"\x01\x02\x03\x04",
        shared=b"\x00" * 7 + b"\x09",
    )


def tile_bundle() -> Bundle:
    """One of the family `tile`: a background and two residuals, one of no object."""
    return replace(
        small_bundle(),
        networks=(
            Network(TileSpec("background", 2, 16), (0, 0, 31, 20), 12.5, b"a stream of 37 bytes, as good as any.", 3, 1),
            Network(TileSpec("residual"), (3, 2, 18, 20), 6.0, b"", 4, 2),
            Network(TileSpec("residual"), (20, 1, 31, 9), 7.25, b"", 2),
        ),
    )


def header_only(height: int, width: int, components: int = 3) -> bytes:
    """The least that passes for a JPEG of a size before it is decoded: a frame, a scan, and as many bytes as the size asks for."""
    frame = struct.pack(">BHHB", 8, height, width, components) + b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    head = b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\x00\x02"
    return head + bytes(max(0, -(-height * width // 512) - len(head)))


def jpeg_bundle() -> Bundle:
    """One of the family `jpeg`, of a file that nobody can decode."""
    return replace(small_bundle(), networks=(Network(JpegSpec(), (0, 0, 31, 20), 1.0, header_only(20, 31), 5, 0),), shared=bytes(8))


def mend(data: bytes, *, length: bool = True) -> bytes:
    """Make length (unless told not to) and checksum right again, so that the checks behind them are reached. Written without the code it tests."""
    if len(data) < 48:
        return data
    fixed = bytearray(data)
    if length:
        struct.pack_into("<I", fixed, 8, len(fixed))
    struct.pack_into("<I", fixed, 12, zlib.crc32(fixed[:12] + bytes(4) + fixed[16:]))
    return bytes(fixed)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    """Any valid bundle, of small networks or short streams."""
    family = draw(st.sampled_from(("siren", "tile", "jpeg")))
    most = 400 if family == "jpeg" else 65535
    stored = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    source = tuple(draw(st.integers(side, 65535)) for side in stored)
    height, width = stored
    count = draw(st.integers(0, 5))

    def span(limit: int) -> tuple[int, int]:
        low = draw(st.integers(0, limit - 1))
        return low, draw(st.integers(low + 1, limit))

    def network(kind: Kind, rect: tuple[int, int, int, int]) -> Network:
        around = (draw(st.integers(0, 255)), draw(st.integers(-1, count - 1)))
        if family == "jpeg":
            return Network(JpegSpec(), rect, 1.0, header_only(height, width, draw(st.sampled_from((1, 3)))), *around)
        if family == "tile":
            whole = kind == "background"
            spec = TileSpec(kind, draw(st.integers(1, 2)), 2 ** draw(st.integers(0, 10))) if whole else TileSpec("residual")
            step = draw(st.floats(2.0**-20, 2.0**20, width=32))
            return Network(spec, rect, step, draw(st.binary(min_size=1, max_size=40)) if whole else b"", *around)
        return sine(kind, rect)

    def sine(kind: Kind, rect: tuple[int, int, int, int]) -> Network:
        w0 = draw(st.floats(0.5, 1000, width=32))
        dtype: Dtype = draw(st.sampled_from(("int8", "float16")))
        spec = NetworkSpec(kind, draw(st.integers(1, SMALL_DEPTH)), draw(st.integers(1, SMALL_WIDTH)), dtype, w0)
        scale = draw(st.floats(2.0**-20, 2.0**20, width=32))
        owner = draw(st.integers(-1, count - 1))
        return Network(spec, rect, scale, random_weights(spec, draw(st.integers(0, 9))), draw(st.integers(0, 255)), owner)

    networks = [network("background", (0, 0, width, height))]
    for _ in range(0 if family == "jpeg" else draw(st.integers(0, 4))):
        (x0, x1), (y0, y1) = span(width), span(height)
        networks.append(network(draw(st.sampled_from(("residual", "direct"))), (x0, y0, x1, y1)))
    boxes = []
    for _ in range(count):
        corners = [sorted((draw(st.floats(0, side, width=32)), draw(st.floats(0, side, width=32)))) for side in (source[1], source[0])]
        (x0, x1), (y0, y1) = ((low, high) if low < high else (0.0, 1.0) for low, high in corners)
        boxes.append((x0, y0, x1, y1))
    return Bundle(
        stored_size=stored,
        source_size=(source[0], source[1]),
        networks=tuple(networks),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array([draw(st.integers(0, 2**31 - 1)) for _ in range(count)], np.int64),
        crowd=np.array([draw(st.booleans()) for _ in range(count)], np.bool_),
        label=draw(st.integers(-1, 2**31 - 1)),
        psnr=draw(st.none() | st.integers(1, 9900).map(lambda value: value / 100)),
        object_psnr=draw(st.none() | st.integers(1, 9900).map(lambda value: value / 100)),
        source_hash=draw(st.binary(min_size=4, max_size=4)),
        shared=bytes(8) if family == "jpeg" else draw(st.binary(min_size=8, max_size=8).filter(any if family == "tile" else lambda _: True)),
    )
