"""Placements in stored pixels: which output pixels they can reach, and how much of the picture each of those stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rinr_loader.geometry import Placements
from rinr_loader.reader import ShardBuffer

MAX_SAMPLES = 8  # points along one side of an output pixel, at most


@dataclass(frozen=True)
class View:
    """Placements in stored pixels: what evaluation needs of them."""

    output: Tensor
    sample: Tensor
    matrix: Tensor  # [M, 3, 3] output pixels -> stored pixels
    clip: Tensor  # [M, 4] stored pixels


@dataclass(frozen=True)
class Jobs:
    """Networks seen through placements. All columns have one row a job."""

    network: Tensor  # row of the buffer's network columns
    placement: Tensor
    box: Tensor  # output pixels x0, y0, x1, y1 that the network can reach, int64
    samples: Tensor  # points along one side of an output pixel

    def __getitem__(self, rows: Tensor) -> Jobs:
        return Jobs(self.network[rows], self.placement[rows], self.box[rows], self.samples[rows])


def stored_view(buffer: ShardBuffer, placements: Placements) -> View:
    """Placements, all on the buffer's device, in stored pixels."""
    sample = placements.sample
    scale = (buffer.stored_size[sample].double() / buffer.source_size[sample].double()).flip(1)  # [M, 2] x, y
    matrix = placements.matrix.double().clone()
    matrix[:, :2] *= scale[:, :, None]
    return View(placements.output, sample, matrix.float(), (placements.clip.double() * scale.repeat(1, 2)).float())


def scales(view: View) -> Tensor:
    """Stored pixels per output pixel along both output axes, `(M, 2)`, in the middle of what each placement may show: exact for affine matrices."""
    matrix, middle = view.matrix.double(), (view.clip[:, :2] + view.clip[:, 2:]).double() / 2
    there = torch.linalg.inv(matrix)[:, 2:] @ torch.nn.functional.pad(middle, (0, 1), value=1.0)[:, :, None]  # [M, 1, 1] 1 / third coordinate
    slope = (matrix[:, :2, :2] - middle[:, :, None] * matrix[:, 2:, :2]) * there
    found: Tensor = slope.square().sum(1).sqrt()
    return found


def points_a_side(scale: Tensor) -> Tensor:
    """Sample points along one side of an output pixel for so many pixels per output pixel, int64."""
    return (scale - 1e-3).ceil().clamp(1, MAX_SAMPLES).long()


def reach(buffer: ShardBuffer, view: View, jobs: Jobs, size: tuple[int, int]) -> Jobs:
    """Give each job the box of output pixels that it can reach; leave out those that reach none."""
    clip, rect, matrix = view.clip[jobs.placement], buffer.rect[jobs.network], view.matrix[jobs.placement]
    seen = torch.cat([torch.maximum(clip[:, :2], rect[:, :2]), torch.minimum(clip[:, 2:], rect[:, 2:])], 1)
    corners = seen[:, [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(1, (4, 2))  # [J, 4, 2]
    corners = torch.cat([corners, torch.ones_like(corners[..., :1])], 2).double() @ torch.linalg.inv(matrix.double()).transpose(1, 2)
    depth = corners[..., 2:]
    corners = corners[..., :2] / depth
    # One pixel more on each side: with several points a pixel, one can fall in although the centre does not.
    limit = torch.tensor([size[1], size[0]], device=clip.device)
    low = (corners.amin(1).floor() - 1).clamp(min=0).minimum(limit).long()
    high = (corners.amax(1).ceil() + 1).clamp(min=0).minimum(limit).long()
    # Perspective may carry a part of the rectangle beyond the horizon: then its corners do not tell where it is.
    split = (depth.amin(1) <= 0) & (depth.amax(1) >= 0)  # [J, 1]
    low, high = torch.where(split, 0, low), torch.where(split, limit, high)
    some = (seen[:, 2:] > seen[:, :2]).all(1) & (high > low).all(1)
    return Jobs(jobs.network, jobs.placement, torch.cat([low, high], 1), jobs.samples)[some]


def map_points(matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Map points: matrix (K, 3, 3), x and y (K, P), result (K, 2, P)."""
    mapped = matrix @ torch.stack([x, y, torch.ones_like(x)], 1)
    return mapped[:, :2] / mapped[:, 2:]


def inside(points: Tensor, rect: Tensor) -> Tensor:
    """Which points (K, 2, P) lie in rectangles x0 y0 x1 y1 (K, 4): bool (K, P)."""
    low, high = rect[:, :2, None], rect[:, 2:, None]
    return ((points >= low) & (points < high)).all(1)


def feather(points: Tensor, rect: Tensor, width: Tensor, stored_size: Tensor) -> Tensor:
    """Weight of a residual at points: 1 inside, 0 outside, a ramp of `width` pixels at each edge that is not the picture's own.

    Args:
        points: x and y in stored pixels, `(K, 2, P)`.
        rect: x0 y0 x1 y1 of each residual, `(K, 4)`.
        width: In stored pixels, `(K,)`; 0 for a hard edge.
        stored_size: Height and width of each picture, `(K, 2)`.

    Returns:
        Weights in [0, 1], `(K, P)`.
    """
    low, high = points - rect[:, :2, None], rect[:, 2:, None] - points  # [K, 2, P] distance to the edges
    ramp = width[:, None, None]
    hard = width[:, None, None] <= 0
    at_low, at_high = hard | (rect[:, :2, None] <= 0), hard | (rect[:, 2:, None] >= stored_size.flip(1)[:, :, None])
    low_weight = torch.where(at_low, (low >= 0).float(), (low / ramp).clamp(0, 1))
    high_weight = torch.where(at_high, (high > 0).float(), (high / ramp).clamp(0, 1))
    return torch.minimum(low_weight, high_weight).amin(1)
