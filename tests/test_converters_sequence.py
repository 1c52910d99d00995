"""Sequences: rows of every benchmark, frames and rows that do not match, and where annotations are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rinr_loader.converters import open_source, sequence
from rinr_loader.errors import ConvertError


def _sequence(root: Path, annotations: dict[str, str], frames: int | tuple[str, ...] = 3, *, folder: str = "img") -> Path:
    names = frames if isinstance(frames, tuple) else tuple(f"{i:04d}.jpg" for i in range(1, frames + 1))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / folder / name).touch()
    for name, text in annotations.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("row", ["11,21,5,6", "11\t21\t5\t6", "11 21 5 6", " 11 , 21 , 5 , 6 ", "11;21;5;6", "11.0,21.0,5.0,6.0,"])
def test_separators_and_the_first_pixel_of_otb(row: str, tmp_path: Path) -> None:
    source = open_source(_sequence(tmp_path / "Car", {"groundtruth_rect.txt": f"{row}\r\n" * 3}))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[10, 20, 15, 26]]] * 3
    assert [sample.key for sample in source.samples] == ["Car/0001", "Car/0002", "Car/0003"]
    assert {sample.sequence for sample in source.samples} == {"Car"}
    assert (source.names, source.problems, source.samples[0].extra) == (("object",), (), {})


def test_several_objects_keep_their_numbers(tmp_path: Path) -> None:
    files = {"groundtruth_rect.1.txt": "1,1,2,2\n1,1,2,2\n0,0,0,0\n", "groundtruth_rect.2.txt": "5,5,2,2\nNaN,NaN,NaN,NaN\n5,5,2,2\n"}
    source = open_source(_sequence(tmp_path / "Jogging", files))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[0, 0, 2, 2], [4, 4, 6, 6]], [[0, 0, 2, 2]], [[4, 4, 6, 6]]]
    assert [sample.extra for sample in source.samples] == [
        {"objects": [{"track": 1}, {"track": 2}]},
        {"objects": [{"track": 1}]},
        {"objects": [{"track": 2}]},
    ]


def test_tlp_rows_name_their_frame_and_lost_objects_are_not_there(tmp_path: Path) -> None:
    rows = "3,30,30,5,5,0\n1,10,10,5,5,0\n2,20,20,5,5,1\n9,1,1,1,1,0\n"
    source = open_source(_sequence(tmp_path / "Drone1", {"groundtruth_rect.txt": rows}))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[10, 10, 15, 15]], [], [[30, 30, 35, 35]]]
    assert [problem.reason for problem in source.problems] == ["has 4 rows for 3 frames; 1 rows without a frame were left out"]


def test_polygons_become_boxes_and_are_kept(tmp_path: Path) -> None:
    rows = "4,1,9,3,7,8,2,6\n1,1,2,2,3,3,4,4,5,0\nnan,nan,nan,nan,nan,nan,nan,nan\n"
    first, second, third = open_source(_sequence(tmp_path / "bag", {"groundtruth.txt": rows}, folder="color")).samples
    assert first.boxes.tolist() == [[2, 1, 9, 8]]
    assert first.extra == {"objects": [{"polygon": [4, 1, 9, 3, 7, 8, 2, 6]}]}
    assert second.boxes.tolist() == [[1, 0, 5, 4]]
    assert (third.boxes.shape, third.extra) == ((0, 4), {})


def test_frames_without_a_row_stay_and_rows_without_a_frame_go(tmp_path: Path) -> None:
    _sequence(tmp_path / "short", {"groundtruth.txt": "1,1,2,2\n"})
    _sequence(tmp_path / "long", {"groundtruth.txt": "1,1,2,2\n" * 5})
    source = open_source(tmp_path)
    assert [(sample.key, len(sample.boxes)) for sample in source.samples] == [
        *[(f"long/{i:04d}", 1) for i in (1, 2, 3)],
        *[(f"short/{i:04d}", i == 1) for i in (1, 2, 3)],
    ]
    assert [problem.reason for problem in source.problems] == [
        "has 5 rows for 3 frames; 2 rows without a frame were left out",
        "has no usable row for 2 of 3 frames, from 0002.jpg; they are kept without this object",
    ]


def test_a_row_that_cannot_be_read_does_not_shift_the_others(tmp_path: Path) -> None:
    source = open_source(_sequence(tmp_path / "a", {"groundtruth.txt": "1,1,2,2\nm0,12,text\n3,3,2,2\n"}))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[1, 1, 3, 3]], [], [[3, 3, 5, 5]]]
    assert source.problems[0].subject.endswith("groundtruth.txt:2")
    assert len(source.problems) == 2


def test_frames_are_ordered_by_number(tmp_path: Path) -> None:
    source = open_source(_sequence(tmp_path / "a", {"groundtruth.txt": "1,1,1,1\n2,2,1,1\n3,3,1,1\n"}, ("10.jpg", "9.jpg", "1.jpg")))
    assert {sample.key: sample.boxes[0, 0] for sample in source.samples} == {"a/1": 1, "a/9": 2, "a/10": 3}


def test_otb_david_starts_at_frame_300(tmp_path: Path) -> None:
    frames = tuple(f"{i:04d}.jpg" for i in range(298, 303))
    source = open_source(_sequence(tmp_path / "David", {"groundtruth_rect.txt": "1,1,1,1\n2,2,1,1\n3,3,1,1\n"}, frames))
    assert [len(sample.boxes) for sample in source.samples] == [0, 0, 1, 1, 1]
    assert source.samples[2].boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("frames", "annotation"),
    [
        ("seq/bike1/img", "seq/bike1/bike1.txt"),
        ("seq/uav_bike1/img", "seq/uav_bike1/bike1.txt"),
        ("seq/bike1", "seq/bike1.txt"),
        ("seq/bike1", "seq/anno/bike1.txt"),
        ("data_seq/UAV123/bike1", "anno/UAV123/bike1.txt"),
        ("data_seq/UAV123/bike1", "anno/bike1.txt"),
        ("seq/Bike1/imgs", "seq/Bike1/groundtruth.txt"),
    ],
)
def test_annotations_are_found_in_and_around_the_sequence(frames: str, annotation: str, tmp_path: Path) -> None:
    _sequence(tmp_path, {annotation: "1,1,2,2\n" * 3}, folder=frames)
    source = open_source(tmp_path)
    assert source.format == "sequence"
    assert [sample.boxes.tolist() for sample in source.samples] == [[[1, 1, 3, 3]]] * 3
    assert source.problems == ()


def test_split_folders_give_the_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _sequence(tmp_path / split / "one", {"groundtruth.txt": "1,1,2,2\n"}, 1)
    source = open_source(tmp_path)
    assert [(sample.split, sample.key, sample.sequence) for sample in source.samples] == [("train", "one/0001", "one"), ("val", "one/0001", "one")]


def test_frames_without_annotations_are_reported(tmp_path: Path) -> None:
    _sequence(tmp_path / "a", {"groundtruth.txt": "1,1,2,2\n" * 3})
    _sequence(tmp_path / "b", {"groundtruth.txt": "1,1,2,2\n" * 3})
    _sequence(tmp_path / "c", {"notes.txt": "nothing here"})
    source = open_source(tmp_path)
    assert {sample.sequence for sample in source.samples} == {"a", "b"}
    assert [(Path(problem.subject).parent.name, problem.reason) for problem in source.problems] == [("c", "holds frames but no annotations")]


def test_no_sequence_at_all_is_an_error(tmp_path: Path) -> None:
    _sequence(tmp_path / "a", {"readme.txt": "1 2"})
    assert not sequence.detect(tmp_path)
    with pytest.raises(ConvertError, match=r"expected sequences of frames with groundtruth_rect\.txt"):
        open_source(tmp_path, source_format="sequence")


@pytest.mark.real_data("otb_jogging_2obj", "vot15_bag_polygon", "tinytlp_carchase2")
def test_real_rows(real_data: Path) -> None:
    jogging = open_source(real_data / "otb_jogging_2obj").samples[0]
    assert jogging.boxes.tolist() == [[110, 97, 135, 198], [179, 78, 216, 192]]
    bag = open_source(real_data / "vot15_bag_polygon").samples[0]
    np.testing.assert_allclose(bag.boxes, [[292.23, 128.36, 438.19, 260.83]], rtol=1e-6)
    chase = open_source(real_data / "tinytlp_carchase2").samples[-1]
    assert chase.boxes.tolist() == [[456, 205, 831, 476]]
