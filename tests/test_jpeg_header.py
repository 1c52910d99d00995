"""What is said of a JPEG before it is decoded: its size where every decoder agrees on it, an error everywhere else, at a bounded cost."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from bundles import header_only
from hypothesis import example, given
from hypothesis import strategies as st
from jpegs import jpeg_file, textured
from PIL import Image

from rinr_loader.jpeg_header import JpegHeader, read_header

PIXELS = textured(0, (24, 40))
PLAIN = jpeg_file(PIXELS)


def segment(code: int, payload: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(payload)) + payload


def with_segment(code: int, payload: bytes) -> bytes:
    return PLAIN[:2] + segment(code, payload) + PLAIN[2:]


ADOBE = b"Adobe\x00\x64\x00\x00\x00\x00"
THUMBNAIL = b"Exif\x00\x00" + jpeg_file(textured(1, (8, 8)))
READ = {
    "baseline": (PLAIN, 3),
    "full colour": (jpeg_file(PIXELS, subsampling=0), 3),
    "progressive": (jpeg_file(PIXELS, progressive=True), 3),
    "optimized": (jpeg_file(PIXELS, optimize=True), 3),
    "gray": (jpeg_file(PIXELS[..., 0]), 1),
    "progressive gray": (jpeg_file(PIXELS[..., 0], progressive=True), 1),
    "restart markers": (jpeg_file(PIXELS, restart_marker_blocks=1), 3),
    "a thumbnail before it": (with_segment(0xE1, THUMBNAIL), 3),
    "a comment": (with_segment(0xFE, b"\xff\xda\xff\xc0 made by hand"), 3),
    "the longest segment": (with_segment(0xE2, bytes(65533)), 3),
    "fill bytes": (PLAIN[:2] + b"\xff" * 9 + PLAIN[2:], 3),
    "Adobe's YCbCr": (with_segment(0xEE, ADOBE + b"\x01"), 3),
    "Adobe's gray": (jpeg_file(PIXELS[..., 0])[:2] + segment(0xEE, ADOBE + b"\x00") + jpeg_file(PIXELS[..., 0])[2:], 1),
    "another program's APP14": (with_segment(0xEE, b"Adobf\x00\x64\x00\x00\x00\x00\x00"), 3),
    "bytes after its end": (PLAIN + bytes(100), 3),
}


@pytest.mark.parametrize("name", READ)
def test_size_and_components(name: str) -> None:
    data, components = READ[name]
    assert read_header(data) == read_header(memoryview(data)) == JpegHeader(24, 40, components)
    assert Image.open(io.BytesIO(data)).size == (40, 24)


def cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


FRAME = struct.pack(">BHHB", 8, 24, 40, 3)
NAMES = PLAIN[PLAIN.index(FRAME) + 6 :][:9]
REFUSED = {
    "nothing": (b"", "no start"),
    "a PNG": (png(), "no start"),
    "a start alone": (b"\xff\xd8", "no marker at byte 2"),
    "no marker": (b"\xff\xd8abcdef", "no marker at byte 2"),
    "fill bytes to the end": (b"\xff\xd8" + b"\xff" * 50, "no frame"),
    "CMYK": (cmyk(), "8 bits, components"),
    "RGB by Adobe's marker": (with_segment(0xEE, ADOBE + b"\x00"), "not YCbCr (Adobe transform 0)"),
    "YCCK by Adobe's marker": (with_segment(0xEE, ADOBE + b"\x02"), "not YCbCr"),
    "RGB by its component names": (changed(PLAIN, FRAME + NAMES, FRAME + bytes([82, *NAMES[1:3], 71, *NAMES[4:6], 66, *NAMES[7:]])), "[82, 71, 66]"),
    "components from 0": (changed(PLAIN, FRAME + NAMES, FRAME + bytes([0, *NAMES[1:3], 1, *NAMES[4:6], 2, *NAMES[7:]])), "[0, 1, 2]"),
    "12 bits": (changed(PLAIN, FRAME, b"\x0c" + FRAME[1:]), "12 bits"),
    "two components": (changed(PLAIN, FRAME, FRAME[:5] + b"\x02"), "another length"),
    "lossless": (changed(PLAIN, b"\xff\xc0", b"\xff\xc3"), "a frame of type 0xc3"),
    "arithmetic": (changed(PLAIN, b"\xff\xc0", b"\xff\xc9"), "a frame of type 0xc9"),
    "hierarchical": (changed(PLAIN, b"\xff\xc0", b"\xff\xc5"), "a frame of type 0xc5"),
    "a scan before its frame": (changed(PLAIN, b"\xff\xc0", b"\xff\xda"), "no frame"),
    "an end before its frame": (changed(PLAIN, b"\xff\xc0", b"\xff\xd9"), "no frame"),
    "a segment of length 0": (b"\xff\xd8\xff\xe0\x00\x00" + PLAIN[2:], "no frame"),
    "a segment beyond the end": (b"\xff\xd8\xff\xe0\xff\xff" + bytes(100), "no frame"),
    "no scan": (PLAIN[: PLAIN.index(b"\xff\xda")], "0 scans"),
    "257 scans": (PLAIN + b"\xff\xda" * 256, "257 scans"),
    "a bomb": (changed(PLAIN, FRAME, struct.pack(">BHHB", 8, 65535, 65535, 3)), "65535x65535 pixels in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decoders_may_not_agree_on_is_refused(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ValueError, match=r".") as caught:
        read_header(data)
    assert reason in str(caught.value)


def test_the_size_has_to_be_paid_for_in_bytes() -> None:
    assert read_header(header_only(1, 512 * 60)[:60]).width == 512 * 60
    with pytest.raises(ValueError, match="30721x1 pixels in 60 bytes"):
        read_header(header_only(1, 512 * 60 + 1)[:60])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 31)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "quality": 1}])
@pytest.mark.parametrize("gray", [False, True])
def test_no_picture_of_one_colour_is_taken_for_a_bomb(colour: tuple[int, int, int], options: dict[str, object], gray: bool) -> None:
    pixels = np.full((2000, 3000, 3), colour, np.uint8)
    assert read_header(jpeg_file(pixels[..., 0].copy() if gray else pixels, **options)).width == 3000


def test_every_truncation_and_flipped_bit_is_a_header_or_a_value_error() -> None:
    end = PLAIN.index(b"\xff\xda") + 2
    for length in range(end):
        with pytest.raises(ValueError, match=r"."):
            read_header(PLAIN[:length])
    for bit in range(8 * end):
        data = bytearray(PLAIN)
        data[bit // 8] ^= 1 << bit % 8
        try:
            header = read_header(bytes(data))
        except ValueError:
            continue
        assert header.height * header.width <= 512 * len(data)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00\x11\x08", PLAIN[:20]]))
@example(b"", b"\xff\xd8\xff")
def test_random_bytes(data: bytes, start: bytes) -> None:
    try:
        header = read_header(start + data)
    except ValueError:
        return
    assert header.components in (1, 3)


def test_hostile_files_cost_no_more_than_their_length() -> None:
    started = time.monotonic()
    for data in (b"\xff\xd8" + b"\xff" * 10**6, b"\xff\xd8" + b"\xff\xe0\x00\x02" * 250_000, b"\xff\xd8" + bytes(10**6)):
        with pytest.raises(ValueError, match=r"."):
            read_header(data)
    assert time.monotonic() - started < 20
