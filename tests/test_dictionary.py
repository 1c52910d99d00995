"""Dictionaries and analyses as files: equal content gives equal bytes, and whatever is wrong with one is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import numpy as safetensors
from tiny_training import scene, tiny_files

from rinr_loader import analysis, dictionary
from rinr_loader.analysis import dump_analysis, is_analysis, load_analysis
from rinr_loader.dictionary import VERSION, dump, find, load, shipped
from rinr_loader.errors import BundleError, ConfigError

Columns = dict[str, NDArray[Any]]


@pytest.fixture
def columns() -> Columns:
    return dict(safetensors.load(tiny_files()[0]))


# --- what is there ---


def test_a_dictionary_is_the_same_bytes_for_the_same_content(columns: Columns) -> None:
    data = dump(columns, {"steps": 3})
    assert data == tiny_files()[0]
    assert dump(dict(reversed(columns.items())), {"steps": 3}) == data
    assert dump(columns, {"steps": 4}) != data


def test_a_dictionary_comes_back(columns: Columns) -> None:
    found = load(tiny_files()[0], "tiny.bin")
    assert (found.channels, found.predicted, found.about) == (16, 3, {"steps": 3})
    assert found.sha256 == hashlib.sha256(tiny_files()[0]).hexdigest()
    assert found.key.hex() == found.sha256[:16]
    assert found.basis.dtype == torch.float32
    assert np.array_equal(found.basis.numpy(), columns["basis"].astype(np.float32))
    symbols = len(columns["symbols"])
    assert found.background.bounds == ((0, 4), (4, 8), (8, 12), (12, 16))
    assert found.background.group_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert found.background.first_table == symbols
    assert found.residual.first_table == symbols + len(columns["background.classes"])
    assert np.array_equal(found.tables.frequencies[found.residual.first_table :][:, :16], columns["residual.classes"])
    half = symbols // 2
    assert int(found.background.tables.max()) < half <= int(found.residual.tables[1:].min()), "each kind has its own tables"


def test_the_residual_basis_is_complete() -> None:
    flat = load(tiny_files()[0], "tiny.bin").residual_basis.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(192), rtol=0, atol=2e-3)


# --- what is wrong ---


def broken(change: Callable[[Columns], object]) -> bytes:
    columns = dict(safetensors.load(tiny_files()[0]))
    change(columns)
    return dump(columns, {})


def put(name: str, index: Any, value: float) -> Callable[[Columns], object]:
    def change(columns: Columns) -> None:
        columns[name] = columns[name].copy()
        columns[name][index] = value

    return change


def shape(name: str, end: int) -> Callable[[Columns], object]:
    return lambda columns: columns.update({name: columns[name][:end]})


def swap(columns: Columns) -> None:
    """A table with as much in all, but with a gap."""
    table = columns["symbols"].copy()
    reach = int(columns["radius"][0])
    table[0, 2 * reach + 2], table[0, 2 * reach + 1] = table[0, 2 * reach + 1], 0
    columns["symbols"] = table


WRONG: dict[str, tuple[Callable[[Columns], object], str]] = {
    "a tensor missing": (lambda c: c.pop("filter.1.bias"), r"got a file without \['filter.1.bias'\]"),
    "not a number": (put("basis", (0, 0, 0, 0), np.nan), "expected values finite float16 or unsigned, got float16"),
    "infinite": (put("filter.0.weight", (0, 0, 0, 0), np.inf), "expected values finite float16 or unsigned"),
    "another type": (lambda c: c.update(basis=c["basis"].astype(np.float32)), "expected values finite float16 or unsigned, got float32"),
    "another support": (lambda c: c.update(basis=c["basis"][..., :16]), r"expected a basis \(C, 3, 24, 24\), got \(16, 3, 24, 16\)"),
    "no channels": (shape("basis", 0), "expected a basis"),
    "another residual basis": (shape("residual.basis", 100), r"expected a residual basis \(192, 3, 8, 8\), got \(100, 3, 8, 8\)"),
    "another filter": (shape("filter.2.weight", 3), r"expected filter 2 \(12, 24, 3, 3\), got \(3, 24, 3, 3\)"),
    "another bias": (shape("filter.0.bias", 3), r"expected bias 0 \(24,\), got \(3,\)"),
    "another step": (shape("filter.1.step", 3), r"expected step 1 \(24,\), got \(3,\)"),
    "a narrow symbol table": (lambda c: c.update(symbols=c["symbols"][:, :200]), r"expected symbol tables \(1 to 256, 256\), got \(128, 200\)"),
    "radii of other tables": (shape("radius", 5), r"expected radii 128, at most 127, got \(5,\)"),
    "a radius too large": (put("radius", 0, 200), "expected radii 128, at most 127"),
    "a wrong sum": (put("symbols", (0, 0), 4000), "expected symbol tables that sum to 4096, without gaps"),
    "a gap": (swap, "expected symbol tables that sum to 4096, without gaps"),
    "groups of other channels": (put("background.ends", 3, 15), r"expected background groups 16, got \(4, 8, 12, 15\)"),
    "groups that go back": (put("residual.ends", 1, 3), r"expected residual groups 192, got \(6, 3, 72, 192\)"),
    "tables of other channels": (
        lambda c: c.update({"background.tables": c["background.tables"][:, :9]}),
        r"expected background tables \(2 to 64, 16\), got \(4, 9\)",
    ),
    "a table that is not there": (put("residual.tables", (1, 1), 200), "expected residual tables below 128, got 200"),
    "a bucket that is not there": (put("background.buckets", (0, 0), 6), r"expected background buckets \(4, 4\)"),
    "contexts missing": (shape("background.classes", 7), r"expected background class tables \(196, 4\), got \(7, 4\)"),
    "a class that cannot be coded": (put("background.classes", (0, slice(None)), 0), "expected background class tables that sum to 4096"),
    "too many predicted": (put("predicted", 0, 17), r"expected predicted channels at most 16, got \[17\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_do_not_fit_are_refused(what: str) -> None:
    change, message = WRONG[what]
    with pytest.raises(ConfigError, match=f"^set/x.bin: .*{message}.*; fetch the dictionary again or train a new one"):
        load(broken(change), "set/x.bin")


def test_another_version_is_refused(columns: Columns) -> None:
    with pytest.raises(ConfigError, match=rf"x.bin: expected a dictionary of version {VERSION}, got 2; upgrade rinr_loader to read it"):
        load(dump(columns, {"version": 2}), "x.bin")


def with_metadata(columns: Columns, metadata: dict[str, str] | None) -> bytes:
    return safetensors.save(columns, metadata)


@pytest.mark.parametrize(
    "damage", ["empty", "text", "cut off", "no metadata", "metadata of another file", "metadata that is no object", "no version"]
)
def test_a_damaged_file_is_refused(damage: str, columns: Columns) -> None:
    data = tiny_files()[0]
    files = {
        "empty": b"",
        "text": b"this is no dictionary, but a line of text",
        "cut off": data[: len(data) // 2],
        "no metadata": with_metadata(columns, None),
        "metadata of another file": tiny_files()[1],
        "metadata that is no object": with_metadata(columns, {"rinr": "[1]"}),
        "no version": with_metadata(columns, {"rinr": json.dumps({"steps": 3})}),
    }
    with pytest.raises(ConfigError, match=r"^x.bin: expected a dictionary, got \w+: .*; fetch it again$"):
        load(files[damage], "x.bin")


# --- those that are shipped ---


def test_find_gives_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.bin").write_bytes(tiny_files()[0])
    monkeypatch.setattr(dictionary, "SHIPPED", tmp_path)
    shipped.cache_clear()
    try:
        sha256 = hashlib.sha256(tiny_files()[0]).hexdigest()
        assert find(bytes.fromhex(sha256)[:8], "a.rinr").sha256 == sha256
        with pytest.raises(BundleError, match=r"^a.rinr: expected the shared parameters 0102030405060708\.\.\., .*shared/0102030405060708\*\.bin"):
            find(bytes(range(1, 9)), "a.rinr")
    finally:
        shipped.cache_clear()


def test_the_shipped_dictionary_and_its_analysis_belong_together() -> None:
    found = shipped()
    assert len(found.data) <= 2_000_000
    assert analysis.shipped_analysis().linear.weight.shape[0] == found.channels
    assert find(found.key, "a.rinr").sha256 == found.sha256


def test_the_shipped_dictionary_says_where_it_comes_from() -> None:
    """All that `rinr train-dictionary` writes down: what it was trained on, from where, how long, and what came out."""
    about = shipped().about
    assert {"base", "sources", "settings", "torch", "curve"} <= about.keys()
    names = {source["name"] for source in about["sources"]}
    assert names == {"dac_sdc", "coco_yolo", "bccd_voc", "photos_lossless"}, "never what quality is reported on, nor what states no terms"
    for source in about["sources"]:
        assert source.keys() == {"name", "format", "weight", "pictures", "held_out", "sha256"}
    settings, curve = about["settings"], about["curve"]
    assert settings["channels"] == shipped().channels
    assert [curve[0]["step"], curve[-1]["step"]] == [0, settings["steps"]]
    assert len(about["base"]["sha256"]) == 64


# --- analyses ---


def test_an_analysis_comes_back() -> None:
    data = tiny_files()[1]
    network, sha256 = load_analysis(data, "tiny.analysis")
    assert sha256 == hashlib.sha256(tiny_files()[0]).hexdigest()
    assert dump_analysis(network, sha256) == data
    assert not network.training
    with torch.no_grad():
        assert network(scene(0)[None].float() - 127.5).shape == (1, 16, 4, 6)


@pytest.mark.parametrize("damage", ["empty", "text", "cut off", "a dictionary"])
def test_a_damaged_analysis_is_refused(damage: str) -> None:
    data = tiny_files()[1]
    files = {"empty": b"", "text": b"no network at all, but text", "cut off": data[: len(data) // 2], "a dictionary": tiny_files()[0]}
    with pytest.raises(ConfigError, match=r"^x.analysis: expected an analysis network, got \w+: .*; train the dictionary again$"):
        load_analysis(files[damage], "x.analysis")


def test_an_analysis_is_told_from_a_dictionary() -> None:
    assert [is_analysis(data) for data in (*tiny_files(), b"", b"text that is long enough", bytes(40))] == [False, True, False, False, False]


def test_an_analysis_of_another_dictionary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = load_analysis(tiny_files()[1], "tiny.analysis")
    (tmp_path / "mixed.bin").write_bytes(tiny_files()[0])
    (tmp_path / "mixed.analysis").write_bytes(dump_analysis(network, "ab" * 32))
    monkeypatch.setattr(dictionary, "SHIPPED", tmp_path)
    monkeypatch.setattr(analysis, "SHIPPED", tmp_path)
    with pytest.raises(ConfigError, match=r"^mixed.analysis: expected the analysis of [0-9a-f]{64}, got that of abab"):
        analysis.shipped_analysis("mixed")
