"""Committed bytes must go on giving the committed pixels and labels. A missing file fails: nothing here is ever made again by a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, assert_close, psnr
from PIL import Image

from rinr_loader import DataLoader, RinrDataset
from rinr_loader.bundle import DTYPES, KINDS, NetworkSpec, TileSpec, pack, parse
from rinr_loader.decode import decode_batch
from rinr_loader.dictionary import Dictionary, load
from rinr_loader.index import decode_key, dump_index, index_shard
from rinr_loader.writer import read_tar, write_tar

GOLDEN = REPOSITORY / "tests" / "golden"
SIREN = ("be", "bs-label-no-objects", "de", "gray-one-row", "int8-residuals", "qre", "re-smaller-than-source")
JPEG = ("jpeg", "jpeg-gray", "jpeg-progressive")
TILE = ("tile-1", "tile-2", "tile-one-row")
BUNDLES = (*SIREN, *TILE, *JPEG)
DATASETS = ("dataset", "dataset-tile", "dataset-jpeg")
SHARDS = ("train/train-000000", "train/train-000001", "val/val-000000")
DATASET = {"train": ["plain", "v1.2/frame 07.left", "ü"], "val": ["a"]}


def pixels(name: str) -> np.ndarray:
    return np.array(Image.open(GOLDEN / "pixels" / f"{name}.png"))


def expected() -> dict[str, Any]:
    described: dict[str, Any] = json.loads((GOLDEN / "bundles.json").read_text())
    return described


def bundle(name: str) -> bytes:
    return (GOLDEN / "bundles" / f"{name}.rinr").read_bytes()


def shared() -> dict[bytes, Dictionary]:
    """The dictionary of the golden tiles, by the hash that they name it by."""
    found = load((GOLDEN / "dictionary.bin").read_bytes(), "dictionary.bin")
    return {found.key: found}


def bundles_of(split: Path) -> list[bytes]:
    return [data for tar in sorted(split.glob("*.tar")) for name, data in read_tar(tar) if name.endswith(".rinr")]


def test_every_golden_file_is_there_and_no_other() -> None:
    wanted = {
        "make.py",
        "bundles.json",
        "dictionary.bin",
        *(f"{root}/{name}" for root in DATASETS for name in ("dataset.json", "data.yaml", "report.json")),
    }
    wanted |= {f"bundles/{name}.rinr" for name in BUNDLES} | {f"pixels/{name}.png" for name in BUNDLES}
    wanted |= {f"pixels/{root}-{split}-{i}.png" for root in DATASETS for split, keys in DATASET.items() for i in range(len(keys))}
    wanted |= {f"{root}/{shard}.{suffix}" for root in DATASETS for shard in SHARDS for suffix in ("tar", "safetensors")}
    wanted |= {f"dataset-tile/shared/{sha256}.bin" for sha256 in json.loads((GOLDEN / "dataset-tile" / "dataset.json").read_bytes())["shared"]}
    found = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found == wanted


def test_golden_bundles_are_of_every_kind_and_dtype() -> None:
    assert {parse(bundle(name)).family for name in JPEG} == {"jpeg"}
    specs = {(n.spec.kind, n.spec.dtype) for name in SIREN for n in parse(bundle(name)).networks if isinstance(n.spec, NetworkSpec)}
    wanted = {(kind, dtype) for kind in KINDS for dtype in DTYPES} - {("direct", "int8")}  # read as any other network's int8
    assert specs == wanted
    assert any(parse(bundle(name)).crowd.any() for name in BUNDLES)
    assert any(parse(bundle(name)).label >= 0 for name in BUNDLES)


def test_golden_tiles_are_of_both_layers_of_many_lanes_and_have_residuals() -> None:
    parsed = {name: parse(bundle(name)) for name in TILE}
    backgrounds = [one.networks[0].spec for one in parsed.values()]
    assert {spec.layers for spec in backgrounds if isinstance(spec, TileSpec)} == {1, 2}
    assert max(spec.lanes for spec in backgrounds if isinstance(spec, TileSpec)) >= 8
    assert [len(one.networks) for one in parsed.values()] == [3, 3, 1]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_decodes_to_its_pixels(name: str) -> None:
    wanted = pixels(name)
    assert wanted.std() > 5, "a golden picture of one colour proves nothing"
    assert_close(decode_batch([bundle(name)], shared=shared())[0].permute(1, 2, 0), wanted, "pixels")


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_parses_to_its_labels_and_networks(name: str) -> None:
    parsed, about = parse(bundle(name)), expected()[name]
    assert list(parsed.stored_size) == about["stored_size"]
    assert list(parsed.source_size) == about["source_size"]
    assert parsed.boxes.tolist() == about["boxes"]
    assert parsed.classes.tolist() == about["classes"]
    assert parsed.crowd.tolist() == about["crowd"]
    assert (parsed.label, parsed.psnr, parsed.object_psnr) == (about["label"], about["psnr"], about["object_psnr"])
    assert parsed.source_hash.hex() == about["source_hash"]
    found = [{"spec": str(n.spec), "rect": list(n.rect), "scale": n.scale, "feather": n.feather, "object": n.object} for n in parsed.networks]
    assert found == about["networks"]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_packs_to_its_bytes(name: str) -> None:
    assert pack(parse(bundle(name))) == bundle(name)


def test_golden_residuals_matter() -> None:
    """The objects of `qre` are not those of its background: the pixels above would notice a decoder without residuals."""
    parsed = parse(bundle("qre"))
    without = decode_batch([pack(type(parsed)(parsed.stored_size, parsed.source_size, parsed.networks[:1]))])[0].permute(1, 2, 0)
    assert psnr(without, pixels("qre")) < 35


@pytest.mark.parametrize("name", ["tile-1", "tile-2"])
def test_golden_residuals_of_tiles_matter(name: str) -> None:
    parsed = parse(bundle(name))
    coarser = replace(parsed, networks=(parsed.networks[0], *(replace(one, scale=one.scale / 1000) for one in parsed.networks[1:])))
    assert psnr(decode_batch([pack(coarser)], shared=shared())[0].permute(1, 2, 0), pixels(name)) < 40


@pytest.mark.parametrize("root", DATASETS)
@pytest.mark.parametrize("split", list(DATASET))
def test_the_dataset_gives_its_pixels_and_labels(split: str, root: str) -> None:
    dataset = RinrDataset(GOLDEN / root, split)
    assert dataset.keys == DATASET[split]
    assert dataset.names == ("box", "ball", "corner")
    for i, (image, target) in enumerate(dataset):
        assert_close(image.permute(1, 2, 0), pixels(f"{root}-{split}-{i}"), "pixels")
        assert target["key"] == DATASET[split][i]
    first = dataset.labels[0]
    boxes = [[6, 8, 21, 20], [15, 12, 38, 33], [0, 28, 9.5, 37]]
    assert first["boxes"].tolist() == boxes[: len(first["boxes"])]
    assert first["classes"].tolist() == [1, 0, 2][: len(first["boxes"])]
    families = {"dataset": "siren", "dataset-tile": "tile", "dataset-jpeg": "jpeg"}
    assert {parse(data).family for data in bundles_of(GOLDEN / root / split)} == {families[root]}
    assert len(dataset) == len(DATASET[split]) == len(DataLoader(dataset, size=(32, 32)))


@pytest.mark.parametrize("root", DATASETS)
@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_made_again_is_the_golden_one(shard: str, root: str) -> None:
    tar = GOLDEN / root / f"{shard}.tar"
    assert dump_index(index_shard(tar), shard_bytes=tar.stat().st_size) == tar.with_suffix(".safetensors").read_bytes()


@pytest.mark.parametrize("root", DATASETS)
@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_written_again_is_the_golden_one(shard: str, root: str, tmp_path: Path) -> None:
    tar = GOLDEN / root / f"{shard}.tar"
    write_tar(tmp_path / "again.tar", read_tar(tar))
    assert (tmp_path / "again.tar").read_bytes() == tar.read_bytes()


def test_the_sidecar_of_a_golden_shard() -> None:
    members = dict(read_tar(GOLDEN / "dataset" / "train" / "train-000000.tar"))
    sidecars = {decode_key(name.removesuffix(".json")): json.loads(data) for name, data in members.items() if name.endswith(".json")}
    assert sidecars == {"v1.2/frame 07.left": {"objects": [{"track": 0}, {"track": 1}]}}
