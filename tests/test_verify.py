"""`rinr verify` and `rinr index`: what is damaged is found and told, what can be rebuilt is rebuilt."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_datasets import edit, tree_hash, write_detection

from rinr_loader.bundle import Bundle, Network, NetworkSpec, pack
from rinr_loader.codecs import siren
from rinr_loader.errors import BundleError, ConfigError, ShardError
from rinr_loader.reindex import reindex
from rinr_loader.verify import verify
from rinr_loader.writer import read_tar, write_tar

FIRST, SECOND, VAL = "train/train-000000", "train/train-000001", "val/val-000000"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detection(tmp_path_factory.mktemp("verify") / "shards")


@pytest.fixture
def dest(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


def flip(byte: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[byte] ^= 0x40

    return change


def change_json(dest: Path, change: Callable[[dict[str, object]], object]) -> None:
    described = json.loads((dest / "dataset.json").read_bytes())
    change(described)
    (dest / "dataset.json").write_text(json.dumps(described))


def add_member(shard: Path, name: str, data: bytes) -> None:
    members = [*read_tar(shard), (name, data)]
    write_tar(shard, members)


def test_a_whole_dataset_passes(dest: Path) -> None:
    found = verify(dest)
    assert found.damage == ()
    assert (found.shards, found.samples) == (3, 7)
    assert found.bytes == sum(path.stat().st_size for path in dest.rglob("*-0*"))
    assert verify(dest / "data.yaml").damage == ()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a bundle": (lambda d: edit(d / f"{FIRST}.tar", flip(900)), "train-000000.tar: expected SHA-256 .*; fetch or convert it again"),
    "its checksum": (lambda d: edit(d / f"{FIRST}.tar", flip(900)), r"train-000000.tar:a%2Eleft.rinr: expected checksum"),
    "a cut-off shard": (
        lambda d: os.truncate(d / f"{FIRST}.tar", 3000),
        "train-000000.tar: expected .* bytes, got 3000",
    ),
    "no tar": (lambda d: (d / f"{FIRST}.tar").write_bytes(b"hello"), "train-000000.tar: expected a tar of bundles"),
    "a shard gone": (lambda d: (d / f"{SECOND}.tar").unlink(), "train-000001.tar: expected a shard, got nothing there"),
    "an index gone": (lambda d: (d / f"{SECOND}.safetensors").unlink(), "000001.safetensors: expected an index, got nothing there; .*`rinr index`"),
    "a bit of an index": (lambda d: edit(d / f"{SECOND}.safetensors", flip(-5)), "000001.safetensors: expected SHA-256 .*`rinr index`"),
    "another shard's index": (
        lambda d: shutil.copy(d / f"{VAL}.safetensors", d / f"{SECOND}.safetensors"),
        r"train-000001.safetensors: expected .*; make it again with `rinr index`",
    ),
    "a shard too many": (
        lambda d: shutil.copy(d / f"{VAL}.tar", d / "val/val-000001.tar"),
        "val-000001.tar: expected only the shards and indexes",
    ),
    "data.yaml gone": (lambda d: (d / "data.yaml").unlink(), "data.yaml: expected .*, got nothing there; .*`rinr index`"),
    "data.yaml of others": (lambda d: (d / "data.yaml").write_text("train: train\n"), "data.yaml: expected .*, got something else"),
    "no JSON": (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: expected JSON"),
    "no splits": (lambda d: change_json(d, lambda j: j.pop("splits")), "dataset.json: expected what docs/FORMAT.md lists"),
    "rows of text": (lambda d: change_json(d, lambda j: j.update(splits={"train": "x"})), "dataset.json: expected what docs/FORMAT.md lists"),
    "names of numbers": (lambda d: change_json(d, lambda j: j.update(names=[1, 2, 3])), "dataset.json: expected what docs/FORMAT.md lists"),
    "a version to come": (lambda d: change_json(d, lambda j: j.update(version=2)), "dataset.json: expected version 1, got 2; upgrade"),
    "a path out of it": (
        lambda d: change_json(d, lambda j: j["splits"]["val"]["shards"][0].update(path="../x.tar")),
        "dataset.json: expected what docs/FORMAT.md lists",
    ),
    "a wrong count": (
        lambda d: change_json(d, lambda j: j["splits"]["val"].update(samples=9)),
        "dataset.json: val: expected 2 samples as in its shards, got 9",
    ),
    "a wrong row": (lambda d: change_json(d, lambda j: j["splits"]["val"]["shards"][0].update(objects=9)), "val-000000.tar: expected 9 objects, got"),
    "wrong groups": (lambda d: change_json(d, lambda j: j.update(groups={})), "dataset.json: groups: expected .*background 3x16"),
    "too few names": (lambda d: change_json(d, lambda j: j.update(names=["one"])), "expected a class below 1, got 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told(dest: Path, name: str) -> None:
    change, expected = DAMAGE[name]
    change(dest)
    found = verify(dest)
    assert found.damage
    assert any(re.search(expected, damage) for damage in found.damage), found.damage


def test_the_check_goes_on_after_damage(dest: Path) -> None:
    edit(dest / f"{FIRST}.tar", flip(900))
    (dest / f"{SECOND}.safetensors").unlink()
    (dest / f"{VAL}.tar").write_bytes(b"")
    found = verify(dest)
    told = "\n".join(found.damage)
    assert all(name in told for name in ("train-000000.tar", "train-000001.safetensors", "val-000000.tar"))
    assert found.samples == 4  # the other two of the first shard, and the second


def test_shards_are_checked_even_without_a_sound_dataset_json(dest: Path) -> None:
    (dest / "dataset.json").write_text("[]")
    edit(dest / f"{FIRST}.tar", flip(900))
    found = verify(dest)
    assert [damage.split(":")[0].split("/")[-1] for damage in found.damage] == ["dataset.json", "train-000000.tar"]
    assert (found.shards, found.samples) == (3, 6)


def test_what_lies_beside_bundles_is_checked(dest: Path) -> None:
    add_member(dest / f"{SECOND}.tar", "e.json", b"{")
    add_member(dest / f"{SECOND}.tar", "f.json", b"{}")
    add_member(dest / f"{SECOND}.tar", "e.txt", b"carried along")
    reindex(dest)
    damage = verify(dest).damage
    assert len(damage) == 2
    assert "train/train-000001.tar:e.json: expected JSON" in damage[0]
    assert "train/train-000001.tar:f.json: expected a member f.rinr beside it" in damage[1]


def test_a_key_in_two_shards_is_told(dest: Path) -> None:
    shutil.copy(dest / f"{FIRST}.tar", dest / "train/train-000002.tar")
    reindex(dest)
    assert sum("expected a key of its own, got that of a sample in train/train-000000.tar" in damage for damage in verify(dest).damage) == 3


def test_weights_that_decode_to_nothing_are_told(dest: Path) -> None:
    networks = []
    for kind, bias in (("background", 6e4), ("residual", -6e4)):
        spec = NetworkSpec(kind, 1, 2, "float16")  # type: ignore[arg-type]
        flat = torch.zeros(1, spec.rows + spec.weights)
        siren.layers(flat, spec)[-1][1].fill_(bias)
        networks.append(Network(spec, (0, 0, 8, 8), 3e38, siren.to_bytes(flat, spec, None)[0]))
    write_tar(dest / f"{VAL}.tar", [("bad.rinr", pack(Bundle((8, 8), (8, 8), tuple(networks))))])
    reindex(dest)
    assert [damage for damage in verify(dest).damage if "val-000000.tar:bad.rinr: expected a picture, got values that are not finite" in damage]


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a directory with dataset\.json, got none"):
        verify(tmp_path)


# --- rinr index ---


def test_indexes_come_back_as_they_were(dest: Path, original: Path) -> None:
    for index in dest.rglob("*.safetensors"):
        index.unlink()
    (dest / "data.yaml").unlink()
    change_json(dest, lambda j: j.update(groups={}, splits={}))
    made = reindex(dest)
    assert (made.shards, made.samples, len(made.changed)) == (3, 7, 3)
    assert tree_hash(dest) == tree_hash(original)
    assert reindex(dest).changed == ()


def test_a_shard_that_is_gone_is_forgotten(dest: Path) -> None:
    (dest / f"{FIRST}.tar").unlink()
    assert [damage.split(":")[0] for damage in verify(dest).damage] == [f"{FIRST}.tar"]
    assert reindex(dest).samples == 4
    assert verify(dest).damage == ()


def test_a_damaged_bundle_stops_it_before_anything_is_written(dest: Path) -> None:
    edit(dest / f"{VAL}.tar", flip(900))
    (dest / f"{FIRST}.safetensors").unlink()
    before = tree_hash(dest)
    with pytest.raises(BundleError, match=r"val-000000\.tar:.*fetch or convert it again"):
        reindex(dest)
    assert tree_hash(dest) == before


def test_a_damaged_header_loses_no_samples_in_silence(dest: Path) -> None:
    members = [name for name, _ in read_tar(dest / f"{FIRST}.tar")]
    assert len(members) == 4
    edit(dest / f"{FIRST}.tar", lambda data: data.__setitem__(data.index(b"dir/c.rinr"), 0x7A))
    with pytest.raises(ShardError, match=r"train-000000\.tar: expected a tar of bundles"):
        reindex(dest)


def test_without_shards_there_is_nothing_to_index(dest: Path) -> None:
    for shard in dest.rglob("*.tar"):
        shard.unlink()
    with pytest.raises(ConfigError, match="expected shards, got none"):
        reindex(dest)
