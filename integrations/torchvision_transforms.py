"""What a torchvision transform becomes: geometry for the decode, a dtype, a normalisation, and what is left for torchvision itself.

A transform is read from its beginning. Crops, resizes and flips become matrices, so that every pixel is decoded once, where it is needed;
conversions and `Normalize` become arguments of the decode. From the first transform that is none of these, all are called one image at a
time, on decoded tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import convert_image_dtype

from rinr_loader.crops import RandomResizedCrop
from rinr_loader.decode import Normalize
from rinr_loader.geometry import Placements, place_whole, scale_offset

# The presets of torchvision's reference scripts: they keep what they do in `transforms`.
_PRESETS = {"ClassificationPresetTrain", "ClassificationPresetEval", "DetectionPresetTrain", "DetectionPresetEval"}

_FLIP_X = (v1.RandomHorizontalFlip, v2.RandomHorizontalFlip)
_FLIP_Y = (v1.RandomVerticalFlip, v2.RandomVerticalFlip)
_RANDOM_CROP = (v1.RandomResizedCrop, v2.RandomResizedCrop)
_CENTER_CROP = (v1.CenterCrop, v2.CenterCrop)
_RESIZE = (v1.Resize, v2.Resize)
_GEOMETRY = (*_FLIP_X, *_FLIP_Y, *_RANDOM_CROP, *_CENTER_CROP, *_RESIZE)
_FROM_PIL = (v1.PILToTensor, v2.PILToTensor, v2.ToImage, v2.ToPureTensor)


@dataclass(frozen=True)
class Recipe:
    """How a batch is decoded for a transform.

    Args:
        geometry: Torchvision's own crops, resizes and flips, in order.
        antialias: Whether they filter where an image gets smaller.
        dtype: Of the decoded images: uint8 in [0, 255], or a floating type in [0, 1].
        normalize: Mean and standard deviation of each channel.
        rest: What is called on each decoded image afterwards.
    """

    geometry: tuple[Any, ...] = ()
    antialias: bool = True
    dtype: torch.dtype = torch.uint8
    normalize: Normalize | None = None
    rest: tuple[Callable[..., Any], ...] = ()


@dataclass(frozen=True)
class _Frame:
    """Images on their way through the geometry, float64.

    Args:
        size: Height and width of each, `(N, 2)`.
        forward: From source to image coordinates, `(N, 3, 3)`.
        clip: Source rectangle that may show, xyxy, `(N, 4)`.
    """

    size: Tensor
    forward: Tensor
    clip: Tensor

    def moved(self, scale: Tensor, offset: Tensor, size: Tensor) -> _Frame:
        """The images after `p * scale + offset` (x and y, `(N, 2)`), of another size."""
        return replace(self, size=size, forward=scale_offset(scale, offset) @ self.forward)


def read_transform(transform: Any) -> Recipe:
    """Read a torchvision transform, of `torchvision.transforms` or its `v2`; None is what `ToImage` and `ToDtype(float32, scale=True)` do."""
    if transform is None:
        return Recipe(dtype=torch.float32)
    recipe = Recipe()
    for step in _steps(transform):
        scaled = _scaled_dtype(step)
        if recipe.rest:
            recipe = replace(recipe, rest=(*recipe.rest, _on_tensor(step)))
        elif type(step) in _GEOMETRY and recipe.normalize is None:  # a Normalize before would colour what CenterCrop pads
            recipe = replace(recipe, geometry=(*recipe.geometry, step), antialias=recipe.antialias and _filters(step))
        elif type(step) in _FROM_PIL or (scaled == torch.uint8 == recipe.dtype):
            continue
        elif scaled is not None and scaled.is_floating_point and recipe.normalize is None:
            recipe = replace(recipe, dtype=scaled)
        elif type(step) in (v1.Normalize, v2.Normalize) and recipe.dtype.is_floating_point and recipe.normalize is None:
            recipe = replace(recipe, normalize=(tuple(step.mean), tuple(step.std)))
        else:
            recipe = replace(recipe, rest=(_on_tensor(step),))
    return recipe


def place(recipe: Recipe, source_size: Tensor, stored_size: Tensor) -> tuple[Placements, Tensor]:
    """Place the samples of a batch, each in an image of its own, with random numbers of torch's global generator as torchvision draws them.

    Args:
        recipe: What to do.
        source_size: Height and width of each source picture, `(N, 2)`.
        stored_size: And as stored: what the transform is shown, as if it had been read from a file.

    Returns:
        Placements, and height and width of each image, int64 `(N, 2)`.
    """
    source, stored = source_size.double().flip(1), stored_size.double()
    clip = torch.cat([torch.zeros_like(source), source], 1)
    frame = _Frame(stored, scale_offset(stored.flip(1) / source, torch.zeros_like(source)), clip)
    for step in recipe.geometry:
        frame = _apply(step, frame)
    placements = replace(place_whole(source_size, frame.forward), clip=frame.clip.float())
    return placements, frame.size.long()


def _steps(transform: Any) -> Iterator[Any]:
    """The transforms of compositions, presets and sequences, one by one."""
    if isinstance(transform, (list, tuple)):
        for step in transform:
            yield from _steps(step)
    elif type(transform) in (v1.Compose, v2.Compose) or type(transform).__name__ in _PRESETS:
        yield from _steps(transform.transforms)
    elif type(transform) is nn.Sequential:
        yield from _steps(list(transform))
    else:
        yield transform


def _scaled_dtype(step: Any) -> torch.dtype | None:
    """The dtype that a step converts images to, scaling their values; None where it is not such a step."""
    if type(step) in (v1.ToTensor, v2.ToTensor):
        return torch.float32
    if type(step) in (v1.ConvertImageDtype, v2.ConvertImageDtype) or (type(step) is v2.ToDtype and step.scale):
        return step.dtype if isinstance(step.dtype, torch.dtype) else None
    return None


def _filters(step: Any) -> bool:
    if type(step) not in (*_RESIZE, *_RANDOM_CROP):
        return True
    return step.antialias is not False and "nearest" not in str(getattr(step.interpolation, "value", step.interpolation))


def _on_tensor(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, where torchvision expects a PIL image: images are tensors here."""
    return partial(_convert, step) if type(step) in (v1.PILToTensor, v1.ToTensor) else step


def _convert(step: Callable[..., Any], image: Any) -> Any:
    if not isinstance(image, Tensor):
        return step(image)
    return convert_image_dtype(image, torch.float32) if type(step) is v1.ToTensor else image


def _apply(step: Any, frame: _Frame) -> _Frame:
    count = len(frame.size)
    shown = frame.size.flip(1)  # [N, 2] width, height
    if type(step) in (*_FLIP_X, *_FLIP_Y):
        axis = torch.tensor([1.0, 0.0] if type(step) in _FLIP_X else [0.0, 1.0], dtype=shown.dtype)
        mirrored = (torch.rand(count, 1) < step.p) * axis  # [N, 2]
        return frame.moved(1 - 2 * mirrored, mirrored * shown, frame.size)
    if type(step) in _RESIZE:
        size = _resized(step, frame.size)
        return frame.moved(size.flip(1) / shown, torch.zeros_like(shown), size)
    size = torch.tensor(list(step.size), dtype=shown.dtype).expand(count, 2)
    if type(step) in _RANDOM_CROP:
        crop = RandomResizedCrop(scale=tuple(step.scale), ratio=tuple(step.ratio)).crop(frame.size, torch.rand(count, 22))
        gain = size.flip(1) / crop[:, 2:]
        return frame.moved(gain, -crop[:, :2] * gain, size)
    surplus = shown - size.flip(1)
    offset = torch.where(surplus >= 0, -(surplus / 2).round(), (-surplus / 2).floor())
    # The padding stays empty, also where an earlier crop has cut something off there.
    corners = torch.stack([torch.zeros_like(shown), shown], 1)  # [N, 2, 2]
    scale, start = torch.diagonal(frame.forward, dim1=1, dim2=2)[:, None, :2], frame.forward[:, None, :2, 2]
    bounds = (corners - start) / scale
    clip = torch.cat([torch.maximum(frame.clip[:, :2], bounds.amin(1)), torch.minimum(frame.clip[:, 2:], bounds.amax(1))], 1)
    return replace(frame, clip=clip).moved(torch.ones_like(shown), offset, size)


def _resized(step: Any, size: Tensor) -> Tensor:
    """Height and width after a `Resize`, with torchvision's rounding."""
    wanted = [step.size] if isinstance(step.size, int) else step.size
    if wanted is not None and len(wanted) == 2:
        return torch.tensor(list(wanted), dtype=size.dtype).expand(len(size), 2)
    shorter, longer = size.amin(1), size.amax(1)
    if wanted is None:
        short, long = (step.max_size * shorter / longer).floor(), torch.full_like(longer, step.max_size)
    else:
        short, long = torch.full_like(shorter, wanted[0]), (wanted[0] * longer / shorter).floor()
        if step.max_size is not None:
            short = torch.where(long > step.max_size, (step.max_size * short / long).floor(), short)
            long = long.clamp(max=step.max_size)
    portrait = size[:, 1] <= size[:, 0]
    return torch.stack([torch.where(portrait, long, short), torch.where(portrait, short, long)], 1).clamp(min=1)
