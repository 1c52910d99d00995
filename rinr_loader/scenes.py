"""The demo's pictures: textured shapes drawn over crops of the photographs that installed packages ship."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rinr_loader.errors import ConfigError

NAMES = ("disc", "block", "wedge")
SUPERSAMPLED = 3  # shapes are drawn this many times larger, so that their edges are smooth

# Photographs by the package that ships them. Those of `val` come first: there is always one, and never the same as in `train`.
PHOTOGRAPHS = (
    ("ultralytics", "assets/zidane.jpg"),
    ("ultralytics", "assets/bus.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


@dataclass(frozen=True)
class DrawnScene:
    """A picture and what is on it.

    Args:
        pixels: RGB, uint8, `(H, W, 3)`.
        boxes: Xyxy in pixels, tight around each shape, float32, `(n, 4)`.
        classes: Of each shape, int64, `(n,)`; see `NAMES`.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


def find_photographs() -> list[Path]:
    """Photographs inside installed packages, none of which is imported.

    Raises:
        ConfigError: There are fewer than two, one for each split.
    """
    found = []
    for package, name in PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations or []) if spec else []
        found += [Path(folder) / name for folder in folders if (Path(folder) / name).is_file()]
    if len(found) < 2:
        wanted = ", ".join(sorted({package for package, _ in PHOTOGRAPHS}))
        raise ConfigError(
            f"demo: expected at least two photographs in the packages {wanted}, got {len(found)}; pip install 'rinr-loader[ultralytics]'"
        )
    return found


def draw_scenes(photographs: list[Path], count: int, *, width: int, height: int, seed: int) -> Iterator[DrawnScene]:
    """Draw scenes over crops of photographs, taking these in turn; the same arguments give the same scenes.

    Args:
        photographs: What to take crops of.
        count: How many scenes.
        width, height: In pixels.
        seed: Of everything that is drawn.
    """
    opened = [np.asarray(Image.open(path).convert("RGB")) for path in photographs]
    for k in range(count):
        random = np.random.default_rng([seed, k])
        yield _draw(opened[k % len(opened)], random, width, height)


def _draw(photograph: NDArray[np.uint8], random: np.random.Generator, width: int, height: int) -> DrawnScene:
    canvas = _crop(photograph, random, width, height).astype(np.float64)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    wanted = int(random.integers(1, 4))
    for _ in range(20 * wanted):
        if len(boxes) == wanted:
            break
        w, h = (int(random.integers(height // 6, height // 2)) for _ in range(2))
        left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
        if any(left < x1 + 2 and x0 < left + w + 2 and top < y1 + 2 and y0 < top + h + 2 for x0, y0, x1, y1 in boxes):
            continue
        kind = int(random.integers(0, len(NAMES)))
        mask = _mask(kind, w, h)[..., None]
        part = canvas[top : top + h, left : left + w]
        part[:] = part * (1 - mask) + _texture(random, kind, w, h) * mask
        boxes.append((left, top, left + w, top + h))
        classes.append(kind)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return DrawnScene(pixels, np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int64))


def _crop(photograph: NDArray[np.uint8], random: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """A random part of a photograph, two to three times the size of a scene and reduced to it: that removes its JPEG history."""
    full_height, full_width = photograph.shape[:2]
    scale = min(float(random.uniform(2, 3)), full_width / width, full_height / height)
    w, h = int(width * scale), int(height * scale)
    left, top = int(random.integers(0, full_width - w + 1)), int(random.integers(0, full_height - h + 1))
    part = Image.fromarray(photograph[top : top + h, left : left + w]).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(part)


def _mask(kind: int, width: int, height: int) -> NDArray[np.float64]:
    """Coverage of each pixel of a shape's box, 0 to 1."""
    w, h = width * SUPERSAMPLED, height * SUPERSAMPLED
    image = Image.new("L", (w, h))
    draw = ImageDraw.Draw(image)
    if kind == 0:
        draw.ellipse((0, 0, w - 1, h - 1), fill=255)
    elif kind == 1:
        draw.rectangle((0, 0, w - 1, h - 1), fill=255)
    else:
        draw.polygon([(0, h - 1), (w - 1, h - 1), (w // 2, 0)], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255.0


def _texture(random: np.random.Generator, kind: int, width: int, height: int) -> NDArray[np.float64]:
    """Stripes, checks or rings in two shades of a colour that goes with the class, with some grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    period = float(random.uniform(4, 9))
    pattern = (np.hypot(x - width / 2, y - height / 2), np.maximum(np.abs(x - width / 2), np.abs(y - height / 2)), x + y)[kind]
    colour = np.array(((225, 70, 50), (60, 120, 225), (235, 190, 45))[kind]) + random.uniform(-25, 25, 3)
    shade = 0.8 + 0.2 * np.sin(2 * np.pi * pattern / period)
    grain = random.normal(0, 3, (height, width, 3))
    texture: NDArray[np.float64] = shade[..., None] * colour + grain
    return texture
