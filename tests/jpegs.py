"""Bundles of the family `jpeg`, for tests: files written and read by Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from conftest import draw_scene
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.bundle import Bundle, JpegSpec, Network, pack

Pixels = NDArray[np.uint8]


def textured(seed: int, stored: tuple[int, int]) -> Pixels:
    """A scene with noise on it, uint8 `(H, W, 3)`: no two of its pixels are alike."""
    height, width = stored
    scene = draw_scene(seed, width=max(width, 24), height=max(height, 24), objects=2).image[:height, :width]
    noise = np.random.default_rng(seed).integers(-20, 21, scene.shape)
    return np.clip(scene + noise, 0, 255).astype(np.uint8)


def jpeg_file(pixels: Pixels, **options: object) -> bytes:
    """A JPEG file of pixels `(H, W, 3)`, or `(H, W)` for gray."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def read_jpeg(file: bytes) -> Pixels:
    """Its pixels, uint8 `(H, W, 3)`."""
    return np.array(Image.open(io.BytesIO(file)).convert("RGB"))


def jpeg_bundle(
    seed: int,
    *,
    stored: tuple[int, int] = (24, 40),
    source: tuple[int, int] | None = None,
    file: bytes | None = None,
    boxes: Sequence[Sequence[float]] = (),
    **options: object,
) -> bytes:
    """A bundle of a textured picture, or of a file; sizes are height and width."""
    data = jpeg_file(textured(seed, stored), **options) if file is None else file
    return pack(
        Bundle(
            stored_size=stored,
            source_size=source or stored,
            networks=(Network(JpegSpec(), (0, 0, stored[1], stored[0]), 1.0, data),),
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            classes=np.zeros(len(boxes), np.int64),
            crowd=np.zeros(len(boxes), np.bool_),
        )
    )
