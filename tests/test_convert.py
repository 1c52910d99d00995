"""Conversion: the same bytes whatever happens on the way, nothing half-written, and every picture or box that is left out is told."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import random_weights
from conftest import draw_scene
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_datasets import tree_hash
from tiny_settings import TinySettings

from rinr_loader import RinrDataset, units
from rinr_loader.bundle import Bundle, Network, NetworkSpec, pack, parse
from rinr_loader.convert import Job, Progress, Report, convert, estimate
from rinr_loader.encode import encode_unit
from rinr_loader.errors import ConfigError, ConvertError, ShardError, StorageError
from rinr_loader.index import index_shard
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.source import Problem, Sample, Source, Split
from rinr_loader.units import plan_units
from rinr_loader.writer import read_tar

SPEC = NetworkSpec("background", 1, 2, "int8")
BAD_PICTURE = b"this is no picture"
NAMES = ("ellipse", "rectangle", "triangle")


def png(pixels: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")  # type: ignore[arg-type]
    return file.getvalue()


def sample(key: str, seed: int, split: Split = "train", **changes: Any) -> Sample:
    scene = draw_scene(seed, width=24, height=16, objects=1)
    return replace(Sample(key, split, png(scene.image), scene.boxes, scene.classes), **changes)


def source(train: int = 7, val: int = 2) -> Source:
    samples = [sample(f"t{i}", i) for i in range(train)] + [sample(f"v{i}", 50 + i, "val") for i in range(val)]
    return Source("drawn", samples, NAMES)


def source_of_files(folder: Path, train: int = 7) -> Source:
    """Pictures as files, so that they can change on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for made in source(train, 0).samples:
        path = folder / f"{made.key}.png"
        assert isinstance(made.image, bytes)
        path.write_bytes(made.image)
        samples.append(replace(made, image=path))
    return Source("drawn", samples, NAMES)


class Encoder:
    """In the place of `encode_unit`: bundles of random networks that are a function of picture, settings and unit, at no cost."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.fail_at: int | None = None
        self.pictures: list[Picture] = []

    def __call__(
        self, pictures: Sequence[Picture], settings: Settings, *, unit: str, on_background: Callable[[], None] | None, **_: Any
    ) -> list[bytes]:
        if self.fail_at == len(self.encoded):
            raise KeyboardInterrupt
        self.encoded.append(unit)
        self.pictures += pictures
        bundles = []
        for picture in pictures:
            height, width = picture.pixels.shape[:2]
            digest = hashlib.sha256(repr((settings, unit, picture.blind)).encode() + picture.pixels.tobytes()).digest()
            network = Network(SPEC, (0, 0, width, height), 0.5, random_weights(SPEC, int.from_bytes(digest[:4], "little")))
            rest = {"label": picture.label, "source_hash": picture.source_hash, "psnr": 20 + digest[0] / 100}
            labels = {"boxes": picture.boxes, "classes": picture.classes, "crowd": picture.crowd}
            bundles.append(pack(Bundle((height, width), picture.source_size, (network,), **labels, **rest)))  # type: ignore[arg-type]
            if on_background is not None:
                on_background()
        return bundles


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """Conversions of this test encode for nothing, in units of two samples, and do not wait for the disk."""
    made = Encoder()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(units, "encode_unit", made)
    monkeypatch.setattr(units, "UNIT", 2)
    return made


SIREN = Settings(family="siren")
JOB = Job(SIREN, shard_samples=3)


def members(dest: Path, split: str = "train") -> dict[str, bytes]:
    return {name: data for shard in sorted((dest / split).glob("*.tar")) for name, data in read_tar(shard)}


def described(dest: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dest / "dataset.json").read_bytes())
    return found


# --- what is written ---


def test_the_directory(encoder: Encoder, tmp_path: Path) -> None:
    report = convert(source(), tmp_path / "d", JOB)
    files = sorted(path.relative_to(tmp_path / "d").as_posix() for path in (tmp_path / "d").rglob("*") if path.is_file())
    shards = ["train/train-000000", "train/train-000001", "train/train-000002", "val/val-000000"]
    assert files == sorted(["data.yaml", "dataset.json", "report.json", *(f"{shard}.{kind}" for shard in shards for kind in ("tar", "safetensors"))])
    assert encoder.encoded == [f"train-{s:06d}-{u:04d}" for s, u in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))] + ["val-000000-0000"]
    assert report.samples == {"train": 7, "val": 2}
    assert report.problems == ()
    assert report.dropped_boxes == {}
    assert report.bytes == sum((tmp_path / "d" / file).stat().st_size for file in files)
    assert report.source_bytes == sum(len(s.image) for s in source().samples if isinstance(s.image, bytes))
    for split in ("train", "val"):
        stored = [parse(data) for data in members(tmp_path / "d", split).values()]
        assert report.psnr[split] == pytest.approx(np.mean([bundle.psnr or 0 for bundle in stored]))
        objects = [bundle.object_psnr for bundle in stored if bundle.object_psnr is not None]
        assert report.object_psnr[split] == (pytest.approx(np.mean(objects)) if objects else None)


def test_shards_hold_the_samples_in_order(encoder: Encoder, tmp_path: Path) -> None:
    convert(source(), tmp_path, JOB)
    keys = [index_shard(shard).keys for shard in sorted((tmp_path / "train").glob("*.tar"))]
    assert keys == [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"]]
    for made, (name, data) in zip(source().samples, {**members(tmp_path), **members(tmp_path, "val")}.items(), strict=True):
        bundle = parse(data)
        assert name == f"{made.key}.rinr"
        np.testing.assert_array_equal(bundle.boxes, made.boxes)
        np.testing.assert_array_equal(bundle.classes, made.classes)
        assert isinstance(made.image, bytes)
        assert bundle.source_hash == hashlib.sha256(made.image).digest()[:4]


def test_dataset_json_says_what_is_there(encoder: Encoder, tmp_path: Path) -> None:
    convert(source(), tmp_path, Job(TinySettings(seed=5), size=(20, 20), shard_samples=3))
    found = described(tmp_path)
    assert {split: (table["samples"], table["objects"]) for split, table in found["splits"].items()} == {"train": (7, 7), "val": (2, 2)}
    for table in found["splits"].values():
        for row in table["shards"]:
            for name, size, digest in (("path", "bytes", "sha256"), ("index", "index_bytes", "index_sha256")):
                data = (tmp_path / row[name]).read_bytes()
                assert (row[size], row[digest]) == (len(data), hashlib.sha256(data).hexdigest())
    assert found["names"] == list(NAMES)
    assert (found["codec"]["seed"], found["codec"]["size"], found["codec"]["shard_samples"]) == (5, [20, 20], 3)
    text = (tmp_path / "dataset.json").read_text()
    assert os.uname().nodename not in text
    assert str(tmp_path) not in text


@given(st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, max_size=300), st.integers(1, 200))
def test_units_never_cross_a_shard_or_a_split(splits: list[Split], shard_samples: int) -> None:
    samples = [Sample(f"{i}", split, b"") for i, split in enumerate(splits)]
    planned = plan_units(samples, shard_samples)
    dealt: dict[str, list[Sample]] = {}
    for unit in planned:
        assert 1 <= len(unit.samples) <= 64
        assert {s.split for s in unit.samples} == {unit.split}
        assert unit.name.startswith(unit.shard)
        assert unit.shard.startswith(unit.split)
        dealt.setdefault(unit.shard, []).extend(unit.samples)
    assert len({unit.name for unit in planned}) == len(planned)
    for split in set(splits):
        mine = [found for shard, found in dealt.items() if shard.startswith(split)]
        assert [s for found in mine for s in found] == [s for s in samples if s.split == split]
        assert all(len(found) == shard_samples for found in mine[:-1])


@pytest.mark.parametrize(("shard_samples", "sizes"), [(1, [1] * 7), (7, [7]), (100, [7]), (2, [2, 2, 2, 1])])
def test_shard_samples(encoder: Encoder, tmp_path: Path, shard_samples: int, sizes: list[int]) -> None:
    convert(source(), tmp_path, Job(shard_samples=shard_samples))
    assert [row["samples"] for row in described(tmp_path)["splits"]["train"]["shards"]] == sizes


def test_names_suit_webdataset_and_dali(encoder: Encoder, tmp_path: Path) -> None:
    """Both split a member's name at its first dot; DALI reads names that are not plain USTAR as empty."""
    keys = ["v1.2/frame 07.left", "straße", "tab\there", "a" * 95]
    samples = [sample(key, i, extra={"track": i}) for i, key in enumerate(keys)]
    convert(Source("drawn", samples, NAMES), tmp_path, JOB)
    for shard in (tmp_path / "train").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for info in tar:
                assert info.name.count(".") == 1
                assert info.name.isascii()
                assert not set(info.name) & set(" \t\n")
                assert info.pax_headers == {}
                assert (info.uid, info.gid, info.mtime, info.uname, info.gname) == (0, 0, 0, "", "")
    assert [name.split(".")[1] for name in members(tmp_path)] == ["rinr", "json"] * 4
    assert RinrDataset(tmp_path).keys == keys


def test_sidecars_follow_their_bundle_and_lose_dropped_boxes(encoder: Encoder, tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 5, 5], [3, 3, 3, 9], [np.nan] * 4, [1, 1, 9, 9]], np.float32)
    with_list = sample("a", 0, boxes=boxes, classes=np.arange(4) % 3, extra={"objects": ["p", "q", "r", "s"], "clip": "x"})
    convert(Source("drawn", [with_list, sample("b", 1), sample("c", 2, extra={"z": 1, "a": [1.5, None, "é"]})], NAMES), tmp_path, JOB)
    found = members(tmp_path)
    assert list(found) == ["a.rinr", "a.json", "b.rinr", "c.rinr", "c.json"]
    assert json.loads(found["a.json"]) == {"objects": ["p", "s"], "clip": "x"}
    assert found["c.json"] == b'{"a": [1.5, null, "\\u00e9"], "z": 1}'
    assert parse(found["a.rinr"]).classes.tolist() == [0, 0]


def test_pictures_reach_the_encoder_as_they_should(encoder: Encoder, tmp_path: Path) -> None:
    crowd = np.array([True])
    samples = [sample("a", 0, label=2, crowd=crowd), sample("b", 1, "val"), sample("c", 2, "test")]
    convert(Source("drawn", samples, NAMES), tmp_path / "d", Job(size=(12, 12)))
    assert [picture.blind for picture in encoder.pictures] == [False, True, True]
    assert [picture.label for picture in encoder.pictures] == [2, -1, -1]
    assert [picture.crowd.tolist() for picture in encoder.pictures] == [[True], [False], [False]]
    assert {(picture.pixels.shape, picture.source_size) for picture in encoder.pictures} == {((8, 12, 3), (16, 24))}
    encoder.pictures.clear()
    convert(Source("drawn", samples, NAMES), tmp_path / "e", Job(val_residuals=True))
    assert [picture.blind for picture in encoder.pictures] == [False] * 3
    assert {picture.pixels.shape for picture in encoder.pictures} == {(16, 24, 3)}


# --- the same bytes ---


def test_two_runs_are_equal_and_other_settings_are_not(encoder: Encoder, tmp_path: Path) -> None:
    for name, job in (("a", JOB), ("b", JOB), ("c", replace(JOB, settings=Settings(seed=1, family="siren")))):
        convert(source(), tmp_path / name, job)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b") != tree_hash(tmp_path / "c")


def test_processes_and_threads_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really encoded: one process, two processes, and several threads."""
    job = Job(TinySettings(), shard_samples=2)
    made = source(4, 1)
    convert(made, tmp_path / "one", job)
    convert(made, tmp_path / "two", job, workers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        convert(made, tmp_path / "threads", job)
    finally:
        torch.set_num_threads(before)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two") == tree_hash(tmp_path / "threads")
    assert {network.spec.kind for data in members(tmp_path / "two").values() for network in parse(data).networks} == {"background", "residual"}


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_of_the_encoder(threads: int) -> None:
    scene = draw_scene(1, width=24, height=16, objects=2)
    height, width = scene.image.shape[:2]
    picture = Picture(scene.image, (height, width), scene.boxes, scene.classes, np.zeros(len(scene.boxes), np.bool_))
    small = replace(
        picture, pixels=scene.image[:10, :10], source_size=(10, 10), boxes=scene.boxes[:0], classes=scene.classes[:0], crowd=picture.crowd[:0]
    )
    pictures = [picture, small, picture]
    assert encode_unit(pictures, TinySettings(), unit="u", threads=1) == encode_unit(pictures, TinySettings(), unit="u", threads=threads)


# --- going on ---


def interrupted(encoder: Encoder, made: Source, dest: Path, after: int, job: Job = JOB) -> None:
    encoder.fail_at = len(encoder.encoded) + after
    with pytest.raises(KeyboardInterrupt):
        convert(made, dest, job)
    encoder.fail_at = None
    assert not (dest / "dataset.json").exists()


@pytest.mark.parametrize("after", range(6))
def test_interrupted_after_any_unit_it_goes_on_and_gives_the_same_bytes(encoder: Encoder, tmp_path: Path, after: int) -> None:
    convert(source(), tmp_path / "undisturbed", JOB)
    all_units = encoder.encoded.copy()
    encoder.encoded.clear()
    interrupted(encoder, source(), tmp_path / "d", after)
    with pytest.raises(ConfigError, match="expected a directory with dataset"):
        RinrDataset(tmp_path / "d")
    convert(source(), tmp_path / "d", JOB)
    assert encoder.encoded == all_units, "no unit is encoded twice"
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


@pytest.mark.parametrize("where", range(25))
def test_interrupted_at_any_write_it_goes_on_and_gives_the_same_bytes(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    """Stopped before the n-th file is renamed into place, then before the n-th again."""
    convert(source(), tmp_path / "undisturbed", JOB)
    calls = [0]
    replace_file = Path.replace

    def stop(self: Path, target: Any) -> Path:
        calls[0] += 1
        if calls[0] == where + 1:
            raise KeyboardInterrupt
        return replace_file(self, target)

    for attempt in range(2):
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stop)
            with suppress(KeyboardInterrupt):
                convert(source(), tmp_path / "d", JOB)
        assert attempt == 1 or calls[0] == where + 1, "the first run is stopped"
        assert not list((tmp_path / "d").rglob("*.tmp"))
    convert(source(), tmp_path / "d", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


def test_leftovers_of_a_killed_run_are_removed(encoder: Encoder, tmp_path: Path) -> None:
    convert(source(), tmp_path / "undisturbed", JOB)
    interrupted(encoder, source(), tmp_path / "d", 2)
    leftover = tmp_path / "d" / ".rinr" / ".train-000000-0001.tar.123.tmp"
    leftover.write_bytes(b"half")
    interrupted(encoder, source(), tmp_path / "d", 0)
    assert not leftover.exists()
    convert(source(), tmp_path / "d", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


def test_a_run_killed_while_cleaning_up_is_finished(encoder: Encoder, tmp_path: Path) -> None:
    convert(source(), tmp_path / "d", JOB)
    before = tree_hash(tmp_path / "d")
    encoder.encoded.clear()
    for leftover in (".rinr", ".rinr-done"):
        (tmp_path / "d" / leftover).mkdir()
        (tmp_path / "d" / leftover / "train-000000-0000.tar").write_bytes(b"")
        convert(source(), tmp_path / "d", JOB)
        assert tree_hash(tmp_path / "d") == before
    assert encoder.encoded == []


def test_a_finished_conversion_has_nothing_to_do(encoder: Encoder, tmp_path: Path) -> None:
    first = convert(source(), tmp_path, JOB)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    encoder.encoded.clear()
    again = convert(source(), tmp_path, JOB)
    assert encoder.encoded == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    assert replace(again, seconds=0) == replace(first, seconds=0)


@pytest.mark.parametrize("change", ["gone", "cut", "index"])
def test_a_finished_conversion_that_lost_files_is_not_finished(encoder: Encoder, tmp_path: Path, change: str) -> None:
    convert(source(), tmp_path / "d", JOB)
    shard = tmp_path / "d" / "train" / "train-000001.tar"
    if change == "gone":
        shard.unlink()
    elif change == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    else:
        shard.with_suffix(".safetensors").unlink()
    with pytest.raises(ShardError, match=r"train-000001\.\w+: expected .*; remove .*d and convert again"):
        convert(source(), tmp_path / "d", JOB)


def test_progress_counts_what_was_found(encoder: Encoder, tmp_path: Path) -> None:
    interrupted(encoder, source(), tmp_path, 2)
    seen: list[Progress] = []
    convert(source(), tmp_path, JOB, on_progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].resumed) == (9, 9, 3)
    assert seen[-1].bytes == sum(len(data) for split in ("train", "val") for data in members(tmp_path, split).values())
    report = convert(source(), tmp_path, JOB)
    total = sum((report.psnr[split] or 0) * count for split, count in report.samples.items())
    assert seen[-1].psnr == pytest.approx(total / 9, abs=0.01)


def repaint(path: Path) -> None:
    path.write_bytes(png(np.full((16, 24, 3), 9, np.uint8)))


@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_picture_that_changed_is_encoded_again_with_its_unit_only(encoder: Encoder, tmp_path: Path, after: int) -> None:
    made = source_of_files(tmp_path / "pictures")
    interrupted(encoder, made, tmp_path / "d", after) if after < 5 else stop_in_assembly(made, tmp_path / "d")
    repaint(tmp_path / "pictures" / "t3.png")  # in the third unit, train-000001-0000
    encoder.encoded.clear()
    convert(made, tmp_path / "d", JOB)
    assert encoder.encoded == ["train-000001-0000", *(["train-000001-0001", "train-000002-0000"][after - 3 :])]
    convert(made, tmp_path / "undisturbed", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


def stop_in_assembly(made: Source, dest: Path) -> None:
    """All units encoded, all shards joined, dataset.json not there yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rinr_loader.convert.describe_dataset", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(made, dest, JOB)
    assert list(dest.rglob("train-000002.tar"))


def raise_interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_killed_between_the_two_files_of_a_changed_unit(encoder: Encoder, tmp_path: Path) -> None:
    """The new report must not vouch for the old members."""
    made = source_of_files(tmp_path / "pictures")
    stop_in_assembly(made, tmp_path / "d")
    repaint(tmp_path / "pictures" / "t3.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "write_tar", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(made, tmp_path / "d", JOB)
    convert(made, tmp_path / "d", JOB)
    convert(made, tmp_path / "undisturbed", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["boxes", "classes", "crowd", "label", "extra"])
def test_annotations_that_changed_are_encoded_again(encoder: Encoder, tmp_path: Path, change: str) -> None:
    made = source()
    interrupted(encoder, made, tmp_path / "d", 3)
    old = made.samples[0]
    other = {"boxes": old.boxes + 1, "classes": (old.classes + 1) % 3, "crowd": np.ones(1, np.bool_), "label": 1, "extra": {"x": 1}}[change]
    changed = replace(made, samples=[replace(old, **{change: other}), *made.samples[1:]])
    encoder.encoded.clear()
    convert(changed, tmp_path / "d", JOB)
    assert encoder.encoded[0] == "train-000000-0000"
    assert len(encoder.encoded) == 4
    convert(changed, tmp_path / "undisturbed", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


def test_a_picture_that_became_readable_is_taken_in(encoder: Encoder, tmp_path: Path) -> None:
    made = source_of_files(tmp_path / "pictures")
    good = (tmp_path / "pictures" / "t0.png").read_bytes()
    (tmp_path / "pictures" / "t0.png").unlink()
    interrupted(encoder, made, tmp_path / "d", 3)
    (tmp_path / "pictures" / "t0.png").write_bytes(good)
    report = convert(made, tmp_path / "d", JOB)
    assert (report.samples, report.problems) == ({"train": 7}, ())


def test_a_unit_with_an_unreadable_picture_is_not_encoded_again(encoder: Encoder, tmp_path: Path) -> None:
    made = Source("drawn", [sample("a", 0, image=BAD_PICTURE), *source().samples], NAMES)
    interrupted(encoder, made, tmp_path, 2)
    encoder.encoded.clear()
    report = convert(made, tmp_path, JOB)
    assert "train-000000-0000" not in encoder.encoded
    assert len(report.problems) == 1


OTHER_JOBS = {
    "seed 0 instead of 3": Job(Settings(seed=3, family="siren"), shard_samples=3),
    "mode qre instead of re": Job(Settings(mode="re", family="siren"), shard_samples=3),
    "size None instead of [8, 8]": Job(SIREN, size=(8, 8), shard_samples=3),
    "shard_samples 3 instead of 4": Job(SIREN, shard_samples=4),
    "val_residuals False instead of True": Job(SIREN, shard_samples=3, val_residuals=True),
}


@pytest.mark.parametrize("difference", OTHER_JOBS)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_command_on_the_same_dest_is_refused(encoder: Encoder, tmp_path: Path, difference: str, finished: bool) -> None:
    convert(source(), tmp_path / "d", JOB) if finished else interrupted(encoder, source(), tmp_path / "d", 2)
    before = tree_hash(tmp_path / "d")
    words = "another dataset" if finished else "an unfinished conversion"
    with pytest.raises(ConfigError) as caught:
        convert(source(), tmp_path / "d", OTHER_JOBS[difference])
    assert f"expected the conversion asked for, got {words} ({difference})" in str(caught.value)
    assert "choose another DEST" in str(caught.value)
    assert tree_hash(tmp_path / "d") == before


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (source(6), "other samples"),
        (replace(source(), names=("a", "b", "c")), "other names"),
        (replace(source(), format="coco"), "source_format drawn instead of coco"),
        (Source("drawn", [*source().samples, sample("new", 9)], NAMES), "other samples"),
    ],
    ids=["fewer", "names", "format", "more"],
)
def test_another_source_on_the_same_dest_is_refused(encoder: Encoder, tmp_path: Path, other: Source, difference: str) -> None:
    convert(source(), tmp_path / "d", JOB)
    with pytest.raises(ConfigError, match=rf"another dataset \({difference}\); choose another DEST"):
        convert(other, tmp_path / "d", JOB)


def test_the_advice_is_right_the_same_command_goes_on(encoder: Encoder, tmp_path: Path) -> None:
    interrupted(encoder, source(), tmp_path / "d", 2)
    with pytest.raises(ConfigError, match="run the same command again, or choose another DEST"):
        convert(source(), tmp_path / "d", Job(shard_samples=4))
    assert convert(source(), tmp_path / "d", JOB).samples == {"train": 7, "val": 2}
    assert convert(source(), tmp_path / "other", Job(shard_samples=4)).samples == {"train": 7, "val": 2}


@pytest.mark.parametrize("content", [b'{"name": "mine"}', b"[1]", b"no json", b"\xff\xfe", b'{"codec": null}', b'{"codec": {"job": 3}}'])
def test_a_dataset_json_of_something_else(encoder: Encoder, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ConfigError, match="got another dataset"):
        convert(source(), tmp_path, JOB)
    assert (tmp_path / "dataset.json").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["notes.txt", "train/a.jpg", ".hidden"])
def test_dest_holds_something_else(encoder: Encoder, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=rf"expected an empty folder or an unfinished conversion, got {name.split('/')[0]}; choose another DEST"):
        convert(source(), tmp_path, JOB)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [name]


def test_dest_is_a_file_or_below_one(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file: expected a folder, got a file; choose another DEST"):
        convert(source(), tmp_path / "file", JOB)
    with pytest.raises(StorageError, match="expected a place that can be written, got Not a directory"):
        convert(source(), tmp_path / "file" / "d", JOB)


def test_an_empty_dest_and_one_with_parents_to_make(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source(), tmp_path / "empty", JOB)
    convert(source(), tmp_path / "a" / "b" / "c", JOB)
    assert tree_hash(tmp_path / "empty") == tree_hash(tmp_path / "a" / "b" / "c")


# --- no space left ---


def sound_so_far(dest: Path) -> None:
    """No half-written file: everything that has its name is whole."""
    assert not (dest / "dataset.json").exists()
    assert not list(dest.rglob("*.tmp"))
    for path in dest.rglob("*.tar"):
        list(read_tar(path))
    for path in dest.rglob("*.json"):
        json.loads(path.read_bytes())


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A folder with room for `size` bytes, and a function that makes room: a small tmpfs, or where that may not be mounted, a watched folder."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False, capture_output=True).returncode == 0:
        try:
            yield lambda: subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True) and None
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    with watched(folder, size) as make_room:
        yield make_room


@contextmanager
def watched(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A folder in which nothing can be flushed to disk once it holds more than `size` bytes."""
    limit = [size]
    fsync = os.fsync

    def checked(descriptor: int) -> None:
        if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > limit[0]:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", checked)
        yield lambda: limit.__setitem__(0, 1 << 24)


@pytest.mark.parametrize("disk", [small_disk, watched], ids=["small disk", "watched folder"])
@pytest.mark.parametrize("size", [4096, 24_576, 49_152, 81_920])
def test_no_space_left(encoder: Encoder, tmp_path: Path, disk: Any, size: int) -> None:
    convert(source(), tmp_path / "undisturbed", JOB)
    if disk is watched:
        (tmp_path / "disk").mkdir()
    with disk(tmp_path / "disk", size) as make_room:
        dest = tmp_path / "disk" / "d"
        with pytest.raises(StorageError, match="no space left; free some and run the same command again, what is finished is kept"):
            convert(source(), dest, JOB)
        sound_so_far(dest)
        with pytest.raises(StorageError, match="no space left"):
            convert(source(), dest, JOB)
        sound_so_far(dest)
        make_room()
        encoder.encoded.clear()
        convert(source(), dest, JOB)
        assert len(encoder.encoded) < 6 or size < 20_000, "what was finished is kept"
        assert tree_hash(dest) == tree_hash(tmp_path / "undisturbed")


def test_files_that_may_not_grow(encoder: Encoder, tmp_path: Path) -> None:
    """A real limit of the operating system on the size of a file."""
    convert(source(), tmp_path / "undisturbed", JOB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(StorageError, match=r"train-000000-0000\.tar: expected a place that can be written, got File too large"):
            convert(source(), tmp_path / "d", JOB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sound_so_far(tmp_path / "d")
    convert(source(), tmp_path / "d", JOB)
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


def test_no_space_left_in_a_worker(tmp_path: Path) -> None:
    """The error crosses from a spawned process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    dest = tmp_path / "d"
    (dest / ".rinr").mkdir(parents=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # inherited by the workers
    try:
        with pytest.raises(StorageError, match="File too large"):
            convert(source(2, 1), dest, Job(TinySettings()), workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sound_so_far(dest)


# --- what cannot be used ---


def test_unreadable_pictures_are_told_and_left_out(encoder: Encoder, tmp_path: Path) -> None:
    made = source_of_files(tmp_path / "pictures", 5)
    (tmp_path / "pictures" / "t1.png").write_bytes(BAD_PICTURE)
    (tmp_path / "pictures" / "t3.png").unlink()
    report = convert(made, tmp_path / "d", JOB)
    assert report.samples == {"train": 3}
    wanted = (Problem("train/t1.png", "not a picture that Pillow can identify"), Problem("train/t3.png", "cannot be read: No such file or directory"))
    assert report.problems == wanted
    assert json.loads((tmp_path / "d" / "report.json").read_bytes())["problems"] == [[p.subject, p.reason] for p in wanted]
    assert RinrDataset(tmp_path / "d").keys == ["t0", "t2", "t4"]
    assert [row["samples"] for row in described(tmp_path / "d")["splits"]["train"]["shards"]] == [2, 1]


def test_a_shard_without_a_readable_picture_is_left_out(encoder: Encoder, tmp_path: Path) -> None:
    made = source_of_files(tmp_path / "pictures")
    for i in (3, 4, 5):
        (tmp_path / "pictures" / f"t{i}.png").write_bytes(BAD_PICTURE)
    report = convert(made, tmp_path / "d", JOB)
    assert report.samples == {"train": 4}
    assert sorted(path.name for path in (tmp_path / "d" / "train").iterdir()) == [
        f"train-00000{i}.{kind}" for i in (0, 2) for kind in ("safetensors", "tar")
    ]
    assert len(report.problems) == 3


def test_only_unreadable_pictures(encoder: Encoder, tmp_path: Path) -> None:
    made = Source("drawn", [sample("a", 0, image=BAD_PICTURE), sample("b", 1, image=BAD_PICTURE)], NAMES)
    words = r"source: expected at least one readable picture, got none \(train/a: not a picture that Pillow can identify\); check the files"
    for _ in range(2):
        with pytest.raises(ConvertError, match=words):
            convert(made, tmp_path / "d", JOB)
        assert not (tmp_path / "d" / "dataset.json").exists()


def test_an_empty_source(encoder: Encoder, tmp_path: Path) -> None:
    for call in (lambda: convert(Source("drawn", []), tmp_path / "d", JOB), lambda: estimate(Source("drawn", []))):
        with pytest.raises(ConvertError, match="source: expected at least one picture, got none; check the path and --source-format"):
            call()
    assert not (tmp_path / "d").exists()


def test_boxes_that_cannot_be_used_are_told_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 5, 5], [3, 3, 3, 9], [30, 2, 40, 9], [np.nan] * 4, [20, 10, 99, 99]], np.float32)
    made = Source(
        "drawn", [sample("a", 0, boxes=boxes, classes=np.array([0, 1, 2, 0, 1])), sample("b", 1, boxes=boxes[1:2], classes=np.array([2]))], NAMES
    )
    report = convert(made, tmp_path, JOB)
    assert report.dropped_boxes == {"not finite": 1, "outside the picture": 1, "without an area": 2}
    assert [(p.subject, p.reason) for p in report.problems] == [
        ("train/a", "1 box(es) not finite"),
        ("train/a", "1 box(es) outside the picture"),
        ("train/a", "1 box(es) without an area"),
        ("train/b", "1 box(es) without an area"),
    ]
    found = RinrDataset(tmp_path).labels
    assert found[0]["boxes"].tolist() == [[0, 0, 5, 5], [20, 10, 24, 16]]
    assert found[0]["classes"].tolist() == [0, 1]
    assert len(found[1]["boxes"]) == 0, "the picture stays, as a background"


def test_labels_of_another_picture_size(encoder: Encoder, tmp_path: Path) -> None:
    made = Source("drawn", [sample("a", 0, declared_size=(16, 24)), sample("b", 1, declared_size=(24, 16))], NAMES)
    report = convert(made, tmp_path, JOB)
    assert report.samples == {"train": 1}
    assert report.problems[0].subject == "train/a"
    assert report.problems[0].reason == "expected a picture of 16x24 as its labels state, got 24x16; correct the labels or the picture"


STRICT: dict[str, tuple[Source, str]] = {
    "picture": (Source("drawn", [sample("a", 0), sample("b", 1, image=BAD_PICTURE)], NAMES), "train/b: not a picture"),
    "box": (Source("drawn", [sample("a", 0, boxes=np.array([[5, 5, 5, 9]], np.float32))], NAMES), r"train/a: 1 box\(es\) without an area"),
    "size": (Source("drawn", [sample("a", 0, declared_size=(1, 1)), sample("b", 1)], NAMES), "train/a: expected a picture of 1x1"),
    "listing": (replace(source(), problems=(Problem("train/x.txt", "no number"),)), "train/x.txt: no number"),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_makes_the_first_problem_an_error(encoder: Encoder, tmp_path: Path, name: str) -> None:
    made, words = STRICT[name]
    with pytest.raises(ConvertError, match=rf"^{words}.*; mend it, or leave out --strict$"):
        convert(made, tmp_path, JOB, strict=True)
    assert encoder.encoded == [], "nothing is fitted in vain"
    report = convert(made, tmp_path, JOB)  # the advice: without it the conversion goes on
    assert len(report.problems) == 1


def test_strict_looks_at_finished_units_too(encoder: Encoder, tmp_path: Path) -> None:
    made = Source("drawn", [sample("a", 0, image=BAD_PICTURE), *(sample(f"t{i}", i) for i in range(5))], NAMES)
    interrupted(encoder, made, tmp_path, 2)
    with pytest.raises(ConvertError, match="train/a: not a picture"):
        convert(made, tmp_path, JOB, strict=True)


def test_strict_is_content_where_there_is_no_problem(encoder: Encoder, tmp_path: Path) -> None:
    assert convert(source(), tmp_path, JOB, strict=True).samples == {"train": 7, "val": 2}


@pytest.mark.parametrize(("first", "second"), [("a", "a"), ("Frame", "frame"), ("dir/A", "Dir/a"), ("v1.A", "V1.a")])
def test_keys_that_are_equal_but_for_case(encoder: Encoder, tmp_path: Path, first: str, second: str) -> None:
    with pytest.raises(ConvertError, match=rf"train: expected keys that differ in more than case, got '{first}' and '{second}'; rename"):
        convert(Source("drawn", [sample(first, 0), sample("b", 1), sample(second, 2)], NAMES), tmp_path / "d", JOB)
    assert not (tmp_path / "d").exists()
    convert(Source("drawn", [sample(first, 0), sample(second, 2, "val")], NAMES), tmp_path / "d", JOB)  # of two splits


@pytest.mark.parametrize("key", ["n" * 96, "ü" * 20, "f" * 160 + "/n"])
def test_keys_that_a_tar_does_not_hold(encoder: Encoder, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConvertError, match="expected a name that a USTAR archive holds"):
        convert(Source("drawn", [sample("a", 0), sample(key, 1)], NAMES), tmp_path / "d", JOB)
    assert encoder.encoded == []
    assert not (tmp_path / "d").exists()


LABELS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "class above the names": ({"classes": np.array([3])}, NAMES, "expected class ids from 0 to 2, got 3"),
    "class below 0": ({"classes": np.array([-1])}, NAMES, "expected class ids from 0 to 2, got -1"),
    "class below 0 without names": ({"classes": np.array([-1])}, (), "expected class ids from 0 to 2147483647, got -1"),
    "class that 32 bits do not hold": ({"classes": np.array([2**31])}, (), "expected class ids from 0 to 2147483647, got 2147483648"),
    "label above the names": ({"label": 3}, NAMES, "expected class ids from 0 to 2, got 3"),
    "more classes than boxes": ({"classes": np.array([0, 0])}, NAMES, "expected a class for each of 1 boxes, got 2"),
    "fewer classes than boxes": ({"classes": np.zeros(0, np.int64)}, NAMES, "expected a class for each of 1 boxes, got 0"),
    "crowds of other boxes": ({"crowd": np.zeros(2, np.bool_)}, NAMES, "expected a class for each of 1 boxes"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_do_not_fit(encoder: Encoder, tmp_path: Path, name: str) -> None:
    changes, names, words = LABELS[name]
    made = Source("drawn", [sample("a", 0, classes=np.array([0])), sample("b", 1, **changes)], names)
    for call in (lambda: convert(made, tmp_path / "d", JOB), lambda: estimate(made)):
        with pytest.raises(ConvertError, match=rf"^train/b: {words}.*; correct the labels"):
            call()
    assert not (tmp_path / "d").exists()


def test_classes_without_names(encoder: Encoder, tmp_path: Path) -> None:
    convert(Source("drawn", [sample("a", 0, classes=np.array([41]), label=7)]), tmp_path, JOB)
    assert RinrDataset(tmp_path).labels[0]["classes"].tolist() == [41]
    assert RinrDataset(tmp_path).labels[0]["label"] == 7


@pytest.mark.parametrize("shard_samples", [0, -1])
def test_shards_of_nothing(encoder: Encoder, tmp_path: Path, shard_samples: int) -> None:
    with pytest.raises(ValueError, match=f"shard_samples: expected at least 1, got {shard_samples}"):
        convert(source(), tmp_path, Job(shard_samples=shard_samples))


# --- estimate ---


def test_estimate_spreads_its_samples_and_extrapolates(encoder: Encoder, tmp_path: Path) -> None:
    made = source(20, 4)
    found = estimate(made, JOB, samples=4)
    assert (found.samples, found.tried) == (24, 4)
    tried = [picture.source_hash for picture in encoder.pictures]
    every = [hashlib.sha256(s.image).digest()[:4] for s in made.samples if isinstance(s.image, bytes)]
    assert [every.index(found) for found in tried] == [0, 8, 15, 23]
    assert [picture.blind for picture in encoder.pictures] == [False, False, False, True]
    report = convert(made, tmp_path / "d", JOB)
    bundles = sum(len(data) for split in ("train", "val") for data in members(tmp_path / "d", split).values())
    assert found.bytes == pytest.approx(bundles, rel=0.05)
    assert found.psnr == pytest.approx(report.psnr["train"], abs=3)
    assert 0 < found.hours < 1


def test_estimate_of_fewer_samples_than_asked_for(encoder: Encoder) -> None:
    assert estimate(source(2, 1), JOB, samples=8).tried == 3
    assert len(encoder.pictures) == 3


def test_estimate_writes_nothing(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    estimate(source(), JOB)
    assert list(tmp_path.iterdir()) == []


def test_estimate_without_a_readable_picture(encoder: Encoder) -> None:
    with pytest.raises(ConvertError, match=r"source: expected readable pictures, got none of 1 tried \(not a picture"):
        estimate(Source("drawn", [sample("a", 0, image=BAD_PICTURE)], NAMES))


def test_a_report_survives(encoder: Encoder, tmp_path: Path) -> None:
    report = convert(source(), tmp_path, JOB)
    assert isinstance(report, Report)
    assert report.seconds > 0
    assert report.dest == tmp_path
