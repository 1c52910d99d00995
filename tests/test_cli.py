"""The command `rinr` in process: every command, every exit status, what goes to standard output and what to standard error."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from conftest import draw_scene
from PIL import Image
from small_datasets import edit, tree_hash, write_detection
from tiny_shards import TINY
from typer.testing import CliRunner, Result

from rinr_loader import __version__, cli, presets
from rinr_loader.bundle import parse
from rinr_loader.convert import Job
from rinr_loader.specs import FAMILIES
from rinr_loader.writer import read_tar


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit hardly at all."""
    for name in presets.PRESETS:
        monkeypatch.setitem(presets.PRESETS, name, TINY)


def rinr(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def convert(source: Path, dest: Path, *options: object) -> Result:
    return rinr("convert", source, dest, "--device", "cpu", *options)


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result.stdout


def failed(result: Result, status: int = 1) -> str:
    """What standard error says: for a failure one line, and nothing on standard output."""
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    if status == 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert "Traceback" not in result.stderr
        return errors[0]
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detection(tmp_path_factory.mktemp("cli") / "shards")


@pytest.fixture
def dest(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_yolo: Callable[..., Path]) -> Path:
    return write_yolo(tmp_path_factory.mktemp("source"), train=5, val=2, width=32, height=24)


def described(dest: Path) -> dict[str, Any]:
    return dict(json.loads((dest / "dataset.json").read_bytes()))


# --- the command itself ---


def test_version_and_help() -> None:
    assert done(rinr("--version")).strip() == f"rinr {__version__}"
    commands = ("convert", "info", "verify", "index", "export", "bench", "demo", "train-dictionary")
    assert all(command in done(rinr("--help")) for command in commands)
    for command in commands:
        assert "Usage: rinr" in done(rinr(command, "--help"))


def test_choices_are_those_of_the_core() -> None:
    hints = get_type_hints(cli.convert_command, include_extras=False)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cli.convert_command).parameters.items()}
    preset, mode = (set(get_args(get_args(hints[name])[0])) for name in ("preset", "mode"))
    assert preset == set(get_args(presets.PresetName)) <= set(presets.PRESETS), "a benchmark that ran before adds some of its own"
    assert mode == set(get_args(presets.Mode)) == {mode for modes in presets.MODES.values() for mode in modes}
    assert set(get_args(hints["family"])) == set(FAMILIES) == set(presets.UNDERSTOOD) == set(presets.MODES)
    settings, job = presets.Settings(), Job()
    assert (defaults["family"], defaults["seed"]) == (settings.family, settings.seed)
    optional = ("preset", "mode", "target_psnr", "object_psnr", "max_bytes", "refine", "layers")
    assert {defaults[name] for name in optional} == {None}, "what is not given is left to the settings"
    assert (defaults["shard_samples"], defaults["val_residuals"], defaults["size"]) == (job.shard_samples, job.val_residuals, job.size)


USAGE: dict[str, tuple[Sequence[str], str]] = {
    "no command": ((), "Usage: rinr"),
    "unknown command": (("konvert",), "konvert"),
    "unknown option": (("convert", "a", "b", "--speed", "9"), "--speed"),
    "no DEST": (("convert", "a"), "DEST"),
    "preset": (("convert", "a", "b", "--preset", "slow"), "--preset"),
    "mode": (("convert", "a", "b", "--mode", "xx"), "--mode"),
    "family": (("convert", "a", "b", "--family", "webp"), "--family"),
    "a preset of a family without": (
        ("convert", "a", "b", "--family", "jpeg", "--preset", "balanced"),
        "--preset: is of family siren, and not of jpeg; leave it out, or choose --family siren",
    ),
    "a mode of a family without": (
        ("convert", "a", "b", "--family", "jpeg", "--mode", "qre"),
        "--mode: is of family siren and tile, and not of jpeg",
    ),
    "a mode of another family": (
        ("convert", "a", "b", "--family", "tile", "--mode", "de"),
        "mode: expected one of qre, be for family tile, got 'de'",
    ),
    "refining a sine network": (("convert", "a", "b", "--family", "siren", "--refine", "100"), "--refine: is of family tile, and not of siren"),
    "layers of a JPEG": (("convert", "a", "b", "--family", "jpeg", "--layers", "2"), "--layers: is of family tile, and not of jpeg"),
    "bytes of a sine network": (
        ("convert", "a", "b", "--family", "siren", "--max-bytes", "9000"),
        "--max-bytes: is of family tile and jpeg, and not of siren",
    ),
    "no bytes": (("convert", "a", "b", "--family", "jpeg", "--max-bytes", "0"), "--max-bytes"),
    "three layers": (("convert", "a", "b", "--family", "tile", "--layers", "3"), "--layers"),
    "refining backwards": (("convert", "a", "b", "--family", "tile", "--refine", "-1"), "--refine"),
    "source format": (("convert", "a", "b", "--source-format", "mnist"), "expected one of dac_sdc, yolo"),
    "size": (("convert", "a", "b", "--size", "640"), "expected WIDTHxHEIGHT in pixels, such as 640x360, got '640'"),
    "no size": (("convert", "a", "b", "--size", "0x4"), "WIDTHxHEIGHT"),
    "val fraction": (("convert", "a", "b", "--val-fraction", "1"), "from 0 up to but not including 1"),
    "shard samples": (("convert", "a", "b", "--shard-samples", "0"), "--shard-samples"),
    "limit": (("export", "a", "b", "--limit", "0"), "--limit"),
    "target": (("convert", "a", "b", "--target-psnr", "120"), "--target-psnr"),
    "workers": (("convert", "a", "b", "--workers", "0"), "--workers"),
    "device": (("verify", "a", "--device", "tpu"), "expected cpu, cuda or cuda:NUMBER, got 'tpu'"),
    "amp on a CPU": (("convert", "a", "b", "--amp", "--device", "cpu"), "CUDA only"),
    "format": (("export", "a", "b", "--format", "webp"), "--format"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_told_with_status_2(name: str) -> None:
    arguments, expected = USAGE[name]
    result = rinr(*arguments)
    assert result.exit_code == 2
    assert expected in " ".join((result.stderr + result.stdout).replace("│", " ").split())


URL = "s3://bucket/data"
WITH_PATHS = (("convert", URL, "b"), ("convert", "a", URL), ("info", URL), ("verify", URL), ("index", URL), ("export", URL, "b"), ("bench", URL))


@pytest.mark.parametrize(
    "arguments",
    [*WITH_PATHS, ("demo", "--out", URL), ("train-dictionary", "a", "--out", URL), ("train-dictionary", URL, "--out", "b.bin")],
    ids=" ".join,
)
def test_a_url_is_a_clear_error(arguments: Sequence[str]) -> None:
    assert f"expected a local path, got {URL}; reading and writing object storage is not there yet" in failed(rinr(*arguments))


def test_a_device_that_is_not_there(source: Path, tmp_path: Path) -> None:
    assert "device: expected one of this machine, got cuda:99" in failed(rinr("convert", source, tmp_path / "d", "--device", "cuda:99"))


@pytest.mark.parametrize("command", ["info", "verify", "index", "bench"])
def test_no_dataset(command: str, tmp_path: Path) -> None:
    assert "expected a directory with dataset.json, got none; make one with `rinr convert SOURCE" in failed(rinr(command, tmp_path))
    assert "expected a directory with dataset.json" in failed(rinr(command, tmp_path / "nowhere"))


# --- convert ---


def test_convert_tells_what_it_did(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "shards")
    assert "train 5, val 2 samples" in done(result)
    assert "PSNR" in result.stdout
    assert "converting: 7/7 images" in result.stderr
    assert described(tmp_path / "shards")["task"] == "detect"
    before = tree_hash(tmp_path / "shards")
    assert "train 5, val 2 samples" in done(convert(source, tmp_path / "shards"))  # complete: nothing left to do
    assert tree_hash(tmp_path / "shards") == before


def test_options_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    options = (
        "--source-format yolo --family siren --preset best --mode re --size 16x100 --target-psnr 20 --object-psnr 21 --shard-samples 2 --limit 3"
    )
    report = json.loads(done(convert(source, tmp_path / "shards", *options.split(), "--seed", 7, "--val-residuals", "--workers", 1, "--json")))
    assert report["samples"] == {"train": 3, "val": 2}
    assert report["dest"] == str(tmp_path / "shards")
    about = described(tmp_path / "shards")
    wanted = {
        "family": "siren",
        "preset": "best",
        "mode": "re",
        "size": [16, 100],
        "target_psnr": 20,
        "object_psnr": 21,
        "shard_samples": 2,
        "seed": 7,
    }
    assert {name: about["codec"][name] for name in wanted} == wanted
    assert about["codec"]["val_residuals"]
    assert len(about["splits"]["train"]["shards"]) == 2
    bundle = parse(next(read_tar(tmp_path / "shards/train/train-000000.tar"))[1])
    assert bundle.stored_size == (12, 16)


def test_looking_at_the_labels_of_val_is_warned_of(source: Path, tmp_path: Path) -> None:
    told = convert(source, tmp_path / "blind").stderr
    assert "--val-residuals: the pictures" not in told
    assert "val: its objects have" in told, "what encoding blind to the labels costs is said too"
    assert (
        "--val-residuals: the pictures of val and test get better where their labels are" in convert(source, tmp_path / "d", "--val-residuals").stderr
    )
    assert "warning" not in rinr("info", tmp_path / "blind").stderr
    assert "val were encoded with a look at the labels" in rinr("info", tmp_path / "d").stderr


def test_a_share_becomes_val(tmp_path: Path) -> None:
    for k in range(6):
        Image.fromarray(draw_scene(k, width=32, height=24).image).save(tmp_path / f"{k}.png")
    done(convert(tmp_path, tmp_path.parent / "fraction", "--val-fraction", 0.34))
    assert {split: table["samples"] for split, table in described(tmp_path.parent / "fraction")["splits"].items()} == {"train": 4, "val": 2}


def test_a_dry_run_estimates_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    assert "estimated from 7 of 7 samples; nothing was written" in done(convert(source, tmp_path / "d", "--dry-run"))
    estimate = json.loads(done(convert(source, tmp_path / "d", "--dry-run", "--json")))
    assert estimate["samples"] == 7
    assert estimate["hours"] > 0
    assert not (tmp_path / "d").exists()


def damaged(root: Path, write_yolo: Callable[..., Path], count: int = 1, labels: str = "0 nan 0.5 0.1 0.1\n") -> Path:
    """A dataset in which `count` pictures cannot be read, and rows are added to the labels of another one."""
    source = write_yolo(root, train=count + 2, val=1, width=32, height=24)
    for k in range(count):
        (root / f"images/train/{k:04d}.png").write_bytes(b"no picture")
    with (root / f"labels/train/{count:04d}.txt").open("a") as file:
        file.write(labels)
    return source


def test_problems_are_listed_up_to_a_number(tmp_path: Path, write_yolo: Callable[..., Path]) -> None:
    result = convert(damaged(tmp_path / "source", write_yolo, count=12), tmp_path / "d")
    assert "train 2, val 1" in done(result)
    assert f"warning: 13 problem(s), all of them in {tmp_path / 'd' / 'report.json'}:" in result.stderr
    assert "0000.png: not a picture that Pillow can identify" in result.stderr
    assert "  and 3 more" in result.stderr
    assert len(json.loads((tmp_path / "d/report.json").read_bytes())["problems"]) == 13


@pytest.mark.requires("ultralytics")
def test_an_unreadable_picture_installs_nothing(tmp_path: Path, write_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics, once imported, replaces `PIL.Image.open` by one that runs pip where a file is no picture."""
    from ultralytics.utils import checks

    monkeypatch.setattr(checks, "check_requirements", lambda *_: pytest.fail("asked for a package"))
    result = convert(damaged(tmp_path / "source", write_yolo), tmp_path / "d")
    assert "0000.png: not a picture that Pillow can identify" in result.stderr


@pytest.mark.parametrize(("count", "labels"), [(1, ""), (0, "0 nan 0.5 0.1 0.1\n"), (0, "0 0.5 0.5 0 0.1\n")], ids=["picture", "label", "box"])
def test_strict_makes_the_first_problem_an_error(
    tmp_path: Path, write_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, count: int, labels: str
) -> None:
    source = damaged(tmp_path / "source", write_yolo, count, labels)
    with monkeypatch.context() as patch:
        patch.setattr("rinr_loader.units.encode_unit", lambda *_, **__: pytest.fail("fitted something first"))
        assert "mend it, or leave out --strict" in failed(convert(source, tmp_path / "d", "--strict"))
    done(convert(source, tmp_path / "other"))  # the advice


def test_there_is_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "expected a dataset, got nothing there; check the path" in failed(convert(tmp_path / "nowhere", tmp_path / "d"))
    assert "got no pictures and no shards" in failed(convert(tmp_path / "empty", tmp_path / "d"))
    (tmp_path / "empty/a.jpg").write_bytes(b"")
    assert "expected at least one readable picture, got none" in failed(convert(tmp_path / "empty", tmp_path / "d"))


def test_dest_holds_something_else(source: Path, dest: Path, tmp_path: Path) -> None:
    assert "got another dataset" in failed(convert(source, dest))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    assert "expected an empty folder or an unfinished conversion, got thesis.tex; choose another DEST" in failed(convert(source, tmp_path / "full"))
    assert "thesis.tex" in failed(convert(source, tmp_path / "full/thesis.tex"))
    assert "expected a dataset of pictures, got one that is converted already" in failed(convert(dest, tmp_path / "d"))


def test_other_options_do_not_continue_a_conversion(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rinr_loader.convert._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = convert(source, tmp_path / "d")
    assert "the same command again continues where it was" in failed(result, 130)
    assert "seed 0 instead of 1); run the same command again, or choose another DEST" in failed(convert(source, tmp_path / "d", "--seed", 1))
    done(convert(source, tmp_path / "d"))


def test_no_space_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        message = failed(convert(source, tmp_path / "d", "--shard-samples", 2))
    assert "no space left; free some and run the same command again, what is finished is kept" in message
    assert not list((tmp_path / "d").rglob("*.tmp"))
    done(convert(source, tmp_path / "d", "--shard-samples", 2))
    done(convert(source, tmp_path / "undisturbed", "--shard-samples", 2))
    assert tree_hash(tmp_path / "d") == tree_hash(tmp_path / "undisturbed")


# --- info, verify, index ---


def test_info(dest: Path, tmp_path: Path) -> None:
    text = done(rinr("info", dest, "--worst", tmp_path / "worst.png"))
    for expected in (
        "7 samples, task detect",
        "background",
        "residual",
        "header",
        "tar",
        "index",
        "total",
        "ellipse",
        "train/a.left",
        "--source SOURCE",
    ):
        assert expected in text
    assert np.asarray(Image.open(tmp_path / "worst.png")).ndim == 3
    about = json.loads(done(rinr("info", dest, "--json")))
    assert about["splits"]["train"]["samples"] == 5
    assert len(about["worst"]) == 7


def test_info_beside_jpeg(source: Path, tmp_path: Path) -> None:
    done(convert(source, tmp_path / "d"))
    text = done(rinr("info", tmp_path / "d", "--source", source))
    assert "train, on 5 of its pictures" in text
    assert "JPEG quality 75" in text
    about = json.loads(done(rinr("info", tmp_path / "d", "--source", source, "--samples", 2, "--json")))
    assert [row["pictures"] for row in about["jpeg"]] == [2, 2]


def test_info_of_what_is_not_right(dest: Path, tmp_path: Path, source: Path) -> None:
    assert "--worst: expected a place that can be written" in failed(rinr("info", dest, "--worst", tmp_path / "no/such/folder.png"))
    assert "expected the pictures that" in failed(rinr("info", dest, "--source", source.parent))
    shutil.copy(dest / "val/val-000000.safetensors", dest / "train/train-000001.safetensors")
    assert "train-000001.safetensors: expected SHA-256" in failed(rinr("info", dest))
    assert "1 index(es) changed" in done(rinr("index", dest))  # the advice
    done(rinr("info", dest))


def test_verify_lists_damage_with_status_1(dest: Path) -> None:
    assert "3 shards, 7 samples" in done(rinr("verify", dest, "--device", "cpu"))
    edit(dest / "train/train-000000.tar", lambda data: data.__setitem__(900, data[900] ^ 1))
    (dest / "val/val-000000.safetensors").unlink()
    result = rinr("verify", dest)
    assert result.exit_code == 1
    assert "train-000000.tar:a%2Eleft.rinr: expected checksum" in result.stdout
    assert "val/val-000000.safetensors: expected an index, got nothing there" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("3 thing(s) damaged")
    result = rinr("verify", dest, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["damage"]) == 3


def test_index_refuses_damage(dest: Path) -> None:
    assert json.loads(done(rinr("index", dest, "--json"))) == {"shards": 3, "samples": 7, "changed": []}
    edit(dest / "train/train-000000.tar", lambda data: data.__setitem__(900, data[900] ^ 1))
    assert "train-000000.tar:a%2Eleft.rinr" in failed(rinr("index", dest))


# --- export, bench ---


def test_export(dest: Path, tmp_path: Path) -> None:
    assert "4 pictures" in done(rinr("export", dest, tmp_path / "out", "--format", "jpeg", "--size", "16x16", "--limit", 2))
    assert [np.asarray(Image.open(file)).shape for file in (tmp_path / "out").rglob("*.jpg")] == [(12, 16, 3)] * 4
    found = json.loads(done(rinr("export", dest, tmp_path / "out", "--json")))
    assert found["pictures"] == 7
    assert "choose another OUT" in failed(rinr("export", dest, tmp_path))


def test_bench(dest: Path) -> None:
    found = json.loads(done(rinr("bench", dest, "--seconds", 0, "--batch-size", 1, "--batch-size", 3, "--size", "16x8", "--split", "val", "--json")))
    assert [speed["batch_size"] for speed in found["speeds"]] == [1, 3]
    assert (found["size"], found["split"]) == ([8, 16], "val")
    assert all(speed["images_per_second"] > 0 for speed in found["speeds"])
    assert "images/s" in done(rinr("bench", dest, "--seconds", 0))
    assert "expected a split 'test', got only" in failed(rinr("bench", dest, "--split", "test"))


@pytest.mark.parametrize("command", ["info", "verify", "index", "export", "bench"])
def test_ctrl_c_is_status_130(command: str, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rinr_loader.dataset.json.loads", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert failed(rinr(command, dest, *([tmp_path / "out"] if command == "export" else [])), 130).endswith("stopped")
