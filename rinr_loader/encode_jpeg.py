"""The family `jpeg`: pictures as JPEG files, their own where they are ones and nothing else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rinr_loader.bundle import ALIGNMENT, HEADER, NETWORK, OBJECT, JpegSpec, Network
from rinr_loader.codecs.jpeg import decode_files
from rinr_loader.errors import BundleError
from rinr_loader.measured import pack_measured
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.quality import Pixels, jpeg, psnr
from rinr_loader.targets import targets_of

QUALITY = 95  # without a target
HIGHEST = 100
# From this quality of a JPEG with halved colour on, one with full colour can be smaller at the same PSNR: photographs at 37 dB and more.
FULL_COLOUR_FROM = 75


def encode_unit(
    pictures: Sequence[Picture],
    settings: Settings,
    *,
    unit: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    on_background: Callable[[], None] | None = None,
    shared: Mapping[str, bytes] | None = None,
) -> list[bytes]:
    """Encode pictures; see `encode.encode_unit`. There is no randomness, and nothing that a GPU could do.

    A target that no JPEG reaches, or none within `settings.max_bytes`, gives the best one there is.
    """

    def encode(picture: Picture) -> bytes:
        bundle = jpeg_bundle(picture, jpeg_of(picture, settings))
        if on_background is not None:
            on_background()
        return bundle

    pool = ThreadPoolExecutor(threads or torch.get_num_threads())
    try:
        return list(pool.map(encode, pictures))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def jpeg_bundle(picture: Picture, file: bytes) -> bytes:
    """A picture as the JPEG that it is stored as."""
    height, width = picture.pixels.shape[:2]
    return pack_measured(picture, [Network(JpegSpec(), (0, 0, width, height), 1.0, file)], "cpu")


def jpeg_of(picture: Picture, settings: Settings) -> bytes:
    """The JPEG that a picture is stored as."""
    target, object_target = targets_of(picture, settings)
    most = limit_of(picture, settings.max_bytes)
    if target is None and object_target is None:
        chosen: bytes | None = own_file(picture) or _jpeg(picture.pixels, QUALITY)
        if chosen is not None and most is not None and len(chosen) > most:
            chosen = None
    else:
        chosen = reaching_jpeg(picture, target, object_target, settings.max_bytes)
    return best_jpeg(picture.pixels, most) if chosen is None else chosen


def reaching_jpeg(picture: Picture, target: float | None, object_target: float | None, max_bytes: int | None) -> bytes | None:
    """The smallest JPEG that reaches targets; the file that the picture was read from is exact, and reaches them all.

    Args:
        picture: What is encoded.
        target, object_target: PSNR in dB that the picture and its objects shall have, None for any.
        max_bytes: Of its bundle.

    Returns:
        The file; None where there is none within the limit.
    """
    found = smallest_jpeg(picture.pixels, target, picture.object_mask, object_target)
    most = limit_of(picture, max_bytes)
    files = [file for file in (found[0] if found else None, own_file(picture)) if file is not None and (most is None or len(file) <= most)]
    return min(files, key=len, default=None)


def limit_of(picture: Picture, max_bytes: int | None) -> int | None:
    """Bytes that a picture's JPEG may have in a bundle of at most `max_bytes`."""
    return None if max_bytes is None else max(0, max_bytes - overhead(len(picture.boxes)))


def overhead(objects: int) -> int:
    """Bytes of a bundle besides its JPEG."""
    tables = HEADER.size + objects * OBJECT.itemsize + NETWORK.itemsize
    return tables + -tables % ALIGNMENT


def own_file(picture: Picture) -> bytes | None:
    """The file that a picture was read from, where decoding it gives the picture's pixels exactly."""
    if not picture.original:
        return None
    try:
        same = np.array_equal(_decoded(picture.original, picture.pixels), picture.pixels)
    except BundleError:
        return None
    return picture.original if same else None


def smallest_jpeg(
    pixels: Pixels, target_psnr: float | None, mask: NDArray[np.bool_] | None = None, object_psnr: float | None = None
) -> tuple[bytes, float, float | None] | None:
    """The smallest JPEG that reaches targets: the lowest quality that does, with halved or with full colour.

    Args:
        pixels: RGB, uint8, `(H, W, 3)`.
        target_psnr: PSNR in dB that the picture shall have, None for any.
        mask: Its objects, bool, `(H, W)`.
        object_psnr: PSNR in dB that these shall have, None for any.

    Returns:
        The file, the picture's PSNR and that of its objects (None without any); None where the highest quality is not enough.
    """

    def tried(quality: int, full_colour: bool) -> _Tried:
        file = _jpeg(pixels, quality, full_colour)
        decoded = _decoded(file, pixels)
        objects = psnr(decoded, pixels, mask) if mask is not None and mask.any() else None
        return _Tried(quality, file, psnr(decoded, pixels), objects)

    def lowest(full_colour: bool) -> _Tried | None:
        low, high, best = 1, HIGHEST + 1, None
        while low < high:
            middle = (low + high) // 2
            one = tried(middle, full_colour)
            if one.reaches(target_psnr, object_psnr):
                high, best = middle, one
            else:
                low = middle + 1
        return best

    half = lowest(False)
    full = None if _is_gray(pixels) or (half is not None and half.quality < FULL_COLOUR_FROM) else lowest(True)
    found = min((one for one in (half, full) if one is not None), key=lambda one: len(one.file), default=None)
    return None if found is None else (found.file, found.psnr, found.object_psnr)


@dataclass(frozen=True)
class _Tried:
    """A JPEG of some quality, and what it gives in dB."""

    quality: int
    file: bytes
    psnr: float
    object_psnr: float | None

    def reaches(self, target: float | None, object_target: float | None) -> bool:
        enough = target is None or self.psnr >= target
        return enough and (object_target is None or self.object_psnr is None or self.object_psnr >= object_target)


def best_jpeg(pixels: Pixels, most: int | None) -> bytes:
    """The JPEG with the highest PSNR that takes at most so many bytes; the smallest one where none is small enough."""

    def highest(full_colour: bool) -> bytes | None:
        low, high, best = 0, HIGHEST, None
        while low < high:
            middle = (low + high + 1) // 2
            file = _jpeg(pixels, middle, full_colour)
            if most is None or len(file) <= most:
                low, best = middle, file
            else:
                high = middle - 1
        return best

    def candidates() -> Iterator[bytes]:
        yield from (file for file in (highest(False), highest(True)) if file is not None)

    return max(candidates(), key=lambda file: psnr(_decoded(file, pixels), pixels), default=_jpeg(pixels, 1))


def _jpeg(pixels: Pixels, quality: int, full_colour: bool = False) -> bytes:
    """A picture as an optimized JPEG, a gray one with one component."""
    return jpeg(np.ascontiguousarray(pixels[..., 0]) if _is_gray(pixels) else pixels, quality, full_colour=full_colour)


def _is_gray(pixels: Pixels) -> bool:
    return bool((pixels == pixels[..., :1]).all())


def _decoded(file: bytes, pixels: Pixels) -> Pixels:
    """What a reader on this machine's CPU will see."""
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    size = (pixels.shape[0], pixels.shape[1])
    decoded: Pixels = decode_files([data], [size], ["picture"], torch.device("cpu"))[0].permute(1, 2, 0).numpy()
    return decoded
