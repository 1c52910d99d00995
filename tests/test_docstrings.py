"""The examples in public docstrings run and give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from conftest import REPOSITORY, SCENE_NAMES
from small_datasets import drawn
from tiny_shards import members, write_shards

WITH_EXAMPLES = sorted(
    path.stem for path in (REPOSITORY / "rinr_loader").glob("*.py") if ">>> " in path.read_text() and path.stem not in ("cli", "demo")
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("docstrings") / "set"
    write_shards(dest, [drawn(f"{i}", i) for i in range(3)], names=SCENE_NAMES)
    return dest


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name: str, dataset: Path) -> None:
    module = import_module(f"rinr_loader.{name}")
    bundle = next(data for key, data in members(dataset)[1].items() if key.endswith(".rinr"))
    tried = 0
    for example in doctest.DocTestFinder().find(module, extraglobs={"path": dataset, "bundle": bundle}):
        result = doctest.DocTestRunner(verbose=False).run(example)
        assert result.failed == 0, example.name
        tried += result.attempted
    assert tried > 0


def test_there_are_examples() -> None:
    assert {"dataset", "decode", "loader"} <= set(WITH_EXAMPLES)
