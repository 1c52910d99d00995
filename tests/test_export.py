"""`rinr export`: pictures as decoded, labels as stored, and what other programs make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SCENE_NAMES, assert_close
from PIL import Image
from small_datasets import drawn, tree_hash, write_detection
from tiny_shards import write_shards

from rinr_loader import RinrDataset
from rinr_loader.converters import open_source
from rinr_loader.errors import ConfigError, ShardError, StorageError
from rinr_loader.export import export
from rinr_loader.pictures import decode_pictures
from rinr_loader.source import Sample


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detection(tmp_path_factory.mktemp("export") / "shards")


def test_pictures_are_those_decoded(dest: Path, tmp_path: Path) -> None:
    done = export(dest, tmp_path / "out")
    assert (done.pictures, done.crowds) == (7, 1)
    for split in ("train", "val"):
        dataset = RinrDataset(dest, split)
        for key, pixels in zip(dataset.keys, decode_pictures(dataset, range(len(dataset))), strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "out/images" / split / f"{key}.png")), pixels)
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 7


def test_labels_are_read_back_as_a_yolo_dataset(dest: Path, tmp_path: Path) -> None:
    export(dest, tmp_path / "out", picture_format="jpeg")
    source = open_source(tmp_path / "out")
    assert (source.format, source.names, source.problems) == ("yolo", SCENE_NAMES, ())
    for split in ("train", "val"):
        dataset = RinrDataset(dest, split)
        found = {sample.key: sample for sample in source.samples if sample.split == split}
        assert sorted(found) == sorted(dataset.keys)
        for label in dataset.labels:
            height, width = label["size"]
            sample = found[label["key"]]
            kept = ~label["crowd"]
            assert_close(sample.boxes * np.array([width, height] * 2, np.float32), label["boxes"][kept], "boxes")
            assert sample.classes.tolist() == label["classes"][kept].tolist()


@pytest.mark.requires("ultralytics")
@pytest.mark.filterwarnings("default")
def test_ultralytics_reads_it(dest: Path, tmp_path: Path) -> None:
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    export(dest, tmp_path / "out")
    data = check_det_dataset(str(tmp_path / "out/data.yaml"), autodownload=False)
    labels = YOLODataset(img_path=data["train"], data=data, imgsz=32, augment=False).labels
    dataset = RinrDataset(dest, "train")
    counts = {label["key"]: int((~label["crowd"]).sum()) for label in dataset.labels}
    found = {Path(label["im_file"]).relative_to(data["train"]).with_suffix("").as_posix(): len(label["cls"]) for label in labels}
    assert found == counts


@pytest.mark.parametrize(("size", "expected"), [((16, 100), (12, 16)), ((100, 6), (6, 8)), ((9999, 9999), (24, 32))])
def test_pictures_fit_inside_a_size_and_are_never_enlarged(dest: Path, tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    export(dest, tmp_path / "out", size=size, limit=1)
    assert [np.asarray(Image.open(file)).shape[:2] for file in (tmp_path / "out/images").rglob("*.png")] == [expected] * 2


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    classes = ("ant", "n/a", "..")
    samples = [Sample(key, "train", drawn("x", k).image, label=k - 1) for k, key in enumerate(("loose", "ant/0", "b", "c"))]
    write_shards(tmp_path / "shards", samples, names=classes)
    export(tmp_path / "shards", tmp_path / "out")
    found = sorted(file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.png"))
    assert found == ["train/%2E%2E/c.png", "train/ant/0.png", "train/n%2Fa/b.png", "train/unlabelled/loose.png"]


def test_without_labels_there_are_only_pictures(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [Sample("a", "train", drawn("a", 1).image)])
    export(tmp_path / "shards", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file()) == ["a.png", "export.json"]


def test_an_earlier_export_is_replaced(dest: Path, tmp_path: Path) -> None:
    export(dest, tmp_path / "once", limit=1)
    export(dest, tmp_path / "out", picture_format="jpeg")
    export(dest, tmp_path / "out", limit=1)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "once")


def test_what_is_not_an_export_is_left_alone(dest: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"expected an empty folder or an earlier export, got one with holiday\.jpg; choose another OUT"):
        export(dest, tmp_path)
    with pytest.raises(ConfigError, match="earlier export"):
        export(dest, dest)
    with pytest.raises(StorageError, match=r"holiday\.jpg"):
        export(dest, tmp_path / "holiday.jpg")


@pytest.mark.parametrize("key", ["../../escaped", "a/../../../escaped", "/escaped", "a//b", "a\\b"])
def test_a_key_cannot_lead_out_of_the_folder(tmp_path: Path, key: str) -> None:
    write_shards(tmp_path / "shards", [Sample(key, "train", drawn("a", 1).image)])
    with pytest.raises(ShardError, match="expected a key that names a file"):
        export(tmp_path / "shards", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.png"))
