"""COCO JSON: which file is which split, where pictures are found, and what becomes of every field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rinr_loader.converters import coco, open_source
from rinr_loader.errors import ConvertError

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def _write(file: Path, images: Sequence[str], annotations: Sequence[dict[str, Any]] = (), **fields: Any) -> Path:
    listed = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(images, start=1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"info": {}, "images": listed, "annotations": list(annotations), "categories": CATEGORIES} | fields))
    return file


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_boxes_classes_crowds_and_all_other_fields(tmp_path: Path) -> None:
    annotations = [
        {"id": 5, "image_id": 1, "category_id": 90, "bbox": [1, 2, 3.5, 4], "area": 14.0, "iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"id": 6, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"counts": "ab", "size": [48, 64]}},
        {"id": 7, "image_id": 2, "category_id": 18, "bbox": [5, 5, 0, 1]},
    ]
    _write(tmp_path / "annotations" / "instances_train.json", ["a.jpg", "b.jpg", "c.jpg"], annotations)
    _touch(tmp_path / "images", "a.jpg", "b.jpg", "c.jpg")
    source = open_source(tmp_path)
    a, b, c = source.samples
    assert source.names == ("person", "dog", "toothbrush")
    assert a.boxes.tolist() == [[1, 2, 4.5, 6], [0, 0, 9, 9]]
    assert a.classes.tolist() == [2, 0]
    assert a.crowd is not None
    assert a.crowd.tolist() == [False, True]
    assert a.declared_size == (64, 48)
    assert a.extra == {"image_id": 1, "objects": [{k: v for k, v in row.items() if k not in ("image_id", "bbox")} for row in annotations[:2]]}
    assert b.boxes.tolist() == [[5, 5, 5, 6]]  # empty: the encoder drops and counts it
    assert b.crowd is None
    assert (c.boxes.shape, c.extra) == ((0, 4), {"image_id": 3})
    assert source.problems == ()


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("annotations/instances_train2017.json", "train2017/a.jpg"),
        ("annotations/instances_train2017.json", "images/train2017/a.jpg"),
        ("annotations/instances_train2017.json", "images/a.jpg"),
        ("annotations/instances_train.json", "train/a.jpg"),
        ("annotations/instances_train.json", "images/train/a.jpg"),
        ("annotations/instances_train.json", "train2017/a.jpg"),
        ("instances_train.json", "train/a.jpg"),
        ("labels.json", "a.jpg"),
        ("labels.json", "images/a.jpg"),
        ("train/_annotations.coco.json", "train/a.jpg"),
        ("annotations/data.json", "images/a.jpg"),
    ],
)
def test_pictures_are_found_in_the_usual_places(file: str, image: str, tmp_path: Path) -> None:
    written = _write(tmp_path / file, ["a.jpg"])
    _touch(tmp_path, image)
    for path in (tmp_path, written):
        (sample,) = open_source(path).samples
        assert (sample.key, sample.split) == ("a", "train")
        assert isinstance(sample.image, Path)
        assert sample.image.samefile(tmp_path / image)


def test_names_with_folders_become_keys(tmp_path: Path) -> None:
    _write(tmp_path / "instances_val.json", ["x/a.jpg", "y\\a.jpg"])
    _touch(tmp_path / "val", "x/a.jpg", "y/a.jpg")
    assert [(sample.key, sample.split) for sample in open_source(tmp_path).samples] == [("x/a", "val"), ("y/a", "val")]


def test_each_split_has_its_file_and_other_tasks_are_passed_over(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _write(tmp_path / "annotations" / f"instances_{split}2017.json", ["a.jpg"])
        _write(tmp_path / "annotations" / f"person_keypoints_{split}2017.json", ["b.jpg"])
        _write(tmp_path / "annotations" / f"captions_{split}2017.json", ["b.jpg"])
        _touch(tmp_path / f"{split}2017", "a.jpg", "b.jpg")
    assert [(sample.split, sample.key) for sample in open_source(tmp_path).samples] == [("train", "a"), ("val", "a")]


def test_two_files_for_one_split_ask_for_one(tmp_path: Path) -> None:
    _touch(tmp_path, "a.jpg")
    _write(tmp_path / "one.json", ["a.jpg"])
    two = _write(tmp_path / "two.json", ["a.jpg"])
    with pytest.raises(ConvertError, match=r"expected one COCO JSON for train, got one\.json, two\.json; give the file"):
        open_source(tmp_path)
    assert len(open_source(two).samples) == 1


def test_files_that_disagree_about_a_category_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "instances_train.json", [])
    _write(tmp_path / "instances_val.json", [], categories=[{"id": 1, "name": "cat"}])
    with pytest.raises(ConvertError, match=r"instances_val\.json: category 1: expected 'person' as elsewhere, got 'cat'"):
        open_source(tmp_path)


def test_categories_of_all_files_are_numbered_together(tmp_path: Path) -> None:
    _write(tmp_path / "instances_train.json", ["a.jpg"], [{"image_id": 1, "category_id": 18, "bbox": [0, 0, 1, 1]}])
    _write(
        tmp_path / "instances_val.json", ["b.jpg"], [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1]}], categories=[{"id": 7, "name": "cat"}]
    )
    _touch(tmp_path, "a.jpg", "b.jpg")
    source = open_source(tmp_path)
    assert source.names == ("person", "cat", "dog", "toothbrush")
    assert [sample.classes.tolist() for sample in source.samples] == [[2], [1]]


def test_what_is_broken_is_left_out_and_reported(tmp_path: Path) -> None:
    annotations: list[dict[str, Any]] = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, float("nan"), 1]},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1]},
        {"id": 4, "image_id": 1, "category_id": 1},
        {"id": 8, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10**400, 1]},
        {"id": 5, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"id": 6, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ]
    _write(tmp_path / "labels.json", ["a.jpg", "gone.jpg"], annotations)
    _touch(tmp_path, "a.jpg")
    source = open_source(tmp_path)
    (sample,) = source.samples
    assert sample.boxes.tolist() == [[0, 0, 1, 1]]
    reasons = {problem.subject.rpartition(": ")[2]: problem.reason for problem in source.problems}
    assert set(reasons) == {
        "annotation 1",
        "annotation 2",
        "annotation 3",
        "annotation 4",
        "annotation 8",
        "image_id 99",
        str(tmp_path / "labels.json"),
        "gone.jpg",
    }
    assert reasons["annotation 3"] == "category 2 is not in categories"
    assert reasons["gone.jpg"] == "the picture does not exist"


def test_pictures_that_are_all_missing_are_an_error(tmp_path: Path) -> None:
    _write(tmp_path / "annotations" / "instances_train.json", ["a.jpg", "b.jpg"])
    with pytest.raises(ConvertError, match=r"expected its 2 pictures in one of .*/train.*, got none there"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "expected JSON, got"),
        ('{"images": []}', "got no annotations, categories"),
        ('{"images": {}, "annotations": [], "categories": []}', "got no images"),
        ('{"images": [], "annotations": [], "categories": [{"name": "x"}]}', "expected categories with a whole id"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ConvertError, match=r"labels\.json: ") as error:
        open_source(tmp_path)
    assert message in str(error.value)


def test_other_json_is_not_taken_for_coco(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text('{"train": ["images"]}')
    (tmp_path / "list.json").write_text('[{"images": 1}]')
    (tmp_path / "images.txt").write_text('{"images": []}')
    assert not coco.detect(tmp_path)
    assert not coco.detect(tmp_path / "images.txt")
    _write(tmp_path / "real.json", [])
    assert coco.detect(tmp_path)
