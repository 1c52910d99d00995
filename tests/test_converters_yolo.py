"""YOLO: where images and labels are found, what the rows mean, and which rows are dropped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rinr_loader.converters import open_source, yolo
from rinr_loader.converters.yolo_labels import parse_labels
from rinr_loader.errors import ConvertError
from rinr_loader.source import Source


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def _keys(source: Source) -> dict[str, list[str]]:
    return {split: keys for split in ("train", "val", "test") if (keys := [s.key for s in source.samples if s.split == split])}


def test_splits_may_be_folders_lists_and_files_of_paths(tmp_path: Path) -> None:
    images = {f"images/{name}.jpg": "" for name in ("train/a", "train/deep/b", "more/c", "val/d", "val/e")}
    lists = {"val.txt": "./images/val/d.jpg\nimages/val/e.jpg\n\nimages/val/notes.md\n"}
    _files(tmp_path, images | lists | {"data.yaml": "train: [images/train, images/more]\nval: val.txt\ntest:\nnames: [x]\n"})
    source = open_source(tmp_path)
    assert _keys(source) == {"train": ["images/more/c", "images/train/a", "images/train/deep/b"], "val": ["val/d", "val/e"]}
    assert source.problems == ()


def test_an_image_in_a_list_is_taken_once_and_may_be_anywhere(tmp_path: Path) -> None:
    outside = _files(tmp_path / "outside", {"a.jpg": "", "a.txt": "0 .5 .5 .1 .1"}) / "a.jpg"
    _files(tmp_path / "set", {"lists/train.txt": f"{outside}\n{outside}\nb.jpg\n", "b.jpg": "", "d.yaml": "train: lists/train.txt\nnc: 1\n"})
    source = open_source(tmp_path / "set")
    assert [(sample.key, len(sample.boxes)) for sample in source.samples] == [("a", 1), ("b", 0)]
    assert [problem.reason for problem in source.problems] == ["is listed twice in train"]
    assert source.names == ("class_0",)


@pytest.mark.parametrize("written", ["..", "{root}", "moved/away", "/nowhere/at/all", ""])
def test_path_is_absolute_relative_or_out_of_date(written: str, tmp_path: Path) -> None:
    root = _files(tmp_path / "set", {"images/a.jpg": "", "cfg/data.yaml": "", "cfg/images/a.jpg": ""})
    text = f"path: {written.format(root=root)}\ntrain: images\nnames: [x]\n"
    (root / "cfg" / "data.yaml").write_text(text)
    (sample,) = open_source(root / "cfg" / "data.yaml").samples
    assert isinstance(sample.image, Path)
    assert sample.image.resolve() == (root if written in ("..", "{root}") else root / "cfg") / "images" / "a.jpg"


def test_a_relative_path_may_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _files(tmp_path, {"here/images/a.jpg": "", "yamls/coco.yaml": "path: here\ntrain: images\nnames: [x]\n"})
    monkeypatch.chdir(tmp_path)
    assert [s.key for s in open_source("yamls/coco.yaml").samples] == ["a"]


def test_a_leading_dot_dot_that_leads_nowhere_is_passed_over(tmp_path: Path) -> None:
    names = {"train/images/a.jpg": "", "valid/images/b.jpg": "", "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['x']\n"}
    assert _keys(open_source(_files(tmp_path, names))) == {"train": ["a"], "val": ["b"]}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_does_not_exist_is_an_error_and_the_advice_works(split: str, tmp_path: Path) -> None:
    other = "val" if split == "train" else "train"
    yaml = _files(tmp_path, {"images/a.jpg": "", "data.yaml": f"{other}: images\n{split}: images/none\nnames: [x]\n"}) / "data.yaml"
    for path in (tmp_path, yaml):
        with pytest.raises(ConvertError, match=rf"data\.yaml: {split}: expected images at .*images/none, got nothing there; .* drop that line"):
            open_source(path)
    yaml.write_text(f"{other}: images\nnames: [x]\n")
    assert _keys(open_source(tmp_path)) == {other: ["a"]}


def test_a_missing_test_split_is_reported(tmp_path: Path) -> None:
    source = open_source(_files(tmp_path, {"images/a.jpg": "", "data.yaml": "train: images\ntest: test-dev.txt\nnames: [x]\n"}))
    assert [problem.subject.endswith("data.yaml: test") for problem in source.problems] == [True]


def test_folders_are_read_where_the_yaml_names_no_split_that_exists(tmp_path: Path) -> None:
    names = {
        "images/a.jpg": "",
        "labels/a.txt": "1 .5 .5 .1 .1",
        "some_names.yaml": "path: .\ntrain: images/t\nval: images/v\nnames:\n  0: x\n  1: y\n",
    }
    source = open_source(_files(tmp_path, names))
    assert (_keys(source), source.names) == ({"train": ["a"]}, ("x", "y"))
    assert [problem.subject.rpartition(" ")[2] for problem in source.problems] == ["train", "val"]
    with pytest.raises(ConvertError, match="train: expected images at"):
        open_source(tmp_path / "some_names.yaml")


@pytest.mark.parametrize("pattern", ["images/{split}/{name}.jpg", "{split}/images/{name}.jpg"])
def test_folders_without_a_yaml_give_splits_and_numbered_names(pattern: str, tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        image = pattern.format(split=split, name=name)
        _files(tmp_path, {image: "", image.replace("images", "labels").replace("jpg", "txt"): "2 .5 .5 .2 .2"})
    source = open_source(tmp_path)
    assert _keys(source) == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert source.names == ("class_0", "class_1", "class_2")


def test_classes_txt_names_the_classes(tmp_path: Path) -> None:
    source = open_source(_files(tmp_path, {"images/a.jpg": "", "labels/a.txt": "1 .5 .5 .2 .2", "labels/classes.txt": "cat\ndog\n"}))
    assert source.names == ("cat", "dog")


def test_the_last_images_folder_decides_where_labels_are(tmp_path: Path) -> None:
    root = tmp_path / "images" / "set"
    _files(root, {"images/s/a.b.jpg": "", "labels/s/a.b.txt": "0 .5 .5 .2 .2", "plain/c.jpg": "", "plain/c.txt": "0 .5 .5 .2 .2"})
    _files(root, {"data.yaml": "train: images\nnames: [x]\n"})
    assert [(s.key, len(s.boxes)) for s in open_source(root).samples] == [("s/a.b", 1)]
    outside = tmp_path / "other"
    _files(outside, {"plain/c.jpg": "", "plain/c.txt": "0 .5 .5 .2 .2", "data.yaml": "train: plain\nnames: [x]\n"})
    assert [(s.key, len(s.boxes)) for s in open_source(outside).samples] == [("c", 1)]


def test_labels_are_found_from_inside_the_images_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _files(tmp_path, {"images/a.jpg": "", "labels/a.txt": "0 .5 .5 .2 .2", "images/d.yaml": "train: .\nnames: [x]\n"})
    monkeypatch.chdir(tmp_path / "images")
    assert [len(sample.boxes) for sample in open_source("d.yaml").samples] == [1]


def test_images_without_or_with_empty_labels_are_backgrounds(tmp_path: Path) -> None:
    labels = {"labels/b.txt": "", "labels/c.txt": "\n \n", "labels/d.txt": "\ufeff0 .5 .5 .2 .2\r\n"}
    source = open_source(_files(tmp_path, {f"images/{name}.jpg": "" for name in "abcd"} | labels))
    assert [(s.key, s.boxes.shape, s.extra) for s in source.samples] == [(k, (0, 4), {}) for k in "abc"] + [("d", (1, 4), {})]
    assert source.problems == ()


def test_bad_rows_are_dropped_one_by_one_with_file_and_line(tmp_path: Path) -> None:
    rows = ["0 .5 .5 .2 .2", "0 .5 .5 .2", "0 .5 .5 .2 .2 .9", "0 nan .5 .2 .2", "0 .5 x .2 .2", "2 .5 .5 .2 .2", "-1 .5 .5 .2 .2", "0.5 .5 .5 .2 .2"]
    rows += ["0 320 240 50 50", "0 .5 .5 -.2 .2", "0 .5 .5 .2 .2", "0 inf .5 .2 .2", "1 .9 .9 .4 .4"]
    source = open_source(_files(tmp_path, {"images/a.jpg": "", "labels/a.txt": "\n".join(rows), "d.yaml": "train: images\nnames: [x, y]\n"}))
    (sample,) = source.samples
    np.testing.assert_allclose(sample.boxes, [[0.4, 0.4, 0.6, 0.6], [0.7, 0.7, 1.1, 1.1]], atol=1e-6)  # leaves the image: the encoder clips
    assert sample.classes.tolist() == [0, 1]
    reasons = {int(problem.subject.rpartition(":")[2]): problem.reason for problem in source.problems}
    assert sorted(reasons) == list(range(2, 13))
    assert "got 4 columns" in reasons[2]
    assert "got 6 columns" in reasons[3]
    assert reasons[6].startswith("expected a class id from 0 to 1, got 2")
    assert reasons[11] == "repeats row 1"
    assert "fractions" in reasons[9]
    assert all(problem.subject.startswith(str(tmp_path / "labels" / "a.txt:")) for problem in source.problems)


def test_polygons_become_boxes_and_are_kept(tmp_path: Path) -> None:
    text = "1 .2 .3 .6 .3 .4 .8\n0 .5 .5 .2 .2\n"
    (sample,) = open_source(_files(tmp_path, {"images/a.jpg": "", "labels/a.txt": text, "d.yaml": "train: images\nnames: [x, y]\n"})).samples
    np.testing.assert_allclose(sample.boxes, [[0.2, 0.3, 0.6, 0.8], [0.4, 0.4, 0.6, 0.6]], atol=1e-6)
    assert sample.extra == {"objects": [{"polygon": [0.2, 0.3, 0.6, 0.3, 0.4, 0.8]}, {}]}
    assert sample.classes.tolist() == [1, 0]


def test_pose_rows_keep_their_keypoints(tmp_path: Path) -> None:
    text = "0 .5 .5 .2 .2 .4 .4 2 .6 .6 1"
    yaml = "train: images\nnames: [x]\nkpt_shape: [2, 3]\n"
    (sample,) = open_source(_files(tmp_path, {"images/a.jpg": "", "labels/a.txt": text, "d.yaml": yaml})).samples
    np.testing.assert_allclose(sample.boxes, [[0.4, 0.4, 0.6, 0.6]], atol=1e-6)
    assert sample.extra == {"objects": [{"keypoints": [0.4, 0.4, 2, 0.6, 0.6, 1]}]}


def test_a_label_file_that_is_no_text_takes_its_image_out(tmp_path: Path) -> None:
    _files(tmp_path, {"images/a.jpg": "", "images/b.jpg": "", "labels/b.txt": ""})
    (tmp_path / "labels" / "a.txt").write_bytes(b"0 .5 .5 \xff .2")
    source = open_source(tmp_path)
    assert [sample.key for sample in source.samples] == ["b"]
    assert "0xff at 8" in source.problems[0].reason


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [a, b]", ("a", "b")),
        ("names: {1: b, 0: a}", ("a", "b")),
        ("nc: 2", ("class_0", "class_1")),
        ("nc: 2\nnames: [yes, 007]", ("yes", "007")),  # YAML would make True and 7 of them
        ("names:\nnc: 1", ("class_0",)),
    ],
)
def test_names(names: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    assert open_source(_files(tmp_path, {"images/a.jpg": "", "data.yaml": f"train: images\n{names}\n"})).names == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images\nnames: {0: a, 2: b}", "names: expected the ids 0 to 1, got 0, 2"),
        ("train: images\nnc: 3\nnames: [a]", "expected 3 names as `nc` says, got 1"),
        ("train: images\nnc: many", "nc: expected a whole number, got 'many'"),
        ("train: images\nnames: person", "names: expected a list or ids with names, got 'person'"),
        ("train: images\nkpt_shape: [x]\nnc: 1", "kpt_shape: expected"),
        ("train: images\nnames: [[a, b]]", "names: expected a text for every class, got a list"),
        ("train: {a: b}\nnc: 1", "train: expected a path or a list of paths, got a dict"),
        ("train: images\npath: [a]\nnc: 1", "path: expected a folder, got a list"),
        ("- a\n- b", "expected `train:`, `val:` and `names:`, got a list"),
        ("", "expected `train:`, `val:` and `names:`, got a NoneType"),
        ("train: [images", "expected YAML, got"),
    ],
)
def test_a_yaml_that_cannot_be_used_says_why(text: str, message: str, tmp_path: Path) -> None:
    _files(tmp_path, {"images/a.jpg": "", "data.yaml": text})
    with pytest.raises(ConvertError, match=r"data\.yaml: ") as error:
        open_source(tmp_path / "data.yaml")
    assert message in str(error.value)


def test_several_yamls_ask_for_one_and_a_foreign_one_is_passed_over(tmp_path: Path) -> None:
    _files(tmp_path, {"images/a.jpg": "", "a.yaml": "train: images\nnames: [x]", "other.yaml": "- 1"})
    assert open_source(tmp_path).names == ("x",)
    _files(tmp_path, {"b.yaml": "train: images\nnames: [y]"})
    with pytest.raises(ConvertError, match=r"expected one dataset yaml, got a\.yaml, b\.yaml; give the file"):
        open_source(tmp_path)
    assert open_source(tmp_path / "b.yaml").names == ("y",)


def test_hidden_files_are_passed_over_and_linked_folders_followed(tmp_path: Path) -> None:
    _files(tmp_path / "far", {"a.JPG": "", "._a.JPG": "", ".cache/b.jpg": ""})
    _files(tmp_path / "set", {"data.yaml": "train: images\nnames: [x]"})
    (tmp_path / "set" / "images").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    assert [sample.key for sample in open_source(tmp_path / "set").samples] == ["a"]


def test_rows_may_name_any_class_where_nothing_names_them() -> None:
    assert parse_labels("79 .5 .5 .1 .1").classes == [79]
    assert parse_labels("1e3 .5 .5 .1 .1").classes == [1000]
    assert parse_labels("1e300 .5 .5 .1 .1").problems[0][1].startswith("expected a class id from 0 to 65535")


@given(st.text(alphabet="0123456789.-+einfa \n\t_", max_size=200), st.one_of(st.none(), st.integers(1, 9)))
def test_any_text_gives_boxes_or_reasons(text: str, class_count: int | None) -> None:
    labels = parse_labels(text, class_count=class_count)
    assert len(labels.boxes) == len(labels.classes) == len(labels.objects)
    assert len(labels.boxes) + len(labels.problems) == sum(bool(line.strip()) for line in text.splitlines())
    assert all(np.isfinite(box).all() and x1 <= x2 and y1 <= y2 for box in labels.boxes for x1, y1, x2, y2 in [box])
    assert all(0 <= label < (class_count or 65_536) for label in labels.classes)


@pytest.mark.requires("ultralytics")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "rows", ["0 .5 .5 .2 .2\n1 .25 .75 .5 .5\n1 .25 .75 .5 .5\n0 1 1 .1 .1\n", "1 .2 .3 .6 .3 .4 .8\n0 .1 .1 .2 .1 .2 .2 .1 .2\n", "\n", None]
)
def test_boxes_and_label_paths_are_those_of_ultralytics(rows: str | None, tmp_path: Path) -> None:
    from ultralytics.data.utils import img2label_paths, verify_image_label

    image = tmp_path / "images" / "x" / "images" / "a.b.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(image)
    (label,) = img2label_paths([str(image)])
    if rows is not None:
        _files(Path(label).parent, {Path(label).name: rows})
    (sample,) = open_source(_files(tmp_path, {"data.yaml": "train: images\nnames: [x, y]\n"})).samples
    _, theirs, *_ = verify_image_label((str(image), label, "", False, 2, 0, 0, False))
    centre, extent = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2, sample.boxes[:, 2:] - sample.boxes[:, :2]
    ours = np.concatenate([sample.classes[:, None], centre, extent], axis=1)
    np.testing.assert_allclose(sorted(ours.tolist()), sorted(theirs.tolist()), atol=1e-6)


def test_detect_wants_labels_beside_images(tmp_path: Path) -> None:
    _files(tmp_path, {"images/a.jpg": "", "labels/a.xml": ""})
    assert not yolo.detect(tmp_path)
    _files(tmp_path, {"labels/a.txt": ""})
    assert yolo.detect(tmp_path)


@pytest.mark.real_data("coco_yolo")
def test_coco128_agrees_with_its_label_files(real_data: Path) -> None:
    source = open_source(real_data / "coco_yolo")
    backgrounds = [sample.key for sample in source.samples if not len(sample.boxes)]
    assert len(backgrounds) == 2
    assert not any((real_data / "coco_yolo" / "labels" / f"{key}.txt").exists() for key in backgrounds)
    assert source.names[0] == "person"
    assert os.fspath(real_data) in str(source.samples[0].image)
