"""Streams of the entropy coder as the tests need them: what is in them, and how all of it is decoded again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rinr_loader.codecs.rans import Decoder, Tables, class_steps, deal, decode_classes, decode_symbols, encode

GROUPS, BUCKETS, CLASSES = 3, 4, 9
CONTEXTS = BUCKETS + 1


def random_tables(rng: np.random.Generator, rows: int, symbols: int, *, zeros: bool = True) -> NDArray[np.int64]:
    """Frequencies from flat to certain; some symbols have none."""
    counts = np.zeros((rows, symbols), np.int64)
    for row in counts:
        share = rng.dirichlet(np.full(symbols, 10.0 ** rng.uniform(-2, 1)))
        row[:] = np.floor(share * (4096 - symbols)) + (0 if zeros else 1)
        row[share.argmax()] += 4096 - row.sum()
    return counts


def draw(rng: np.random.Generator, frequencies: NDArray[np.int64], tables: NDArray[np.int64]) -> NDArray[np.int64]:
    """Symbols as often as their tables say; anything where there is no table."""
    slots = rng.integers(0, 4096, tables.shape)
    return np.asarray((frequencies.cumsum(1)[tables] <= slots[..., None]).sum(-1))


def arena_of(streams: list[bytes], guard: int = 0xAA) -> tuple[NDArray[np.uint8], list[int], list[int]]:
    """Streams at odd places of an arena, with bytes around them that are nobody's; where each starts and ends."""
    arena, starts = bytes([guard] * 7), []
    for stream in streams:
        starts.append(len(arena))
        arena += stream + bytes([guard] * 3)
    return np.frombuffer(arena, np.uint8), starts, [start + len(stream) for start, stream in zip(starts, streams, strict=True)]


def decoder_of(streams: list[bytes], lanes: list[int], tables: Tables, guard: int = 0xAA) -> Decoder:
    """A decoder of streams in such an arena."""
    return Decoder(*arena_of(streams, guard), lanes, tables)


def padded(parts: list[NDArray[np.int64]], fill: int = -1) -> NDArray[np.int64]:
    """`(steps, L)` of each image as `(most steps, N, most lanes)`."""
    grid = np.full((max(len(part) for part in parts), len(parts), max(part.shape[1] for part in parts)), fill)
    for n, part in enumerate(parts):
        grid[: len(part), n, : part.shape[1]] = part
    return grid


@dataclass
class Coded:
    """Images coded in three parts, as tiles are: two rounds of classes, then symbols."""

    lanes: list[int]
    frequencies: NDArray[np.int64]
    buckets: list[NDArray[np.int64]]
    classes: list[list[NDArray[np.int64]]]  # of each round, of each image
    has_left: list[NDArray[np.bool_]]  # of each round, (N, most tiles)
    extra: list[NDArray[np.int64]]
    symbol_tables: list[NDArray[np.int64]]
    symbols: list[NDArray[np.int64]]
    streams: list[bytes]

    @property
    def bases(self) -> tuple[int, int]:
        return 5, 5 + GROUPS * CONTEXTS**2

    def counts(self, which: int) -> list[int]:
        return [len(classes) for classes in self.classes[which]]


def coded(seed: int, images: list[tuple[int, int, int, int]]) -> Coded:
    """Code images of (lanes, tiles of the first round, tiles of the second, symbols)."""
    rng = np.random.default_rng(seed)
    frequencies = np.zeros((5 + 2 * GROUPS * CONTEXTS**2, 40), np.int64)
    frequencies[:5] = random_tables(rng, 5, 40)
    frequencies[5:, :CLASSES] = random_tables(rng, len(frequencies) - 5, CLASSES, zeros=False)
    lanes = [image[0] for image in images]
    result = Coded(lanes, frequencies, [], [], [], [], [], [], [])
    steps: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = [[] for _ in images]
    for which in (0, 1):
        tiles = [image[1 + which] for image in images]
        buckets = rng.integers(0, BUCKETS, (GROUPS, CLASSES))
        has_left, extra = rng.random((len(images), max(tiles))) < 0.8, rng.integers(0, CONTEXTS, (len(images), max(tiles)))
        classes = [rng.integers(0, CLASSES, (count, GROUPS)) for count in tiles]
        result.buckets.append(buckets)
        result.classes.append(classes)
        result.has_left.append(has_left)
        result.extra.append(extra)
        for n, mine in enumerate(classes):
            left, first = has_left[n, : len(mine)], extra[n, : len(mine)]
            steps[n].append(class_steps(mine, left, first, lanes[n], base=result.bases[which], buckets=buckets, contexts=CONTEXTS))
    for n, (_, _, _, count) in enumerate(images):
        tables = rng.integers(0, 5, count)
        symbols = draw(rng, frequencies, tables)
        result.symbol_tables.append(tables)
        result.symbols.append(symbols)
        steps[n].append((deal(symbols, lanes[n]), deal(tables, lanes[n])))
    values, tables_of = ([np.concatenate([part[i] for part in mine]) for mine in steps] for i in (0, 1))
    result.streams = encode(values, tables_of, Tables(frequencies))
    return result


def decode_all(data: Coded, decoder: Decoder) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Both rounds of classes, then the symbols."""
    classes = [
        decode_classes(decoder, data.counts(i), data.has_left[i], data.extra[i], base=data.bases[i], buckets=data.buckets[i], contexts=CONTEXTS)
        for i in (0, 1)
    ]
    return classes, decode_symbols(decoder, np.concatenate(data.symbol_tables), [len(tables) for tables in data.symbol_tables])


@dataclass
class Found:
    """All that was decoded from N streams of the same image, and whether they are intact."""

    values: NDArray[np.int64]  # (N, everything)
    intact: NDArray[np.bool_]


def versions(data: Coded, count: int) -> Coded:
    """The only image in `data` many times over."""
    return replace(
        data,
        lanes=data.lanes * count,
        classes=[mine * count for mine in data.classes],
        has_left=[mine.repeat(count, 0) for mine in data.has_left],
        extra=[mine.repeat(count, 0) for mine in data.extra],
        symbol_tables=data.symbol_tables * count,
        symbols=data.symbols * count,
        streams=data.streams * count,
    )


def decode_versions(data: Coded, streams: list[bytes], guard: int = 0xAA) -> Found:
    """Decode many streams as if each were that of the only image in `data`."""
    many = versions(data, len(streams))
    decoder = decoder_of(streams, many.lanes, Tables(data.frequencies), guard)
    classes, symbols = decode_all(many, decoder)
    values = [mine.reshape(len(streams), -1).astype(np.int64) for mine in (*classes, symbols)]
    return Found(np.concatenate([*values, decoder.position[:, None]], 1), decoder.intact())
