"""Surfaces of the family `tile`: against a slow reader, at every scale, in bands, with residuals, and from damaged or foreign bundles."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tile_reader
import torch
from conftest import assert_close
from dictionaries import columns_of, random_tile_bundle, tiny_dictionary
from jpegs import jpeg_bundle
from networks import random_bundle
from numpy.typing import NDArray

from rinr_loader.bundle import TileSpec, pack, parse
from rinr_loader.codecs import tile as codec
from rinr_loader.codecs.tile import picture, scaled_basis, synthesise
from rinr_loader.decode import decode, decode_batch, whole
from rinr_loader.dictionary import Dictionary, dump, load
from rinr_loader.errors import BundleError
from rinr_loader.geometry import Letterbox
from rinr_loader.reader import buffer_of
from rinr_loader.tiles import open_tiles, stream_bytes

Floats = NDArray[np.float64]

SHARED = {tiny_dictionary().key: tiny_dictionary()}
# Two that overlap, one of one pixel, one at the border; feathered, hard, and with a ramp wider than themselves
RESIDUALS = [((2, 3, 30, 21), 6.0, 4), ((20, 10, 37, 33), 9.0, 0), ((5, 30, 6, 31), 12.0, 2), ((31, 0, 40, 40), 5.0, 255)]

EVERYTHING = (0, 0, 65535, 65535)


def surface(bundle: bytes, k: int = 1, shared: dict[bytes, Dictionary] | None = None) -> torch.Tensor:
    return open_tiles(buffer_of([bundle], shared=SHARED if shared is None else shared), [0])([0], [k], [EVERYTHING])[0]


def levels(bundle: bytes, k: int = 1) -> Floats:
    """A surface in grey levels."""
    found: Floats = surface(bundle, k).double().numpy() * 255
    return found


def slow(bundle: bytes) -> Floats:
    """The picture, by the reader that is written from the document."""
    parsed = parse(bundle)
    first = parsed.networks[0]
    assert isinstance(first.spec, TileSpec)
    return tile_reader.read_picture(
        columns_of(),
        first.weights,
        layers=first.spec.layers,
        lanes=first.spec.lanes,
        rects=[network.rect for network in parsed.networks],
        steps=[network.scale for network in parsed.networks],
        feathers=[network.feather for network in parsed.networks],
    )


def means(image: Floats, k: int) -> Floats:
    """Means of k x k pixels, of what is left at the right and lower border."""
    _, height, width = image.shape
    rows, columns = -(-height // k), -(-width // k)
    return np.array([[image[:, k * i : k * i + k, k * j : k * j + k].mean((1, 2)) for j in range(columns)] for i in range(rows)]).transpose(2, 0, 1)


def decibels(a: Floats, b: Floats) -> float:
    return float(10 * np.log10(255**2 / np.square(a - b).mean()))


# --- against the document ---


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (15, 17), (16, 16), (17, 90), (40, 40), (64, 33)])
def test_a_picture_is_what_the_document_says(size: tuple[int, int], layers: int) -> None:
    bundle = random_tile_bundle(3, size, layers=layers)
    expected = slow(bundle)
    assert expected.shape == (3, *size)
    np.testing.assert_allclose(levels(bundle), expected, atol=2e-3)
    pixels = decode_batch([bundle], shared=SHARED)[0]
    assert_close(pixels, np.rint(np.clip(expected, 0, 255)).astype(np.uint8), "pixels")


@pytest.mark.parametrize("layers", [1, 2])
def test_residuals_are_added_with_their_ramps(layers: int) -> None:
    bundle = random_tile_bundle(4, (40, 40), layers=layers, residuals=RESIDUALS)
    without = random_tile_bundle(4, (40, 40), layers=layers)
    np.testing.assert_allclose(levels(bundle), slow(bundle), atol=2e-3)
    change = np.abs(levels(bundle) - levels(without)).max(0)
    inside = np.zeros((40, 40), bool)
    for (x0, y0, x1, y1), _, _ in RESIDUALS:
        inside[y0:y1, x0:x1] = True
    assert change[inside].max() > 5
    assert change[~inside].max() < 1e-3


def test_the_filter_is_told_the_step() -> None:
    """The same latents with another step: not the same picture at another contrast."""
    one, two = (random_tile_bundle(3, (32, 32), layers=2, step=step) for step in (20.0, 40.0))
    plain = random_tile_bundle(3, (32, 32), layers=1, step=20.0)
    assert np.abs(levels(one) - levels(plain)).max() > 0.1
    assert np.abs(2 * (levels(one) - 127.5) - (levels(two) - 127.5)).max() > 0.1


# --- at a scale ---


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_linear_picture_at_a_scale_is_the_mean_of_its_pixels(k: int) -> None:
    bundle = random_tile_bundle(5, (48, 80))
    np.testing.assert_allclose(levels(bundle, k), means(slow(bundle), k), atol=1e-3)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("size", [(41, 35), (17, 600), (15, 17), (1, 1), (3, 50)])
def test_a_ragged_border_at_a_scale_is_near(size: tuple[int, int], k: int) -> None:
    """Inside, means; in the last row and column of pixels that are means of fewer, what the tile shows beyond the border takes part."""
    bundle = random_tile_bundle(6, size)
    found, expected = levels(bundle, k), means(slow(bundle), k)
    assert found.shape == expected.shape
    whole_rows, whole_columns = size[0] // k, size[1] // k
    np.testing.assert_allclose(found[:, :whole_rows, :whole_columns], expected[:, :whole_rows, :whole_columns], atol=1e-3)
    assert decibels(found, expected) > 20


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_filtered_picture_at_a_scale_is_near(k: int) -> None:
    bundle = random_tile_bundle(5, (48, 80), layers=2)
    expected = means(slow(bundle), k)
    assert decibels(levels(bundle, k), expected) > 40
    # The filter is left out there, so the picture is that of one layer.
    np.testing.assert_allclose(levels(bundle, k), levels(random_tile_bundle(5, (48, 80)), k), atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(48, 64), (40, 40), (41, 45)])
def test_residuals_at_a_scale_are_means_of_what_they_add(size: tuple[int, int], k: int) -> None:
    residuals = [*RESIDUALS, ((7, 7, size[1], size[0]), 4.0, 3)]
    with_residuals, without = (random_tile_bundle(7, size, residuals=these) for these in (residuals, []))
    added = slow(with_residuals) - slow(without)
    np.testing.assert_allclose(levels(with_residuals, k) - levels(without, k), means(added, k), atol=1e-3)


# --- bands ---


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("band", [1, 7, 12])
def test_bands_do_not_show(layers: int, k: int, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_tile_bundle(8, (100, 88), layers=layers, residuals=RESIDUALS)
    at_once = levels(bundle, k)
    monkeypatch.setattr(codec, "BAND", band)
    np.testing.assert_allclose(levels(bundle, k), at_once, atol=1e-3)


def test_memory_beyond_the_picture_is_that_of_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 2000 x 2000 pixels: besides the result, which is as large as it must be, a fixed number of tiles is in work."""
    monkeypatch.setattr(codec, "BAND", 500)
    latents = torch.randn(16, 125, 125, generator=torch.Generator().manual_seed(0)).round()
    basis = scaled_basis(tiny_dictionary().basis, 1)
    allocated = _peak_of(lambda: picture(latents, basis, dict(tiny_dictionary().filter), 30.0))
    result, tile = 4 * 3 * 2000 * 2000, 4 * 3 * 24 * 24
    assert result < allocated < result + 5 * (500 + 2 * 125) * tile, f"{allocated / 1e6:.0f} MB"


def _peak_of(work: Any) -> int:
    """Most bytes of tensors that lived at once, by the profiler's record of allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    total = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


# --- pictures of one kind, of none, of all kinds ---


def test_a_picture_without_any_latents_is_grey() -> None:
    for layers in (1, 2):
        for k in (1, 2, 8):
            bundle = random_tile_bundle(0, (30, 40), layers=layers, busy=0.0)
            found = surface(bundle, k)
            assert found.shape == (3, -(-30 // k), -(-40 // k))
            assert (found * 255 - 127.5).abs().max() < 8  # the filter may add a little


def test_surfaces_come_in_the_order_that_was_asked_for() -> None:
    bundles = [random_tile_bundle(i, (20 + 8 * i, 24), layers=1 + i % 2, residuals=[((2, 3, 20, 17), 6.0, 4)] if i else []) for i in range(3)]
    buffer = buffer_of(bundles, shared=SHARED)
    asked = [(2, 1), (0, 2), (2, 4), (1, 1), (0, 1)]
    found = open_tiles(buffer, [0, 1, 2])([s for s, _ in asked], [k for _, k in asked], [EVERYTHING] * len(asked))
    for (s, k), mine in zip(asked, found, strict=True):
        assert_close(mine, surface(bundles[s], k))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_only_the_tiles_of_a_region_are_made(layers: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_tile_bundle(0, (150, 200), layers=layers, residuals=RESIDUALS)
    whole_surface, buffer = surface(bundle, k), buffer_of([bundle], shared=SHARED)
    made: list[int] = []

    def counting(latents: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        made.append(latents.shape[2] * latents.shape[3])
        return synthesise(latents, basis)

    monkeypatch.setattr(codec, "synthesise", counting)
    for x0, y0, x1, y1 in ((0, 0, 200, 150), (50, 40, 51, 41), (0, 33, 17, 150), (190, 0, 200, 10), (33, 140, 150, 150), (16, 16, 32, 32)):
        for band in (8192, 30):
            made.clear()
            monkeypatch.setattr(codec, "BAND", band)
            (found,) = open_tiles(buffer, [0])([0], [k], [(x0, y0, x1, y1)])
            assert found.shape == whole_surface.shape
            inside = (slice(None), slice(y0 // k, -(-y1 // k)), slice(x0 // k, -(-x1 // k)))
            torch.testing.assert_close(found[inside], whole_surface[inside], atol=2e-6, rtol=0)
            if band == 8192:
                across, down = (-(-b // 16) - a // 16 for a, b in ((x0, x1), (y0, y1)))
                assert sum(made) <= (across + 2) * (down + 2)


def test_families_in_one_buffer_do_not_mix() -> None:
    bundles = [
        random_tile_bundle(0, (24, 40), layers=2),
        jpeg_bundle(1),
        random_bundle(2, stored=(24, 40)),
        random_tile_bundle(3, (24, 40), residuals=RESIDUALS[:1]),
    ]
    buffer = buffer_of(bundles, shared=SHARED)
    together = decode(buffer, whole(buffer, (24, 40)), size=(24, 40))
    for i, bundle in enumerate(bundles):
        assert_close(together[i], decode_batch([bundle], shared=SHARED)[0], "pixels")


def test_a_picture_letterboxed_to_a_smaller_size_is_near_its_pixels() -> None:
    bundle = random_tile_bundle(9, (64, 96), layers=2)
    buffer = buffer_of([bundle], shared=SHARED)
    placed = Letterbox()(buffer.source_size, size=(32, 48), random=_none)
    shown = decode(buffer, placed, size=(32, 48))[0].double().numpy()
    assert decibels(shown, np.clip(means(slow(bundle), 2), 0, 255)) > 35


def _none(count: int) -> torch.Tensor:
    raise AssertionError("no random numbers expected")


# --- dictionaries ---


def other_dictionary() -> Dictionary:
    """Another basis, with the same tables."""
    columns = {**columns_of(), "basis": columns_of()["basis"][:, ::-1]}
    return load(dump(columns, {"made": "for tests, with its colours turned round"}), "other.bin")


def test_samples_of_two_dictionaries_in_one_buffer() -> None:
    other = other_dictionary()
    assert other.key != tiny_dictionary().key
    bundles = [random_tile_bundle(1, (24, 40), step=200.0, dictionary=mine) for mine in (tiny_dictionary(), other)]
    one, two = open_tiles(buffer_of(bundles, shared={**SHARED, other.key: other}), [0, 1])([0, 1], [1, 1], [EVERYTHING] * 2)
    assert_close(one.flip(0), two)
    assert (one - two).abs().max() > 0.05


def test_a_missing_dictionary_is_named_with_the_bundle() -> None:
    bundle = random_tile_bundle(0, (16, 16))
    buffer = buffer_of([bundle], ["street/one"])
    for read in (lambda: open_tiles(buffer, [0])([0], [1], [EVERYTHING]), lambda: decode(buffer, whole(buffer, (16, 16)), size=(16, 16))):
        with pytest.raises(BundleError) as caught:
            read()
        assert "street/one" in str(caught.value)
        assert tiny_dictionary().key.hex() in str(caught.value)
    with pytest.raises(BundleError, match=tiny_dictionary().key.hex()):
        decode_batch([bundle])
    with pytest.raises(BundleError, match=tiny_dictionary().key.hex()):
        surface(bundle, shared={other_dictionary().key: other_dictionary()})


def test_a_dictionary_is_named_by_its_bytes() -> None:
    assert tiny_dictionary().sha256 == hashlib.sha256(tiny_dictionary().data).hexdigest()
    assert parse(random_tile_bundle(0, (16, 16))).shared == bytes.fromhex(tiny_dictionary().sha256)[:8]


# --- damage ---


def test_damage_behind_the_checksum_names_the_bundle() -> None:
    """Bytes that change after they were read and checked."""
    buffer = buffer_of([random_tile_bundle(i, (40, 40)) for i in range(2)], ["whole", "broken"], shared=SHARED)
    broken = buffer.data.clone()
    start = int(buffer.network_offset[buffer.network_start[1]])
    broken[start + 20 : start + 24] ^= 0x55
    damaged = replace(buffer, data=broken)
    with pytest.raises(BundleError, match=r"^broken\.rinr"):
        decode(damaged, whole(damaged, (40, 40)), size=(40, 40))
    assert_close(open_tiles(damaged, [0])([0], [1], [EVERYTHING])[0], open_tiles(buffer, [0])([0], [1], [EVERYTHING])[0])


def test_every_bit_of_a_bundle_is_checked() -> None:
    data = random_tile_bundle(0, (16, 16), residuals=[((1, 1, 9, 9), 5.0, 2)], busy=0.3)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleError):
            decode_batch([bytes(broken)], shared=SHARED)


def test_a_record_that_does_not_fit_the_stream_is_an_error() -> None:
    """Rectangles, lanes and sizes are checked by the stream itself."""
    parsed = parse(random_tile_bundle(0, (40, 40), residuals=RESIDUALS[:2]))
    background, first, second = parsed.networks
    grown = replace(first, rect=(0, 0, 40, 40))
    lanes = replace(background, spec=TileSpec("background", 1, 64))
    for networks in ((background, grown, second), (background, first), (lanes, first, second)):
        with pytest.raises(BundleError):
            surface(pack(replace(parsed, networks=networks)))


def test_what_a_stream_decodes_to_takes_a_bounded_amount_of_memory() -> None:
    bundle = random_tile_bundle(0, (2000, 2000), busy=0.05)
    buffer = buffer_of([bundle], shared=SHARED)
    tracemalloc.start()  # which sees numpy: the entropy decoder
    try:
        open_tiles(buffer, [0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 125 * 125 * (16 * 8 * 4 + 200) + 8_000_000, f"{peak / 1e6:.0f} MB"


def test_the_bytes_of_streams_are_told_by_part() -> None:
    with_objects = random_tile_bundle(1, (70, 90), residuals=RESIDUALS)
    bundles = [random_tile_bundle(0, (70, 90)), jpeg_bundle(0), with_objects, random_tile_bundle(2, (16, 16), busy=0)]
    parts = stream_bytes(buffer_of(bundles, shared=SHARED))
    lengths = [len(network.weights) for bundle in (bundles[0], bundles[2], bundles[3]) for network in parse(bundle).networks[:1]]
    assert [sum(part.values()) for part in parts] == pytest.approx(lengths)
    for part, bundle in zip(parts, (bundles[0], bundles[2], bundles[3]), strict=True):
        spec = parse(bundle).networks[0].spec
        assert isinstance(spec, TileSpec)
        assert 0 <= part["lanes"] <= 4 * spec.lanes + 2, "their states, and what is left of the last words"
    names = {f"background latents {a} to {b - 1}" for a, b in tiny_dictionary().background.bounds}
    assert names < parts[0].keys()
    assert all(parts[0][name] > 0 for name in names)
    objects = [sum(size for name, size in part.items() if name.startswith("objects")) for part in parts]
    assert objects[0] == objects[2] == 0 < objects[1]
    assert parts[1]["escapes"] > 0
    assert not any(size for name, size in parts[2].items() if "latents" in name), "classes of zeros have no symbols"
