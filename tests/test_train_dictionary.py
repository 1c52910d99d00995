"""Dictionaries from datasets: `rinr train-dictionary`, and the fit of the shipped one before a conversion."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_psnr, draw_scene
from PIL import Image
from small_datasets import tree_hash
from tiny_training import small, tiny_files
from typer.testing import CliRunner, Result

from rinr_loader import RinrDataset, cli, fit_dictionary, train_dictionary, training
from rinr_loader.analysis import load_analysis
from rinr_loader.convert import Job, convert
from rinr_loader.converters import open_source
from rinr_loader.dictionary import load
from rinr_loader.errors import ConfigError
from rinr_loader.presets import Settings
from rinr_loader.shared import listed, load_shared
from rinr_loader.source import Problem, Source
from rinr_loader.train_dictionary import groups_of, hold_out, middle, read_pictures
from rinr_loader.verify import verify

OPTIONS = ("--steps", "4", "--channels", "16", "--batch", "1", "--limit", "9")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "START_BATCHES", 2)
    with small():
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of pictures as large as a crop."""
    folders = tmp_path_factory.mktemp("sources")
    for name, count in (("first", 10), ("second", 2)):
        (folders / name).mkdir()
        for k in range(count):
            Image.fromarray(draw_scene(k + count, width=208, height=192).image).save(folders / name / f"{k}.png")
    return folders / "first", folders / "second"


def rinr(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def failed(result: Result, status: int = 1) -> str:
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


# --- rinr train-dictionary ---


def test_a_dictionary_is_trained_and_says_where_it_comes_from(sources: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "own.bin"
    result = rinr("train-dictionary", *sources, "--out", out, *OPTIONS, "--seed", 5, "--weights", "3,1.5", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    told = json.loads(result.stdout)
    assert "training for 4 steps" in result.stderr
    assert [f"validation after {step} steps: 0." in result.stderr for step in (0, 2, 4)] == [True] * 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["own.analysis", "own.bin"], "the state is gone when both stand"
    found = load(out.read_bytes(), out.name)
    assert load_analysis(out.with_suffix(".analysis").read_bytes(), "own.analysis")[1] == found.sha256 == told["sha256"]
    about = found.about
    assert about == told["about"]
    described = [{name: source[name] for name in ("name", "pictures", "held_out", "weight")} for source in about["sources"]]
    assert described == [
        {"name": "first", "pictures": 8, "held_out": 1, "weight": 3.0},
        {"name": "second", "pictures": 1, "held_out": 1, "weight": 1.5},
    ]
    assert (about["settings"]["steps"], about["settings"]["seed"], about["settings"]["channels"]) == (4, 5, 16)
    assert about["torch"] == torch.__version__
    assert [row["step"] for row in about["curve"]] == [0, 2, 4]
    assert str(tmp_path) not in json.dumps(about), "a dictionary names no place of this machine"


def test_a_training_that_was_stopped_goes_on(sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(out: Path) -> Result:
        return rinr("train-dictionary", sources[0], "--out", out, *OPTIONS)

    assert train(tmp_path / "whole.bin").exit_code == 0
    loss_of = training.loss_of

    def stopping(model: training.Model, images: torch.Tensor, steps: torch.Tensor, step: int) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return loss_of(model, images, steps, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "loss_of", stopping)
        stopped = train(tmp_path / "parts.bin")
    assert stopped.exit_code == 130
    assert "the same command again continues where it was" in stopped.stderr
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.bin.state"]
    resumed = train(tmp_path / "parts.bin")
    assert "going on after step 2 of 4" in resumed.stderr
    for suffix in (".bin", ".analysis"):
        assert (tmp_path / f"parts{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_training_goes_on_from_a_dictionary(sources: tuple[Path, Path], tmp_path: Path) -> None:
    def train(out: Path, *more: object) -> Result:
        return rinr("train-dictionary", sources[0], "--out", out, "--steps", 2, "--batch", 1, "--limit", 9, *more)

    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    assert train(first, "--channels", 16).exit_code == 0
    grown = train(second, "--from", first, "--channels", 20)
    assert grown.exit_code == 0, (grown.stderr, grown.exception)
    before, after = (load(path.read_bytes(), path.name) for path in (first, second))
    assert (before.channels, after.channels) == (16, 20)
    assert after.background.ends == (*before.background.ends[:-1], 20)
    assert after.about["base"] == {"sha256": before.sha256, **before.about}
    assert float((after.basis[:16] - before.basis).abs().max()) < 0.02 < float(after.basis[16:].abs().max()), "two steps move it a little"
    assert train(tmp_path / "third.bin", "--from", first).exit_code == 0
    assert load((tmp_path / "third.bin").read_bytes(), "third").channels == 16, "as many as it has, where none are asked for"

    assert "expected at least its 20 channels, got 16" in failed(train(tmp_path / "x.bin", "--from", second, "--channels", 16))
    assert "none.bin: expected a file, got No such file" in failed(train(tmp_path / "x.bin", "--from", tmp_path / "none.bin"))
    second.with_suffix(".analysis").write_bytes(first.with_suffix(".analysis").read_bytes())
    message = failed(train(tmp_path / "x.bin", "--from", second))
    assert f"second.analysis: expected the analysis of {after.sha256}, got that of {before.sha256}" in message
    second.with_suffix(".analysis").unlink()
    assert "second.analysis: expected a file" in failed(train(tmp_path / "x.bin", "--from", second))
    assert not list(tmp_path.glob("x*"))


def test_a_state_of_another_training_or_a_damaged_one_is_told(sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "own.bin"
    with monkeypatch.context() as patch:
        patch.setattr(train_dictionary, "finish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert rinr("train-dictionary", sources[0], "--out", out, *OPTIONS).exit_code == 130
    assert "other sources" in failed(rinr("train-dictionary", sources[1], "--out", out, *OPTIONS))
    assert "seed 0 instead of 1" in failed(rinr("train-dictionary", sources[0], "--out", out, *OPTIONS, "--seed", 1))
    (tmp_path / "own.bin.state").write_bytes(b"nothing")
    assert "expected the state of a training, got" in failed(rinr("train-dictionary", sources[0], "--out", out, *OPTIONS))
    assert not out.exists()


def test_a_training_that_fell_apart_leaves_only_its_state(sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_dictionary.finish

    def broken(*arguments: Any) -> Any:
        dictionary, analysis, about = whole(*arguments)
        return dictionary[:-1], analysis, about

    with monkeypatch.context() as patch:
        patch.setattr(train_dictionary, "finish", broken)
        assert "own.bin: expected a dictionary, got" in failed(rinr("train-dictionary", sources[0], "--out", tmp_path / "own.bin", *OPTIONS))
    assert [path.name for path in tmp_path.iterdir()] == ["own.bin.state"]
    assert rinr("train-dictionary", sources[0], "--out", tmp_path / "own.bin", *OPTIONS).exit_code == 0, "and goes on from there"


def test_a_state_stands_before_the_first_step(sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "loss_of", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert rinr("train-dictionary", sources[0], "--out", tmp_path / "own.bin", *OPTIONS).exit_code == 130
    assert (tmp_path / "own.bin.state").exists(), "a place that cannot be written is told before hours of work"


def test_what_cannot_be_used_is_left_out_and_told(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sources[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "small.png").write_bytes(b"")
    Image.fromarray(draw_scene(1, width=190, height=400).image).save(folder / "small.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:900])
    result = rinr("train-dictionary", folder, "--out", tmp_path / "own.bin", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert "2 picture(s) left out" in result.stderr
    assert "mixed: train/small: smaller than the 192x192 pixels of a crop: 190x400" in result.stderr
    assert "mixed: train/torn: damaged" in result.stderr
    (folder / "0.png").unlink()
    (folder / "1.png").unlink()
    message = failed(rinr("train-dictionary", folder, "--out", tmp_path / "b.bin", *OPTIONS))
    assert "mixed: expected pictures of at least 192x192 in its split train, got none of 2" in message


def test_a_single_picture_cannot_be_validated_on(sources: tuple[Path, Path], tmp_path: Path) -> None:
    message = failed(rinr("train-dictionary", sources[0], "--out", tmp_path / "a.bin", *OPTIONS, "--limit", 1))
    assert "sources: expected a picture to validate on beside those to train on" in message


def test_what_is_there_is_not_overwritten(sources: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a.bin", "b.analysis"):
        (tmp_path / name).write_bytes(b"mine")
        out = (tmp_path / name).with_suffix(".bin")
        assert f"{name}: expected a new file" in failed(rinr("train-dictionary", sources[0], "--out", out, *OPTIONS))
        assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x.dict"), "--out: expected a file NAME.bin, got 'x.dict'"),
        (("--out", "x.bin", "--weights", "1,2"), "--weights: expected 1 positive number(s) with commas between, one for each SOURCE, got '1,2'"),
        (("--out", "x.bin", "--weights", "many"), "got 'many'"),
        (("--out", "x.bin", "--weights", "0"), "got '0'"),
        (("--out", "x.bin", "--weights", "nan"), "got 'nan'"),
        (("--out", "x.bin", "--channels", "8"), "--channels"),
        (("--out", "x.bin", "--steps", "0"), "--steps"),
        ((), "--out"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], message: str) -> None:
    assert message in failed(rinr("train-dictionary", "a", *options), 2)


def test_groups_have_the_shares_of_the_shipped_dictionary() -> None:
    assert groups_of(256) == (12, 48, 112, 256)
    assert groups_of(128) == (6, 24, 56, 128)
    for channels in range(16, 769):
        assert list(groups_of(channels)) == sorted(set(groups_of(channels)))
        assert groups_of(channels)[-1] == channels


def test_every_16th_picture_is_held_out() -> None:
    pictures = [torch.full((3, 2, 2), k, dtype=torch.uint8) for k in range(120)]

    def numbers(count: int) -> tuple[list[int], list[int]]:
        used, held = hold_out(pictures[:count])
        return [int(p[0, 0, 0]) for p in used], [int(p[0, 0, 0]) for p in held]

    assert numbers(120)[1] == [7, 23, 39, 55, 71]
    assert sorted([*numbers(120)[0], *numbers(120)[1]]) == list(range(120)), "none is lost"
    assert numbers(8) == ([0, 1, 2, 3, 4, 5, 6], [7])
    assert numbers(3) == ([0, 1], [2])
    assert numbers(1) == ([0], [])
    large = torch.arange(2 * 1100, dtype=torch.int32).view(1, 2, 1100).repeat(3, 1, 1)
    assert torch.equal(middle(large), large[:, :, 38:1062])


def test_pictures_are_read_as_they_are_converted(sources: tuple[Path, Path]) -> None:
    source = open_source(sources[1])
    pictures, problems = read_pictures(source.samples, 16, (104, 200))
    assert [tuple(picture.shape) for picture in pictures] == [(3, 96, 104)] * 2
    assert problems == []
    assert read_pictures(source.samples, 100, (104, 200))[1][0] == Problem("train/0", "smaller than the 100x100 pixels of a crop: 104x96")


# --- rinr convert --fit-dictionary ---


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny dictionary in the place of the shipped one; its SHA-256."""
    data, network = tiny_files()
    found, (analysis, _) = load(data, "tiny.bin"), load_analysis(network, "tiny.analysis")
    monkeypatch.setattr(fit_dictionary, "shipped", lambda: found)
    monkeypatch.setattr(fit_dictionary, "shipped_analysis", lambda: analysis)
    return found.sha256


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory, write_yolo: Callable[..., Path]) -> Path:
    return write_yolo(tmp_path_factory.mktemp("yolo"), train=5, val=2, width=64, height=48)


JOB = Job(Settings(family="tile", target_psnr=22))


def test_a_conversion_fits_a_dictionary_and_carries_it(yolo: Path, base: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    dest = tmp_path / "shards"
    report = convert(open_source(yolo), dest, JOB, fit_dictionary=4, on_fit=lambda done, total: steps.append((done, total)))
    assert report.samples == {"train": 5, "val": 2}
    assert steps == [(k, 4) for k in range(5)]
    metadata = json.loads((dest / "dataset.json").read_bytes())
    sha256 = metadata["codec"]["dictionary"]
    assert sha256 != base
    assert (metadata["codec"]["job"]["dictionary"], metadata["codec"]["job"]["fit_dictionary"]) == (base, 4)
    assert len(listed(metadata)) == 2, "the dictionary and its analysis"
    assert list(load_shared(dest, metadata)) == [bytes.fromhex(sha256)[:8]]
    fitted = load((dest / "shared" / f"{sha256}.bin").read_bytes(), "fitted")
    assert (fitted.about["base"], fitted.about["settings"]["steps"]) == (base, 4)
    assert verify(dest).damage == ()
    assert len(RinrDataset(dest, "train")) == 5
    assert report.psnr["train"] is not None
    assert report.psnr["train"] > 21.5
    assert not (dest / ".rinr").exists()


def test_a_conversion_that_was_killed_in_its_fit_goes_on(yolo: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(yolo)
    convert(source, tmp_path / "whole", JOB, fit_dictionary=4)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        convert(source, tmp_path / "parts", JOB, fit_dictionary=4, on_fit=kill)
    assert [path.suffix for path in (tmp_path / "parts" / ".rinr").glob("dictionary*")] == [".state"]
    with pytest.raises(ConfigError, match=r"an unfinished conversion \(fit_dictionary 4 instead of 5\)"):
        convert(source, tmp_path / "parts", JOB, fit_dictionary=5)
    done: list[int] = []

    def kill_later(progress: object) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        convert(source, tmp_path / "parts", JOB, fit_dictionary=4, on_fit=lambda step, total: done.append(step), on_progress=kill_later)
    assert done == [2, 3, 4], "from the last step that was saved"
    done.clear()
    convert(source, tmp_path / "parts", JOB, fit_dictionary=4, on_fit=lambda step, total: done.append(step))
    assert done == [], "a dictionary that is finished is not fitted again"
    assert tree_hash(tmp_path / "parts") == tree_hash(tmp_path / "whole")


def test_a_damaged_dictionary_of_a_killed_conversion_is_told(yolo: Path, base: str, tmp_path: Path) -> None:
    def kill(progress: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(open_source(yolo), tmp_path / "d", JOB, fit_dictionary=2, on_progress=kill)
    work = tmp_path / "d" / ".rinr"
    (work / "dictionary.bin").write_bytes(tiny_files()[0])
    with pytest.raises(ConfigError, match=r"dictionary.analysis: expected the analysis of [0-9a-f]{64}, got that of .* and convert again"):
        convert(open_source(yolo), tmp_path / "d", JOB, fit_dictionary=2)
    (work / "dictionary.bin").write_bytes(b"text")
    with pytest.raises(ConfigError, match=r"dictionary.bin: expected a dictionary, got"):
        convert(open_source(yolo), tmp_path / "d", JOB, fit_dictionary=2)


def test_a_conversion_without_a_fit_carries_the_shipped_dictionary(yolo: Path, tmp_path: Path) -> None:
    source = open_source(yolo, limit=1)
    convert(source, tmp_path / "shards", JOB)
    metadata = json.loads((tmp_path / "shards" / "dataset.json").read_bytes())
    (sha256,) = listed(metadata)
    assert sha256 == metadata["codec"]["dictionary"] == fit_dictionary.shipped().sha256
    assert hashlib.sha256((tmp_path / "shards" / "shared" / f"{sha256}.bin").read_bytes()).hexdigest() == sha256
    assert f"dictionary {sha256[:12]}... (the package's own)" in rinr("info", tmp_path / "shards").stdout
    assert verify(tmp_path / "shards").damage == ()


@pytest.mark.parametrize("fit", [(), ("--fit-dictionary", 2)])
def test_a_conversion_with_a_dictionary_of_ones_own(fit: tuple[object, ...], yolo: Path, tmp_path: Path) -> None:
    own, (data, network) = tmp_path / "own.bin", tiny_files()
    own.write_bytes(data)
    own.with_suffix(".analysis").write_bytes(network)
    named = load(data, "own").sha256
    result = rinr("convert", yolo, tmp_path / "shards", "--dictionary", own, "--target-psnr", 22, "--json", *fit)
    assert result.exit_code == 0, (result.stderr, result.exception)
    metadata = json.loads((tmp_path / "shards" / "dataset.json").read_bytes())
    sha256 = metadata["codec"]["dictionary"]
    assert metadata["codec"]["job"]["dictionary"] == named
    assert len(listed(metadata)) == 2
    assert sha256 in listed(metadata)
    if fit:
        assert load((tmp_path / "shards" / "shared" / f"{sha256}.bin").read_bytes(), "fitted").about["base"] == named != sha256
    else:
        assert sha256 == named
    assert verify(tmp_path / "shards").damage == ()
    assert f"dictionary {sha256[:12]}... (the dataset's own)" in rinr("info", tmp_path / "shards").stdout
    assert rinr("export", tmp_path / "shards", tmp_path / "out").exit_code == 0
    first = open_source(yolo).samples[0]
    (shown,) = (tmp_path / "out").glob(f"images/{first.split}/{first.key}.png")
    assert_psnr(np.array(Image.open(shown)), np.array(Image.open(str(first.image))), at_least=21)


def test_a_dictionary_that_cannot_be_used_is_told(yolo: Path, tmp_path: Path) -> None:
    own, (data, network) = tmp_path / "own.bin", tiny_files()
    own.write_bytes(data)

    def message(*options: object) -> str:
        return failed(rinr("convert", yolo, tmp_path / "d", "--dictionary", own, *options))

    assert "own.analysis: expected a file, got No such file or directory; a dictionary is NAME.bin and NAME.analysis" in message()
    own.with_suffix(".analysis").write_bytes(network[: len(network) // 2])
    assert "own.analysis: expected an analysis network, got" in message()
    own.with_suffix(".analysis").write_bytes(network)
    own.write_bytes(data[:-1])
    assert "own.bin: expected a dictionary, got" in message()
    own.write_bytes(data.replace(b'version\\": 1', b'version\\": 9'))
    assert "own.bin: expected a dictionary of version 1, got 9; upgrade rinr_loader to read it" in message()
    wrong = rinr("convert", yolo, tmp_path / "d", "--family", "siren", "--dictionary", own)
    assert "--dictionary: is of family tile, and not of siren" in failed(wrong, 2)
    assert not (tmp_path / "d").exists()


def test_nothing_to_fit_to(base: str, tmp_path: Path, sources: tuple[Path, Path]) -> None:
    Image.fromarray(draw_scene(1, width=15, height=40).image).save(tmp_path / "thin.png")
    with pytest.raises(ConfigError, match="dictionary: expected pictures of at least 16x16 in the split train to fit to, got none"):
        convert(open_source(tmp_path), tmp_path.parent / "thin", JOB, fit_dictionary=2)
    source = open_source(sources[1])
    held = Source(source.format, [sample.__class__(sample.key, "val", sample.image) for sample in source.samples])
    with pytest.raises(ConfigError, match="in the split train to fit to, got none"):
        convert(held, tmp_path.parent / "held", JOB, fit_dictionary=2)


def test_a_fit_is_of_the_family_tile(tmp_path: Path, yolo: Path) -> None:
    message = "--fit-dictionary: is of family tile, and not of siren"
    assert message in failed(rinr("convert", yolo, tmp_path / "d", "--family", "siren", "--fit-dictionary"), 2)
    assert "--fit-dictionary" in failed(rinr("convert", yolo, tmp_path / "d", "--family", "tile", "--fit-dictionary", "0"), 2)
    assert "--fit-dictionary" in failed(rinr("convert", yolo, tmp_path / "d", "--family", "tile", "--fit-dictionary", "-3"), 2)
    with pytest.raises(ConfigError, match="fit_dictionary: expected steps with family tile, or 0, got 5 with family jpeg"):
        convert(open_source(yolo), tmp_path / "d", Job(Settings(family="jpeg")), fit_dictionary=5)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (("SOURCE", "DEST", "--fit-dictionary"), 2000),
        (("--fit-dictionary", "SOURCE", "DEST"), 2000),
        (("SOURCE", "--fit-dictionary", "--limit", "3", "DEST"), 2000),
        (("SOURCE", "DEST", "--fit-dictionary", "7"), 7),
        (("SOURCE", "DEST", "--fit-dictionary=7"), 7),
        (("SOURCE", "DEST"), 0),
    ],
)
def test_the_number_of_steps_may_be_left_out(
    arguments: tuple[str, ...], steps: int, yolo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    seen: list[int] = []

    def noted(*positional: object, fit_dictionary: int, **named: object) -> None:
        seen.append(fit_dictionary)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["rinr_loader.convert"], "convert", noted)  # the attribute of the package is the function
    places = {"SOURCE": str(yolo), "DEST": str(tmp_path / "d")}
    rinr("convert", "--family", "tile", *(places.get(argument, argument) for argument in arguments))
    assert seen == [steps]


def test_the_command_tells_of_the_fit(yolo: Path, base: str, tmp_path: Path) -> None:
    result = rinr("convert", yolo, tmp_path / "d", "--family", "tile", "--device", "cpu", "--fit-dictionary", 2, "--target-psnr", 22)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "fitting the dictionary: 2/2 steps" in result.stderr
    assert "converting: 7/7 images" in result.stderr
    dry = rinr("convert", yolo, tmp_path / "e", "--family", "tile", "--device", "cpu", "--fit-dictionary", "--dry-run")
    assert "the estimate is made with the dictionary that the fit begins with" in dry.stderr
