"""Shards read with `webdataset` alone: every member arrives, and decodes to what our own loader gives."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_close, needs
from tiny_shards import KEYS, members, write_named

needs("webdataset")

import webdataset

from rinr_loader import BundleError, ConfigError, RinrDataset, decode_batch, open_shared
from rinr_loader.index import decode_key
from rinr_loader.integrations.webdataset import Decoded, rinr_collation, rinr_decoder


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_named(tmp_path_factory.mktemp("shards") / "data")


def read(dest: Path) -> webdataset.WebDataset:
    return webdataset.WebDataset([str(shard) for shard in members(dest)[0]], shardshuffle=False)


def test_every_member_arrives_with_its_bytes_whatever_its_key(dest: Path) -> None:
    found = {f"{sample['__key__']}.{name}": data for sample in read(dest) for name, data in sample.items() if not name.startswith("__")}
    assert found == members(dest)[1]
    keys = [decode_key(sample["__key__"]) for sample in read(dest)]
    assert keys == RinrDataset(dest).keys == sorted(KEYS)


def test_decoded_samples_are_those_of_our_own_dataset(dest: Path) -> None:
    ours = RinrDataset(dest)
    samples = list(read(dest).decode(rinr_decoder()))
    assert len(samples) == len(ours)
    for sample, (image, target) in zip(samples, ours, strict=True):
        decoded = sample["rinr"]
        assert isinstance(decoded, Decoded)
        assert decoded.image.dtype == torch.uint8
        assert_close(decoded.image, image, "exact")
        assert_close(decoded.boxes, target["boxes"], "exact")
        assert decoded.classes.tolist() == target["classes"].tolist()
        assert decoded.crowd.tolist() == target["crowd"].tolist()
        assert decoded.label == target["label"]
        assert decode_key(sample["__key__"]) == target["key"]
    assert [sample.get("json") for sample in samples] == [{"track": k} if k % 2 else None for k in range(len(samples))]


def test_images_of_one_size_and_boxes_in_their_pixels(dest: Path) -> None:
    labels = RinrDataset(dest).labels
    for sample, label in zip(read(dest).decode(rinr_decoder(size=(10, 36))), labels, strict=True):
        assert sample["rinr"].image.shape == (3, 10, 36)
        assert_close(sample["rinr"].image, decode_batch([members(dest)[1][f"{sample['__key__']}.rinr"]], size=(10, 36))[0], "exact")
        height, width = label["size"]
        scale = np.array([36 / width, 10 / height] * 2, np.float32)
        assert_close(sample["rinr"].boxes, label["boxes"] * scale, "boxes")


def test_a_batch_is_decoded_together_and_unpacks_like_our_loaders(dest: Path) -> None:
    single = [sample["rinr"] for sample in read(dest).decode(rinr_decoder(size=(16, 24)))]
    batches = list(read(dest).batched(4, collation_fn=rinr_collation(size=(16, 24))))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 3]
    keys: list[str] = []
    for number, (images, targets) in enumerate(batches):
        for i, decoded in enumerate(single[4 * number : 4 * number + 4]):
            mine = targets.batch_index == i
            assert_close(images[i], decoded.image, "pixels")
            assert_close(targets.boxes[mine], decoded.boxes, "exact")
            assert targets.classes[mine].tolist() == decoded.classes.tolist()
            assert targets.crowd[mine].tolist() == decoded.crowd.tolist()
            assert int(targets.labels[i]) == decoded.label
        keys += targets.keys
    assert keys == sorted(KEYS)


def test_the_stored_size_serves_a_batch_that_shares_it(dest: Path) -> None:
    samples = list(read(dest))
    assert rinr_collation()(samples[:1]).images.shape == (1, 3, 20, 24)
    with pytest.raises(ConfigError, match=r"expected one size.*pass size="):
        rinr_collation()(samples[:2])


def test_other_members_are_left_to_other_handlers() -> None:
    decoder = rinr_decoder()
    assert decoder(".json", b"{}") is None
    assert decoder(".rinr.json", b"{}") is None


def test_handlers_can_be_sent_to_worker_processes(dest: Path) -> None:
    sample, *_ = read(dest)
    decoder, collation = pickle.loads(pickle.dumps((rinr_decoder(size=(8, 8)), rinr_collation(size=(8, 8)))))  # noqa: S301
    assert_close(decoder(".rinr", sample["rinr"]).image, collation([sample]).images[0], "exact")


def test_a_damaged_member_is_named(dest: Path) -> None:
    samples: list[dict[str, Any]] = list(read(dest))[:2]
    samples[1]["rinr"] = samples[1]["rinr"][:-1] + bytes([samples[1]["rinr"][-1] ^ 1])
    with pytest.raises(BundleError, match=samples[1]["__key__"]):
        rinr_collation(size=(8, 8))(samples)
    with pytest.raises(webdataset.autodecode.DecodingError) as caught:
        webdataset.autodecode.Decoder([rinr_decoder()])(samples[1])
    assert isinstance(caught.value.__cause__, BundleError)
    assert caught.value.key == samples[1]["__key__"]


@pytest.mark.parametrize("sample", [{"jpg": b""}, {"rinr": torch.zeros(3, 4, 4)}, {}])
def test_a_batch_of_something_else_is_refused(sample: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^k: expected the bytes of a \.rinr member, got (jpg|Tensor|nothing); .*batched\(\) without decode\(\)"):
        rinr_collation()([{"__key__": "k", "__url__": "", **sample}])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "rinr_loader.integrations.webdataset")
    with pytest.raises(ImportError, match=r"pip install 'rinr-loader\[webdataset\]'"):
        importlib.import_module("rinr_loader.integrations.webdataset")


def test_shards_whose_dictionary_does_not_come_with_the_package() -> None:
    dest = REPOSITORY / "tests/golden/dataset-tile"
    shards = [str(path) for path in sorted((dest / "train").glob("*.tar"))]
    keys = RinrDataset(dest).keys
    expected = {key: image for key, (image, _) in zip(keys, RinrDataset(dest), strict=True)}
    shared = open_shared(*(dest / "shared").glob("*.bin"))
    assert list(shared) == list(RinrDataset(dest).shared), "without the analysis, which lies beside it"

    def dataset() -> webdataset.WebDataset:
        return webdataset.WebDataset(shards, shardshuffle=False)

    decoder, collation = pickle.loads(pickle.dumps((rinr_decoder(shared=shared), rinr_collation(size=(37, 45), shared=shared))))  # noqa: S301
    for sample in dataset().decode(decoder):
        assert_close(sample["rinr"].image, expected[decode_key(sample["__key__"])], "pixels")
    ((images, targets),) = dataset().batched(3, collation_fn=collation)
    assert_close(images[0], expected[targets.keys[0]], "pixels")
    advice = r"expected the shared parameters [0-9a-f]{16}\.\.\., .* pass shared=rinr_loader.open_shared\(FILE\)"
    samples: list[dict[str, Any]] = list(dataset())
    with pytest.raises(BundleError, match=advice):
        rinr_collation(size=(8, 8))(samples)
    bundle = samples[0]["rinr"]
    with pytest.raises(BundleError, match=advice):
        decode_batch([bundle])
    assert_close(decode_batch([bundle], shared=shared)[0], images[0], "pixels")


def test_files_that_are_no_shared_parameters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.bin: expected a file of shared parameters, got No such file or directory; pass DEST/shared"):
        open_shared(tmp_path / "none.bin")
    (analysis,) = [
        path for path in (REPOSITORY / "tests/golden/dataset-tile/shared").glob("*.bin") if b"residual.basis" not in path.read_bytes()[:8000]
    ]
    with pytest.raises(ConfigError, match=r"expected a dictionary, got the network that encodes with it; pass the other"):
        open_shared(analysis)
    (tmp_path / "text.bin").write_text("text")
    with pytest.raises(ConfigError, match=r"text\.bin: expected a dictionary, got"):
        open_shared(tmp_path / "text.bin")
