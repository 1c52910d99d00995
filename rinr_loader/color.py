"""Batched colour operations on images `(N, 3, H, W)`, RGB: uint8 in [0, 255] or floats in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Pixels handled at a time: about nine float32 planes of this size stand in memory. The small one stays in a CPU's cache.
_PIXELS_CPU = 1 << 16
_PIXELS_DEVICE = 1 << 24

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def hsv_gains(numbers: Tensor, *, hue: float, saturation: float, value: float) -> Tensor:
    """Turn uniform numbers in [0, 1), shape `(N, 3)`, into the gains that `adjust_hsv` takes, each within plus or minus its range."""
    return (2 * numbers - 1) * torch.tensor([hue, saturation, value], dtype=numbers.dtype, device=numbers.device)


def adjust_hsv(images: Tensor, gains: Tensor) -> Tensor:
    """Turn the hue and scale saturation and value of each image, with the meaning of Ultralytics' RandomHSV.

    uint8 images go through OpenCV's 8-bit steps (hue in 180, saturation in 255, the result rounded down) and end within 2 levels of
    it. Floats are computed without steps, so up to one step of OpenCV's hue (about 10 levels) apart.

    Args:
        images: RGB, shape `(N, 3, H, W)`, uint8 in [0, 255] or floats in [0, 1].
        gains: For each image the turn of the hue as a share of the circle, and the relative changes of saturation and value, shape
            `(N, 3)`; zeros leave an image as it is, but for the 8-bit steps.

    Returns:
        New images of the same shape, type and device.

    Raises:
        TypeError: The images are neither uint8 nor floating point.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}; convert them first")
    adjusted = torch.empty_like(images)
    pixels = images.shape[2] * images.shape[3]
    step = max(1, (_PIXELS_CPU if images.device.type == "cpu" else _PIXELS_DEVICE) // max(pixels, 1))
    gains = gains.to(images.device, torch.float32)
    for part, gain, out in zip(images.split(step), gains.split(step), adjusted.split(step), strict=True):
        _adjust_part(part, gain, out)
    return adjusted


def _adjust_part(images: Tensor, gains: Tensor, out: Tensor) -> None:
    stepped = images.dtype == torch.uint8
    turn, saturation_gain, value_gain = gains[:, :, None, None].unbind(1)  # [N, 1, 1]
    rgb = images.to(torch.float32)
    if not stepped:
        rgb = rgb * 255
    red, green, blue = rgb.unbind(1)  # [N, H, W]
    value, least = rgb.amax(1), rgb.amin(1)
    range_ = value - least
    sector = torch.where(value == green, blue - red + 2 * range_, red - green + 4 * range_)
    sector = torch.where(value == red, green - blue, sector)
    # A grey pixel gets hue and saturation 0: every numerator is 0 there.
    if stepped:
        hue = _ratio_in_steps(sector, range_, 30)
        saturation = _ratio_in_steps(range_, value, 255)
        turn_steps = (180 * turn).floor()
    else:
        hue = sector / range_.clamp(min=1e-6) * 30
        saturation = range_ / value.clamp(min=1e-6) * 255
        turn_steps = 180 * turn
    hue = (hue + turn_steps) / 30  # in sixths of the circle
    saturation = (saturation * (1 + saturation_gain)).clamp_(0, 255)
    value = (value * (1 + value_gain)).clamp_(0, 255)
    chroma = value * saturation / 255
    for channel, phase in enumerate((5, 3, 1)):
        k = (hue + phase).remainder_(6)
        level = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
        out[:, channel] = level if stepped else level / 255  # to uint8 rounds down, as OpenCV does on the way back


def _ratio_in_steps(numerator: Tensor, denominator: Tensor, steps: int) -> Tensor:
    """Return the integers nearest to numerator / denominator * steps, by OpenCV's table of reciprocals in 1/4096; exact in float32."""
    reciprocal = ((steps << 12) / denominator.clamp(min=1)).round_()
    return (numerator * reciprocal).add_(2048).mul_(1 / 4096).floor_()


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Subtract a mean and divide by a standard deviation, both for images scaled to [0, 1].

    Args:
        images: Shape `(N, C, H, W)`, uint8 in [0, 255] or floats in [0, 1].
        mean: One number for each channel.
        std: One number for each channel, not 0.
        dtype: Floating type of the result.

    Returns:
        Normalised images, `dtype`, same shape, device and memory format.
    """
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1) * unit
    factor = 1 / (torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1) * unit)
    return ((images.to(torch.float32) - shift) * factor).to(dtype)
