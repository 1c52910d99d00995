"""WebDataset shards of pictures: keys, labels, boxes, splits, byte ranges and damage."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from rinr_loader.converters import open_source, webdataset
from rinr_loader.errors import ConvertError
from rinr_loader.source import ByteRange, Sample


def _shard(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _bytes(sample: Sample) -> bytes:
    assert isinstance(sample.image, ByteRange)
    with sample.image.path.open("rb") as stream:
        stream.seek(sample.image.offset)
        return stream.read(sample.image.size)


def test_keys_end_at_the_first_dot_and_images_are_byte_ranges(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"a.jpg": b"first", "a.cls": "3\n", "x.y/b.c.PNG": b"second", "x.y/b.c.cls": "0", "a.txt": "caption"}
    source = open_source(_shard(tmp_path / "shard.tar", members))
    assert [(s.key, s.label, _bytes(s)) for s in source.samples] == [("a", 3, b"first"), ("x.y/b", 0, b"second")]
    assert source.names == ("0", "1", "2", "3")
    assert source.problems == ()
    assert pickle.loads(pickle.dumps(source.samples[0].image)) == source.samples[0].image  # noqa: S301 - what workers are sent


def test_boxes_from_json(tmp_path: Path) -> None:
    own = {"boxes": [[1, 2, 3, 4], [0, 0, 1.5, 1]], "classes": [1, 0], "caption": "two"}
    coco = {"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 4}], "image_id": 7}
    members: dict[str, bytes | str] = {}
    for key, content in {"a": own, "b": coco, "c": {"caption": "none"}, "d": ["a", "list"]}.items():
        members |= {f"{key}.jpg": b"x", f"{key}.json": json.dumps(content)}
    a, b, c, d = open_source(_shard(tmp_path / "shard.tar", members)).samples
    assert (a.boxes.tolist(), a.classes.tolist(), a.extra) == ([[1, 2, 3, 4], [0, 0, 1.5, 1]], [1, 0], own)
    assert (b.boxes.tolist(), b.classes.tolist(), b.extra) == ([[1, 2, 4, 6]], [4], coco)
    assert (c.boxes.shape, c.extra) == ((0, 4), {"caption": "none"})
    assert d.extra == {"json": ["a", "list"]}


@pytest.mark.parametrize("pattern", ["{split}/000.tar", "set-{split}-000.tar"])
def test_splits_come_from_folders_or_names(pattern: str, tmp_path: Path) -> None:
    for split, key in (("train", "a"), ("val", "b"), ("test", "c")):
        _shard(tmp_path / pattern.format(split=split), {f"{key}.jpg": b"x"})
    assert [(sample.split, sample.key) for sample in open_source(tmp_path).samples] == [("train", "a"), ("val", "b"), ("test", "c")]


def test_bad_members_are_reported(tmp_path: Path) -> None:
    bad_boxes = json.dumps({"boxes": [[1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, 4], [1, 2, 3, 4]], "classes": [0, 0, -1, 0.5]})
    members: dict[str, bytes | str] = {
        "a.jpg": b"x",
        "a.cls": "cat",
        "b.jpg": b"x",
        "b.json": "{",
        "c.cls": "1",
        "d.jpg": b"x",
        "d.png": b"x",
        "e.jpg": b"x",
        "e.cls": "-4",
        "f.jpg": b"x",
        "f.json": bad_boxes,
        "noext": b"x",
    }
    source = open_source(_shard(tmp_path / "s.tar", members))
    assert [(sample.key, sample.label, len(sample.boxes)) for sample in source.samples] == [(key, -1, 0) for key in "abdef"]
    subjects = sorted(problem.subject.rpartition(": ")[2] for problem in source.problems)
    assert subjects == ["a.cls", "b.json", "c", "d.png", "e.cls", "f.json", "f.json", "f.json", "f.json", "noext"]
    assert source.names == ()


def test_the_same_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", {"a.jpg": b"x"})
    _shard(tmp_path / "1.tar", {"a.jpg": b"x"})
    with pytest.raises(ConvertError, match=r"0\.tar at byte 512 and 'a' for .*1\.tar at byte 512"):
        open_source(tmp_path)


def test_a_truncated_shard_gives_what_is_whole(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "s.tar", {"a.jpg": b"x" * 1000, "b.jpg": b"y" * 5000})
    shard.write_bytes(shard.read_bytes()[:4000])
    source = open_source(shard)
    assert [sample.key for sample in source.samples] == ["a"]
    assert "truncated" in source.problems[0].reason


def test_a_compressed_shard_says_so(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "s.tar", {"a.jpg": b"x"})
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert not webdataset.detect(tmp_path)
    with pytest.raises(ConvertError, match=r"expected pictures in the webdataset format, got none; .*decompress it or fetch it again"):
        open_source(tmp_path, source_format="webdataset")


def test_shards_without_pictures_are_another_format(tmp_path: Path) -> None:
    _shard(tmp_path / "s.tar", {"a.rinr": b"x", "a.json": "{}"})
    assert not webdataset.detect(tmp_path)
    assert not webdataset.detect(tmp_path / "nothing")
