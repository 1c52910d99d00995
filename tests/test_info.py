"""`rinr info`: counts, bytes and PSNR are what the files hold; the comparison with JPEG is on the same pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import detection_scenes
import numpy as np
import pytest
from conftest import SCENE_NAMES, psnr
from detection_scenes import draw
from PIL import Image
from small_datasets import drawn, edit, write_detection
from tiny_shards import write_shards

from rinr_loader import RinrDataset
from rinr_loader.bundle import parse
from rinr_loader.compare import compare_with_jpeg
from rinr_loader.errors import ConfigError, ShardError
from rinr_loader.index import SUFFIX
from rinr_loader.info import describe, draw_worst
from rinr_loader.pictures import decode_pictures
from rinr_loader.source import Sample, Source
from rinr_loader.writer import read_tar


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detection(tmp_path_factory.mktemp("info") / "shards")


def test_counts(dest: Path) -> None:
    info = describe(dest)
    assert (info.samples, info.task, info.names) == (7, "detect", SCENE_NAMES)
    assert {split: (s.samples, s.shards) for split, s in info.splits.items()} == {"train": (5, 2), "val": (2, 1)}
    assert (
        sum(s.objects for s in info.splits.values())
        == sum(info.classes.values())
        == sum(len(label["boxes"]) for split in info.splits for label in RinrDataset(dest, split).labels)
    )
    assert (info.splits["val"].residuals, info.splits["val"].saw_labels) == (0, False)
    assert sum(info.groups.values()) == 7 + info.splits["train"].residuals


def test_a_look_at_the_labels_is_told(tmp_path: Path) -> None:
    detection_scenes.write_shards(tmp_path, train=[draw("a")], val=[draw("b", objects=3)], test=[draw("c", objects=0)])
    found = describe(tmp_path).splits
    assert {split: (s.residuals, s.saw_labels) for split, s in found.items()} == {"train": (2, True), "val": (3, True), "test": (0, False)}


@pytest.mark.parametrize("residuals", [False, True])
def test_every_byte_is_in_one_place(dest: Path, tmp_path: Path, residuals: bool) -> None:
    if residuals:
        dest = detection_scenes.write_shards(tmp_path, train=[draw("a"), draw("b")])
    found = describe(dest).bytes
    assert found.total == sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    assert found.total == found.background + found.residual + found.header + found.tar + found.index + found.other
    bundles = [parse(data) for tar in dest.rglob("*.tar") for name, data in read_tar(tar) if name.endswith(SUFFIX)]
    assert found.background == sum(len(bundle.networks[0].weights) for bundle in bundles)
    assert found.residual == sum(len(network.weights) for bundle in bundles for network in bundle.networks[1:])
    assert (found.source == 0) == residuals


def test_the_worst_pictures_come_first(dest: Path) -> None:
    info = describe(dest, worst=3)
    values = np.sort(np.concatenate([RinrDataset(dest, split).column("psnr") for split in ("train", "val")]))
    assert [picture.psnr for picture in info.worst] == values[:3].tolist()
    assert info.psnr.worst == values[0]
    assert info.psnr.mean == pytest.approx(float(values.mean()), abs=1e-3)
    assert all(picture.key in RinrDataset(dest, picture.split).keys for picture in info.worst)


def test_the_sheet_shows_what_was_decoded(dest: Path) -> None:
    info = describe(dest, worst=2)
    sheet = np.asarray(draw_worst(info, width=64, height=48))
    dataset = RinrDataset(dest, info.worst[0].split)
    pixels = next(decode_pictures(dataset, [dataset.keys.index(info.worst[0].key)]))
    ratio = min(64 / pixels.shape[1], 48 / pixels.shape[0])
    corner = sheet[6 : 6 + 48, 6 : 6 + 64]  # inside the gap
    centre = np.asarray(Image.fromarray(pixels).resize((round(pixels.shape[1] * ratio), round(pixels.shape[0] * ratio)), Image.Resampling.NEAREST))
    same = (corner[: centre.shape[0], : centre.shape[1]] == centre).all(2).mean()
    assert same > 0.6  # the rest is under label boxes


def test_classes_of_a_classification_set(tmp_path: Path) -> None:
    samples = [Sample(f"{'ab'[k % 2]}/{k}", "train", drawn("x", k).image, label=k % 2) for k in range(3)]
    write_shards(tmp_path / "shards", samples, names=("a", "b", "never"))
    info = describe(tmp_path / "shards")
    assert info.task == "classify"
    assert info.classes == {"a": 2, "b": 1, "never": 0}
    assert info.object_psnr.mean is None


def test_a_damaged_index_is_an_error(tmp_path: Path) -> None:
    dest = write_detection(tmp_path / "shards")
    edit(dest / "val/val-000000.safetensors", lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(ShardError, match=r"val-000000\.safetensors: .*make it again with `rinr index`"):
        describe(dest)


# --- beside JPEG ---


def source_of(split: str) -> Source:
    keys = {"train": [("a.left", 1)], "val": [("a.left", 6), ("z", 7)]}[split]
    return Source("drawn", [drawn(key, seed, split=split) for key, seed in keys])  # type: ignore[arg-type]


def test_jpegs_are_measured_on_the_sources_pixels(dest: Path) -> None:
    dataset = RinrDataset(dest, "val")
    compared = compare_with_jpeg(dataset, source_of("val"), qualities=(60,))
    assert compared.pictures == 2
    own, as_many, at_60 = compared.rates
    assert own.psnr == pytest.approx(float(dataset.column("psnr").mean()), abs=1e-3)
    rows = dataset.metadata["splits"]["val"]["shards"]
    assert own.bytes == pytest.approx(sum(row["bytes"] + row["index_bytes"] for row in rows) / 2)

    sizes, values = [], []
    for sample in source_of("val").samples:
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)))  # type: ignore[arg-type]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=60, optimize=True)
        sizes.append(file.tell())
        values.append(psnr(np.array(Image.open(file)), np.array(pixels)))
    assert at_60.bytes == np.mean(sizes)
    assert at_60.psnr == pytest.approx(np.mean(values), abs=1e-3)
    assert as_many.bytes <= own.bytes or "quality 1," in as_many.name


def test_a_picture_is_found_by_its_key_where_train_became_val(dest: Path) -> None:
    moved = Source("drawn", [drawn("z", 7, split="train")])
    assert compare_with_jpeg(RinrDataset(dest, "val"), moved, qualities=()).pictures == 1


@pytest.mark.parametrize("change", [lambda s: Source("drawn", []), lambda s: Source("drawn", [drawn("z", 99, split="val")])], ids=["none", "others"])
def test_another_source_is_refused(dest: Path, change: Callable[[Source], Source]) -> None:
    with pytest.raises(ConfigError, match=r"expected the pictures that .* was made from, got none of the 2 tried"):
        compare_with_jpeg(RinrDataset(dest, "val"), change(source_of("val")))
