"""Pascal VOC: coordinates, splits, attributes and broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rinr_loader.converters import open_source, voc
from rinr_loader.errors import ConvertError


def _object(name: str = "cat", box: tuple[object, ...] = (11, 21, 30, 40), rest: str = "") -> str:
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{rest}<bndbox>{corners}</bndbox></object>"


def _xml(*objects: str, size: tuple[int, int] = (64, 48)) -> str:
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>other.jpg</filename>{head}{''.join(objects)}</annotation>"


def _set(root: Path, files: dict[str, str], *, annotations: str = "Annotations", images: str = "JPEGImages") -> Path:
    """Write XML files by key, and a picture for each."""
    for key, text in files.items():
        for path in (root / annotations / f"{key}.xml", root / images / f"{key}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text if path.suffix == ".xml" else "")
    return root


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((11, 21, 30, 40), (10, 20, 30, 40)),
        ((1, 1, 64, 48), (0, 0, 64, 48)),
        ((0, 5, 10, 10), (0, 4, 10, 10)),
        ((10.5, 1.25, 20.5, 9), (9.5, 0.25, 20.5, 9)),
        ((181, 329, 181, 329), (180, 328, 180, 328)),
        ((30, 21, 11, 40), (29, 20, 29, 40)),
        ((-5, 1, 10, 10), (-5, 0, 10, 10)),
    ],
)
def test_pixels_are_counted_from_one_and_both_ends_are_inside(given: tuple[float, ...], expected: tuple[float, ...], tmp_path: Path) -> None:
    (sample,) = open_source(_set(tmp_path, {"a": _xml(_object(box=given))})).samples
    assert sample.boxes.tolist() == [list(expected)]
    assert sample.declared_size == (64, 48)


def test_names_are_sorted_and_attributes_kept_where_they_say_something(tmp_path: Path) -> None:
    dog = _object("dog", rest="<pose>Left</pose><truncated>1</truncated><difficult>0</difficult><part><name>head</name></part>")
    cat = _object("cat", rest="<pose>Unspecified</pose><truncated>0</truncated><difficult>1</difficult>")
    source = open_source(_set(tmp_path, {"b": _xml(dog, cat), "a": _xml(_object("zebra"))}))
    a, b = source.samples
    assert source.names == ("cat", "dog", "zebra")
    assert (a.classes.tolist(), a.extra) == ([2], {})
    assert (b.classes.tolist(), b.extra) == ([1, 0], {"objects": [{"pose": "Left", "truncated": 1}, {"difficult": 1}]})


def test_an_xml_without_objects_is_a_background_and_a_picture_without_xml_is_left_out(tmp_path: Path) -> None:
    _set(tmp_path, {"a": _xml(), "b": _xml(_object())})
    (tmp_path / "JPEGImages" / "c.jpg").touch()
    (tmp_path / "Annotations" / "d.xml").write_text(_xml(_object()))
    source = open_source(tmp_path)
    assert [(sample.key, len(sample.boxes)) for sample in source.samples] == [("a", 0), ("b", 1)]
    assert {Path(problem.subject).name: problem.reason for problem in source.problems} == {
        "c.jpg": "has no XML file; add one without objects to keep it as a background",
        "d.xml": "its picture does not exist",
    }
    (tmp_path / "Annotations" / "c.xml").write_text(_xml())
    assert [sample.key for sample in open_source(tmp_path).samples] == ["a", "b", "c"]


def test_image_sets_give_the_splits(tmp_path: Path) -> None:
    _set(tmp_path, {key: _xml(_object()) for key in ("a", "b", "c", "d e 1", "f", "g")})
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, text in {"train": "a\nd e 1\n", "val": "b  1\nzzz\n", "trainval": "a\nb\nf\n", "test": "c.jpg\na\n"}.items():
        (lists / f"{name}.txt").write_text(text)
    source = open_source(tmp_path)
    assert [(s.split, s.key) for s in source.samples] == [("train", "a"), ("train", "d e 1"), ("train", "f"), ("val", "b"), ("test", "c")]
    subjects = [problem.subject.rpartition("/")[2] for problem in source.problems]
    assert sorted(subjects) == ["g.jpg", "test.txt: a", "val.txt: zzz"]


@pytest.mark.parametrize(("annotations", "images"), [("", ""), ("annotations", "images"), ("labels", "images"), ("Annotations", "JPEGImages")])
def test_layouts(annotations: str, images: str, tmp_path: Path) -> None:
    source = open_source(_set(tmp_path, {"a": _xml(_object())}, annotations=annotations, images=images))
    assert (source.format, [sample.key for sample in source.samples]) == ("voc", ["a"])


@pytest.mark.parametrize("inside", ["", "images"])
def test_split_folders_give_the_splits(inside: str, tmp_path: Path) -> None:
    for split, key in (("train", "a"), ("valid", "b"), ("test", "c")):
        _set(tmp_path / split, {key: _xml(_object(f"kind_{key}"))}, annotations="labels" if inside else "", images=inside)
    source = open_source(tmp_path)
    assert [(s.split, s.key, s.classes.tolist()) for s in source.samples] == [("train", "a", [0]), ("val", "b", [1]), ("test", "c", [2])]


def test_a_devkit_with_one_year_is_opened_and_with_two_asks(tmp_path: Path) -> None:
    _set(tmp_path / "VOC2007", {"a": _xml(_object())})
    assert len(open_source(tmp_path).samples) == 1
    _set(tmp_path / "VOC2012", {"b": _xml(_object())})
    with pytest.raises(ConvertError, match="expected one VOC set, got VOC2007, VOC2012"):
        open_source(tmp_path)
    assert [sample.key for sample in open_source(tmp_path / "VOC2012").samples] == ["b"]


def test_broken_objects_are_dropped_and_broken_files_take_their_picture_out(tmp_path: Path) -> None:
    objects = [_object(box=("nan", 1, 2, 3)), _object(box=("", 1, 2, 3)), _object(name=""), "<object><name>x</name></object>", _object("ok")]
    _set(tmp_path, {"a": _xml(*objects), "b": "<annotation><object>", "c": "<label/>", "d": '<?xml version="1.0" encoding="nope"?><annotation/>'})
    source = open_source(tmp_path, source_format="voc")
    (sample,) = source.samples
    assert (sample.key, source.names, len(sample.boxes)) == ("a", ("ok",), 1)
    by_file: dict[str, list[str]] = {}
    for problem in source.problems:
        by_file.setdefault(Path(problem.subject).stem, []).append(problem.reason)
    assert {key: len(reasons) for key, reasons in by_file.items()} == {"a": 4, "b": 1, "c": 1, "d": 1}
    assert by_file["a"][0].startswith("object 1 (cat): expected 4 finite numbers, got xmin 'nan'")
    assert "expected <annotation>, got <label>" in by_file["c"][0]


def test_a_size_of_zero_is_no_declared_size(tmp_path: Path) -> None:
    assert open_source(_set(tmp_path, {"a": _xml(_object(), size=(0, 0))})).samples[0].declared_size is None


def test_xml_of_another_kind_is_not_taken_for_voc(tmp_path: Path) -> None:
    _set(tmp_path, {"a": "<html/>"}, annotations="", images="")
    assert not voc.detect(tmp_path)
    assert not voc.detect(tmp_path / "a.xml")


@pytest.mark.real_data("bccd_voc")
def test_bccd_touches_the_borders_exactly(real_data: Path) -> None:
    source = open_source(real_data / "bccd_voc")
    assert source.names == ("Platelets", "RBC", "WBC")
    boxes = np.concatenate([sample.boxes for sample in source.samples])
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2].max() == 640
    assert boxes[:, 3].max() == 480


@pytest.mark.real_data("odd_inputs")
def test_the_zero_area_box_is_handed_on_as_empty(real_data: Path) -> None:
    (sample,) = open_source(real_data / "odd_inputs" / "voc_zero_area_box").samples
    width, height = (sample.boxes[:, 2:] - sample.boxes[:, :2]).T
    assert int(((width == 0) & (height == 0)).sum()) == 1
    assert len(sample.boxes) == 12
