"""Sheets of pictures for people to look at: a grid of cells with captions, label boxes drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, BOX = (24, 24, 24), (235, 235, 235), (255, 196, 0)
CAPTION = 14  # pixels of a line of caption
GAP = 6


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet.

    Args:
        pixels: RGB, uint8, `(H, W, 3)`.
        caption: One line below it; cut where it does not fit.
        boxes: Drawn onto it, xyxy in its pixels, `(n, 4)`.
    """

    pixels: NDArray[np.uint8]
    caption: str = ""
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))


def draw_sheet(cells: Sequence[Cell], *, columns: int, width: int, height: int) -> Image.Image:
    """Draw pictures side by side, each fitted into a cell with its aspect kept.

    Args:
        cells: The pictures, row by row.
        columns: Cells in a row.
        width: Of the picture area of a cell, in pixels.
        height: The same.
    """
    rows = -(-len(cells) // columns)
    step = width + GAP, height + CAPTION + GAP
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for i, cell in enumerate(cells):
        left, top = GAP + i % columns * step[0], GAP + i // columns * step[1]
        picture = _fitted(cell, width, height)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        draw.text((left, top + height), _cut(cell.caption, width, draw, font), fill=INK, font=font)
    return sheet


def _fitted(cell: Cell, width: int, height: int) -> Image.Image:
    h, w = cell.pixels.shape[:2]
    ratio = min(width / w, height / h)
    # Enlarged pixels stay visible as what they are; reduced ones are averaged.
    method = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS
    picture = Image.fromarray(cell.pixels).resize((max(1, round(w * ratio)), max(1, round(h * ratio))), method)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in (cell.boxes.astype(np.float64) * ratio).tolist():
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=BOX)
    return picture


def _cut(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The beginning of a caption that fits; what the font cannot draw becomes a question mark."""
    text = text.encode("ascii", "replace").decode()
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text
