"""Reading samples: the bytes and columns asked for, in the order asked for, and a named error for every kind of damage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close
from networks import BACKGROUNDS, DIRECT, RESIDUALS, random_bundle

from rinr_loader import reader
from rinr_loader.bundle import parse
from rinr_loader.decode import decode, decode_batch, whole
from rinr_loader.errors import BundleError, ShardError, StorageError
from rinr_loader.index import ShardIndex, encode_key, index_shard
from rinr_loader.reader import ShardBuffer, buffer_of, read_samples, spread
from rinr_loader.writer import write_tar

KEYS = ["a", "folder/b.1", "ä ü", "d", "e", "f"]
BUNDLES = [
    random_bundle(
        0, residuals=[(RESIDUALS[0], (3, 4, 17, 20)), (DIRECT, (10, 8, 30, 22))], boxes=[[1, 2, 30, 20], [4, 4, 9, 9]], classes=[3, 1], label=2
    ),
    random_bundle(1, stored=(9, 11), source=(18, 22), background=BACKGROUNDS[1]),
    random_bundle(2, boxes=[[0, 0, 40, 24]], classes=[7]),
    random_bundle(3, background=BACKGROUNDS[2], residuals=[(RESIDUALS[1], (0, 0, 9, 8))], boxes=[[5, 5, 6, 6]] * 3, classes=[0, 1, 2]),
    random_bundle(4, stored=(1, 1)),
    random_bundle(5, residuals=[(RESIDUALS[0], (5, 5, 12, 20))]),
]


@pytest.fixture
def shards(tmp_path: Path) -> list[tuple[Path, ShardIndex]]:
    """Two shards of three samples each."""
    found = []
    for number in range(2):
        path = tmp_path / f"train-{number:06d}.tar"
        write_tar(path, [(f"{encode_key(key)}.rinr", data) for key, data in list(zip(KEYS, BUNDLES, strict=True))[number * 3 : number * 3 + 3]])
        found.append((path, index_shard(path)))
    return found


def read(shards: list[tuple[Path, ShardIndex]], *samples: int) -> ShardBuffer:
    numbers = np.array(samples, np.int64)
    return read_samples(shards, numbers // 3, numbers % 3)


def check(buffer: ShardBuffer, samples: list[int]) -> None:
    """Every column is what the bundles say."""
    assert buffer.keys == tuple(KEYS[i] for i in samples)
    assert len(buffer) == len(samples)
    for k, i in enumerate(samples):
        bundle = parse(BUNDLES[i])
        assert tuple(buffer.stored_size[k].tolist()) == bundle.stored_size
        assert tuple(buffer.source_size[k].tolist()) == bundle.source_size
        assert int(buffer.label[k]) == bundle.label
        objects = slice(int(buffer.object_start[k]), int(buffer.object_start[k + 1]))
        assert buffer.box[objects].tolist() == bundle.boxes.tolist()
        assert buffer.class_id[objects].tolist() == bundle.classes.tolist()
        assert buffer.crowd[objects].tolist() == bundle.crowd.tolist()
        first, last = buffer.network_start[k : k + 2].tolist()
        assert last - first == len(bundle.networks)
        for row, network in zip(range(first, last), bundle.networks, strict=True):
            assert buffer.groups[int(buffer.network_group[row])] == network.spec
            offset = int(buffer.network_offset[row])
            assert offset % 16 == 0
            assert buffer.data[offset : offset + network.spec.nbytes].numpy().tobytes() == network.weights
            assert tuple(buffer.rect[row].tolist()) == network.rect
            assert float(buffer.scale[row]) == pytest.approx(network.scale)
            assert float(buffer.feather[row]) == network.feather
    assert int(buffer.object_start[-1]) == len(buffer.box) == len(buffer.class_id) == len(buffer.crowd)
    assert int(buffer.network_start[-1]) == len(buffer.rect) == len(buffer.scale) == len(buffer.network_group)


ORDERS = [[0], [5], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 4, 1], [2, 2, 2], [5, 0, 5, 0, 3, 3, 1], []]


@pytest.mark.parametrize("samples", ORDERS, ids=str)
def test_samples_come_in_the_order_asked_for(shards: list[tuple[Path, ShardIndex]], samples: list[int]) -> None:
    buffer = read(shards, *samples)
    check(buffer, samples)
    dtypes = {"rect": torch.float32, "box": torch.float32, "crowd": torch.bool, "data": torch.uint8, "scale": torch.float32, "feather": torch.float32}
    for field in dataclasses.fields(ShardBuffer):
        value = getattr(buffer, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == dtypes.get(field.name, torch.int64), field.name
            assert value.device.type == "cpu"


@pytest.mark.parametrize("samples", [order for order in ORDERS if order], ids=str)
def test_a_buffer_of_bytes_is_the_same_but_for_its_keys(shards: list[tuple[Path, ShardIndex]], samples: list[int]) -> None:
    ours = buffer_of([BUNDLES[i] for i in samples])
    assert ours.keys == tuple(map(str, range(len(samples))))
    check(dataclasses.replace(ours, keys=tuple(KEYS[i] for i in samples)), samples)
    size = (8, 8)
    theirs = read(shards, *samples)
    assert_close(decode(theirs, whole(theirs, size), size=size), decode_batch([BUNDLES[i] for i in samples], size=size), "pixels")
    check(buffer_of([BUNDLES[i] for i in samples], [encode_key(KEYS[i]) for i in samples]), samples)


def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every read of a file from here on."""
    seen: list[tuple[str, int, int]] = []
    genuine = reader._read_range

    def spy(path: Path, first: int, last: int) -> bytes:
        seen.append((path.name, first, last))
        return genuine(path, first, last)

    monkeypatch.setattr(reader, "_read_range", spy)
    return seen


def test_near_members_are_read_together_and_far_ones_apart(shards: list[tuple[Path, ShardIndex]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ranges(monkeypatch)
    index = shards[0][1]
    begin, end = index.offset.tolist(), (index.offset + index.size).tolist()
    read(shards, 2, 0)
    assert seen == [("train-000000.tar", begin[0], end[2])]
    seen.clear()
    monkeypatch.setattr(reader, "GAP", 100)  # less than a tar header
    check(read(shards, 2, 4, 0), [2, 4, 0])
    assert sorted(seen) == sorted(
        [(shards[0][0].name, begin[i], end[i]) for i in (0, 2)]
        + [(shards[1][0].name, *(int(x) for x in (shards[1][1].offset[1], shards[1][1].offset[1] + shards[1][1].size[1])))]
    )


def test_a_sample_that_is_wanted_twice_is_read_and_held_once(shards: list[tuple[Path, ShardIndex]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ranges(monkeypatch)
    once = read(shards, 1)
    many = read(shards, 1, 1, 1, 1)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len(many.data) == len(once.data)
    assert set(many.network_offset.tolist()) == set(once.network_offset.tolist())


def test_only_the_bytes_of_the_members_are_read(shards: list[tuple[Path, ShardIndex]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ranges(monkeypatch)
    read(shards, 4)
    index = shards[1][1]
    assert seen == [("train-000001.tar", int(index.offset[1]), int(index.offset[1] + index.size[1]))]


# --- damage ---


def test_a_damaged_bundle_is_named(shards: list[tuple[Path, ShardIndex]]) -> None:
    path, index = shards[0]
    data = bytearray(path.read_bytes())
    data[int(index.offset[1]) + int(index.size[1]) - 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        BundleError, match=r"^train-000000\.tar:folder/b%2E1\.rinr: expected checksum 0x[0-9a-f]{8}, got 0x[0-9a-f]{8}; the bundle is damaged"
    ):
        read(shards, 0, 1)
    check(read(shards, 0), [0])  # the others are as good as before


def test_a_cut_off_shard_is_named(shards: list[tuple[Path, ShardIndex]]) -> None:
    path, index = shards[1]
    data = path.read_bytes()
    end = int(index.offset[2]) + 50
    path.write_bytes(data[:end])
    with pytest.raises(
        ShardError,
        match=rf"^train-000001\.tar: expected bytes {index.offset[2]} to {index.offset[2] + index.size[2]}, got 50 bytes; the shard is truncated",
    ):
        read(shards, 5)
    path.write_bytes(data[:100])
    with pytest.raises(ShardError, match="got 0 bytes"):
        read(shards, 5)


def test_a_missing_shard_is_named(shards: list[tuple[Path, ShardIndex]]) -> None:
    shards[1][0].unlink()
    with pytest.raises(StorageError, match=r"train-000001\.tar: expected a readable shard, got No such file or directory"):
        read(shards, 0, 5)
    check(read(shards, 0), [0])


def test_an_index_that_points_elsewhere_is_noticed(shards: list[tuple[Path, ShardIndex]]) -> None:
    path, index = shards[0]
    shards[0] = (path, dataclasses.replace(index, offset=index.offset + 16))
    with pytest.raises(BundleError, match=r"train-000000\.tar:a\.rinr: expected magic"):
        read(shards, 0)
    shards[0] = (path, dataclasses.replace(index, size=index.size - 1))
    with pytest.raises(BundleError, match=r"expected \d+ bytes, got \d+; the bundle is cut off"):
        read(shards, 0)


def test_damage_in_memory_names_the_key() -> None:
    with pytest.raises(BundleError, match=r"^bundle 1: "):
        buffer_of([BUNDLES[0], b"RINR"])
    with pytest.raises(BundleError, match=r"^x\.rinr: "):
        buffer_of([BUNDLES[0][:-1]], ["x"])


# --- parts ---


def test_moving_a_buffer_keeps_everything(shards: list[tuple[Path, ShardIndex]]) -> None:
    buffer = read(shards, 3, 0)
    assert buffer.to("cpu") is buffer
    elsewhere = buffer.to("meta")
    assert elsewhere.device.type == "meta"
    assert elsewhere.keys == buffer.keys
    assert elsewhere.box.shape == buffer.box.shape
    elsewhere_too = {"keys", "groups", "shared_hash", "shared", "host"}
    assert all(getattr(elsewhere, f.name).device.type == "meta" for f in dataclasses.fields(buffer) if f.name not in elsewhere_too)
    assert elsewhere.host is None, "only JPEGs are decoded from host memory"


def test_spread_lists_the_rows_of_chosen_samples() -> None:
    rows, starts = spread(np.array([0, 2, 2, 5]), np.array([2, 0, 1, 2]))
    assert rows.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert starts.tolist() == [0, 3, 5, 5, 8]
    rows, starts = spread(np.array([0]), np.array([], np.int64))
    assert rows.tolist() == []
    assert starts.tolist() == [0]
