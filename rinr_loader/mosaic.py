"""Random affine and mosaic: the geometry with which Ultralytics trains a detector, re-implemented from its behaviour.

An image is first resized so that its longer side fits. A mosaic puts four such images around a point of a canvas of twice the size.
Image or canvas is then scaled, moved and perhaps turned about its centre into the output, and mirrored. Matrices only: no pixel exists yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rinr_loader.geometry import Placements, Random, fit_long_side, flip, place_whole, real_dtype, scale_offset, warp

# A scale of 0 has no inverse; at this one an image is less than a pixel.
_SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class RandomAffine:
    """Resize to the longer side, then scale, translate, turn, shear and mirror at random: Ultralytics' augmentation without mosaic.

    Args:
        scale: Scale factors from 1 - scale to 1 + scale, or the smallest and the largest.
        translate: How far the centre moves, as a share of the output size.
        degrees: Largest angle of rotation.
        shear: Largest angle of shear, in degrees.
        perspective: Largest perspective, as a share of the scale for each pixel from the centre.
        horizontal: Probability of mirroring left to right.
        vertical: Probability of mirroring top to bottom.
        long_side: Pixels of the longer side of a single image before the affine; None takes the longer side of the output.
    """

    scale: float | tuple[float, float] = 0.5
    translate: float = 0.1
    degrees: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    horizontal: float = 0.5
    vertical: float = 0.0
    long_side: int | None = None

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place one sample in each output; see `Transform`."""
        single = torch.full((len(source_size), 4), -1, device=source_size.device)
        single[:, 0] = torch.arange(len(source_size), device=source_size.device)
        return mosaic_affine(source_size, single, self, size=size, random=random)


def mosaic_affine(source_size: Tensor, samples: Tensor, affine: RandomAffine, *, size: tuple[int, int], random: Random) -> Placements:
    """Place four samples in each output as a mosaic, or one where there are no partners, and move the whole at random.

    Args:
        source_size: Height and width of every sample read, partners included, shape `(S, 2)`.
        samples: For each output the rows of `source_size` that go top left, top right, bottom left and bottom right, int64, shape
            `(N, 4)`; a row of one sample and three -1 is a single image.
        affine: Ranges of the movement.
        size: Height and width of the output; square where there are mosaics.
        random: `random(count)` gives uniform numbers in [0, 1), shape `(N, count)`.

    Returns:
        Placements in the order of outputs, on the device of `source_size`. Box filters compare with the area before shear and perspective.

    Raises:
        ValueError: The output is not square, but there are mosaics.
    """
    device = source_size.device
    samples, centre, numbers, mirror = samples.to(device), random(2).to(device), random(8).to(device), random(2).to(device)
    single = samples[:, 1] < 0
    if size[0] != size[1] and not bool(single.all()):
        raise ValueError(f"size: expected a square for a mosaic, got {size[0]}x{size[1]}; turn mosaic off for this batch")
    first_size = source_size[samples[:, 0]]
    fitted = fit_long_side(first_size, affine.long_side or max(size))
    alone = _place_fitted(first_size, fitted, torch.zeros_like(fitted), order=samples[:, 0])
    four = mosaic(source_size, samples.clamp(min=0), centre, size=size[0])
    placements = Placements.concatenate([alone, four]).select(torch.cat([single, ~single[four.output]]))
    placements = placements.select(placements.output.argsort(stable=True))
    canvas = torch.where(single[:, None], fitted, 2 * size[0])
    forward, area = affine_matrix(affine, canvas, numbers, size=size)
    placements = warp(placements, forward, area=area)
    return flip(placements, size=size, horizontal=mirror[:, 0] < affine.horizontal, vertical=mirror[:, 1] < affine.vertical)


def mosaic(source_size: Tensor, samples: Tensor, centre: Tensor, *, size: int) -> Placements:
    """Place four samples around a random point of a canvas of twice the size.

    Args:
        source_size: Height and width of every sample, shape `(S, 2)`.
        samples: Rows of `source_size` that go top left, top right, bottom left and bottom right, int64, shape `(N, 4)`.
        centre: Uniform numbers in [0, 1) that choose the y and the x of the point, shape `(N, 2)`.
        size: Longer side of each sample, and half the side of the canvas, in pixels.

    Returns:
        Four placements for each output, in the order of `samples`, in the canvas of `2 * size`; clips are what the canvas shows.
    """
    count, flat = len(samples), samples.flatten()
    fitted = fit_long_side(source_size[flat], size)  # [4N, 2]
    margin = (size + 1) // 2
    point = (margin + (2 * size - 2 * margin) * centre.to(real_dtype(centre.device))).floor().to(torch.int64)  # [N, 2] y, x
    before = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]], device=flat.device).repeat(count, 1)  # which quadrants end at the point
    corner = point.repeat_interleave(4, dim=0) - before * fitted  # [4N, 2] y, x of each sample's top left corner in the canvas
    placements = _place_fitted(source_size[flat], fitted, corner, order=flat, canvas=2 * size)
    output = torch.arange(count, device=flat.device).repeat_interleave(4)
    return Placements(output=output, sample=placements.sample, matrix=placements.matrix, clip=placements.clip)


def _place_fitted(source_size: Tensor, fitted: Tensor, corner: Tensor, *, order: Tensor, canvas: int | None = None) -> Placements:
    """Place samples at a resized height and width, with their top left corner (y, x) in outputs of their own, cut at the canvas."""
    real = real_dtype(source_size.device)
    gain = fitted.flip(1).to(real) / source_size.flip(1).to(real)
    placed = place_whole(source_size, scale_offset(gain, corner.flip(1).to(real)))
    clip = placed.clip
    if canvas is not None:
        low = (-corner).clamp(min=0).flip(1) / gain
        high = torch.minimum(fitted, canvas - corner).flip(1) / gain
        clip = torch.cat([low, high], dim=1).to(torch.float32)
    return Placements(output=placed.output, sample=order, matrix=placed.matrix, clip=clip)


def affine_matrix(affine: RandomAffine, canvas: Tensor, numbers: Tensor, *, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Matrices that uniform numbers choose within the ranges of `affine`; mirroring is not among them.

    Args:
        affine: The ranges.
        canvas: Height and width of the images to move, shape `(N, 2)`.
        numbers: Uniform numbers in [0, 1) for perspective x and y, angle, scale, shear x and y, translation x and y, shape `(N, 8)`.
        size: Height and width of the output.

    Returns:
        From canvas to output coordinates, `(N, 3, 3)`, and the square of the scale, `(N,)`, both float64.
    """
    device, real = numbers.device, real_dtype(numbers.device)
    signed = 2 * numbers.to(real) - 1
    low, high = affine.scale if isinstance(affine.scale, tuple) else (1 - affine.scale, 1 + affine.scale)
    scale = (low + (high - low) * numbers[:, 3].to(real)).clamp(min=_SMALLEST_SCALE)
    angle = signed[:, 2] * math.radians(affine.degrees)
    shear = (signed[:, 4:6] * math.radians(affine.shear)).tan()
    identity = torch.eye(3, dtype=real, device=device).repeat(len(numbers), 1, 1)

    to_centre = scale_offset(torch.ones_like(shear), -canvas.flip(1).to(real) / 2)
    perspective = identity.clone()
    perspective[:, 2, :2] = signed[:, :2] * affine.perspective
    turn = identity.clone()
    turn[:, 0, 0] = turn[:, 1, 1] = scale * angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = scale * angle.sin(), -scale * angle.sin()
    slant = identity.clone()
    slant[:, 0, 1], slant[:, 1, 0] = shear[:, 0], shear[:, 1]
    share = 0.5 + signed[:, 6:8] * affine.translate
    to_place = scale_offset(torch.ones_like(shear), share * torch.tensor([size[1], size[0]], dtype=real, device=device))
    return to_place @ slant @ turn @ perspective @ to_centre, scale.square()
