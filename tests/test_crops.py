"""Crops of image classification equal torchvision's, boxes included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from painting import numbered, paint
from torch import Tensor

from rinr_loader.boxes import place_boxes
from rinr_loader.crops import CenterCrop, RandomResizedCrop
from rinr_loader.rng import Draws


def no_random(count: int) -> Tensor:
    raise AssertionError("this transform is not random")


def random_boxes(source_size: Tensor, count: int) -> Tensor:
    """Boxes inside each image, shape (N, count, 4)."""
    generator = torch.Generator().manual_seed(9)
    corners = torch.rand(len(source_size), count, 2, 2, generator=generator).sort(2).values
    return (corners * source_size.flip(1)[:, None, None]).flatten(2)


def with_area(boxes: Tensor) -> Tensor:
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


@pytest.mark.requires("torchvision")
@pytest.mark.parametrize("size", [(20, 20), (13, 30), (31, 12), (48, 64)])
@pytest.mark.parametrize("source", [(40, 50), (41, 50), (12, 33), (13, 8)])
def test_center_crop_has_torchvisions_pixels(source: tuple[int, int], size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import functional

    image = numbered(*source, channel=7)
    placements = CenterCrop()(torch.tensor([source]), size=size, random=no_random)
    theirs = functional.center_crop(torch.from_numpy(image).permute(2, 0, 1), list(size)).permute(1, 2, 0).numpy()
    assert np.array_equal(paint(placements, [image], size, fill=0)[0], theirs)


@pytest.mark.requires("torchvision")
def test_center_crop_has_torchvisions_boxes_after_the_resize() -> None:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    source_size = torch.randint(10, 500, (60, 2), generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(source_size, 4)
    # Where torchvision pads, its boxes are a pixel off its own pixels at odd sizes; ours follow the pixels, tested above.
    for resize, size in ((256, (224, 224)), (100, (99, 80)), (33, (32, 32))):
        placements = CenterCrop(resize=resize)(source_size, size=size, random=no_random)
        ours, _, index = place_boxes(placements, boxes.flatten(0, 1), torch.zeros(240, dtype=torch.int64), torch.arange(61) * 4, size=size)
        transform = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])
        for k, canvas in enumerate(source_size.tolist()):
            theirs = transform(tv_tensors.BoundingBoxes(boxes[k], format="XYXY", canvas_size=canvas))
            assert_close(ours[index == k], with_area(theirs.as_subclass(torch.Tensor)), "boxes")


class FedTorch:
    """Stands for `torch` inside torchvision, with random numbers out of a list."""

    def __init__(self, numbers: Iterator[float], picks: Iterator[float]) -> None:
        self.numbers, self.picks = numbers, picks

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, count: int) -> FedTorch:
        assert count == 1
        return self

    def uniform_(self, low: float, high: float) -> Tensor:
        return torch.tensor([float(low) + (float(high) - float(low)) * next(self.numbers)], dtype=torch.float64)

    def randint(self, low: int, high: int, *, size: tuple[int]) -> Tensor:
        return torch.tensor([low + int((high - low) * next(self.picks))])


@pytest.mark.requires("torchvision")
@pytest.mark.parametrize(
    "transform", [RandomResizedCrop(flip=0), RandomResizedCrop((0.7, 1.0), (0.5, 0.6), 0), RandomResizedCrop((0.9, 1.0), (1.5, 3), 0)]
)
def test_random_resized_crop_equals_torchvision(transform: RandomResizedCrop, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import _geometry

    count, size = 200, (64, 48)
    source_size = torch.randint(4, 400, (count, 2), generator=torch.Generator().manual_seed(2))
    boxes = random_boxes(source_size, 3)
    draws = Draws(0, 0, torch.arange(count))
    numbers = Draws(0, 0, torch.arange(count))(23).double()
    placements = transform(source_size, size=size, random=draws)
    ours, _, index = place_boxes(placements, boxes.flatten(0, 1), torch.zeros(3 * count, dtype=torch.int64), torch.arange(count + 1) * 3, size=size)
    crops = transform.crop(source_size, numbers)
    fallbacks = 0
    for k, canvas in enumerate(source_size.tolist()):
        areas, ratios, picks = numbers[k, :10].tolist(), numbers[k, 10:20].tolist(), numbers[k, 20:22].tolist()
        fed = iter(itertools.chain.from_iterable(zip(areas, ratios, strict=True)))
        their_transform = v2.RandomResizedCrop(size, scale=transform.scale, ratio=transform.ratio)
        with monkeypatch.context() as patch:
            patch.setattr(_geometry, "torch", FedTorch(fed, iter(picks)))
            params = their_transform.make_params([tv_tensors.BoundingBoxes(boxes[k], format="XYXY", canvas_size=canvas)])
        assert crops[k].tolist() == [params["left"], params["top"], params["width"], params["height"]]
        fallbacks += next(fed, None) is None
        theirs = their_transform.transform(tv_tensors.BoundingBoxes(boxes[k], format="XYXY", canvas_size=canvas), params)
        assert_close(ours[index == k], with_area(theirs.as_subclass(torch.Tensor)), "boxes")
    assert fallbacks > 10 or transform.scale[0] < 0.5


def test_random_resized_crop_pixels_are_those_of_the_crop() -> None:
    source_size = torch.tensor([[60, 80], [90, 40]])
    images = [numbered(60, 80), numbered(90, 40)]
    transform = RandomResizedCrop(flip=0.0)
    crops = transform.crop(source_size, Draws(4, 0, torch.arange(2))(23)).long().tolist()
    for k, (x, y, width, height) in enumerate(crops):
        placements = transform(source_size, size=(height, width), random=Draws(4, 0, torch.arange(2)))
        assert np.array_equal(paint(placements, images, (height, width))[k], images[k][y : y + height, x : x + width])


side = st.integers(1, 800)


@given(height=side, width=side, seed=st.integers(0, 10**6))
def test_random_crops_lie_inside_the_image(height: int, width: int, seed: int) -> None:
    crop = RandomResizedCrop().crop(torch.tensor([[height, width]]), Draws(seed, 0, torch.arange(1))(23))[0].tolist()
    x, y, crop_width, crop_height = crop
    assert all(value == int(value) for value in crop)
    assert 0 <= x <= x + crop_width <= width
    assert 0 <= y <= y + crop_height <= height
    assert min(crop_width, crop_height) >= 1


def test_random_resized_crop_flips_and_spreads() -> None:
    count = 4000
    source_size = torch.full((count, 2), 200)
    placements = RandomResizedCrop(flip=0.3)(source_size, size=(32, 32), random=Draws(0, 0, torch.arange(count)))
    assert abs(float((placements.matrix[:, 0, 0] < 0).float().mean()) - 0.3) < 0.04
    area = placements.matrix[:, 0, 0].abs() * placements.matrix[:, 1, 1] * 32 * 32 / 200**2
    assert abs(float(area.mean()) - 0.5) < 0.05
    assert float(area.min()) < 0.1
    assert float(area.max()) > 0.95
    # The flip must follow neither from the crop's size nor from its place.
    flipped = placements.matrix[:, 0, 0] < 0
    corner = placements.matrix @ torch.tensor([16.0, 16.0, 1.0])
    for quantity in (area, corner[:, 0] / 200, corner[:, 1] / 200):
        assert abs(float(quantity[flipped].mean() - quantity[~flipped].mean())) < 0.03
