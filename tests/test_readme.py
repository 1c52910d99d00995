"""Every snippet of the README runs, against tiny datasets in a fresh folder."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, SCENE_NAMES, draw_scene, needs
from small_datasets import drawn
from tiny_shards import TINY, png, write_shards
from typer.testing import CliRunner

from rinr_loader import presets
from rinr_loader.cli import app
from rinr_loader.converters import CONVERTERS
from rinr_loader.source import Sample

needs("ultralytics", "torchvision")

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_yolo: Callable[..., Path]) -> Path:
    """A working directory with what the snippets name: `photos/`, `shards/` and `classes/`."""
    monkeypatch.chdir(tmp_path)
    for name in presets.PRESETS:
        monkeypatch.setitem(presets.PRESETS, name, TINY)
    write_yolo(tmp_path / "photos", train=4, val=2, width=40, height=24)
    return tmp_path


def write_datasets(folder: Path) -> None:
    detection = [drawn(f"{k}", k, split="train" if k < 4 else "val", width=40) for k in range(6)]
    write_shards(folder / "shards", detection, names=SCENE_NAMES)
    pictures = [Sample(f"{'ab'[k % 2]}/{k}", "train", png(draw_scene(k, width=40, height=24).image), label=k % 2) for k in range(4)]
    write_shards(folder / "classes", pictures, names=("a", "b"))


def test_the_commands_run_one_after_the_other(folder: Path) -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE) for line in COMMANDS[:2])
    for line in COMMANDS[2:]:
        program, *arguments = shlex.split(line)
        assert program == "rinr"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert (folder / "worst.png").stat().st_size > 0
    assert len(list((folder / "pictures/images").rglob("*.jpg"))) == 6


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.filterwarnings("default")
def test_a_snippet_runs(folder: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_datasets(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})  # noqa: S102 - our own README
    if "print(" in SNIPPETS[number]:
        assert capsys.readouterr().out


def test_examples_are_short() -> None:
    for block in SNIPPETS:
        assert len([line for line in block.splitlines() if line]) <= 7, block


def test_every_source_format_is_listed() -> None:
    table = README[README.index("## What it reads") :]
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", table, re.MULTILINE)) == set(CONVERTERS)


def test_options_that_are_named_exist() -> None:
    told = set(re.findall(r"`(?:rinr [a-z]+ [^`]*)?(--[a-z-]+)", README))
    assert told
    shown = "".join(
        CliRunner(env={"COLUMNS": "200"}).invoke(app, [name, "--help"]).stdout for name in ("convert", "info", "export", "train-dictionary")
    )
    assert {option for option in told if option not in shown} == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (REPOSITORY / target).is_file(), target


def test_no_line_is_a_place_for_later() -> None:
    assert not re.search(r"TODO|TBD|FIXME|XXX|\?\?", README)
