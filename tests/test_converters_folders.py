"""Folders of pictures: a class per folder, or no labels at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from rinr_loader.converters import image_folder, open_source


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_class_per_folder(tmp_path: Path) -> None:
    source = open_source(_touch(tmp_path, "dogs/x.jpg", "cats/deep/y.PNG", "cats/z.webp", "cats/README.txt"))
    assert (source.format, source.names) == ("image_folder", ("cats", "dogs"))
    assert [(s.split, s.key, s.label) for s in source.samples] == [("train", "cats/deep/y", 0), ("train", "cats/z", 0), ("train", "dogs/x", 1)]
    assert all(sample.boxes.shape == (0, 4) for sample in source.samples)


def test_splits_above_the_classes_share_one_numbering(tmp_path: Path) -> None:
    source = open_source(_touch(tmp_path, "train/b/1.jpg", "train/c/2.jpg", "val/a/3.jpg", "val/c/4.jpg"))
    assert source.names == ("a", "b", "c")
    assert [(s.split, s.key, s.label) for s in source.samples] == [("train", "b/1", 1), ("train", "c/2", 2), ("val", "a/3", 0), ("val", "c/4", 2)]


def test_one_class_is_enough_below_splits_or_when_forced(tmp_path: Path) -> None:
    assert open_source(_touch(tmp_path / "a", "train/cat/1.jpg", "val/cat/2.jpg")).names == ("cat",)
    one = _touch(tmp_path / "b", "cat/1.jpg")
    assert open_source(one).format == "images"
    assert open_source(one, source_format="image_folder").samples[0].label == 0


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = open_source(_touch(tmp_path, "bus/1.jpg", "car/2.jpg", "train/3.jpg"))
    assert (source.format, source.names) == ("image_folder", ("bus", "car", "train"))


def test_an_empty_class_keeps_its_id_and_strays_are_reported(tmp_path: Path) -> None:
    _touch(tmp_path, "train/b/1.jpg", "train/c/2.jpg", "val/b/3.jpg", "val/4.jpg", "unsorted/5.jpg")
    (tmp_path / "train" / "a").mkdir()
    source = open_source(tmp_path, source_format="image_folder")
    assert source.names == ("a", "b", "c")
    assert {Path(problem.subject).name: problem.reason for problem in source.problems} == {
        "4.jpg": "lies in no class folder",
        "unsorted": "is no split",
        "a": "the class folder holds no pictures; the class keeps its id",
    }


@pytest.mark.parametrize("other", ["masks/a.png", "images/a.jpg", "top.jpg"])
def test_folders_that_are_no_classes_are_not_taken_for_some(other: str, tmp_path: Path) -> None:
    assert not image_folder.detect(_touch(tmp_path, "a/1.jpg", "b/2.jpg", other))


def test_pictures_at_any_depth(tmp_path: Path) -> None:
    names = ("a.jpg", "b.JPEG", "x/c.tif", "x/y/d.webp", "e.heic", "f.jp2", ".hidden.jpg", "x/.git/g.jpg", "clip.mp4", "LICENSE.txt")
    source = open_source(_touch(tmp_path, *names))
    assert (source.format, source.names) == ("images", ())
    assert [sample.key for sample in source.samples] == ["a", "b", "e", "f", "x/c", "x/y/d"]
    assert {sample.label for sample in source.samples} == {-1}


def test_pictures_in_split_folders(tmp_path: Path) -> None:
    source = open_source(_touch(tmp_path, "train/x/a.jpg", "val2017/b.jpg", "c.jpg"), source_format="images")
    assert [(sample.split, sample.key) for sample in source.samples] == [("train", "x/a"), ("val", "b")]
    assert [problem.reason for problem in source.problems] == ["lies outside the train, val and test folders"]


def test_a_single_picture(tmp_path: Path) -> None:
    (sample,) = open_source(_touch(tmp_path, "photo.jpg") / "photo.jpg").samples
    assert (sample.key, sample.split) == ("photo", "train")


def test_a_broken_link_is_listed_so_that_it_is_reported_as_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert len(open_source(tmp_path).samples) == 1
