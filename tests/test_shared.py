"""Files of shared parameters: written before any shard, listed, loaded by the dataset when it reads, checked by `rinr verify`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from jpegs import jpeg_file, textured
from small_datasets import edit, tree_hash

from rinr_loader import RinrDataset, convert, shared
from rinr_loader.convert import Job
from rinr_loader.errors import ConfigError, ShardError, StorageError
from rinr_loader.info import describe
from rinr_loader.presets import Settings
from rinr_loader.reader import read_samples
from rinr_loader.reindex import reindex
from rinr_loader.source import Sample, Source
from rinr_loader.verify import verify

FILES = (b"the parameters of a dataset", b"and others" * 100)
NAMES = [hashlib.sha256(data).hexdigest() for data in FILES]
SHARED = dict(zip(NAMES, FILES, strict=True))


@pytest.fixture(autouse=True)
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is parsed from here on; parameters are their bytes."""
    seen: list[str] = []

    def parse(data: bytes, name: str) -> bytes:
        seen.append(name)
        if data.startswith(b"of another version"):
            raise ConfigError(f"{name}: expected a dictionary of version 1, got 2; upgrade rinr_loader to read it")
        return data

    monkeypatch.setattr(shared, "load", parse)
    return seen


def make(dest: Path, files: dict[str, bytes] | None = None) -> Path:
    samples = [Sample(f"{i}", "train", jpeg_file(textured(i, (24, 30))), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for i in range(3)]
    convert.convert(Source("drawn", samples), dest, Job(Settings(family="jpeg"), shard_samples=2, shared=SHARED if files is None else files))
    return dest


def path_of(dest: Path, number: int) -> Path:
    return dest / "shared" / f"{NAMES[number]}.bin"


def listed(dest: Path) -> dict[str, Any]:
    return dict(json.loads((dest / "dataset.json").read_bytes())["shared"])


def test_a_dataset_carries_its_shared_parameters(tmp_path: Path, parsed: list[str]) -> None:
    dest = make(tmp_path / "d")
    assert listed(dest) == {name: len(data) for name, data in SHARED.items()}
    assert [path_of(dest, i).read_bytes() for i in range(2)] == list(FILES)
    assert sorted(path.name for path in (dest / "shared").iterdir()) == sorted(f"{name}.bin" for name in NAMES)
    dataset = RinrDataset(dest)
    assert parsed == [], "not before something is read"
    buffer = dataset.read([0, 2])
    assert buffer.shared == {bytes.fromhex(name)[:8]: data for name, data in SHARED.items()}
    dataset.read([1])
    assert sorted(parsed) == sorted(f"shared/{name}.bin" for name in NAMES), "once"


def test_without_any_there_is_no_folder(tmp_path: Path) -> None:
    dest = make(tmp_path / "d", {})
    assert listed(dest) == {}
    assert not (dest / "shared").exists()
    assert RinrDataset(dest).read([0]).shared == {}
    described = json.loads((dest / "dataset.json").read_bytes())
    for earlier in ({**described, "shared": []}, {name: value for name, value in described.items() if name != "shared"}):
        (dest / "dataset.json").write_text(json.dumps(earlier))
        assert RinrDataset(dest).read([0]).shared == {}


def test_they_are_written_before_any_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = convert.write_tar

    def refuse(path: Path, *rest: Any) -> None:
        if path.parent.name == "train":
            assert path_of(tmp_path / "d", 0).read_bytes() == FILES[0]
            raise StorageError("no space left")
        genuine(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_tar", refuse)
        with pytest.raises(StorageError, match="no space left"):
            make(tmp_path / "d")
    assert not list((tmp_path / "d").rglob("*.tmp"))
    assert not (tmp_path / "d/dataset.json").exists()
    make(tmp_path / "d")
    assert tree_hash(tmp_path / "d") == tree_hash(make(tmp_path / "whole"))


def test_a_file_that_is_not_what_its_name_says_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"shared: expected a file of SHA-256 {NAMES[0]}, got {NAMES[1]}"):
        make(tmp_path / "d", {NAMES[0]: FILES[1]})
    assert not (tmp_path / "d/dataset.json").exists()


def test_a_missing_or_cut_file_is_told_when_the_dataset_is_opened(tmp_path: Path) -> None:
    dest = make(tmp_path / "d")
    path_of(dest, 0).write_bytes(FILES[0][:-1])
    for attempt in (lambda: RinrDataset(dest), lambda: make(dest)):
        with pytest.raises(ShardError, match=rf"{NAMES[0]}\.bin: expected 27 bytes, got 26; the file is damaged, fetch or convert the dataset again"):
            attempt()
    path_of(dest, 0).unlink()
    for attempt in (lambda: RinrDataset(dest), lambda: make(dest)):
        with pytest.raises(ShardError, match=rf"{NAMES[0]}\.bin: expected the shared parameters of the dataset, got No such file"):
            attempt()


def test_a_damaged_file_is_told_when_something_is_read(tmp_path: Path) -> None:
    dest = make(tmp_path / "d")
    edit(path_of(dest, 1), lambda data: data.__setitem__(0, 0))
    dataset = RinrDataset(dest)
    with pytest.raises(ShardError, match=rf"{NAMES[1]}\.bin: expected SHA-256 {NAMES[1]}, got [0-9a-f]{{64}}; the file is damaged"):
        dataset.read([0])
    path_of(dest, 1).unlink()
    with pytest.raises(ShardError, match="got No such file"):
        dataset.read([0])


def test_verify_lists_what_is_wrong_with_them(tmp_path: Path) -> None:
    dest = make(tmp_path / "whole")
    whole = verify(dest)
    assert whole.damage == ()
    assert whole.bytes >= sum(map(len, FILES)) + sum(path.stat().st_size for path in dest.glob("train/*"))

    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rinr_loader.verify.read_samples", lambda *arguments: (given.append(arguments[3]), read_samples(*arguments))[1])
        verify(dest)
    assert given == [{bytes.fromhex(name)[:8]: data for name, data in SHARED.items()}] * 2, "bundles are decoded by them"

    def damage(change: Any) -> tuple[str, ...]:
        copy = Path(shutil.copytree(dest, tmp_path / "copy"))
        change(copy)
        found = verify(copy).damage
        shutil.rmtree(copy)
        return found

    (gone,) = damage(lambda d: path_of(d, 0).unlink())
    assert f"{NAMES[0]}.bin: expected the shared parameters of the dataset, got No such file" in gone
    (other,) = damage(lambda d: edit(path_of(d, 0), lambda data: data.__setitem__(3, 1)))
    assert f"{NAMES[0]}.bin: expected SHA-256 {NAMES[0]}, got " in other
    (unlisted,) = damage(lambda d: (d / "shared/notes.txt").write_text("x"))
    assert unlisted == (
        "shared/notes.txt: expected only the shared parameters of dataset.json, got another file; move it away, or list it with `rinr index`"
    )
    (size,) = damage(lambda d: edit(d / "dataset.json", lambda data: data.__setitem__(slice(None), bytes(data).replace(b": 1000", b": 1001"))))
    assert size == f"shared/{NAMES[1]}.bin: expected 1001 bytes, got 1000; make it again with `rinr index`"
    version = b"of another version"
    name = hashlib.sha256(version).hexdigest()

    def renew(d: Path) -> None:
        (d / "shared" / f"{name}.bin").write_bytes(version)
        path_of(d, 0).unlink()
        reindex(d)

    (newer,) = damage(renew)
    assert newer.startswith(f"shared/{name}.bin: expected a dictionary of version 1, got 2")


def test_reindex_lists_what_is_there(tmp_path: Path) -> None:
    dest = make(tmp_path / "d")
    before = tree_hash(dest)
    assert reindex(dest).changed == ()
    assert tree_hash(dest) == before
    more = b"more"
    (dest / "shared" / f"{hashlib.sha256(more).hexdigest()}.bin").write_bytes(more)
    path_of(dest, 0).unlink()
    reindex(dest)
    assert listed(dest) == {NAMES[1]: len(FILES[1]), hashlib.sha256(more).hexdigest(): 4}
    assert verify(dest).damage == ()
    before = tree_hash(dest)
    (dest / "shared/notes.txt").write_text("x")
    with pytest.raises(ShardError, match=r"shared/notes\.txt: expected the name [0-9a-f]{64}\.bin, that of its content, got another; .*remove it"):
        reindex(dest)
    (dest / "shared/notes.txt").unlink()
    assert tree_hash(dest) == before


def test_reindex_does_not_forget_what_bundles_name(tmp_path: Path) -> None:
    dest = tmp_path / "d"
    shutil.copytree(REPOSITORY / "tests/golden/dataset-tile", dest)
    (dictionary,) = [name for name in listed(dest) if name == json.loads((dest / "dataset.json").read_bytes())["codec"]["dictionary"]]
    (dest / "shared" / f"{dictionary}.bin").rename(tmp_path / "away")
    (dest / "train/train-000001.safetensors").unlink()
    before = tree_hash(dest)
    with pytest.raises(
        ShardError, match=rf"expected the shared parameters that its bundles name, got no shared/{dictionary}\.bin; fetch that file again"
    ):
        reindex(dest)
    assert tree_hash(dest) == before, "nothing is written"
    (tmp_path / "away").rename(dest / "shared" / f"{dictionary}.bin")
    assert reindex(dest).changed == ("train/train-000001.safetensors",)
    assert dictionary in listed(dest)


@pytest.mark.parametrize("hostile", [["x"], {"../../etc": 1}, {"a" * 64: "1"}, {"a" * 64: True}, {"A" * 64: 1}, {"a" * 65: 1}, "abc", 3, None])
def test_hostile_lists(tmp_path: Path, hostile: object) -> None:
    dest = make(tmp_path / "d", {})
    described = json.loads((dest / "dataset.json").read_bytes())
    (dest / "dataset.json").write_text(json.dumps({**described, "shared": hostile}))
    with pytest.raises(ConfigError, match=r"expected what docs/FORMAT\.md lists"):
        RinrDataset(dest)


def test_info_counts_their_bytes(tmp_path: Path) -> None:
    dest = make(tmp_path / "d")
    found = describe(dest).bytes
    assert found.shared == sum(map(len, FILES))
    assert found.total == sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
