"""DAC-SDC: the order of the numbers, split.json, and the XML of the released training set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rinr_loader.converters import dac_sdc, open_source, voc
from rinr_loader.errors import ConvertError


def _set(root: Path, rows: str, frames: tuple[str, ...], *, folder: str = "images") -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ground_truth.txt").write_text(rows)
    for frame in frames:
        (root / folder / frame).touch()
    return root


@pytest.mark.parametrize("folder", ["images", "."])
def test_both_x_come_before_both_y(folder: str, tmp_path: Path) -> None:
    _set(tmp_path, "0.jpg [295, 382, 131, 232]\n1.jpg [1,2.5,3,4]\n", ("0.jpg", "1.jpg"), folder=folder)
    for path in (tmp_path, tmp_path / "ground_truth.txt"):
        source = open_source(path)
        assert [sample.boxes.tolist() for sample in source.samples] == [[[295, 131, 382, 232]], [[1, 3, 2.5, 4]]]
        assert ([sample.key for sample in source.samples], source.names) == (["0", "1"], ("object",))


def test_split_json_gives_the_splits(tmp_path: Path) -> None:
    _set(tmp_path, "".join(f"{name}.jpg [1, 2, 3, 4]\n" for name in "abc"), ("a.jpg", "b.jpg", "c.jpg"))
    (tmp_path / "split.json").write_text(json.dumps({"about": "text", "train": ["a.jpg"], "test": ["b.jpg", "a.jpg"]}))
    source = open_source(tmp_path)
    assert [(sample.key, sample.split) for sample in source.samples] == [("a", "train"), ("b", "test")]
    assert [(Path(p.subject).name, p.reason) for p in source.problems] == [
        ("split.json: a.jpg", "is listed for train too and stays there"),
        ("c.jpg", "is not listed in split.json"),
    ]


@pytest.mark.parametrize("text", ["[]", '{"first": ["a.jpg"]}', "{"])
def test_a_split_json_that_says_nothing_is_refused_and_the_advice_works(text: str, tmp_path: Path) -> None:
    _set(tmp_path, "a.jpg [1, 2, 3, 4]\n", ("a.jpg",))
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ConvertError, match=r"split\.json: expected .*; correct or delete it"):
        open_source(tmp_path)
    (tmp_path / "split.json").unlink()
    assert len(open_source(tmp_path).samples) == 1


def test_what_does_not_fit_is_left_out_and_reported(tmp_path: Path) -> None:
    rows = "a.jpg [1, 2, 3, 4]\nb.jpg [1, 2, 3]\nc.jpg [1, nan, 3, 4]\nd.jpg 1 2 3 4\n\ngone.jpg [1, 2, 3, 4]\na.jpg [5, 6, 7, 8]\n"
    source = open_source(_set(tmp_path, rows, ("a.jpg", "b.jpg", "c.jpg", "d.jpg")))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[1, 3, 2, 4], [5, 7, 6, 8]]]
    subjects = [Path(problem.subject).name for problem in source.problems]
    assert subjects == ["ground_truth.txt:2", "ground_truth.txt:3", "ground_truth.txt:4", "gone.jpg", "b.jpg", "c.jpg", "d.jpg"]


def _release(root: Path, category: str, name: str, kind: str, *, size: tuple[int, int] = (640, 360), rest: str = "") -> None:
    folder = root / category
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jpg").touch()
    box = "<bndbox><xmin>276</xmin><ymin>128</ymin><xmax>311</xmax><ymax>194</ymax></bndbox>"
    head = f"<filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    (folder / f"{name}.xml").write_text(f"<annotation>{head}<object><name>{kind}</name>{box}{rest}</object></annotation>")


def test_the_released_xml_is_told_from_voc(tmp_path: Path) -> None:
    _release(tmp_path, "whale1", "720 (13)_0001", "whale1")
    _release(tmp_path, "whale3", "720 [1]_0001", "whale3")
    _release(tmp_path, "boat2", "0001", "boat2")
    assert not voc.detect(tmp_path)
    source = open_source(tmp_path)
    assert (source.format, source.names) == ("dac_sdc", ("boat", "whale"))
    assert [sample.boxes.tolist() for sample in source.samples] == [[[276, 128, 311, 194]]] * 3
    assert [(s.key, s.classes.tolist(), s.sequence) for s in source.samples] == [
        ("boat2/0001", [0], "boat2"),
        ("whale1/720 (13)_0001", [1], "whale1"),
        ("whale3/720 [1]_0001", [1], "whale3"),
    ]


def test_other_xml_in_folders_is_not_taken_for_the_contest(tmp_path: Path) -> None:
    _release(tmp_path / "size", "a", "1", "cat", size=(640, 480))
    _release(tmp_path / "fields", "a", "1", "cat", rest="<difficult>0</difficult>")
    assert not dac_sdc.detect(tmp_path / "size")
    assert not dac_sdc.detect(tmp_path / "fields")
    with pytest.raises(ConvertError, match="label files such as"):
        open_source(tmp_path / "size")


def test_released_xml_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    _release(tmp_path, "boat2", "0001", "boat2")
    (tmp_path / "boat2" / "0002.jpg").touch()
    (tmp_path / "boat2" / "0003.jpg").touch()
    (tmp_path / "boat2" / "0003.xml").write_text("<annotation>")
    (tmp_path / "boat2" / "0004.xml").write_text("<annotation/>")
    source = open_source(tmp_path)
    assert len(source.samples) == 1
    assert sorted(Path(problem.subject).name for problem in source.problems) == ["0002.jpg", "0003.jpg", "0004.xml"]


@pytest.mark.real_data("dac_sdc")
def test_the_real_frames_have_small_boxes_inside(real_data: Path) -> None:
    source = open_source(real_data / "dac_sdc")
    areas = sorted(float((x2 - x1) * (y2 - y1)) for sample in source.samples for x1, y1, x2, y2 in sample.boxes)
    assert min(areas) > 0
    assert areas[len(areas) // 2] / (640 * 360) == pytest.approx(0.005, abs=0.002)
