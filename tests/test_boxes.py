"""Boxes go where their pixels go, are cut where the pixels are cut, and are dropped when too little is left."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from painting import paint
from torch import Tensor

from rinr_loader.boxes import ULTRALYTICS_FILTER, BoxFilter, clip_boxes, keep_boxes, place_boxes, place_objects, transform_boxes
from rinr_loader.geometry import Placements, invert, scale_offset

coordinate = st.floats(-500, 500, width=32)


def box_list(draws: list[tuple[float, float, float, float]]) -> Tensor:
    raw = torch.tensor(draws)
    return torch.cat([torch.minimum(raw[:, :2], raw[:, 2:]), torch.maximum(raw[:, :2], raw[:, 2:])], dim=1)


boxes_strategy = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=5).map(box_list)


@given(boxes=boxes_strategy, scale=st.tuples(st.floats(0.1, 8), st.floats(0.1, 8)), offset=st.tuples(coordinate, coordinate), mirror=st.booleans())
def test_there_and_back(boxes: Tensor, scale: tuple[float, float], offset: tuple[float, float], mirror: bool) -> None:
    factor = torch.tensor([scale], dtype=torch.float64) * (-1 if mirror else 1)
    matrix = scale_offset(factor, torch.tensor([offset], dtype=torch.float64)).repeat(len(boxes), 1, 1)
    there = transform_boxes(boxes, matrix)
    assert (there[:, :2] <= there[:, 2:]).all()
    corner = (boxes[0, :2].double() - torch.tensor(offset)) / factor[0]
    assert_close(there[0, 2:] if mirror else there[0, :2], corner.float(), "boxes")
    assert_close(transform_boxes(there, invert(matrix)), boxes, "boxes")


def test_a_turned_box_is_bounded_and_perspective_divides() -> None:
    root = math.sqrt(0.5)
    turn = torch.tensor([[root, -root, 0.0], [root, root, 0.0], [0.0, 0.0, 1.0]])
    assert_close(transform_boxes(torch.tensor([[0.0, 0, 2, 2]]), turn[None]), torch.tensor([[0, -2 * root, 4 * root, 2 * root]]))
    forward = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.01, 0, 1]])
    assert_close(transform_boxes(torch.tensor([[0.0, 10, 100, 20]]), invert(forward)[None]), torch.tensor([[0.0, 5, 50, 20]]))


@given(boxes=boxes_strategy)
def test_clip(boxes: Tensor) -> None:
    clipped = clip_boxes(boxes, torch.tensor([-50.0, 0.0, 100.0, 30.0]))
    assert np.array_equal(clipped[:, 0::2], boxes[:, 0::2].numpy().clip(-50, 100))
    assert np.array_equal(clipped[:, 1::2], boxes[:, 1::2].numpy().clip(0, 30))
    own = torch.tensor([[-50.0, 0.0, 100.0, 30.0]]) + torch.arange(len(boxes))[:, None]
    assert torch.equal(clip_boxes(boxes, own), torch.cat([clip_boxes(b[None], r) for b, r in zip(boxes, own, strict=True)]))


@pytest.mark.parametrize(
    ("after", "box_filter", "kept"),
    [
        ([0, 0, 10, 10], BoxFilter(), True),
        ([5, 0, 5, 10], BoxFilter(), False),
        ([0, 5, 10, 5], BoxFilter(), False),
        ([5, 5, 5, 5], BoxFilter(), False),
        ([0, 0, math.nan, 10], BoxFilter(), False),
        ([0, 0, 2, 10], BoxFilter(min_side=2), False),
        ([0, 0, 2.01, 10], BoxFilter(min_side=2), True),
        ([0, 0, 10, 1], BoxFilter(max_aspect=10), False),
        ([0, 0, 1.01, 10], BoxFilter(max_aspect=10), True),
        ([0, 0, 10, 4], BoxFilter(min_area=0.1), False),
        ([0, 0, 10, 4.1], BoxFilter(min_area=0.1), True),
    ],
)
def test_filter_thresholds(after: list[float], box_filter: BoxFilter, kept: bool) -> None:
    before = torch.tensor([[0.0, 0, 10, 10]])
    assert keep_boxes(before, torch.tensor([after]), scale=4.0, box_filter=box_filter).tolist() == [kept]


def test_a_box_without_area_before_is_dropped() -> None:
    assert keep_boxes(torch.tensor([[3.0, 3, 3, 9]]), torch.tensor([[0.0, 0, 5, 5]])).tolist() == [False]


@pytest.mark.requires("ultralytics")
def test_filter_equals_box_candidates() -> None:
    from ultralytics.data.augment import RandomPerspective

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3000, 2, 2, generator=generator).sort(1).values
    before = (corners * torch.tensor([100.0, 60.0])).flatten(1)
    after = before * torch.tensor([0.5, 0.3, 0.5, 0.3]) - torch.rand(3000, 1, generator=generator) * 20
    after = clip_boxes(after, torch.tensor([0.0, 0, 40, 40]))
    theirs = RandomPerspective.box_candidates(before.numpy().T * 0.5, after.numpy().T)
    ours = keep_boxes(before, after, scale=0.25, box_filter=ULTRALYTICS_FILTER)
    assert 200 < theirs.sum() < 2700
    assert ours.tolist() == theirs.tolist()


def test_placed_objects_equal_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(16)
    counts = torch.tensor([3, 0, 5, 1])
    object_start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    box = box_list((torch.rand(9, 4, generator=generator) * 70 - 5).tolist())
    class_id = torch.arange(9) * 10
    matrix = scale_offset(torch.rand(6, 2, generator=generator) + 0.5, torch.rand(6, 2, generator=generator) * 16 + 2).float()
    placements = Placements(
        output=torch.tensor([2, 0, 4, 0, 2, 2]),  # unordered; outputs 1 and 3 show nothing
        sample=torch.tensor([0, 2, 1, 3, 2, 0]),  # sample 0 twice, sample 1 without objects
        matrix=matrix,
        clip=torch.tensor([[10.0, 5, 50, 55]]).repeat(6, 1),
    )
    size, box_filter = (40, 36), BoxFilter(min_side=3.0, min_area=0.5)
    expected = []
    for output in range(5):
        for m in range(6):
            if placements.output[m] != output:
                continue
            (gx, _, tx), (_, gy, ty), _ = matrix[m].tolist()
            for k in range(int(object_start[placements.sample[m]]), int(object_start[placements.sample[m] + 1])):
                x1, y1, x2, y2 = box[k].tolist()
                x1, x2, y1, y2 = max(x1, 10), min(x2, 50), max(y1, 5), min(y2, 55)
                if x1 >= x2 or y1 >= y2:
                    continue
                area = (x2 - x1) * (y2 - y1) / (gx * gy)
                left, right = (min(max((x - tx) / gx, 0), size[1]) for x in (x1, x2))
                top, bottom = (min(max((y - ty) / gy, 0), size[0]) for y in (y1, y2))
                if right - left > 3 and bottom - top > 3 and (right - left) * (bottom - top) > 0.5 * area:
                    expected.append(([left, top, right, bottom], k, output))
    assert 4 < len(expected) < 14  # of 18: some are kept, some are not
    assert {0, 2} <= {row[2] for row in expected}  # the order of outputs matters
    boxes, objects, outputs = place_objects(placements, box, object_start, size=size, box_filter=box_filter)
    assert_close(boxes, torch.tensor([row[0] for row in expected]), "boxes")
    assert objects.tolist() == [row[1] for row in expected]
    assert outputs.tolist() == [row[2] for row in expected]
    again, classes, batch_index = place_boxes(placements, box, class_id, object_start, size=size, box_filter=box_filter)
    assert torch.equal(again, boxes)
    assert classes.tolist() == [row[1] * 10 for row in expected]
    assert torch.equal(batch_index, outputs)


def test_nothing_placed_and_no_objects() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = Placements(output=empty, sample=empty, matrix=torch.zeros(0, 3, 3), clip=torch.zeros(0, 4))
    boxes, classes, batch_index = place_boxes(nothing, torch.zeros(0, 4), empty, torch.zeros(1, dtype=torch.int64), size=(8, 8))
    assert (boxes.shape, classes.shape, batch_index.shape) == ((0, 4), (0,), (0,))
    assert boxes.dtype == torch.float32


@given(
    scale=st.tuples(st.floats(0.4, 3), st.floats(0.4, 3)),
    offset=st.tuples(st.floats(-20, 40), st.floats(-20, 40)),
    angle=st.floats(-3.1, 3.1),
    corner=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    extent=st.tuples(st.integers(5, 20), st.integers(5, 20)),
)
def test_boxes_are_where_the_pixels_are(
    scale: tuple[float, float], offset: tuple[float, float], angle: float, corner: tuple[int, int], extent: tuple[int, int]
) -> None:
    image = np.zeros((40, 40, 1), np.uint8)
    x1, y1, x2, y2 = corner[0], corner[1], corner[0] + extent[0], corner[1] + extent[1]
    image[y1:y2, x1:x2] = 255
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64)
    forward = turn @ scale_offset(torch.tensor([scale], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64))[0]
    zero = torch.zeros(1, dtype=torch.int64)
    placements = Placements(output=zero, sample=zero, matrix=invert(forward)[None].float(), clip=torch.tensor([[0.0, 0, 40, 40]]))
    at = np.argwhere(paint(placements, [image], (64, 64), fill=0)[0, ..., 0])
    boxes, _, _ = place_boxes(placements, torch.tensor([[x1, y1, x2, y2]]).float(), zero, torch.tensor([0, 1]), size=(64, 64))
    if len(at) == 0:
        return
    # Every pixel that shows the object is inside its box; where the object is not turned, the box is tight.
    left, top, right, bottom = boxes[0].tolist()
    assert left <= at[:, 1].min() + 0.51
    assert right >= at[:, 1].max() + 0.49
    assert top <= at[:, 0].min() + 0.51
    assert bottom >= at[:, 0].max() + 0.49
    if angle == 0:
        assert max(at[:, 1].min() - left, right - at[:, 1].max() - 1, at[:, 0].min() - top, bottom - at[:, 0].max() - 1) <= 0.51
