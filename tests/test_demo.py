"""`rinr demo`: the scenes it draws, and the whole path on a few of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs
from PIL import Image
from small_datasets import tree_hash
from tiny_shards import TINY
from typer.testing import CliRunner

needs("ultralytics")

from rinr_loader import RinrDataset, demo, presets, scenes
from rinr_loader.cli import app
from rinr_loader.converters import open_source
from rinr_loader.errors import ConfigError
from rinr_loader.scenes import NAMES, draw_scenes, find_photographs
from rinr_loader.verify import verify


def test_photographs_are_found_and_differ_between_splits() -> None:
    found = find_photographs()
    assert len(found) == len(set(found)) >= 2
    assert all(path.is_file() for path in found)


def test_without_photographs_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = importlib.util.find_spec("rich")
    monkeypatch.setattr(scenes.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else rich)
    with pytest.raises(ConfigError, match=r"expected at least two photographs in the packages matplotlib, ultralytics, got 0; pip install"):
        find_photographs()


def test_scenes_are_a_function_of_their_seed() -> None:
    once, again, other = (list(draw_scenes(find_photographs(), 4, width=96, height=64, seed=seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a.pixels, b.pixels) and np.array_equal(a.boxes, b.boxes) for a, b in zip(once, again, strict=True))
    assert not any(np.array_equal(a.pixels, b.pixels) for a, b in zip(once, other, strict=True))


def test_boxes_are_tight_around_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without textures and photographs, the shapes are what is white."""
    monkeypatch.setattr(scenes, "_crop", lambda photograph, random, width, height: np.zeros((height, width, 3), np.uint8))
    monkeypatch.setattr(scenes, "_texture", lambda random, kind, width, height: np.full((height, width, 3), 255.0))
    seen = set()
    for scene in draw_scenes(find_photographs(), 30, width=160, height=96, seed=0):
        white = scene.pixels.max(2) > 0
        assert scene.pixels.shape == (96, 160, 3)
        assert len(scene.boxes) == len(scene.classes) >= 1
        for x0, y0, x1, y1 in scene.boxes.astype(int).tolist():
            rows, columns = np.nonzero(white[y0:y1, x0:x1])
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, y1 - y0 - 1, 0, x1 - x0 - 1)
            white[y0:y1, x0:x1] = False
        assert not white.any()
        seen |= set(scene.classes.tolist())
    assert seen == set(range(len(NAMES)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", TINY)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a few scenes and one epoch, on the CPU."""
    run = demo.run_demo
    monkeypatch.setattr(demo, "run_demo", lambda out: run(out, train=8, val=2, epochs=1, seconds=0, device="cpu"))


@pytest.mark.filterwarnings("default")
def test_the_demo_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)
    for expected in ("train: shards", "val: shards", "objects' PSNR", "These sizes are toys", str(out / "side_by_side.png")):
        assert expected in result.stdout
    assert "verified 10 samples" in result.stderr

    assert verify(out / "shards").damage == ()
    source = open_source(out / "jpeg")
    assert source.names == NAMES
    assert {split: len(RinrDataset(out / "shards", split)) for split in ("train", "val")} == {"train": 8, "val": 2}
    assert np.asarray(Image.open(out / "side_by_side.png")).shape[2] == 3
    report: dict[str, Any] = json.loads((out / "demo.json").read_bytes())
    assert report["training"]["epochs"] == 1
    assert [row["name"].split(":")[0] for row in report["rows"]] == ["the source, JPEG quality 95", "train", "train", "val", "val"]

    # Again, over the first, as JSON: the same data. Only the training is left out.
    training = demo.Training(**report["training"])
    monkeypatch.setattr(demo, "_train", lambda *_: training)
    before = tree_hash(out / "jpeg"), tree_hash(out / "shards")
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["out"] == str(out)
    assert (tree_hash(out / "jpeg"), tree_hash(out / "shards")) == before


def test_what_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected an empty folder or an earlier demo, got one with thesis.tex; choose another --out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "thesis.tex")]).exit_code == 1


def test_without_ultralytics_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rinr_loader.integrations.ultralytics", None)
    with pytest.raises(ConfigError, match=r"expected the package ultralytics, .*; pip install 'rinr-loader\[ultralytics\]'"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
