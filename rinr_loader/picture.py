"""What the encoder is given for one sample: stored pixels and their boxes; and points in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.quality import box_mask

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in stored pixels, exclusive at the end


@dataclass(frozen=True)
class Picture:
    """What is encoded into one bundle.

    Args:
        pixels: As stored, RGB, uint8, `(H, W, 3)`.
        source_size: Height and width of the original.
        boxes: Label boxes inside the original, float32 xyxy in its pixels, `(n, 4)`.
        classes, crowd: Of each box, int64 and bool, `(n,)`.
        label: Class id of the picture, or -1.
        source_hash: See `SourceImage`.
        blind: Encode without looking at the boxes, one step further up the ladder: for val and test.
        original: The JPEG file whose pixels these are, None where there is none.
    """

    pixels: NDArray[np.uint8]
    source_size: tuple[int, int]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    label: int = -1
    source_hash: bytes = bytes(4)
    blind: bool = False
    original: bytes | None = None

    @property
    def stored_boxes(self) -> NDArray[np.float64]:
        """The label boxes in stored pixels."""
        height, width = self.pixels.shape[:2]
        x, y = width / self.source_size[1], height / self.source_size[0]
        scaled: NDArray[np.float64] = self.boxes.astype(np.float64) * np.array([x, y, x, y])
        return scaled

    @property
    def object_mask(self) -> NDArray[np.bool_]:
        """The union of the label boxes in stored pixels; crowds do not count."""
        return box_mask(self.stored_boxes[~self.crowd], *self.pixels.shape[:2])


def pixel_centres(rect: Rect, device: torch.device) -> Tensor:
    """Centres of a rectangle's pixels, float32 `(2, N)` of x and y, row by row."""
    x0, y0, x1, y1 = rect
    y, x = torch.meshgrid(torch.arange(y0, y1, device=device) + 0.5, torch.arange(x0, x1, device=device) + 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


def normalised(points: Tensor, rect: Rect) -> Tensor:
    """Points as a network of this rectangle sees them: -1 to 1 from edge to edge."""
    low = torch.tensor(rect[:2], device=points.device)[:, None]
    extent = torch.tensor([rect[2] - rect[0], rect[3] - rect[1]], device=points.device)[:, None]
    return (points - low) / extent * 2 - 1
