"""`RinrDataset`: one split, its labels, its samples, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCENE_NAMES, assert_close
from small_datasets import drawn, edit, write_detection
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from rinr_loader import BundleError, ConfigError, RinrDataset, ShardError
from rinr_loader.cli import app
from rinr_loader.decode import decode, whole

KEYS = ["a.left", "dir/b", "dir/c", "dir/images/d", "e"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detection(tmp_path_factory.mktemp("dataset") / "set")


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A dataset that may be damaged."""
    return Path(shutil.copytree(dataset, tmp_path / "set"))


def test_a_split_knows_its_samples_without_opening_a_shard(copy: Path) -> None:
    for shard in copy.rglob("*.tar"):  # as long as before, but nothing in it
        shard.write_bytes(bytes(shard.stat().st_size))
    source = RinrDataset(copy)
    assert len(source) == 5
    assert source.keys == KEYS
    assert source.names == tuple(SCENE_NAMES)
    assert [len(label["boxes"]) for label in source.labels] == [2, 0, 2, 2, 3]
    assert source.labels[3]["size"] == source.labels[3]["stored_size"] == (30, 40)
    assert source.labels[2]["crowd"].tolist() == [True, False]


def test_labels_are_those_of_the_source(dataset: Path) -> None:
    label = RinrDataset(dataset).labels[4]
    sample = drawn("e", 5, objects=3)
    assert np.array_equal(label["boxes"], sample.boxes)
    assert label["classes"].tolist() == sample.classes.tolist()
    assert (label["key"], label["label"]) == ("e", -1)


def test_samples_are_read_in_any_order(dataset: Path) -> None:
    source = RinrDataset(dataset)
    buffer = source.read([4, 0, 3, 0])
    assert buffer.keys == ("e", "a.left", "dir/images/d", "a.left")
    assert buffer.stored_size.tolist() == [[24, 32], [24, 32], [30, 40], [24, 32]]
    assert torch.equal(buffer.box[:3], torch.from_numpy(source.labels[4]["boxes"]))
    images = decode(buffer, whole(buffer, (24, 32)), size=(24, 32))
    assert torch.equal(images[1], images[3])
    for i, index in enumerate([4, 0, 3]):
        alone = source.read([index])
        assert (decode(alone, whole(alone, (24, 32)), size=(24, 32))[0].int() - images[i].int()).abs().max() <= 1
    assert len(source.read([])) == 0
    with pytest.raises(IndexError, match="expected 0 to 4, got 5"):
        source.read([5])


def test_iterating_gives_every_sample_at_its_stored_size(dataset: Path) -> None:
    found = list(RinrDataset(dataset))
    assert [target["key"] for _, target in found] == KEYS
    assert [tuple(image.shape) for image, _ in found] == [(3, 24, 32)] * 3 + [(3, 30, 40), (3, 24, 32)]
    image, target = found[3]
    buffer = RinrDataset(dataset).read([3])
    assert torch.equal(image, decode(buffer, whole(buffer, (30, 40)), size=(30, 40))[0])
    assert torch.equal(target["boxes"], buffer.box)
    assert (target["index"], target["label"]) == (3, -1)


def test_iterating_at_a_size_moves_the_boxes_too(dataset: Path) -> None:
    plain = {target["key"]: target["boxes"] for _, target in RinrDataset(dataset)}
    for image, target in RinrDataset(dataset, size=(60, 80)):
        assert image.shape == (3, 60, 80)
        factor = 2.0 if target["key"] == "dir/images/d" else 2.5
        assert torch.allclose(target["boxes"], plain[target["key"]] * factor, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_torch_share_out_the_samples(dataset: Path, workers: int) -> None:
    context = "spawn" if workers else None
    loader = DataLoader(RinrDataset(dataset), batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert sorted(target["key"] for _, target in loader) == sorted(KEYS)


def test_the_identity_is_that_of_the_content(dataset: Path, copy: Path) -> None:
    assert RinrDataset(copy).identity == RinrDataset(dataset).identity
    assert RinrDataset(copy, "val").identity != RinrDataset(dataset).identity


def test_a_dataset_is_found_by_its_directory_or_its_yaml(dataset: Path) -> None:
    assert RinrDataset(dataset / "data.yaml", "val").keys == ["a.left", "z"]
    assert RinrDataset(str(dataset), "val").keys == ["a.left", "z"]


def test_what_is_no_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a split 'test', got only train, val"):
        RinrDataset(dataset, "test")
    with pytest.raises(ConfigError, match="make one with `rinr convert"):
        RinrDataset(tmp_path)
    with pytest.raises(ConfigError, match="got a URL"):
        RinrDataset("s3://bucket/set")
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected a rinr dataset"):
        RinrDataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ConfigError, match="expected JSON"):
        RinrDataset(tmp_path)


def test_a_newer_version_is_told_from_damage(copy: Path) -> None:
    described = json.loads((copy / "dataset.json").read_bytes())
    (copy / "dataset.json").write_text(json.dumps({**described, "version": 2}))
    with pytest.raises(ConfigError, match="expected version 1, got 2; upgrade rinr_loader"):
        RinrDataset(copy)


def test_damage_of_shards_and_indexes_is_noticed(copy: Path) -> None:
    index, shard = copy / "train/train-000000.safetensors", copy / "train/train-000000.tar"
    whole_index, whole_shard = index.read_bytes(), shard.read_bytes()
    edit(index, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(ShardError, match=r"train-000000\.safetensors: expected SHA-256"):
        RinrDataset(copy)
    index.write_bytes((copy / "train/train-000001.safetensors").read_bytes())
    with pytest.raises(ShardError, match=r"train-000000\.safetensors: expected SHA-256"):
        RinrDataset(copy)
    index.unlink()
    with pytest.raises(ShardError, match=r"train-000000\.safetensors: expected a file of the dataset"):
        RinrDataset(copy)
    index.write_bytes(whole_index)
    shard.write_bytes(whole_shard[:-512])
    with pytest.raises(ShardError, match=rf"train-000000\.tar: expected {len(whole_shard)} bytes, got {len(whole_shard) - 512}"):
        RinrDataset(copy)


def test_a_shard_cut_off_after_opening_is_an_error_not_wrong_pixels(copy: Path) -> None:
    source = RinrDataset(copy)
    shard = copy / "train/train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ShardError, match=r"train-000001\.tar: expected bytes .* the shard is truncated"):
        source.read([3, 4])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_share_out_many_samples_evenly(dataset: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rinr_loader.dataset.AT_ONCE", 1)
    shares = []
    for number in range(workers):
        monkeypatch.setattr("rinr_loader.dataset.get_worker_info", lambda number=number: SimpleNamespace(id=number, num_workers=workers))
        shares.append([target["key"] for _, target in RinrDataset(dataset)])
    assert sorted(key for share in shares for key in share) == sorted(KEYS)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_samples_of_one_size_are_decoded_together_and_others_alone(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [image for image, _ in RinrDataset(dataset)]
    for at_once in (1, 2, 3, 5):
        monkeypatch.setattr("rinr_loader.dataset.AT_ONCE", at_once)
        for (image, target), expected in zip(RinrDataset(dataset), plain, strict=True):
            assert_close(image, expected, "pixels")
            assert RinrDataset(dataset).keys[target["index"]] == target["key"]


def test_iterating_filters_where_images_get_smaller(dataset: Path) -> None:
    filtered, points = (next(iter(RinrDataset(dataset, size=(6, 8), antialias=flag)))[0] for flag in (True, False))
    buffer = RinrDataset(dataset).read([0])
    assert torch.equal(filtered, decode(buffer, whole(buffer, (6, 8)), size=(6, 8))[0])
    assert torch.equal(points, decode(buffer, whole(buffer, (6, 8)), size=(6, 8), antialias=False)[0])
    assert not torch.equal(filtered, points)


def test_crowds_and_classes_come_with_the_boxes(dataset: Path) -> None:
    source = RinrDataset(dataset, size=(50, 60))
    for (_, target), label in zip(source, source.labels, strict=True):
        height, width = label["size"]
        scale = torch.tensor([60 / width, 50 / height] * 2)
        assert_close(target["boxes"], torch.from_numpy(label["boxes"]) * scale, "boxes")
        assert target["classes"].tolist() == label["classes"].tolist()
        assert target["crowd"].tolist() == label["crowd"].tolist()


def test_a_damaged_sample_is_named_while_iterating(copy: Path) -> None:
    source = RinrDataset(copy)
    offset = int(source.column("offset")[1])
    edit(copy / "train/train-000000.tar", lambda data: data.__setitem__(offset + 100, data[offset + 100] ^ 1))
    with pytest.raises(BundleError, match=r"^train-000000\.tar:dir/b\.rinr: expected checksum"):
        list(source)


def test_an_index_made_again_as_the_message_says_is_good(copy: Path) -> None:
    labels = RinrDataset(copy).labels
    index = copy / "train/train-000000.safetensors"
    edit(index, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(ShardError, match=r"make it again with `rinr index`$"):
        RinrDataset(copy)
    assert CliRunner().invoke(app, ["index", str(copy)]).exit_code == 0
    for again, before in zip(RinrDataset(copy).labels, labels, strict=True):
        assert again["key"] == before["key"]
        assert np.array_equal(again["boxes"], before["boxes"])


def test_a_split_that_is_offered_can_be_opened(dataset: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        RinrDataset(dataset, "test")
    offered = str(caught.value).split("got only ")[1].split(";")[0].split(", ")
    assert [len(RinrDataset(dataset, split)) for split in offered] == [5, 2]
