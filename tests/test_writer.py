"""Files that appear whole or not at all, and tars whose bytes depend on nothing but their members."""

from __future__ import annotations

import errno
import getpass
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from bundles import small_bundle

from rinr_loader.bundle import pack
from rinr_loader.errors import ConvertError, StorageError
from rinr_loader.index import build_index, row_of
from rinr_loader.writer import atomic, data_yaml, describe_dataset, dump_json, hash_file, make_folder, member, read_tar, write_bytes, write_tar

MEMBERS = [("a.rinr", b"x" * 700), ("dir/b.rinr", b""), ("dir/b.json", b"{}")]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whole or not at all ---


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"half"
    assert files(tmp_path) == ["a"]


def test_the_unfinished_file_lies_in_the_scratch_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with atomic(tmp_path / "a", tmp_path / "scratch"):
        assert len(files(tmp_path / "scratch")) == 1
        assert not (tmp_path / "a").exists()
    assert files(tmp_path) == ["a", "scratch"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    write_bytes(tmp_path / "a", b"before")

    def interrupted() -> None:
        with atomic(tmp_path / "a") as file:
            file.write(b"after")
            raise error

    with pytest.raises(StorageError if error is OSError else error):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"before"
    assert files(tmp_path) == ["a"]


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename must not find an empty file under the name."""
    seen = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_bytes(tmp_path / "a", b"12345")
    assert seen == [(5, False)]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left; free some and run the same"), (errno.EDQUOT, "no space left")])
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"a: {words}"):
        write_bytes(tmp_path / "a", b"12345")
    assert files(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place, reason in ((tmp_path / "none" / "a", "No such file"), (tmp_path / "file" / "a", "Not a directory")):
        with pytest.raises(StorageError, match=f"a: expected a place that can be written, got {reason}.*; check the folder"):
            write_bytes(place, b"")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert files(tmp_path) == ["a", "a/b"]
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(StorageError, match=r"file.*: expected a place that can be written, got "):
            make_folder(place)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StorageError, match="no space left"):
        make_folder(tmp_path / "c")


# --- tars ---


def test_a_tar_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS)
    assert list(read_tar(tmp_path / "a.tar")) == MEMBERS
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(info.name, info.size) for info in tar] == [(name, len(data)) for name, data in MEMBERS]


def test_every_header_is_plain_ustar(tmp_path: Path) -> None:
    """Read by its bytes: POSIX 1003.1, "ustar Interchange Format"."""
    long = f"{'f' * 150}/{'n' * 95}.rinr"
    write_tar(tmp_path / "a.tar", [*MEMBERS, (long, b"1")])
    data = (tmp_path / "a.tar").read_bytes()
    at, names = 0, []
    while data[at]:
        block = data[at : at + 512]
        fields = {name: block[start:end].rstrip(b"\0 ") for name, start, end in FIELDS}
        size = int(fields["size"], 8)
        assert int(fields["mode"], 8) == 0o644
        assert [int(fields[name], 8) for name in ("uid", "gid", "mtime")] == [0, 0, 0]
        assert (fields["type"], fields["link"], fields["user"], fields["group"]) == (b"0", b"", b"", b"")
        assert block[257:265] == b"ustar\x0000"
        names.append(b"/".join(part for part in (fields["prefix"], fields["name"]) if part).decode())
        at += 512 + -(-size // 512) * 512
    assert names == [*(name for name, _ in MEMBERS), long]
    assert data[at:].count(0) == len(data) - at >= 1024


FIELDS = (
    ("name", 0, 100),
    ("mode", 100, 108),
    ("uid", 108, 116),
    ("gid", 116, 124),
    ("size", 124, 136),
    ("mtime", 136, 148),
    ("type", 156, 157),
    ("link", 157, 257),
    ("user", 265, 297),
    ("group", 297, 329),
    ("prefix", 345, 500),
)


def test_the_bytes_of_a_tar_depend_on_its_members_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS)
    before = os.umask(0o077)
    try:
        monkeypatch.setattr(time, "time", lambda: 2e9)
        monkeypatch.setattr(getpass, "getuser", lambda: "somebody")
        (tmp_path / "elsewhere").mkdir()
        write_tar(tmp_path / "elsewhere" / "b.tar", iter(MEMBERS), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "elsewhere" / "b.tar").read_bytes()


@pytest.mark.parametrize("name", ["n" * 100, f"{'f' * 155}/{'n' * 100}", f"{'f/' * 77}{'n' * 100}"])
def test_names_that_ustar_holds(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [(name, b"x")])
    assert list(read_tar(tmp_path / "a.tar")) == [(name, b"x")]


@pytest.mark.parametrize("name", ["n" * 101, f"{'f' * 156}/n", f"f/{'n' * 101}", "f" * 300])
def test_names_that_ustar_does_not_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConvertError, match=rf"expected a name that a USTAR archive holds, got {len(name)} characters .*; shorten it"):
        member(name)
    with pytest.raises(ConvertError):
        write_tar(tmp_path / "a.tar", [("a", b""), (name, b"x")])
    assert files(tmp_path) == []


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


# --- what lies beside the shards ---


def test_equal_values_are_equal_json() -> None:
    assert dump_json({"b": 1, "a": ["ü"]}) == dump_json({"a": ["ü"], "b": 1})
    assert json.loads(dump_json({"b": 1, "a": ["ü"]})) == {"a": ["ü"], "b": 1}
    assert "ü".encode() in dump_json("ü"), "people read it"
    assert dump_json({}).endswith(b"\n")


HARD_NAMES = (
    "plain",
    "two words",
    "no",
    "null",
    "1",
    "it's",
    'a "b"',
    "a: b",
    "# x",
    "日本",
    "back\\slash",
    "tab\t",
    "{x}",
    "",
    "- y",
    "\u2028",
    "é",
)


def test_data_yaml_is_what_a_trainer_reads() -> None:
    found = yaml.safe_load(data_yaml(["train", "val"], HARD_NAMES))
    assert found == {"train": "train", "val": "val", "names": dict(enumerate(HARD_NAMES))}
    assert yaml.safe_load(data_yaml(["train"], ())) == {"train": "train", "names": {0: "object"}}


def test_dataset_json_counts_and_tells_the_task() -> None:
    data = pack(small_bundle())
    index = build_index([row_of(str(i), 1024 * i, data, "x") for i in range(3)])
    row = {"samples": 3, "objects": 9, "path": "p"}
    found = describe_dataset({"train": [(row, index), (row, index)], "val": [(row, index)]}, names=("a",), codec={"c": 1}, source={"s": 2})
    assert (found["format"], found["version"], found["names"], found["codec"], found["source"], found["shared"]) == (
        "rinr",
        1,
        ["a"],
        {"c": 1},
        {"s": 2},
        {},
    )
    listed = describe_dataset({"train": [(row, index)]}, names=(), codec={}, source={}, shared={"ab": 3})
    assert listed["shared"] == {"ab": 3}
    assert {split: (table["samples"], table["objects"], len(table["shards"])) for split, table in found["splits"].items()} == {
        "train": (6, 18, 2),
        "val": (3, 9, 1),
    }
    assert found["groups"] == {"background 2x3 int8": 9, "residual 1x4 float16": 9, "direct 1x2 int8": 9}
    assert found["task"] == "detect"

    def task(**changes: object) -> str:
        bundle = small_bundle()
        kept = type(bundle)(bundle.stored_size, bundle.source_size, bundle.networks[:1], **changes)  # type: ignore[arg-type]
        one = build_index([row_of("k", 0, pack(kept), "x")])
        return str(describe_dataset({"train": [(row, one)]}, names=(), codec={}, source={})["task"])

    assert task(label=0) == "classify"
    assert task() == "none"
    assert task(boxes=np.array([[0, 0, 1, 1]], np.float32), classes=np.zeros(1, np.int64), crowd=np.ones(1, np.bool_)) == "detect"
