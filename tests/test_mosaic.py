"""Mosaic and random affine: boxes and pixels of Ultralytics' own augmentation for the same random numbers."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from painting import numbered, paint
from torch import Tensor

from rinr_loader.boxes import ULTRALYTICS_FILTER, place_boxes
from rinr_loader.geometry import Flip, Letterbox, Placements, fit_long_side
from rinr_loader.mosaic import RandomAffine, affine_matrix, mosaic, mosaic_affine
from rinr_loader.rng import Draws


def fixed(*streams: Tensor) -> Any:
    """A `random` that hands out given numbers, and checks that as many are asked for."""
    left = deque(streams)

    def random(count: int) -> Tensor:
        numbers = left.popleft()
        assert numbers.shape[1] == count
        return numbers

    return random


class FedRandom:
    """Stands for the module `random` inside Ultralytics."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = deque(numbers)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.numbers.popleft()

    def random(self) -> float:
        return self.numbers.popleft()

    def choices(self, population: list[int], *, k: int) -> list[int]:
        assert len(population) == k
        return population


def their_labels(boxes: Tensor, source_size: Tensor, fitted: Tensor, image: NDArray[np.uint8] | None, first_class: int) -> dict[str, Any]:
    """A sample as Ultralytics holds it after loading: normalised boxes, an image resized to its longer side."""
    from ultralytics.utils.instance import Instances

    (height, width), shape = source_size.tolist(), tuple(fitted.tolist())
    xyxy = boxes.double().numpy() / np.array([width, height, width, height])
    xywh = np.concatenate([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], axis=1).astype(np.float32)
    return {
        "img": np.zeros((*shape, 3), np.uint8) if image is None else image,
        "cls": np.arange(first_class, first_class + len(boxes), dtype=np.float32)[:, None],
        "instances": Instances(xywh, bbox_format="xywh", normalized=True),
        "im_file": "",
        "ori_shape": (height, width),
        "resized_shape": shape,
    }


def theirs(labels: list[dict[str, Any]], affine: RandomAffine, numbers: list[float], size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run Ultralytics' mosaic (where there are four samples), affine and flips on fixed random numbers."""
    from ultralytics.data import augment

    dataset = SimpleNamespace(cache=None, buffer=[1, 2, 3], get_image_and_label=labels.__getitem__, use_obb=False)
    steps = [
        augment.Mosaic(dataset, imgsz=size),
        augment.RandomPerspective(
            degrees=affine.degrees,
            translate=affine.translate,
            scale=affine.scale,
            shear=affine.shear,
            perspective=affine.perspective,
            size=(size, size),
        ),
        augment.RandomFlip(direction="vertical", p=affine.vertical),
        augment.RandomFlip(direction="horizontal", p=affine.horizontal),
    ]
    if len(labels) == 1:
        steps, numbers = steps[1:], numbers[2:]
    else:
        numbers = [0.0, *numbers]  # whether to make a mosaic at all
    fed = FedRandom(numbers)
    with patch.context() as scope:
        scope.setattr(augment, "random", fed)
        result = labels[0]
        for step in steps:
            result = step(result)
    assert not fed.numbers
    result["instances"].convert_bbox("xyxy")
    return dict(result)


AFFINES = {
    "default": RandomAffine(),
    "wide": RandomAffine(scale=(0.2, 3.0), translate=0.4, horizontal=0.3, vertical=0.6),
    "turned": RandomAffine(scale=0.3, degrees=60, shear=20, horizontal=0.0, vertical=0.0),
    "perspective": RandomAffine(scale=0.2, degrees=10, shear=5, perspective=0.001),
}


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("name", AFFINES)
def test_boxes_equal_ultralytics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    affine, count, objects = AFFINES[name], 60, 5
    generator = torch.Generator().manual_seed(len(name))
    kept = 0
    for size in (64, 97):
        source_size = torch.randint(20, 300, (4 * count, 2), generator=generator)
        corners = torch.rand(4 * count, objects, 2, 2, generator=generator).sort(2).values * source_size.flip(1)[:, None, None]
        boxes = corners.flatten(2)
        samples = torch.randperm(4 * count, generator=generator).view(count, 4)
        samples[::3, 1:] = -1  # every third output is a single image
        numbers = [torch.rand(count, columns, generator=generator) for columns in (2, 8, 2)]
        placements = mosaic_affine(source_size, samples, affine, size=(size, size), random=fixed(*numbers))
        assert placements.output.tolist() == sorted(placements.output.tolist())
        ours, classes, batch_index = place_boxes(
            placements,
            boxes.flatten(0, 1),
            torch.arange(4 * count * objects),
            torch.arange(4 * count + 1) * objects,
            size=(size, size),
            box_filter=ULTRALYTICS_FILTER,
        )
        fitted = fit_long_side(source_size, size)
        for k in range(count):
            rows = [row for row in samples[k].tolist() if row >= 0]
            labels = [their_labels(boxes[row], source_size[row], fitted[row], None, row * objects) for row in rows]
            centre, movement, (vertical, horizontal) = (column[k].double().tolist() for column in (numbers[0], numbers[1], numbers[2].flip(1)))
            result = theirs(labels, affine, [*centre, *movement, vertical, horizontal], size, monkeypatch)
            assert classes[batch_index == k].tolist() == result["cls"][:, 0].astype(int).tolist()
            assert_close(ours[batch_index == k], result["instances"].bboxes, "boxes")
            kept += len(result["cls"])
    assert 0.2 < kept / (2 * count * objects * 3) < 0.95  # the filter has something to do


def sources_and_numbers(count: int, size: int) -> tuple[list[NDArray[np.uint8]], Tensor, Tensor, list[Tensor]]:
    """Images that need no resize, four for each output."""
    generator = torch.Generator().manual_seed(size)
    source_size = torch.randint(size // 3, size + 1, (4 * count, 2), generator=generator)
    source_size[torch.arange(4 * count), torch.randint(0, 2, (4 * count,), generator=generator)] = size
    images = [numbered(height, width, channel=k) for k, (height, width) in enumerate(source_size.tolist())]
    numbers = [torch.rand(count, columns, generator=generator) for columns in (2, 8, 2)]
    return images, source_size, torch.arange(4 * count).view(count, 4), numbers


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("size", [64, 51])
def test_mosaic_has_ultralytics_pixels(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.data import augment

    images, source_size, samples, numbers = sources_and_numbers(8, size)
    ours = paint(mosaic(source_size, samples, numbers[0], size=size), images, (2 * size, 2 * size))
    for k in range(8):
        labels = [their_labels(torch.zeros(0, 4), source_size[row], source_size[row], images[row], 0) for row in samples[k].tolist()]
        dataset = SimpleNamespace(cache=None, buffer=[1, 2, 3], get_image_and_label=labels.__getitem__)
        with monkeypatch.context() as scope:
            scope.setattr(augment, "random", FedRandom([0.0, *numbers[0][k].double().tolist()]))
            result = augment.Mosaic(dataset, imgsz=size)(labels[0])
        assert np.array_equal(ours[k], result["img"])


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("name", AFFINES)
def test_pixels_equal_ultralytics_after_a_half_pixel_shift(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.data import augment

    cv2 = augment.cv2
    # OpenCV's matrix maps pixel indices, ours maps coordinates whose pixel centres are at +0.5.
    shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])

    def warp_affine(image: NDArray[np.uint8], matrix: NDArray[np.float32], *, dsize: tuple[int, int], borderValue: Any) -> NDArray[np.uint8]:
        square = np.eye(3)
        square[: len(matrix)] = matrix
        matrix = np.linalg.inv(shift) @ square @ shift
        return np.asarray(cv2.warpPerspective(image, matrix, dsize=dsize, borderValue=borderValue, flags=cv2.INTER_NEAREST))

    fake = SimpleNamespace(warpAffine=warp_affine, warpPerspective=warp_affine, getRotationMatrix2D=cv2.getRotationMatrix2D)
    size, count, affine = 96, 6, AFFINES[name]
    images, source_size, samples, numbers = sources_and_numbers(count, size)
    samples[::2, 1:] = -1
    placements = mosaic_affine(source_size, samples, affine, size=(size, size), random=fixed(*numbers))
    ours = paint(placements, images, (size, size))
    for k in range(count):
        rows = [row for row in samples[k].tolist() if row >= 0]
        labels = [their_labels(torch.zeros(0, 4), source_size[row], source_size[row], images[row], 0) for row in rows]
        centre, movement, (vertical, horizontal) = (column[k].double().tolist() for column in (numbers[0], numbers[1], numbers[2].flip(1)))
        with monkeypatch.context() as scope:
            scope.setattr(augment, "cv2", fake)
            result = theirs(labels, affine, [*centre, *movement, vertical, horizontal], size, monkeypatch)
        # Both take the nearest pixel, so only points on an edge between pixels may differ.
        far = np.abs(ours[k].astype(int) - result["img"].astype(int)).max(-1) > 1
        assert far.mean() < 0.01
        assert (ours[k] == result["img"]).all(-1).mean() > 0.95


source_sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=4, max_size=4)
unit = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=50)
@given(source_size=source_sizes, centre=st.tuples(unit, unit), size=st.integers(4, 40))
def test_a_mosaic_has_four_parts_that_meet_and_do_not_overlap(source_size: list[tuple[int, int]], centre: tuple[float, float], size: int) -> None:
    placements = mosaic(torch.tensor(source_size), torch.tensor([[0, 1, 2, 3]]), torch.tensor([centre]), size=size)
    marks = [np.full((*pair, 1), k + 1, np.uint8) for k, pair in enumerate(source_size)]
    canvas = paint(placements, marks, (2 * size, 2 * size), fill=0)[0, ..., 0]  # fails on overlap
    fitted = fit_long_side(torch.tensor(source_size), size).tolist()
    lowest, highest = (size + 1) // 2, 2 * size - (size + 1) // 2
    edges = []
    for k, (height, width) in enumerate(fitted):
        at = np.argwhere(canvas == k + 1)
        (top, left), (bottom, right) = at.min(0), at.max(0) + 1
        assert len(at) == (bottom - top) * (right - left)  # a full rectangle
        y, x = (bottom if k < 2 else top), (right if k % 2 == 0 else left)
        edges.append((y, x))
        assert bottom - top == min(height, y if k < 2 else 2 * size - y)
        assert right - left == min(width, x if k % 2 == 0 else 2 * size - x)
    assert len(set(edges)) == 1  # all four meet in the chosen point
    assert all(lowest <= value <= highest for value in edges[0])


def test_no_movement_centres_the_canvas() -> None:
    source_size = torch.tensor([[30, 40], [40, 20]])
    still = RandomAffine(scale=0.0, translate=0.0, horizontal=0.0)
    placements = still(source_size, size=(40, 40), random=Draws(0, 0, torch.arange(2)))
    assert_close(placements.matrix, Letterbox()(source_size, size=(40, 40), random=Draws(0, 0, torch.arange(2))).matrix)
    assert placements.sample.tolist() == [0, 1]
    longer = RandomAffine(scale=0.0, translate=0.0, horizontal=0.0, long_side=80)(source_size, size=(40, 60), random=Draws(0, 0, torch.arange(2)))
    assert_close(longer.matrix[:, 0, 0], torch.tensor([0.5, 0.5]))


def test_mirroring_is_that_of_flip() -> None:
    source_size = torch.randint(20, 80, (50, 2))
    plain = RandomAffine(horizontal=0.0)
    mirrored = RandomAffine(horizontal=0.4, vertical=0.7)
    numbers = [torch.rand(50, columns) for columns in (2, 8, 2)]
    ours = mirrored(source_size, size=(32, 32), random=fixed(*numbers))

    def inner(source_size: Tensor, *, size: tuple[int, int], random: Any) -> Placements:
        return plain(source_size, size=size, random=fixed(*numbers))

    expected = Flip(inner, horizontal=0.4, vertical=0.7)(source_size, size=(32, 32), random=fixed(numbers[2]))
    assert_close(ours.matrix, expected.matrix)


def test_a_vanishing_scale_still_has_an_inverse() -> None:
    forward, area = affine_matrix(RandomAffine(scale=1.0), torch.tensor([[64, 64]]), torch.zeros(1, 8), size=(64, 64))
    assert torch.linalg.det(forward) > 0
    assert area > 0
    placements = RandomAffine(scale=1.0)(torch.tensor([[64, 64]]), size=(64, 64), random=lambda count: torch.zeros(1, count))
    assert placements.matrix.isfinite().all()


def test_a_mosaic_needs_a_square() -> None:
    draws = Draws(0, 0, torch.arange(1))
    with pytest.raises(ValueError, match=r"expected a square for a mosaic, got 32x64; turn mosaic off"):
        mosaic_affine(torch.full((4, 2), 9), torch.tensor([[0, 1, 2, 3]]), RandomAffine(), size=(32, 64), random=draws)
    single = torch.tensor([[0, -1, -1, -1]])
    assert len(mosaic_affine(torch.full((4, 2), 9), single, RandomAffine(), size=(32, 64), random=draws)) == 1


@pytest.mark.cuda
def test_mosaic_is_the_same_on_a_gpu() -> None:
    images, source_size, samples, numbers = sources_and_numbers(6, 64)
    samples[::2, 1:] = -1
    affine = AFFINES["perspective"]
    here = mosaic_affine(source_size, samples, affine, size=(64, 64), random=fixed(*numbers))
    there = mosaic_affine(source_size.cuda(), samples.cuda(), affine, size=(64, 64), random=fixed(*(column.cuda() for column in numbers)))
    assert there.matrix.is_cuda
    assert_close(there.matrix, here.matrix, "boxes")
    assert_close(there.clip, here.clip)
    box = torch.tensor([[1.0, 2, 20, 25]]).repeat(len(images), 1)
    start = torch.arange(len(images) + 1)
    boxes, classes, batch_index = place_boxes(here, box, start[:-1], start, size=(64, 64))
    on_gpu = place_boxes(there, box.cuda(), start[:-1].cuda(), start.cuda(), size=(64, 64))
    assert_close(on_gpu[0], boxes, "boxes")
    assert on_gpu[1].tolist() == classes.tolist()
    assert on_gpu[2].tolist() == batch_index.tolist()
