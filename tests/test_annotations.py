"""Boxes of a source: clipped to the picture; what cannot be used is dropped and counted, and the sidecar stays aligned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rinr_loader.annotations import annotate, sidecar
from rinr_loader.errors import ConvertError
from rinr_loader.source import Sample

NAN, INF = float("nan"), float("inf")
WIDTH, HEIGHT = 40, 30


def sample(boxes: Sequence[Sequence[float]], **changes: object) -> Sample:
    values = np.array(boxes, np.float32).reshape(-1, 4)
    classes = np.arange(len(values), dtype=np.int64)
    return Sample("k", "train", b"", values, classes, **changes)  # type: ignore[arg-type]


GOOD = [1, 2, 3, 4]
# box, what is kept of it or why it is not
BOXES: dict[str, tuple[list[float], list[float] | str]] = {
    "inside": ([1.5, 2, 10.25, 20], [1.5, 2, 10.25, 20]),
    "whole picture": ([0, 0, 40, 30], [0, 0, 40, 30]),
    "over every edge": ([-5, -5, 100, 100], [0, 0, 40, 30]),
    "over the right edge": ([35, 5, 45, 10], [35, 5, 40, 10]),
    "less than a pixel": ([5, 5, 5.25, 5.125], [5, 5, 5.25, 5.125]),
    "left of the picture": ([-10, 5, -1, 10], "outside the picture"),
    "touching its edge from outside": ([40, 5, 50, 10], "outside the picture"),
    "below the picture": ([5, 31, 10, 50], "outside the picture"),
    "no width": ([5, 5, 5, 10], "without an area"),
    "no height": ([5, 5, 10, 5], "without an area"),
    "turned round": ([10, 5, 5, 10], "without an area"),
    "turned upside down": ([5, 10, 10, 5], "without an area"),
    "nothing": ([0, 0, 0, 0], "without an area"),
    "no width, outside": ([50, 5, 50, 10], "without an area"),
    "NaN": ([NAN, 5, 10, 10], "not finite"),
    "all NaN": ([NAN] * 4, "not finite"),
    "infinite": ([0, 0, INF, 10], "not finite"),
    "minus infinite": ([-INF, 0, 10, 10], "not finite"),
}


@pytest.mark.parametrize("relative", [False, True], ids=["pixels", "fractions"])
@pytest.mark.parametrize("name", BOXES)
def test_a_box(name: str, relative: bool) -> None:
    box, wanted = BOXES[name]
    given = np.array([GOOD, box], np.float64) / ([WIDTH, HEIGHT] * 2 if relative else 1)
    found = annotate(Sample("k", "train", b"", given.astype(np.float64), np.array([3, 4]), relative=relative), WIDTH, HEIGHT)  # type: ignore[arg-type]
    if isinstance(wanted, str):
        np.testing.assert_allclose(found.boxes, [GOOD], rtol=1e-6)
        assert (found.classes.tolist(), found.kept.tolist(), dict(found.dropped)) == ([3], [0], {wanted: 1})
    else:
        np.testing.assert_allclose(found.boxes, [GOOD, wanted], rtol=1e-6)
        assert (found.classes.tolist(), found.kept.tolist(), dict(found.dropped)) == ([3, 4], [0, 1], {})
    assert (found.boxes.dtype, found.classes.dtype, found.crowd.dtype) == (np.float32, np.int64, np.bool_)


def test_what_is_dropped_is_counted_by_reason() -> None:
    found = annotate(sample([[0, 0, 1, 1], [NAN] * 4, [5, 5, 5, 5], [50, 50, 60, 60], [6, 6, 6, 9], [2, 2, 3, 3]]), WIDTH, HEIGHT)
    assert dict(found.dropped) == {"not finite": 1, "without an area": 2, "outside the picture": 1}
    assert found.classes.tolist() == found.kept.tolist() == [0, 5]


def test_no_boxes() -> None:
    found = annotate(Sample("k", "train", b""), WIDTH, HEIGHT)
    assert (found.boxes.shape, found.classes.shape, found.crowd.shape, dict(found.dropped)) == ((0, 4), (0,), (0,), {})


def test_crowds_stay_with_their_boxes() -> None:
    boxes = [[0, 0, 1, 1], [5, 5, 5, 5], [2, 2, 3, 3], [4, 4, 6, 6]]
    assert annotate(sample(boxes, crowd=np.array([True, True, False, True])), WIDTH, HEIGHT).crowd.tolist() == [True, False, True]
    assert annotate(sample(boxes), WIDTH, HEIGHT).crowd.tolist() == [False] * 3


def test_labels_of_a_picture_of_another_size() -> None:
    with pytest.raises(ConvertError, match=r"^expected a picture of 30x40 as its labels state, got 40x30; correct the labels or the picture$"):
        annotate(sample([GOOD], declared_size=(30, 40)), WIDTH, HEIGHT)
    assert len(annotate(sample([GOOD], declared_size=(40, 30)), WIDTH, HEIGHT).boxes) == 1


@given(st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), max_size=8), st.booleans(), st.integers(1, 65535), st.integers(1, 65535))
def test_whatever_is_kept_is_what_a_bundle_holds(boxes: list[list[float]], relative: bool, width: int, height: int) -> None:
    found = annotate(sample(boxes, relative=relative), width, height)
    kept: NDArray[np.float32] = found.boxes
    assert np.isfinite(kept).all()
    assert (kept[:, :2] >= 0).all()
    assert (kept[:, 2:] <= (width, height)).all()
    assert (kept[:, :2] < kept[:, 2:]).all()
    assert len(kept) + found.dropped.total() == len(boxes)
    assert found.classes.tolist() == found.kept.tolist()


def test_the_sidecar_loses_the_entries_of_dropped_boxes() -> None:
    given = sample([[0, 0, 1, 1], [5, 5, 5, 5], [2, 2, 3, 3]], extra={"objects": ["a", "b", "c"], "clip": 7})
    assert sidecar(given, annotate(given, WIDTH, HEIGHT)) == {"objects": ["a", "c"], "clip": 7}
    assert given.extra["objects"] == ["a", "b", "c"], "the source is left as it is"


@pytest.mark.parametrize("extra", [{}, {"objects": "not a list"}, {"objects": [1, 2, 3]}, {"caption": "x"}], ids=str)
def test_a_sidecar_that_is_not_one_entry_a_box_stays(extra: dict[str, object]) -> None:
    given = sample([[0, 0, 1, 1], [5, 5, 5, 5]], extra=extra)
    assert sidecar(given, annotate(given, WIDTH, HEIGHT)) == extra
