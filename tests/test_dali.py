"""NVIDIA DALI reads the shards as they are: `fn.readers.webdataset` finds every member, on a machine without a GPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import assert_close, needs
from tiny_shards import KEYS, members, write_named

needs("nvidia.dali")

from nvidia.dali import fn, pipeline_def

from rinr_loader import RinrDataset, decode_batch
from rinr_loader.index import decode_key


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_named(tmp_path_factory.mktemp("shards") / "data")


def read(dest: Path, *, batch_size: int = 4, **reader: Any) -> list[tuple[bytes, bytes]]:
    """Bundle and sidecar of each sample, in the order in which one epoch of a DALI pipeline gives them."""

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None)
    def pipeline() -> tuple[Any, ...]:
        paths = [str(shard) for shard in members(dest)[0]]
        return tuple(fn.readers.webdataset(paths=paths, ext=["rinr", "json"], name="reader", **reader))

    running = pipeline()
    samples = running.reader_meta("reader")["epoch_size"]
    found: list[tuple[bytes, bytes]] = []
    while len(found) < samples:
        bundles, sidecars = running.run()
        found += [(bundles.at(i).tobytes(), sidecars.at(i).tobytes()) for i in range(batch_size)]
    return found[:samples]  # the last batch goes on with the next epoch


def test_every_sample_arrives_with_its_bytes_whatever_its_key(dest: Path) -> None:
    stored = members(dest)[1]
    names = [name.removesuffix(".rinr") for name in stored if name.endswith(".rinr")]
    assert [decode_key(name) for name in names] == sorted(KEYS)
    assert read(dest) == [(stored[f"{name}.rinr"], stored.get(f"{name}.json", b"")) for name in names]


def test_samples_without_a_sidecar_can_be_left_out(dest: Path) -> None:
    stored = members(dest)[1]
    sidecars = [data for name, data in stored.items() if name.endswith(".json")]
    assert 0 < len(sidecars) < len(KEYS)
    assert [sidecar for _, sidecar in read(dest, missing_component_behavior="skip")] == sidecars


def test_bundles_from_dali_decode_to_our_own_pixels(dest: Path) -> None:
    ours = RinrDataset(dest, size=(16, 24))
    images = decode_batch([bundle for bundle, _ in read(dest)], size=(16, 24))
    for image, (expected, _) in zip(images, ours, strict=True):
        assert_close(image, expected, "pixels")
