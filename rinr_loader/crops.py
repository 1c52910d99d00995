"""The crops of image classification, with torchvision's rounding and distribution: centre crop, random resized crop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rinr_loader.geometry import Placements, Random, flip, place_whole, real_dtype, scale_offset

_TRIES = 10


@dataclass(frozen=True)
class CenterCrop:
    """Resize the shorter side, then cut the output out of the middle, with torchvision's rounding; the usual evaluation of classifiers.

    Args:
        resize: Pixels of the shorter side after the resize; None leaves the size as it is.
    """

    resize: int | None = None

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place one sample in each output; see `Transform`."""
        source = source_size.to(real_dtype(source_size.device)).flip(1)  # [N, 2] width, height
        resized = source if self.resize is None else (self.resize * source / source.amin(1, keepdim=True)).floor()
        target = torch.tensor([size[1], size[0]], dtype=source.dtype, device=source.device)
        surplus = resized - target
        offset = torch.where(surplus >= 0, -(surplus / 2).round(), (-surplus / 2).floor())
        return place_whole(source_size, scale_offset(resized / source, offset))


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a random rectangle and stretch it over the output, with the distribution of torchvision's `v2.RandomResizedCrop`.

    Args:
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height of the rectangle.
        flip: Probability of a horizontal mirror image.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, source_size: Tensor, *, size: tuple[int, int], random: Random) -> Placements:
        """Place one sample in each output; see `Transform`."""
        numbers = random(2 * _TRIES + 3).to(source_size.device)
        crop = self.crop(source_size, numbers)  # [N, 4] x, y, width, height
        target = torch.tensor([size[1], size[0]], dtype=crop.dtype, device=crop.device)
        gain = target / crop[:, 2:]
        placements = place_whole(source_size, scale_offset(gain, -crop[:, :2] * gain))
        return flip(placements, size=size, horizontal=numbers[:, -1] < self.flip)

    def crop(self, source_size: Tensor, numbers: Tensor) -> Tensor:
        """Return the rectangles x, y, width, height in source pixels, shape `(N, 4)`, that uniform numbers `(N, >= 22)` choose."""
        numbers = numbers.to(real_dtype(numbers.device))
        height, width = source_size.to(numbers.dtype)[:, :, None].unbind(1)  # [N, 1]
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * numbers[:, :_TRIES])  # [N, 10]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = (low + (high - low) * numbers[:, _TRIES : 2 * _TRIES]).exp()
        widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.to(torch.int64).argmax(1, keepdim=True)
        found = fits.any(1, keepdim=True)
        # When no try fits: the largest central rectangle within the range of ratios.
        largest_width = torch.minimum(width, (height * self.ratio[1]).round().clamp(min=1))
        largest_height = torch.minimum(height, (width / self.ratio[0]).round().clamp(min=1))
        crop_width = torch.where(found, widths.gather(1, first), largest_width)
        crop_height = torch.where(found, heights.gather(1, first), largest_height)
        pick_y, pick_x = numbers[:, 2 * _TRIES, None], numbers[:, 2 * _TRIES + 1, None]
        y = torch.where(found, pick_y * (height - crop_height + 1), (height - crop_height) / 2).floor()
        x = torch.where(found, pick_x * (width - crop_width + 1), (width - crop_width) / 2).floor()
        return torch.cat([x, y, crop_width, crop_height], dim=1)
