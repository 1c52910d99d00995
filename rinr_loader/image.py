"""Reading a source picture: any mode, any orientation, to upright RGB."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rinr_loader.errors import ConvertError
from rinr_loader.jpeg_header import read_header
from rinr_loader.source import ByteRange

MAX_SIDE = 65535  # what a bundle can state


@dataclass(frozen=True)
class SourceImage:
    """A picture as read.

    Args:
        pixels: Upright RGB, uint8, `(H, W, 3)`.
        source_bytes: Size of the file.
        source_hash: First 4 bytes of its SHA-256.
        jpeg: The file, where it is a JPEG that every decoder turns into these pixels; None elsewhere.
    """

    pixels: NDArray[np.uint8]
    source_bytes: int
    source_hash: bytes
    jpeg: bytes | None = None


def read_bytes(image: Path | bytes | ByteRange) -> bytes:
    """The encoded bytes of a picture.

    Raises:
        ConvertError: The file cannot be read.
    """
    try:
        if isinstance(image, ByteRange):
            with image.path.open("rb") as file:
                file.seek(image.offset)
                return file.read(image.size)
        return image.read_bytes() if isinstance(image, Path) else image
    except OSError as error:
        raise ConvertError(f"cannot be read: {error.strerror or error}") from None


def hash_of(data: bytes) -> bytes:
    """What a bundle remembers of its source file, so that a change is noticed: 4 bytes."""
    return hashlib.sha256(data).digest()[:4]


def read_image(image: Path | bytes | ByteRange) -> SourceImage:
    """Read a picture: EXIF orientation applied; grayscale, CMYK, 16-bit, palette and alpha made RGB.

    Grayscale is repeated, CMYK and palettes are converted as Pillow documents it, 16 bits are scaled to 8, alpha is dropped.

    Raises:
        ConvertError: It is missing, not a picture, cut off or damaged. The message is the reason alone.
    """
    data = read_bytes(image)
    try:
        with _open(io.BytesIO(data)) as opened:
            opened.load()
            upright = opened.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)
            kept = upright and opened.format == "JPEG" and opened.mode in ("L", "RGB") and _is_plain(data)
            pixels = _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise ConvertError("not a picture that Pillow can identify") from None
    except Image.DecompressionBombError as error:
        raise ConvertError(f"too large: {error}") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files: OSError, SyntaxError, struct.error, ...
        raise ConvertError(f"damaged: {type(error).__name__}: {error}") from None
    height, width = pixels.shape[:2]
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ConvertError(f"expected 1 to {MAX_SIDE} pixels a side, got {width}x{height}")
    return SourceImage(pixels, len(data), hash_of(data), data if kept else None)


def _is_plain(file: bytes) -> bool:
    """Whether a bundle may hold this JPEG."""
    try:
        read_header(file)
    except ValueError:
        return False
    return True


def _open(file: io.BytesIO) -> Image.Image:
    """Pillow's own `Image.open`.

    Ultralytics, once imported, puts a function in its place that installs a package with pip when it meets a file that is no picture.
    """
    opener = Image.open
    if opener.__module__ != "PIL.Image":
        opener = getattr(opener, "__globals__", {}).get("_image_open", opener)
    return opener(file)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow would clip these at 255: scale 16 bits to 8, as its documentation advises. Modes I and F do not tell their range.
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        gray = np.clip(np.round(values / 257 if wide else values), 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, 2)
    return np.array(image.convert("RGB"))


def fit_inside(pixels: NDArray[np.uint8], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Shrink a picture to fit inside a width and height, keeping its aspect; never enlarge it.

    Args:
        pixels: RGB, uint8, `(H, W, 3)`.
        size: Width and height in pixels; None keeps the picture as it is.
    """
    height, width = pixels.shape[:2]
    if size is None or (width <= size[0] and height <= size[1]):
        return pixels
    ratio = min(size[0] / width, size[1] / height)
    smaller = max(1, round(width * ratio)), max(1, round(height * ratio))
    return np.array(Image.fromarray(pixels).resize(smaller, Image.Resampling.LANCZOS))
