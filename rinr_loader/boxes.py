"""What placements do to label boxes: transform, clip, filter. Boxes are float32 xyxy, shape `(M, 4)`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rinr_loader.geometry import Placements, area_scale, invert, real_dtype


@dataclass(frozen=True)
class BoxFilter:
    """Which boxes survive a transform. All comparisons are strict, so the default drops what has no area left.

    Args:
        min_side: Width and height in output pixels that a box must exceed.
        max_aspect: Ratio of the longer to the shorter side that a box must stay below.
        min_area: Share of its own area, at the scale of the transform, that a box must still show more than.
    """

    min_side: float = 0.0
    max_aspect: float = math.inf
    min_area: float = 0.0


ULTRALYTICS_FILTER = BoxFilter(min_side=2.0, max_aspect=100.0, min_area=0.1)


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Bounds of the transformed corners of boxes.

    Args:
        boxes: Boxes in source pixels, shape `(M, 4)`.
        matrix: From output to source coordinates, one for each box, shape `(M, 3, 3)`: as in `Placements`, so its inverse is applied.

    Returns:
        Boxes in output pixels, neither clipped nor filtered.
    """
    real = real_dtype(boxes.device)
    corners = torch.ones((len(boxes), 4, 3), dtype=real, device=boxes.device)
    corners[..., 0] = boxes[:, [0, 2, 0, 2]].to(real)
    corners[..., 1] = boxes[:, [1, 1, 3, 3]].to(real)
    moved = corners @ invert(matrix.to(real)).transpose(1, 2)  # [M, 4, 3]
    points = moved[..., :2] / moved[..., 2:]
    return torch.cat([points.amin(1), points.amax(1)], dim=1).to(torch.float32)


def clip_boxes(boxes: Tensor, rectangle: Tensor) -> Tensor:
    """Cut boxes at a rectangle: xyxy, shape `(4,)` or one for each box, `(M, 4)`. A box outside collapses onto the border."""
    low, high = rectangle[..., :2], rectangle[..., 2:]
    corners = torch.minimum(torch.maximum(boxes.unflatten(1, (2, 2)), low.unsqueeze(-2)), high.unsqueeze(-2))
    return corners.flatten(1)


def keep_boxes(before: Tensor, after: Tensor, *, scale: Tensor | float = 1.0, box_filter: BoxFilter = BoxFilter()) -> Tensor:
    """Tell which transformed boxes are still worth a label.

    Args:
        before: Boxes in source pixels, shape `(M, 4)`.
        after: The same boxes in output pixels, after clipping.
        scale: Output area that a source pixel gets, one for all boxes or shape `(M,)`.
        box_filter: What a box must have.

    Returns:
        Bool, shape `(M,)`. Boxes with NaN, and boxes without area before or after, are never kept.
    """
    area = (before[:, 2:] - before[:, :2]).prod(1) * scale
    side = after[:, 2:] - after[:, :2]
    shorter, longer = side.amin(1), side.amax(1)
    kept: Tensor = (shorter > box_filter.min_side) & (longer < shorter * box_filter.max_aspect)
    return kept & (area > 0) & (shorter * longer > box_filter.min_area * area)


def place_objects(
    placements: Placements, box: Tensor, object_start: Tensor, *, size: tuple[int, int], box_filter: BoxFilter = BoxFilter()
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry every object of every placed sample into its output image.

    Args:
        placements: Where samples land; on the device of the columns.
        box: Boxes of all objects in source pixels, float32, shape `(O, 4)`.
        object_start: The objects of sample k are `object_start[k]` to `object_start[k + 1]`, int64, shape `(S + 1,)`.
        size: Height and width of the output.
        box_filter: What a box must have to be kept.

    Returns:
        Boxes in output pixels, float32 `(M, 4)`, cut at the placement's clip and at the output; their rows in `box`, int64 `(M,)`; the
        output image of each, int64 `(M,)`. In the order of outputs, then of placements, then of objects.
    """
    order = placements.output.argsort(stable=True)
    first = object_start[placements.sample[order]]
    count = object_start[placements.sample[order] + 1] - first
    placement = order.repeat_interleave(count)
    skipped = first - (count.cumsum(0) - count)  # what to add to a running number to get an object's row
    objects = torch.arange(len(placement), device=box.device) + skipped.repeat_interleave(count)

    before = clip_boxes(box[objects], placements.clip[placement])
    border = torch.tensor([0.0, 0.0, size[1], size[0]], dtype=box.dtype, device=box.device)
    after = clip_boxes(transform_boxes(before, placements.matrix[placement]), border)
    kept = keep_boxes(before, after, scale=area_scale(placements)[placement], box_filter=box_filter)
    return after[kept], objects[kept], placements.output[placement][kept]


def place_boxes(
    placements: Placements, box: Tensor, class_id: Tensor, object_start: Tensor, *, size: tuple[int, int], box_filter: BoxFilter = BoxFilter()
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes `(M, 4)`, classes `(M,)` and batch index `(M,)` of a batch's targets; see `place_objects` for the rest."""
    boxes, objects, batch_index = place_objects(placements, box, object_start, size=size, box_filter=box_filter)
    return boxes, class_id[objects], batch_index
