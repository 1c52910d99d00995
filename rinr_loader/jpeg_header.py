"""What a JPEG says of itself before it is decoded. No imports, so that a bundle can be checked on any machine.

A decoder allocates what the header asks for, so the header is checked first: ITU-T T.81, annex B.
"""

from __future__ import annotations

from dataclasses import dataclass

SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers that begin a frame; those three are tables
# A progressive JPEG needs at least one bit for 64 pixels, a sequential one six for 256.
PIXELS_A_BYTE = 512
MAX_SCANS = 256  # each costs a pass over the picture; libjpeg writes ten


@dataclass(frozen=True)
class JpegHeader:
    """Size in pixels, and number of components: 1 for gray, 3 for YCbCr."""

    height: int
    width: int
    components: int


def read_header(data: bytes | memoryview) -> JpegHeader:
    """Read a JPEG's header, as far as every decoder agrees on what it means.

    Args:
        data: The file.

    Raises:
        ValueError: It is no JPEG of 8 bits, gray or YCbCr, coded with Huffman tables; or it is too short for the size that it states.
    """
    view = memoryview(data)
    if bytes(view[:2]) != b"\xff\xd8":
        raise ValueError("no start of an image")
    at, transform = 2, 1
    while True:
        if at >= len(view) or view[at] != 0xFF:
            raise ValueError(f"no marker at byte {at}")
        while at < len(view) and view[at] == 0xFF:  # any number of them may come before the code
            at += 1
        if at + 3 > len(view):
            raise ValueError("no frame")
        code, length = view[at], int.from_bytes(view[at + 1 : at + 3], "big")
        segment = view[at + 3 : at + 1 + length]
        if length < 2 or len(segment) != length - 2 or code in (0xD8, 0xD9, 0xDA):
            raise ValueError("no frame")
        if code == 0xEE and len(segment) >= 12 and bytes(segment[:5]) == b"Adobe":
            transform = segment[11]
        if code in FRAMES:
            header = _read_frame(code, segment)
            break
        at += 1 + length
    if header.components == 3 and transform != 1:
        raise ValueError(f"three components that are not YCbCr (Adobe transform {transform})")
    if header.height * header.width > PIXELS_A_BYTE * len(view):
        raise ValueError(f"{header.width}x{header.height} pixels in {len(view)} bytes")
    scans = bytes(view).count(b"\xff\xda")
    if not 1 <= scans <= MAX_SCANS:
        raise ValueError(f"{scans} scans")
    return header


def _read_frame(code: int, segment: memoryview) -> JpegHeader:
    if code not in (*SEQUENTIAL, PROGRESSIVE):
        raise ValueError(f"a frame of type {code:#x}")
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        raise ValueError("a frame of another length than its components")
    bits, components = segment[0], segment[5]
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    names = bytes(segment[6::3])
    if bits != 8 or components not in (1, 3) or (components == 3 and names != b"\x01\x02\x03"):
        raise ValueError(f"{bits} bits, components {list(names)}")
    return JpegHeader(height, width, components)
