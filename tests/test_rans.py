"""The entropy coder against a scalar reading of its definition: round trips, bytes, classes and damage."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rans_streams import BUCKETS, CONTEXTS, coded, decode_all, decode_versions, decoder_of, draw, padded, random_tables

from rinr_loader.codecs.rans import Decoder, Tables, deal, decode_classes, decode_symbols, encode

# --- the definition, one symbol at a time ---


class Scalar:
    """One stream, decoded as the definition says, with Python's integers."""

    def __init__(self, stream: bytes, lanes: int, frequencies: list[list[int]]) -> None:
        self.states = list(struct.unpack_from(f"<{lanes}I", stream))
        self.words = [word for (word,) in struct.iter_unpack("<H", stream[4 * lanes :])]
        self.frequencies = frequencies

    def step(self, tables: list[int]) -> list[int]:
        symbols = []
        for lane, table in enumerate(tables):
            symbol = 0
            if table >= 0:
                slot, before = self.states[lane] % 4096, 0
                while before + self.frequencies[table][symbol] <= slot:
                    before += self.frequencies[table][symbol]
                    symbol += 1
                self.states[lane] = self.frequencies[table][symbol] * (self.states[lane] // 4096) + slot - before
            symbols.append(symbol)
        for lane, state in enumerate(self.states):
            if state < 2**15:
                self.states[lane] = state * 2**16 + self.words.pop(0)
        return symbols

    @property
    def spent(self) -> bool:
        return not self.words and set(self.states) == {2**15}


def scalar_classes(scalar: Scalar, lanes: int, has_left: list[bool], extra: list[int], base: int, buckets: list[list[int]]) -> list[list[int]]:
    tiles, groups = len(extra), len(buckets)
    span = math.ceil(tiles / lanes)
    classes = [[-1] * groups for _ in range(tiles)]
    for j in range(span):
        for g in range(groups):
            tables = []
            mine = [lane * span + j for lane in range(lanes)]
            for t in mine:
                if t >= tiles:
                    tables.append(-1)
                    continue
                a = buckets[g][classes[t - 1][g]] if j > 0 and has_left[t] else BUCKETS
                b = buckets[g - 1][classes[t][g - 1]] if g > 0 else extra[t]
                tables.append(base + (g * CONTEXTS + a) * CONTEXTS + b)
            for t, symbol in zip(mine, scalar.step(tables), strict=True):
                if t < tiles:
                    classes[t][g] = symbol
    return classes


# --- what is coded ---


images = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 40)), min_size=1, max_size=5)  # lanes and steps of each


@given(
    seed=st.integers(0, 2**32),
    images=images,
    rows=st.integers(1, 6),
    symbols=st.sampled_from([1, 2, 3, 17, 256]),
    idle=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(seed=1, images=[(1, 0)], rows=1, symbols=1, idle=0.0)
@example(seed=1, images=[(64, 40), (1, 1), (3, 0)], rows=6, symbols=256, idle=0.3)
@settings(max_examples=60)
def test_what_was_encoded_is_decoded_as_the_definition_says(seed: int, images: list[tuple[int, int]], rows: int, symbols: int, idle: float) -> None:
    rng = np.random.default_rng(seed)
    frequencies = random_tables(rng, rows, symbols)
    parts = [np.where(rng.random((steps, lanes)) < idle, -1, rng.integers(0, rows, (steps, lanes))) for lanes, steps in images]
    values = [draw(rng, frequencies, part) for part in parts]
    tables = Tables(frequencies)
    streams = encode(values, parts, tables)

    for (lanes, _), stream, part, value in zip(images, streams, parts, values, strict=True):
        scalar = Scalar(stream, lanes, frequencies.tolist())
        found = np.array([scalar.step(row) for row in part.tolist()]).reshape(part.shape)
        assert np.array_equal(found, np.where(part < 0, 0, value))
        assert scalar.spent

    decoder = decoder_of(streams, [lanes for lanes, _ in images], tables)
    expected = np.where(padded(parts) < 0, 0, padded(values, 0))
    found = decoder.run(padded(parts))
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert decoder.intact().all()
    assert decoder.position.tolist() == [len(stream) for stream in streams]


@pytest.mark.parametrize("lanes", range(1, 65))
def test_every_number_of_lanes(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    frequencies = random_tables(rng, 5, 30)
    parts = [deal(rng.integers(0, 5, count), lanes) for count in (1000, 333, 0, 1)]
    values = [draw(rng, frequencies, part) for part in parts]
    decoder = decoder_of(encode(values, parts, Tables(frequencies)), [lanes] * 4, Tables(frequencies))
    assert np.array_equal(decoder.run(padded(parts)), np.where(padded(parts) < 0, 0, padded(values, 0)))
    assert decoder.intact().all()


def test_steps_and_runs_can_be_mixed() -> None:
    rng = np.random.default_rng(0)
    frequencies = random_tables(rng, 4, 20)
    parts = [rng.integers(-1, 4, (300, 8)), rng.integers(-1, 4, (300, 5))]
    values = [draw(rng, frequencies, part) for part in parts]
    tables = Tables(frequencies)
    streams = encode(values, parts, tables)
    grid, decoder = padded(parts), decoder_of(streams, [8, 5], tables)
    found = [decoder.run(grid[:100]), *(decoder.step(row)[None] for row in grid[100:110])]
    assert not decoder.intact().any()
    assert (decoder.position < [len(stream) for stream in streams]).all()
    found.append(decoder.run(grid[110:]))
    assert np.array_equal(np.concatenate(found), np.where(grid < 0, 0, padded(values, 0)))
    assert decoder.intact().all()


def test_tables_for_lanes_that_an_image_does_not_have_are_ignored() -> None:
    tables = Tables([[2048, 2048]])
    streams = encode([np.ones((9, 4), int), np.ones((9, 1), int)], [np.zeros((9, 4), int), np.zeros((9, 1), int)], tables)
    decoder = decoder_of(streams, [4, 1], tables)
    found = decoder.run(np.zeros((9, 2, 4), int))
    assert found[:, 0].all()
    assert found[:, 1].tolist() == [[1, 0, 0, 0]] * 9
    assert decoder.intact().all()


# --- bytes ---


def test_the_bytes_of_small_streams() -> None:
    tables = Tables([[4096, 0, 0], [2048, 0, 2048], [1, 4095, 0]])
    certain = np.zeros((1000, 2), int)
    # What is certain costs nothing, in any number.
    assert encode([certain], [certain], tables) == [struct.pack("<2I", 2**15, 2**15)]
    # One bit: 2^15 becomes (2^15 / 2048) * 4096 + 2048.
    assert encode([np.array([[2]])], [np.array([[1]])], tables) == [struct.pack("<I", 2**16 + 2048)]
    # Twice one in 4096: 2^15 << 12 is above 2^19, so its low half, 0, is written before the second.
    assert encode([np.array([[0], [0]])], [np.array([[2], [2]])], tables) == [struct.pack("<IH", (2**27 >> 16) << 12, 0)]
    # Two lanes write in the same step: the words stand in the order of the lanes.
    two = [struct.pack("<2I2H", (2**27 >> 16) << 12, (2**27 >> 16 << 12) + 1, 0, 1)]
    one = Tables([[1, 1, 4094]])
    assert encode([np.array([[0, 1], [0, 1]])], [np.zeros((2, 2), int)], one) == two


def test_the_same_bytes_again_and_in_any_company() -> None:
    rng = np.random.default_rng(3)
    frequencies = random_tables(rng, 4, 20)
    tables = Tables(frequencies)
    parts = [rng.integers(-1, 4, (steps, lanes)) for steps, lanes in ((80, 4), (200, 16), (1, 1))]
    values = [draw(rng, frequencies, part) for part in parts]
    together = encode(values, parts, tables)
    assert together == encode(values, parts, Tables(frequencies.astype(np.uint16)))
    assert together == [encode([value], [part], tables)[0] for value, part in zip(values, parts, strict=True)]
    assert encode([], [], tables) == []


@pytest.mark.parametrize("lanes", [1, 4, 16, 64])
def test_the_length_is_close_to_the_ideal(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    frequencies = np.concatenate([random_tables(rng, 20, 60, zeros=False), [[4095, 1] + [0] * 58]])
    parts = [deal(rng.integers(0, 21, 25_000), lanes) for _ in range(4)]
    values = [draw(rng, frequencies, part) for part in parts]
    for stream, part, value in zip(encode(values, parts, Tables(frequencies)), parts, values, strict=True):
        ideal = float((12 - np.log2(frequencies[part, value]))[part >= 0].sum()) / 8
        # Of a lane's 4 bytes 15 bits are lost to the start at 2^15, and the leading zeros of its state: 2 bytes at least, 4 at most.
        assert ideal + 2 * lanes - 0.001 * ideal < len(stream) < 1.001 * ideal + 4 * lanes


# --- classes and symbols ---


tilings = st.lists(st.tuples(st.integers(1, 24), st.integers(0, 90), st.integers(0, 20), st.integers(0, 200)), min_size=1, max_size=4)


@given(seed=st.integers(0, 2**32), images=tilings)
@example(seed=0, images=[(16, 920, 30, 1000), (8, 17, 0, 3), (1, 0, 1, 0), (64, 5, 3, 64)])
@example(seed=0, images=[(4, 0, 0, 0)])
@settings(max_examples=40)
def test_classes_and_symbols_are_decoded_as_the_definition_says(seed: int, images: list[tuple[int, int, int, int]]) -> None:
    data = coded(seed, images)
    for n, lanes in enumerate(data.lanes):
        scalar = Scalar(data.streams[n], lanes, data.frequencies.tolist())
        for i in (0, 1):
            count = data.counts(i)[n]
            left, extra = data.has_left[i][n, :count].tolist(), data.extra[i][n, :count].tolist()
            assert scalar_classes(scalar, lanes, left, extra, data.bases[i], data.buckets[i].tolist()) == data.classes[i][n].tolist()
        for step in range(0, len(data.symbols[n]), lanes):
            mine = data.symbol_tables[n][step : step + lanes].tolist()
            assert scalar.step(mine + [-1] * (lanes - len(mine)))[: len(mine)] == data.symbols[n][step : step + lanes].tolist()
        assert scalar.spent

    decoder = decoder_of(data.streams, data.lanes, Tables(data.frequencies))
    classes, symbols = decode_all(data, decoder)
    for i in (0, 1):
        for found, expected in zip(classes[i], data.classes[i], strict=True):
            assert np.array_equal(found[: len(expected)], expected)
            assert not found[len(expected) :].any()
    assert np.array_equal(symbols, np.concatenate(data.symbols))
    assert decoder.intact().all()


# --- damage ---


IMAGES = [(4, 40, 6, 400), (1, 25, 3, 80), (16, 200, 10, 600)]
each_image = pytest.mark.parametrize("image", IMAGES, ids=["4 lanes", "1 lane", "16 lanes"])


@each_image
def test_every_truncation_is_reported_and_reads_zeros_past_the_end(image: tuple[int, int, int, int]) -> None:
    data = coded(5, [image])
    [stream] = data.streams
    found = decode_versions(data, [stream[:length] for length in range(len(stream) + 1)])
    assert found.intact.tolist() == [False] * len(stream) + [True]
    others = decode_versions(data, [stream[:length] for length in range(len(stream) + 1)], guard=0x55)
    assert np.array_equal(found.values, others.values), "what lies around a stream was read"
    # Whole words: as if zeros followed.
    even = list(range(4 * image[0], len(stream), 2))
    zeros = decode_versions(data, [stream[:length] + bytes(5000) for length in even])
    assert np.array_equal(found.values[even, :-1], zeros.values[:, :-1])
    over = found.values[even, -1] > even
    assert over.any(), "no stream was read past its end"


@each_image
def test_bytes_too_many_are_reported(image: tuple[int, int, int, int]) -> None:
    data = coded(5, [image])
    [stream] = data.streams
    found = decode_versions(data, [stream + more for more in (b"", b"\0", b"\0\0", b"\x12\x34", bytes(100))])
    assert found.intact.tolist() == [True] + [False] * 4
    assert (found.values == found.values[0]).all()


@each_image
def test_flipped_bits_are_reported_in_nearly_every_case(image: tuple[int, int, int, int]) -> None:
    data = coded(6, [image])
    [stream] = data.streams
    versions = [stream]
    for bit in range(8 * len(stream)):
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        versions.append(bytes(changed))
    found = decode_versions(data, versions)
    assert found.intact[0]
    same = (found.values[1:] == found.values[0]).all(1)
    assert not (same & found.intact[1:]).any(), "two streams mean the same"
    # What passes: two symbols of one frequency that change places, which leaves the same state behind.
    assert found.intact[1:].mean() < 0.03


@each_image
def test_longer_damage_is_reported(image: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    data = coded(7, [image])
    [stream] = data.streams
    versions = []
    for _ in range(500):
        changed = bytearray(stream)
        start = int(rng.integers(0, len(stream) - 8))
        changed[start : start + 8] = rng.bytes(8)
        versions.append(bytes(changed))
    assert not decode_versions(data, versions).intact.any()


def test_damage_stays_in_its_image() -> None:
    data = coded(5, [(4, 40, 6, 150), (7, 25, 3, 80), (4, 9, 0, 30)])
    broken = [data.streams[0], data.streams[1][:30], data.streams[2]]
    decoder = decoder_of(broken, data.lanes, Tables(data.frequencies))
    classes, symbols = decode_all(data, decoder)
    assert decoder.intact().tolist() == [True, False, True]
    for n in (0, 2):
        for i in (0, 1):
            assert np.array_equal(classes[i][n, : data.counts(i)[n]], data.classes[i][n])
    assert np.array_equal(symbols[:150], data.symbols[0])
    assert np.array_equal(symbols[230:], data.symbols[2])


@given(junk=st.binary(max_size=300), lanes=st.integers(1, 40))
@example(junk=bytes(160), lanes=40)
@example(junk=b"\xff" * 300, lanes=3)
@example(junk=b"", lanes=1)
@settings(max_examples=40)
def test_any_bytes_decode_to_something_and_to_nothing_outside(junk: bytes, lanes: int) -> None:
    data = coded(1, [(lanes, 30, 5, 100)])
    found = decode_versions(data, [junk])
    assert not found.intact.any()
    assert np.array_equal(found.values, decode_versions(data, [junk], guard=0x11).values)


def test_lanes_without_symbols_do_nothing_even_where_the_stream_is_damaged() -> None:
    tables = Tables([[4096]])
    for state in (0, 5, 2**15 - 1, 2**31, 2**32 - 1):
        decoder = decoder_of([struct.pack("<2I3H", 2**15, state, 1, 2, 3)], [2], tables)
        decoder.run(np.tile([0, -1], (50, 1, 1)))
        assert decoder.position.tolist() == [8]
        assert not decoder.intact().any()


def test_a_state_that_no_encoder_writes_is_reported() -> None:
    tables = Tables([[4096]])
    assert decoder_of([struct.pack("<2I", 2**15, 2**15)], [2], tables).intact().all()
    for state in (0, 2**15 - 1, 2**15 + 2**31, 2**31):
        assert not decoder_of([struct.pack("<2I", 2**15, state)], [2], tables).intact().any()


# --- wrong arguments ---


@pytest.mark.parametrize(
    "frequencies",
    [[[4095, 0]], [[4097, 0]], [[5000, -904]], [[0, 0], [4096, 0]], [4096], [[]], [[4096.0]], [[16] * 256 + [0]]],
    ids=str,
)
def test_tables_that_do_not_sum_up_are_refused(frequencies: list[Any]) -> None:
    with pytest.raises(ValueError, match="frequencies: expected"):
        Tables(frequencies)


def test_what_a_decoder_and_a_device_look_up() -> None:
    tables = Tables([[0, 4000, 96], [4096, 0, 0]])
    assert len(tables) == 2
    assert tables.cumulative.tolist() == [[0, 0, 4000], [0, 4096, 4096]]
    assert tables.lookup.shape == (3, 4096)
    for slot, symbol, frequency, before in ((0, 1, 4000, 0), (3999, 1, 4000, 0), (4000, 2, 96, 4000), (4095, 2, 96, 4000)):
        entry = int(tables.lookup[1, slot])
        assert (entry & 4095, entry >> 12 & 255, (entry >> 20) + 1) == (slot - before, symbol, frequency)
    assert np.array_equal(tables.lookup[0], tables.lookup[2])
    assert np.array_equal(tables.lookup[0] & 4095, np.arange(4096))


REFUSED: dict[str, tuple[Callable[[Tables], object], str]] = {
    "no probability": (
        lambda t: encode([np.array([[0, 2]])], [np.array([[0, 0]])], t),
        "image 0: expected symbols with a probability, got 2 in table 0",
    ),
    "symbol too high": (lambda t: encode([np.array([[3]])], [np.array([[0]])], t), "symbols from 0 to 2"),
    "symbol too low": (lambda t: encode([np.array([[-1]])], [np.array([[0]])], t), "symbols from 0 to 2"),
    "table too high": (lambda t: encode([np.array([[0]])], [np.array([[1]])], t), "tables from -1 to 0"),
    "table too low": (lambda t: encode([np.array([[0]])], [np.array([[-2]])], t), "tables from -1 to 0"),
    "shapes": (lambda t: encode([np.array([[0, 0]])], [np.array([[0]])], t), "of one shape"),
    "run of too many lanes": (lambda t: decoder_of([bytes(8)], [2], t).run(np.zeros((1, 1, 3), int)), "expected tables \\(steps, 1, 2\\)"),
    "step of a missing table": (lambda t: decoder_of([bytes(8)], [2], t).step(np.full((1, 2), 1)), "expected tables from -1 to 0"),
    "end outside": (lambda t: Decoder(np.zeros(8, np.uint8), [0], [9], [2], t), "inside 8 bytes"),
    "start outside": (lambda t: Decoder(np.zeros(8, np.uint8), [-1], [8], [2], t), "inside 8 bytes"),
    "end before start": (lambda t: Decoder(np.zeros(8, np.uint8), [5], [4], [2], t), "inside 8 bytes"),
    "no lanes": (lambda t: Decoder(np.zeros(8, np.uint8), [0], [8], [0], t), "at least one lane"),
    "too many starts": (lambda t: Decoder(np.zeros(8, np.uint8), [0, 0], [8], [1], t), "for each stream"),
    "counts": (lambda t: decode_symbols(decoder_of([bytes(8)], [2], t), np.zeros(5, int), [4]), "sum to 5"),
    "too many tiles": (lambda t: classes_of(tiles=3), "for 3 tiles"),
    "no such context": (lambda t: classes_of(extra=2), "contexts below 2"),
    "no such bucket": (lambda t: classes_of(bucket=1), "contexts below 2"),
    "no such base": (lambda t: classes_of(base=1), "from 1 on are among 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(Tables([[4000, 96, 0]]))


def classes_of(*, tiles: int = 2, extra: int = 0, bucket: int = 0, base: int = 0) -> NDArray[np.uint8]:
    four = Tables([[4000, 96, 0]] * 4)
    left, first, buckets = np.zeros((1, 2), np.bool_), np.full((1, 2), extra), np.full((1, 3), bucket)
    return decode_classes(decoder_of([bytes(8)], [2], four), [tiles], left, first, base=base, buckets=buckets, contexts=2)


def test_the_right_arguments_of_classes_are_taken() -> None:
    assert classes_of().shape == (1, 2, 1)


def test_it_needs_no_torch() -> None:
    code = "import sys, rinr_loader.codecs.rans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
