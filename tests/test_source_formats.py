"""open_source: one picture in every format gives the same box, formats are told apart, and what is wrong with a source is said."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rinr_loader.converters import CONVERTERS, open_source
from rinr_loader.errors import ConvertError, RinrError, StorageError
from rinr_loader.source import ByteRange, Sample, Source

# A white rectangle over the pixels of columns 10 to 29 and rows 5 to 14 (counted from 0) of a black picture of 64x48.
SIZE = (64, 48)
BOX = (10, 5, 30, 15)


def _picture(path: Path) -> Path:
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _yolo(root: Path) -> None:
    _picture(root / "images" / "train" / "a.png")
    x1, y1, x2, y2 = BOX
    row = ((x1 + x2) / 2 / SIZE[0], (y1 + y2) / 2 / SIZE[1], (x2 - x1) / SIZE[0], (y2 - y1) / SIZE[1])
    _text(root / "labels" / "train" / "a.txt", "0 " + " ".join(f"{value:.6f}" for value in row))
    _text(root / "data.yaml", "train: images/train\nnames: [thing]\n")


def _coco(root: Path) -> None:
    _picture(root / "train" / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10]}],
        "categories": [{"id": 3, "name": "thing"}],
    }
    _text(root / "annotations" / "instances_train.json", json.dumps(content))


def _voc(root: Path) -> None:
    _picture(root / "JPEGImages" / "a.png")
    # pixels from 1, both ends inside
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax></bndbox>"
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    _text(root / "Annotations" / "a.xml", f"<annotation>{size}<object><name>thing</name>{box}</object></annotation>")


def _dac_sdc(root: Path) -> None:
    _picture(root / "images" / "a.png")
    _text(root / "ground_truth.txt", "a.png [10, 30, 5, 15]\n")


def _otb(root: Path) -> None:
    _picture(root / "img" / "0001.png")
    _text(root / "groundtruth_rect.txt", "11\t6\t20\t10\n")


def _uav123(root: Path) -> None:
    _picture(root / "thing" / "img" / "000001.png")
    _text(root / "thing" / "thing.txt", "10,5,20,10\n")


def _tlp(root: Path) -> None:
    _picture(root / "img" / "00001.png")
    _text(root / "groundtruth_rect.txt", "1,10,5,20,10,0\n")


def _vot(root: Path) -> None:
    _picture(root / "color" / "00000001.png")
    _text(root / "groundtruth.txt", "20,5,30,10,20,15,10,10\n")


def _webdataset(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    picture = _picture(root.with_name("a.png"))
    with tarfile.open(root / "train-000000.tar", "w") as tar:
        for name, content in (("a.png", picture.read_bytes()), ("a.json", json.dumps({"boxes": [BOX], "classes": [0]}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _image_folder(root: Path) -> None:
    _picture(root / "cats" / "a.png")
    _picture(root / "dogs" / "b.png")


def _images(root: Path) -> None:
    _picture(root / "a.png")
    _picture(root / "deeper" / "b.png")


WITH_BOXES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "yolo": ("yolo", _yolo),
    "coco": ("coco", _coco),
    "voc": ("voc", _voc),
    "dac_sdc": ("dac_sdc", _dac_sdc),
    "otb": ("sequence", _otb),
    "uav123": ("sequence", _uav123),
    "tlp": ("sequence", _tlp),
    "vot": ("sequence", _vot),
    "webdataset": ("webdataset", _webdataset),
}
ALL = {**WITH_BOXES, "image_folder": ("image_folder", _image_folder), "images": ("images", _images)}


def _pixels(sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = sample.image
    if isinstance(image, ByteRange):
        with image.path.open("rb") as stream:
            stream.seek(image.offset)
            image = stream.read(image.size)
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("layout", WITH_BOXES)
def test_the_box_covers_exactly_the_white_pixels(layout: str, tmp_path: Path) -> None:
    name, write = WITH_BOXES[layout]
    write(tmp_path / "source")
    source = open_source(tmp_path / "source")
    assert source.format == name
    (sample,) = source.samples
    scale = np.array([*SIZE, *SIZE]) if sample.relative else 1
    x1, y1, x2, y2 = np.rint(sample.boxes[0] * scale).astype(int)
    np.testing.assert_allclose(sample.boxes * scale, [BOX], atol=1e-3)
    pixels = _pixels(sample)
    assert (pixels[y1:y2, x1:x2] == 255).all()
    assert int((pixels == 255).sum()) == (y2 - y1) * (x2 - x1) * 3
    assert (sample.split, sample.classes.tolist(), len(source.names)) == ("train", [0], 1)
    assert (sample.boxes.dtype.name, sample.classes.dtype.name) == ("float32", "int64")


@pytest.mark.parametrize("layout", ALL)
def test_a_format_is_detected_alone_and_can_be_forced(layout: str, tmp_path: Path) -> None:
    name, write = ALL[layout]
    write(tmp_path / "source")
    labelled = [known for known in CONVERTERS if known not in ("image_folder", "images") and CONVERTERS[known].detect(tmp_path / "source")]
    assert labelled == ([name] if layout in WITH_BOXES else [])
    forced = open_source(tmp_path / "source", source_format=name)
    assert [sample.key for sample in forced.samples] == [sample.key for sample in open_source(str(tmp_path / "source")).samples]


def test_every_converter_goes_by_its_own_name() -> None:
    assert {name: converter.NAME for name, converter in CONVERTERS.items()} == {name: name for name in CONVERTERS}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"nowhere: expected a dataset, got nothing there"):
        open_source(tmp_path / "nowhere")


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"yolo, coco, voc.*got 'cocoa'"):
        open_source(tmp_path, source_format="cocoa")


def test_an_empty_folder_has_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="got no pictures and no shards"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_format_refuses_an_empty_folder_when_forced(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="expected"):
        open_source(tmp_path, source_format=name)


def test_two_formats_in_one_folder_are_ambiguous_until_one_is_chosen(tmp_path: Path) -> None:
    _yolo(tmp_path)
    _coco(tmp_path)
    with pytest.raises(ConvertError, match="signs of yolo and coco; choose with --source-format"):
        open_source(tmp_path)
    assert open_source(tmp_path, source_format="coco").format == "coco"


def test_labels_of_an_unknown_kind_are_never_left_behind_without_a_word(tmp_path: Path) -> None:
    _images(tmp_path)
    _text(tmp_path / "a.csv", "a.png,1,2,3,4\n")
    with pytest.raises(ConvertError, match=r"2 pictures and label files such as .*a\.csv; images takes the pictures without labels"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, source_format="images").samples) == 2


def test_a_converted_dataset_is_no_source(tmp_path: Path) -> None:
    _yolo(tmp_path)
    _text(tmp_path / "dataset.json", '{"format": "rinr", "version": 1}')
    with pytest.raises(ConvertError, match="converted already"):
        open_source(tmp_path)


@pytest.mark.parametrize(("first", "second"), [("a.png", "a.jpg"), ("a.png", "A.png"), ("sub/a.png", "Sub/A.jpg")])
def test_keys_that_collide_are_refused_and_the_advice_works(first: str, second: str, tmp_path: Path) -> None:
    _picture(tmp_path / first)
    _picture(tmp_path / second)
    with pytest.raises(ConvertError, match="expected different keys") as error:
        open_source(tmp_path, source_format="images")
    assert str(tmp_path / first) in str(error.value)
    assert str(tmp_path / second) in str(error.value)
    (tmp_path / second).rename(tmp_path / "renamed.png")
    assert len(open_source(tmp_path, source_format="images").samples) == 2


def test_the_same_key_may_be_in_two_splits(tmp_path: Path) -> None:
    _picture(tmp_path / "train" / "a.png")
    _picture(tmp_path / "val" / "a.png")
    assert [(sample.split, sample.key) for sample in open_source(tmp_path).samples] == [("train", "a"), ("val", "a")]


def test_samples_are_sorted_by_split_and_key_and_limited_per_split(tmp_path: Path) -> None:
    for split in ("valid", "train", "test"):
        for name in ("b", "a", "c"):
            _picture(tmp_path / split / f"{name}.png")
    samples = open_source(tmp_path).samples
    assert [(s.split, s.key) for s in samples] == [(split, key) for split in ("train", "val", "test") for key in "abc"]
    limited = open_source(tmp_path, limit=2).samples
    assert [(s.split, s.key) for s in limited] == [(split, key) for split in ("train", "val", "test") for key in "ab"]


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_numbers_out_of_range_are_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_fraction: expected a share"):
        open_source(tmp_path, val_fraction=fraction)
    with pytest.raises(ValueError, match="limit: expected at least 1"):
        open_source(tmp_path, limit=0)


def _val(source: Source) -> set[str]:
    return {sample.key for sample in source.samples if sample.split == "val"}


def test_val_fraction_takes_its_share_by_names_alone(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").touch()
    quarter = open_source(tmp_path, val_fraction=0.25)
    assert Counter(sample.split for sample in quarter.samples) == {"train": 30, "val": 10}
    assert _val(quarter) == _val(open_source(tmp_path, val_fraction=0.25))
    assert _val(quarter) < _val(open_source(tmp_path, val_fraction=0.5))
    assert [s.key for s in quarter.samples if s.split == "val"] == sorted(_val(quarter))
    assert _val(open_source(tmp_path)) == set()


def test_val_fraction_leaves_a_source_with_val_as_it_is(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "train/c", "val/d"):
        _picture(tmp_path / f"{name}.png")
    assert _val(open_source(tmp_path, val_fraction=0.5)) == {"d"}


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_val_fraction_never_divides_a_sequence_nor_takes_all_or_none(fraction: float, tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 5), ("three", 9)):
        for i in range(1, count + 1):
            (tmp_path / name / "img").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "img" / f"{i:04d}.jpg").touch()
        _text(tmp_path / name / "groundtruth_rect.txt", "1,1,2,2\n" * count)
    source = open_source(tmp_path, val_fraction=fraction)
    splits = {name: {sample.split for sample in source.samples if sample.sequence == name} for name in ("one", "two", "three")}
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "val"} == set.union(*splits.values())


def test_val_fraction_of_one_sequence_is_refused(tmp_path: Path) -> None:
    _otb(tmp_path)
    with pytest.raises(ConvertError, match=r"at least two pictures or sequences in train to divide, got 1; leave it out"):
        open_source(tmp_path, val_fraction=0.2)
    assert len(open_source(tmp_path).samples) == 1


def test_numbers_too_large_for_a_box_are_handed_on_as_invalid(tmp_path: Path) -> None:
    _dac_sdc(tmp_path)
    _text(tmp_path / "ground_truth.txt", "a.png [10, 1e300, 5, 15]\n")
    assert np.isinf(open_source(tmp_path).samples[0].boxes).any()


def test_what_the_system_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(StorageError, match=r"x\.tar: expected a readable dataset, got Is a directory"):
        open_source(tmp_path, source_format="webdataset")


REAL = {
    "bccd_voc": ("voc", {"train": 40}, 784, 3),
    "coco_yolo": ("yolo", {"train": 128}, 929, 80),
    "dac_sdc": ("dac_sdc", {"train": 242, "test": 58}, 300, 1),
    "hymenoptera": ("image_folder", {"train": 32}, 0, 2),
    "kodak": ("images", {"train": 8}, 0, 0),
    "photos_lossless": ("images", {"train": 12}, 0, 0),
    "otb_crossing": ("sequence", {"train": 120}, 120, 1),
    "otb_freeman1_gray": ("sequence", {"train": 64}, 64, 1),
    "otb_jogging_2obj": ("sequence", {"train": 100}, 200, 1),
    "otb_man": ("sequence", {"train": 134}, 134, 1),
    "tinytlp_carchase2": ("sequence", {"train": 64}, 64, 1),
    "uav123_10fps_wakeboard7": ("sequence", {"train": 67}, 67, 1),
    "vot15_bag_polygon": ("sequence", {"train": 100}, 100, 1),
}


@pytest.mark.real_data(*REAL)
@pytest.mark.parametrize("folder", REAL)
def test_real_sets_are_read_whole(folder: str, real_data: Path) -> None:
    source = open_source(real_data / folder)
    boxes = sum(len(sample.boxes) for sample in source.samples)
    assert (source.format, Counter(s.split for s in source.samples), boxes, len(source.names)) == REAL[folder]
    expected = {"coco_yolo": 2}.get(folder, 0)  # the two splits that its yaml names do not exist
    assert len(source.problems) == expected
    for sample in source.samples[::17]:
        assert isinstance(sample.image, Path)
        with Image.open(sample.image) as image:
            width, height = image.size
        assert sample.declared_size in (None, (width, height))
        limit = np.array([1, 1, 1, 1] if sample.relative else [width, height, width, height])
        assert (sample.boxes >= -0.01 * limit).all()
        assert (sample.boxes <= 1.01 * limit).all()


@pytest.mark.real_data
def test_a_folder_of_many_datasets_is_no_dataset(real_data: Path) -> None:
    with pytest.raises(RinrError, match="expected a dataset in one of the formats"):
        open_source(real_data)


@pytest.mark.real_data("video")
def test_a_folder_of_videos_has_no_pictures(real_data: Path) -> None:
    with pytest.raises(ConvertError, match="got no pictures"):
        open_source(real_data / "video")
