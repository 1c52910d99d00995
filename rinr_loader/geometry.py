"""Where samples land in output images: placements, their matrices, and the transforms that choose them.

Coordinates are continuous: pixel (row i, column j) covers [j, j+1) x [i, i+1), its centre is at +0.5. A matrix maps output
coordinates to coordinates of the source image at its original size. Matrices are computed in float64 and stored in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Random = Callable[[int], Tensor]


@dataclass(frozen=True)
class Placements:
    """Where samples land in output images.

    Args:
        output: Index of the output image, int64, shape `(M,)`. Placements of one output do not overlap.
        sample: Index of the sample in its batch or buffer, int64, shape `(M,)`.
        matrix: From output pixel coordinates to source pixel coordinates, float32, shape `(M, 3, 3)`. The last row is (0, 0, 1)
            unless the transform has perspective; then the result is divided by its third coordinate.
        clip: Source rectangle allowed to show, xyxy in source pixels, float32, shape `(M, 4)`.
        area_scale: Output area that a source pixel is meant to get, float32, shape `(M,)`: what a `BoxFilter` compares with. None
            where the matrix itself says so, which is everywhere but under shear and perspective.
    """

    output: Tensor
    sample: Tensor
    matrix: Tensor
    clip: Tensor
    area_scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.output)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Placements:
        """Return the same placements on another device."""
        return Placements(
            output=self.output.to(device, non_blocking=non_blocking),
            sample=self.sample.to(device, non_blocking=non_blocking),
            matrix=self.matrix.to(device, non_blocking=non_blocking),
            clip=self.clip.to(device, non_blocking=non_blocking),
            area_scale=None if self.area_scale is None else self.area_scale.to(device, non_blocking=non_blocking),
        )

    def select(self, index: Tensor) -> Placements:
        """Return the placements that a bool mask `(M,)` or an int64 index `(K,)` chooses, in its order."""
        return Placements(
            output=self.output[index],
            sample=self.sample[index],
            matrix=self.matrix[index],
            clip=self.clip[index],
            area_scale=None if self.area_scale is None else self.area_scale[index],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Placements]) -> Placements:
        """Join placements in the given order; output and sample indices stay as they are.

        Raises:
            ValueError: There are no parts.
        """
        if not parts:
            raise ValueError("placements: expected at least one part, got none")
        scaled = any(part.area_scale is not None for part in parts)
        return cls(
            output=torch.cat([part.output for part in parts]),
            sample=torch.cat([part.sample for part in parts]),
            matrix=torch.cat([part.matrix for part in parts]),
            clip=torch.cat([part.clip for part in parts]),
            area_scale=torch.cat([area_scale(part) for part in parts]) if scaled else None,
        )


class Transform(Protocol):
    """A function from the sizes of a batch's samples to where they land."""

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place the samples of a batch.

        Args:
            source_size: Original height and width of each sample, integers, shape `(N, 2)`.
            size: Height and width of the output images.
            random: `random(count)` gives uniform numbers in [0, 1), shape `(N, count)`, new ones at each call.

        Returns:
            Placements on the device of `source_size`; sample k is row k of `source_size`.
        """
        ...


def real_dtype(device: torch.device) -> torch.dtype:
    """The float type in which matrices are computed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def scale_offset(scale: Tensor, offset: Tensor) -> Tensor:
    """Return the matrices of `p * scale + offset`, shape `(N, 3, 3)`, from x and y of both, shape `(N, 2)`."""
    matrix = torch.diag_embed(torch.nn.functional.pad(scale, (0, 1), value=1.0))
    matrix[:, :2, 2] = offset
    return matrix


def invert(matrix: Tensor) -> Tensor:
    """Invert matrices of shape `(..., 3, 3)`, in the type of the input, without waiting for the device."""
    row_0, row_1, row_2 = matrix.unbind(-2)
    adjugate = torch.stack([torch.linalg.cross(row_1, row_2), torch.linalg.cross(row_2, row_0), torch.linalg.cross(row_0, row_1)], dim=-1)
    determinant = (row_0 * adjugate[..., 0]).sum(-1)
    return adjugate / determinant[..., None, None]


def area_scale(placements: Placements) -> Tensor:
    """Return the output area that a source pixel gets in each placement, float32, shape `(M,)`."""
    if placements.area_scale is not None:
        return placements.area_scale
    return 1 / _linear_determinant(placements.matrix)


def _linear_determinant(matrix: Tensor) -> Tensor:
    return (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs()


def warp(placements: Placements, forward: Tensor, *, area: Tensor | None = None) -> Placements:
    """Move whole output images: compose another matrix behind the placements' own.

    Args:
        placements: Placements in the images before the move.
        forward: From coordinates before to coordinates after the move, one matrix for each output image, shape `(N, 3, 3)`.
        area: Area that one square pixel is meant to get, shape `(N,)`; the default is the determinant of `forward`.

    Returns:
        The same samples and clips in the moved images.
    """
    matrix = placements.matrix.to(forward.dtype) @ invert(forward)[placements.output]
    moved = replace(placements, matrix=matrix.to(torch.float32))
    if area is None and placements.area_scale is None:
        return moved
    factor = (_linear_determinant(forward) if area is None else area)[placements.output]
    return replace(moved, area_scale=(area_scale(placements) * factor).to(torch.float32))


def flip(placements: Placements, *, size: tuple[int, int], horizontal: Tensor | None = None, vertical: Tensor | None = None) -> Placements:
    """Mirror output images.

    Args:
        placements: Placements in output images of `size`.
        size: Height and width of the output images.
        horizontal: Which outputs to mirror left to right, bool, shape `(N,)`; None mirrors none.
        vertical: Which outputs to mirror top to bottom, likewise.

    Returns:
        The same samples and clips in the mirrored images.
    """
    for axis, chosen, extent in ((0, horizontal, size[1]), (1, vertical, size[0])):
        if chosen is None:
            continue
        mirror = torch.eye(3, dtype=real_dtype(chosen.device), device=chosen.device).repeat(len(chosen), 1, 1)
        mirror[:, axis, axis] = torch.where(chosen, -1.0, 1.0).to(mirror.dtype)
        mirror[:, axis, 2] = torch.where(chosen, float(extent), 0.0).to(mirror.dtype)
        placements = warp(placements, mirror)
    return placements


def place_whole(source_size: Tensor, forward: Tensor) -> Placements:
    """Place each sample, uncropped, in an output image of its own.

    Args:
        source_size: Height and width of each sample, shape `(N, 2)`.
        forward: From source to output pixel coordinates, shape `(N, 3, 3)`.

    Returns:
        One placement for each sample, in order.
    """
    order = torch.arange(len(source_size), device=source_size.device)
    width_height = source_size.flip(1).to(torch.float32)
    clip = torch.cat([torch.zeros_like(width_height), width_height], dim=1)
    return Placements(output=order, sample=order, matrix=invert(forward).to(torch.float32), clip=clip)


def fit_long_side(source_size: Tensor, long_side: int) -> Tensor:
    """Sizes after a resize that makes the longer side `long_side`, rounded up as Ultralytics does when it loads an image.

    Args:
        source_size: Height and width, shape `(N, 2)`.
        long_side: Pixels of the longer side.

    Returns:
        Height and width, int64, shape `(N, 2)`.
    """
    real = source_size.to(real_dtype(source_size.device))
    ratio = long_side / real.amax(1, keepdim=True)
    resized = (real * ratio).ceil().clamp(max=long_side)
    return torch.where(ratio == 1, real, resized).to(torch.int64)


def letterbox_gain(
    source_size: Tensor, size: tuple[int, int], *, scaleup: bool = True, center: bool = True, long_side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and offset of a letterbox, with the rounding of Ultralytics' LetterBox.

    Args:
        source_size: Height and width, shape `(N, 2)`.
        size: Height and width of the output.
        scaleup: Whether small images are enlarged.
        center: Whether the padding is shared between both sides; otherwise it is right and below.
        long_side: Resize to this longer side first (`fit_long_side`), as the Ultralytics dataset does.

    Returns:
        Gain `(N, 2)` and offset `(N, 2)`, both x then y, float64: output = source * gain + offset. A side that the ratio would
        make shorter than half a pixel keeps one pixel.
    """
    source = source_size.to(real_dtype(source_size.device)).flip(1)  # [N, 2] width, height
    loaded = source if long_side is None else fit_long_side(source_size, long_side).to(source.dtype).flip(1)
    target = torch.tensor([size[1], size[0]], dtype=source.dtype, device=source.device)
    ratio = (target / loaded).amin(1, keepdim=True)
    if not scaleup:
        ratio = ratio.clamp(max=1.0)
    shown = (loaded * ratio).round()
    # Boxes follow the ratio, not the rounded size: this keeps them exactly Ultralytics', and the pixels agree with the boxes.
    gain = torch.where(shown < 1, 1 / loaded, ratio) * (loaded / source)
    offset = ((target - shown.clamp(min=1)) / 2 - 0.1).round() if center else torch.zeros_like(source)
    return gain, offset


@dataclass(frozen=True)
class Resize:
    """Stretch every image to the output size, whatever its aspect ratio."""

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place one sample in each output; see `Transform`."""
        source = source_size.to(real_dtype(source_size.device)).flip(1)
        target = torch.tensor([size[1], size[0]], dtype=source.dtype, device=source.device)
        return place_whole(source_size, scale_offset(target / source, torch.zeros_like(source)))


@dataclass(frozen=True)
class Letterbox:
    """Fit the whole image inside the output, keep its aspect ratio, and leave the rest to the fill colour.

    Args:
        scaleup: Whether small images are enlarged.
        center: Whether the padding is shared between both sides; otherwise it is right and below.
        long_side: Resize to this longer side first, as the Ultralytics dataset does before its LetterBox.
    """

    scaleup: bool = True
    center: bool = True
    long_side: int | None = None

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place one sample in each output; see `Transform`."""
        gain, offset = letterbox_gain(source_size, size, scaleup=self.scaleup, center=self.center, long_side=self.long_side)
        return place_whole(source_size, scale_offset(gain, offset))


@dataclass(frozen=True)
class Flip:
    """Mirror the outputs of another transform at random.

    Args:
        transform: What places the samples.
        horizontal: Probability of mirroring left to right.
        vertical: Probability of mirroring top to bottom.
    """

    transform: Transform
    horizontal: float = 0.5
    vertical: float = 0.0

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place as `transform` does, then mirror; see `Transform`."""
        placements = self.transform(source_size, size=size, random=random)
        numbers = random(2).to(source_size.device)
        return flip(placements, size=size, horizontal=numbers[:, 0] < self.horizontal, vertical=numbers[:, 1] < self.vertical)
