"""Conversions stopped by Ctrl-C and kill -9, as real processes: the same command again gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPOSITORY
from small_datasets import tree_hash

# The command, with fits that take a moment instead of a minute. Spawned workers import this file's patch again.
RINR = """
from dataclasses import replace

from rinr_loader.cli import main
from rinr_loader.fit import Schedule
from rinr_loader.presets import PRESETS

quick = {"background": Schedule(60, 2e-3, 256), "residual": Schedule(40, 3e-3, 64)}
PRESETS["fast"] = replace(PRESETS["fast"], backgrounds=((2, 8),), **quick)
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "rinr.py"
    path.write_text(RINR)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_yolo: Callable[..., Path]) -> Path:
    return write_yolo(tmp_path_factory.mktemp("source"), train=14, val=4, width=32, height=24)


def start(script: Path, source: Path, dest: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(script),
        "convert",
        str(source),
        str(dest),
        "--family",
        "siren",
        "--preset",
        "fast",
        "--shard-samples",
        "2",
        "--device",
        "cpu",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(script: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Tree hash of an undisturbed conversion, and the seconds from its first file to its end."""
    dest = tmp_path_factory.mktemp("undisturbed") / "shards"
    process = start(script, source, dest)
    wait_for((dest / ".rinr/job.json").exists, process)
    started = time.monotonic()
    status, err = finish(process)
    assert status == 0, err
    return tree_hash(dest), time.monotonic() - started


def units(dest: Path) -> int:
    return len(list((dest / ".rinr").glob("*.tar")))


@pytest.mark.parametrize("options", [(), pytest.param(("--workers", "2"), marks=pytest.mark.slow)], ids=["one process", "two"])
def test_ctrl_c(script: Path, source: Path, tmp_path: Path, undisturbed: tuple[str, float], options: Sequence[str]) -> None:
    dest = tmp_path / "shards"
    process = start(script, source, dest, *options)
    wait_for(lambda: units(dest) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    status, err = finish(process)
    assert status == 130
    assert err.strip().splitlines()[-1] == "stopped; the same command again continues where it was"
    assert "Traceback" not in err
    assert not (dest / "dataset.json").exists()
    before = units(dest)
    assert before >= 2

    status, err = finish(start(script, source, dest, *options))
    assert status == 0, err
    assert tree_hash(dest) == undisturbed[0]


def kill_again_and_again(script: Path, source: Path, dest: Path, seconds: float, kills: int, seed: int, *options: str) -> int:
    """Kill conversions at random moments, then let one finish; return how many were killed before they were done."""
    moments = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(script, source, dest, *options)
        wait_for(lambda: (dest / ".rinr/job.json").exists() or (dest / "dataset.json").exists(), process)
        time.sleep(moments.uniform(0, seconds))
        killed += process.poll() is None
        with suppress(ProcessLookupError):  # it is done
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    status, err = finish(start(script, source, dest, *options))
    assert status == 0, err
    return killed


def test_kill_at_random_moments(script: Path, source: Path, tmp_path: Path, undisturbed: tuple[str, float]) -> None:
    expected, seconds = undisturbed
    killed = kill_again_and_again(script, source, tmp_path / "shards", seconds / 2, 2, 1)
    assert killed >= 1
    assert tree_hash(tmp_path / "shards") == expected
    assert json.loads((tmp_path / "shards/dataset.json").read_bytes())["splits"]["train"]["samples"] == 14


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one process", "two"])
@pytest.mark.parametrize("seed", range(2))
def test_kill_at_many_random_moments(
    script: Path, source: Path, tmp_path: Path, undisturbed: tuple[str, float], seed: int, options: Sequence[str]
) -> None:
    expected, seconds = undisturbed
    kill_again_and_again(script, source, tmp_path / "shards", seconds, 6, 100 + seed, *options)
    assert tree_hash(tmp_path / "shards") == expected
