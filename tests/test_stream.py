"""The stream of a `tile` bundle: round trips, a slow reader written from the document, and damage."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import tile_reader
from dictionaries import columns_of, random_lattice, tiny_dictionary
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rinr_loader import stream as coding
from rinr_loader.codecs.tile import RESIDUAL_TILE, TILE, lattice_of
from rinr_loader.dictionary import shipped
from rinr_loader.errors import BundleError
from rinr_loader.stream import Lattice, Rect, context_below, read_streams, write_stream

Latents = Sequence[NDArray[np.integer]]


def lattices(seed: int, size: tuple[int, int], rects: Sequence[Rect] = (), *, busy: float = 0.6, escapes: float = 0.0) -> list[Lattice]:
    """Background and residuals of random latents."""
    rng, dictionary = np.random.default_rng(seed), tiny_dictionary()
    background = random_lattice(rng, dictionary.background, (0, 0, size[1], size[0]), TILE, busy=busy, escapes=escapes)
    return [background, *(random_lattice(rng, dictionary.residual, rect, RESIDUAL_TILE, busy=busy, escapes=escapes) for rect in rects)]


def write(parts: Sequence[Lattice]) -> tuple[bytes, int]:
    return write_stream(tiny_dictionary(), parts[0], parts[1:])


def read(streams: Sequence[tuple[bytes, int]], rects: Sequence[Sequence[Rect]], names: Sequence[str] | None = None) -> list[Latents]:
    """Decode streams that lie between other bytes."""
    arena, spans = b"\xa5" * 3, []
    for data, _ in streams:
        spans.append((len(arena), len(arena) + len(data)))
        arena += data + b"\x5a" * 5
    named = names or [str(i) for i in range(len(streams))]
    return read_streams(tiny_dictionary(), np.frombuffer(arena, np.uint8), spans, [lanes for _, lanes in streams], rects, named)


def latents_of(parts: Sequence[Lattice]) -> Latents:
    """What decoding should give: the first channels of the background are sums of what is coded."""
    found = [part.symbols.copy() for part in parts]
    rows, across = lattice_of(parts[0].rect, TILE)
    for t in range(rows * across):
        if t:
            found[0][t, : tiny_dictionary().predicted] += found[0][t - 1 if t % across else t - across, : tiny_dictionary().predicted]
    return found


def assert_same(found: Latents, expected: Latents) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@st.composite
def pictures(draw: st.DrawFn) -> list[Lattice]:
    """Latents of any small picture, with residuals that may lie upon each other."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rects: list[Rect] = []
    for _ in range(draw(st.integers(0, 5))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rects.append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    busy, escapes = draw(st.sampled_from((0.0, 0.1, 0.6, 1.0))), draw(st.sampled_from((0.0, 0.01, 0.5, 1.0)))
    return lattices(draw(st.integers(0, 99)), (height, width), rects, busy=busy, escapes=escapes)


# --- round trips ---


@given(parts=pictures(), a_lane=st.sampled_from((1, 8, 100, 2048)))
def test_a_stream_gives_back_what_was_written(parts: list[Lattice], a_lane: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "SYMBOLS_A_LANE", a_lane)
        data, lanes = write(parts)
    assert_same(read([(data, lanes)], [[part.rect for part in parts]])[0], latents_of(parts))


@pytest.mark.parametrize("most", [1, 2, 4, 8, 16, 32, 64])
def test_any_number_of_lanes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "SYMBOLS_A_LANE", 1)
    monkeypatch.setattr(coding, "MOST_LANES", most)
    parts = lattices(most, (90, 130), [(3, 5, 60, 40), (3, 5, 4, 6), (20, 20, 90, 80)], escapes=0.02)
    data, lanes = write(parts)
    assert lanes == most
    assert_same(read([(data, lanes)], [[part.rect for part in parts]])[0], latents_of(parts))


def test_more_lanes_than_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "SYMBOLS_A_LANE", 1)
    parts = lattices(0, (16, 40), [(0, 0, 9, 9)], busy=1.0)
    data, lanes = write(parts)
    assert lanes == 64 > len(parts[0].classes) + len(parts[1].classes)
    assert_same(read([(data, lanes)], [[part.rect for part in parts]])[0], latents_of(parts))


def test_pictures_of_a_batch_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[tuple[int, int], list[Rect]]] = [
        ((1, 1), []),
        ((64, 48), [(0, 0, 48, 64)]),
        ((17, 90), []),
        ((33, 33), [(1, 2, 9, 30), (5, 5, 33, 33)]),
    ]
    batch = [lattices(i, size, rects, escapes=0.1) for i, (size, rects) in enumerate(shapes)]
    streams = []
    monkeypatch.setattr(coding, "SYMBOLS_A_LANE", 1)
    for parts, lanes in zip(batch, (1, 8, 64, 2), strict=True):
        monkeypatch.setattr(coding, "MOST_LANES", lanes)
        streams.append(write(parts))
    assert [lanes for _, lanes in streams] == [1, 8, 64, 2]
    found = read(streams, [[part.rect for part in parts] for parts in batch])
    for mine, parts in zip(found, batch, strict=True):
        assert_same(mine, latents_of(parts))


def test_no_picture_at_all() -> None:
    assert read([], []) == []


def test_nothing_but_zeros_costs_next_to_nothing() -> None:
    parts = lattices(0, (320, 320), [(10, 10, 90, 90)], busy=0.0)
    data, lanes = write(parts)
    assert not any(part.classes.any() for part in parts)
    assert len(data) < 4 * lanes + (400 * 3 + 100 * 4) / 8 * 3  # a few bits for a class, which is rare in these tables
    assert_same(read([(data, lanes)], [[part.rect for part in parts]])[0], latents_of(parts))


def test_lanes_grow_with_what_a_stream_holds() -> None:
    lanes = [write(lattices(0, (side, side), busy=busy))[1] for side, busy in ((16, 1.0), (320, 0.3), (320, 1.0), (1600, 1.0))]
    assert lanes == sorted(lanes)
    assert lanes[0] == 1 < lanes[-1]
    # Classes take steps too: a large picture with nothing in it is not one long lane.
    assert write(lattices(0, (1600, 1600), busy=0.0))[1] > 4


def test_values_beyond_16_bits_are_cut() -> None:
    parts = lattices(0, (16, 16), busy=1.0)
    parts[0].symbols[0, -1], parts[0].symbols[0, -2] = 40_000, -40_000
    found = read([write(parts)], [[parts[0].rect]])[0][0]
    assert found[0, -2:].tolist() == [-32767, 32767]


def test_the_same_latents_are_the_same_bytes() -> None:
    parts = lattices(3, (50, 60), [(0, 0, 30, 30)], escapes=0.1)
    assert write(parts) == write(lattices(3, (50, 60), [(0, 0, 30, 30)], escapes=0.1))


# --- the document ---


@pytest.mark.parametrize("lanes", [1, 4, 64])
@pytest.mark.parametrize(
    ("size", "rects"),
    [
        ((1, 1), []),
        ((40, 70), [(3, 5, 60, 40), (30, 0, 70, 21)]),
        ((100, 33), [(0, 80, 33, 100), (32, 99, 33, 100), (0, 0, 1, 100)]),
    ],
)
def test_a_reader_written_from_the_document_finds_the_same(
    size: tuple[int, int], rects: list[Rect], lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coding, "SYMBOLS_A_LANE", 1)
    monkeypatch.setattr(coding, "MOST_LANES", lanes)
    parts = lattices(7, size, rects, escapes=0.05)
    data, used = write(parts)
    assert_same(tile_reader.read_stream(columns_of(), data, used, [part.rect for part in parts]), latents_of(parts))


def test_classes_of_residuals_know_how_busy_the_background_is() -> None:
    prior = tiny_dictionary().background
    buckets = prior.buckets.astype(int)
    classes = np.zeros((6, 3), np.int64)  # 2 x 3 tiles
    classes[4] = [0, 5, 7]  # the tile at x 16 to 32, y 16 to 32
    low = round((buckets[1, 0] + buckets[2, 0]) / 2 + 0.01)
    high = round((buckets[1, 5] + buckets[2, 7]) / 2 + 0.01)
    assert low < high
    found = context_below(prior, classes, 3, (9, 9, 40, 30)).reshape(3, 4)  # centres at x 13, 21, 29, 37 and y 13, 21, 29
    np.testing.assert_array_equal(found, [[low] * 4, [low, high, high, low], [low, high, high, low]])
    assert context_below(prior, classes, 3, (47, 31, 48, 32)).tolist() == [low]  # its centre lies beyond the last tile


# --- damage ---


def damaged(data: bytes, lanes: int, rects: Sequence[Rect]) -> Latents | None:
    """What a damaged stream gives, None for the error that it should be."""
    try:
        return read([(data, lanes)], [rects])[0]
    except BundleError:
        return None


def small() -> tuple[bytes, int, list[Rect], Latents]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "SYMBOLS_A_LANE", 32)
        parts = small_parts()
        data, lanes = write(parts)
    return data, lanes, [part.rect for part in parts], latents_of(parts)


def small_parts() -> list[Lattice]:
    return lattices(5, (30, 20), [(4, 4, 12, 20)], busy=0.3, escapes=0.01)


def test_a_stream_that_is_cut_off_is_an_error() -> None:
    data, lanes, rects, expected = small()
    assert lanes > 1
    assert_same(damaged(data, lanes, rects) or [], expected)
    for length in range(len(data)):
        assert damaged(data[:length], lanes, rects) is None, length
    assert damaged(data + b"\0", lanes, rects) is None
    assert damaged(data + b"\0\0", lanes, rects) is None


def test_flipped_bits_end_in_an_error_or_in_latents() -> None:
    data, lanes, rects, expected = small()
    tables = tiny_dictionary()
    priors = [tables.background, tables.residual]
    behind = 2 * sum(len(coding._symbols(tables, prior, part)[2]) for prior, part in zip(priors, small_parts(), strict=True))
    errors = 0
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        found = damaged(bytes(broken), lanes, rects)
        errors += found is None
        if found is not None:
            assert [part.shape for part in found] == [part.shape for part in expected]
            assert max(int(abs(part[:, tables.predicted :]).max()) for part in found) <= 32768
    # What is left: the values behind the escapes, and a few symbols of equal frequency. A bundle's checksum sees them.
    assert 0 < behind < len(data) / 2
    assert errors >= 0.98 * 8 * (len(data) - behind)


def test_the_wrong_number_of_lanes_is_an_error() -> None:
    data, lanes, rects, _ = small()
    for wrong in (1, 2, 8, 1024):
        if wrong != lanes:
            assert damaged(data, wrong, rects) is None, wrong


@given(data=st.binary(max_size=200), lanes=st.sampled_from((1, 2, 16, 1024)))
def test_any_bytes_are_an_error_or_latents(data: bytes, lanes: int) -> None:
    found = damaged(data, lanes, [(0, 0, 40, 30), (4, 4, 20, 24), (0, 0, 8, 8)])
    assert found is None or [part.shape for part in found] == [(6, 16), (6, 192), (1, 192)]


def test_the_error_names_the_picture_that_is_damaged() -> None:
    batch = [lattices(i, (40, 40)) for i in range(3)]
    streams = [write(parts) for parts in batch]
    streams[1] = (streams[1][0][:-2], streams[1][1])
    with pytest.raises(BundleError, match=r"^second\.rinr"):
        read(streams, [[parts[0].rect] for parts in batch], ["first.rinr", "second.rinr", "third.rinr"])


def test_a_few_bytes_that_claim_a_large_picture_cost_nothing() -> None:
    whole: Rect = (0, 0, 65535, 65535)
    tracemalloc.start()
    try:
        for rects in ([whole], [(0, 0, 40, 30), *[(0, 0, 40, 30)] * 2000]):
            with pytest.raises(BundleError, match=r"^0: expected at most 256 tiles a byte, got \d+ in 60 bytes"):
                read([(bytes(60), 1)], [rects])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_the_emptiest_picture_is_far_from_that_limit() -> None:
    """Class 0 in every tile, under the shipped tables."""
    dictionary = shipped()
    groups = len(dictionary.background.ends)
    empty = Lattice(np.zeros((10_000, dictionary.channels), np.int64), np.zeros((10_000, groups), np.int64), (0, 0, 1600, 1600))
    data, _ = write_stream(dictionary, empty, [])
    assert coding.TILES_A_BYTE / 2 * len(data) > 10_000
