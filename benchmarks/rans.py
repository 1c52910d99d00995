"""What lanes of the entropy coder cost in bytes, and what they gain in time.

    python benchmarks/rans.py [--device cuda]

Streams with the statistics of 640x360 pictures: 920 tiles with 4 classes each, about 25,000 symbols that are mostly zero, about 4,500
bytes. The bytes of a stream are set against the ideal code length with one lane: lanes cost their states, and the context on the left
where a lane starts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import write_result
from numpy.typing import NDArray

from rinr_loader.codecs.rans import TOTAL, Decoder, Tables, class_steps, deal, decode_classes, decode_symbols, encode

LANES, BATCHES = (4, 8, 16, 32, 64), (64, 256)
ROWS, COLUMNS = 23, 40
GROUPS = (12, 36, 64, 144)  # channels
SILENT = (0.08, 0.75, 0.92, 0.988)  # share of the tiles whose class says that all of a group's channels are zero
CLASSES, BUCKETS, SCALES = 24, 6, 64
CONTEXTS = BUCKETS + 1
HAS_LEFT = np.arange(ROWS * COLUMNS) % COLUMNS > 0
EXTRA = np.full(ROWS * COLUMNS, CONTEXTS - 1)
Array = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """Integers of N pictures and the probabilities that fit them."""

    classes: Array  # (N, tiles, groups)
    symbol_tables: list[Array]
    symbols: list[Array]
    tables: Tables
    buckets: Array  # (groups, classes)

    def steps(self, n: int, lanes: int) -> tuple[Array, Array]:
        """Symbols and tables of one picture, in the order of `encode`."""
        listed = class_steps(self.classes[n], HAS_LEFT, EXTRA, lanes, base=SCALES, buckets=self.buckets, contexts=CONTEXTS)
        dealt = deal(self.symbols[n], lanes), deal(self.symbol_tables[n], lanes)
        return np.concatenate([listed[0], dealt[0]]), np.concatenate([listed[1], dealt[1]])


def frequencies(weights: NDArray[np.float64]) -> Array:
    """Integers whose rows sum to 4096, at least 1 where there is any weight."""
    possible = weights > 0
    counts = possible + np.floor(weights / weights.sum(1, keepdims=True) * (TOTAL - possible.sum(1, keepdims=True))).astype(np.int64)
    counts[np.arange(len(counts)), counts.argmax(1)] += TOTAL - counts.sum(1)
    return np.asarray(counts, np.int64)


def laplacian(mean: float) -> NDArray[np.float64]:
    """Weights of symbols 0, -1, 1, -2, 2, ... with about this mean magnitude, 256 wide, cut at nine times the mean."""
    ratio = (np.sqrt(1 + mean**2) - 1) / mean
    magnitude = (np.arange(256) + 1) // 2
    weights: NDArray[np.float64] = np.where(magnitude <= max(1, 9 * mean), ratio**magnitude, 0)
    return weights


def pictures(count: int, rng: np.random.Generator) -> Pictures:
    """Draw pictures: busy and quiet regions, classes that follow them, symbols that follow the classes."""
    coarse = rng.normal(size=(count, -(-ROWS // 5), -(-COLUMNS // 5))).repeat(5, 1).repeat(5, 2)[:, :ROWS, :COLUMNS]
    busy = 1.5 * coarse + 0.5 * rng.normal(size=(count, 1, 1)) + 0.4 * rng.normal(size=(count, ROWS, COLUMNS))
    classes = np.zeros((count, ROWS * COLUMNS, len(GROUPS)), np.int64)
    buckets = np.zeros((len(GROUPS), CLASSES), np.int64)
    for g, silent in enumerate(SILENT):
        level = (busy + 0.4 * rng.normal(size=busy.shape)).reshape(-1)
        rank = level.argsort().argsort() / level.size
        classes[:, :, g] = np.where(rank < silent, 0, 1 + (rank - silent) / (1 - silent) * (CLASSES - 1)).reshape(count, -1)
        shares = np.bincount(classes[:, :, g].reshape(-1), minlength=CLASSES) / level.size
        buckets[g] = np.minimum((shares.cumsum() - shares / 2) * BUCKETS, BUCKETS - 1)
    means = np.geomspace(0.005, 60, SCALES)
    grades = np.geomspace(0.04, 1.3, CLASSES)
    nearest = [np.abs(np.log(grades[:, None] * np.linspace(1.6, 0.4, c) / means[:, None, None])).argmin(0) for c in GROUPS]  # [K, c] each
    rows = frequencies(np.stack([laplacian(mean) for mean in means]))
    symbol_tables = [np.concatenate([nearest[g][k] for tile in picture for g, k in enumerate(tile) if k]) for picture in classes]
    symbols = [(rows.cumsum(1)[mine] <= rng.integers(0, TOTAL, (len(mine), 1))).sum(1) for mine in symbol_tables]

    seen = np.full((len(GROUPS) * CONTEXTS**2, CLASSES), 0.02)
    for mine in classes:
        for lanes in (1, 16):  # the start of a lane is seen too
            listed = class_steps(mine, HAS_LEFT, EXTRA, lanes, base=0, buckets=buckets, contexts=CONTEXTS)
            active = listed[1] >= 0
            np.add.at(seen, (listed[1][active], listed[0][active]), 1)
    all_rows = np.concatenate([rows, np.pad(frequencies(seen), ((0, 0), (0, 256 - CLASSES)))])
    return Pictures(classes, symbol_tables, symbols, Tables(all_rows), buckets)


def ideal_bytes(data: Pictures, lanes: int) -> float:
    """Mean code length of a picture."""
    bits = 0.0
    for n in range(len(data.symbols)):
        symbols, tables = data.steps(n, lanes)
        active = tables >= 0
        bits += float((np.log2(TOTAL) - np.log2(data.tables.frequencies[tables[active], symbols[active]])).sum())
    return bits / 8 / len(data.symbols)


def on_cpu(data: Pictures, streams: list[bytes], lanes: int) -> Callable[[], bool]:
    """A function that decodes everything with numpy and tells whether it is right."""
    count = len(streams)
    arena, ends = np.frombuffer(b"".join(streams), np.uint8), np.cumsum([len(stream) for stream in streams])
    starts = ends - [len(stream) for stream in streams]
    tables, counts = np.concatenate(data.symbol_tables[:count]), [len(mine) for mine in data.symbols[:count]]
    expected = np.concatenate(data.symbols[:count])
    left, extra = np.tile(HAS_LEFT, (count, 1)), np.tile(EXTRA, (count, 1))

    def decode() -> bool:
        decoder = Decoder(arena, starts, ends, [lanes] * count, data.tables)
        decode_classes(decoder, [ROWS * COLUMNS] * count, left, extra, base=SCALES, buckets=data.buckets, contexts=CONTEXTS)
        symbols = decode_symbols(decoder, tables, counts)
        return bool(decoder.intact().all() and (symbols == expected).all())

    return decode


def on_gpu(data: Pictures, streams: list[bytes], lanes: int, device: str) -> Callable[[], bool]:
    """The same with the kernels; everything lies on the GPU beforehand."""
    from rinr_loader.kernels import rans as kernels

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(device, dtype)

    count, tiles = len(streams), ROWS * COLUMNS
    ends = np.cumsum([len(stream) for stream in streams])
    arena = tensor(np.frombuffer(b"".join(streams), np.uint8), torch.uint8)
    first, last = (tensor(values, torch.int64) for values in (ends - [len(stream) for stream in streams], ends))
    lookup, each = kernels.upload(data.tables, device), tensor([lanes] * count, torch.int32)
    tables = tensor(np.concatenate(data.symbol_tables[:count]), torch.int16)
    counts = tensor([len(mine) for mine in data.symbols[:count]], torch.int64)
    expected = tensor(np.concatenate(data.symbols[:count]), torch.uint8)
    left, extra = tensor(np.tile(HAS_LEFT, (count, 1)), torch.bool), tensor(np.tile(EXTRA, (count, 1)), torch.uint8)
    buckets, numbers = tensor(data.buckets, torch.uint8), tensor([tiles] * count, torch.int32)

    def decode() -> bool:
        decoder = kernels.Decoder(arena, first, last, each, width=lanes, lookup=lookup)
        kernels.decode_classes(decoder, numbers, left, extra, base=SCALES, buckets=buckets, contexts=CONTEXTS)
        symbols = kernels.decode_symbols(decoder, tables, counts)
        return bool((decoder.intact().all() & (symbols == expected).all()).item())  # .item() waits for the GPU

    return decode


def seconds(work: Callable[[], bool], repeat: int) -> float:
    """The shortest of some runs, after one that warms up."""
    best = float("inf")
    for i in range(repeat + 1):
        start = time.perf_counter()
        right = work()
        if i:
            best = min(best, time.perf_counter() - start)
        if not right:
            raise SystemExit("what was decoded is not what was encoded")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    data = pictures(max(BATCHES), np.random.default_rng(0))
    per_picture = float(np.mean([len(mine) for mine in data.symbols]))
    zeros = float(np.mean([(mine == 0).mean() for mine in data.symbols]))
    ideal = ideal_bytes(data, 1)
    total = per_picture + ROWS * COLUMNS * len(GROUPS)
    print(f"{per_picture:.0f} symbols a picture, {100 * zeros:.0f} % zeros, {total - per_picture:.0f} classes, {ideal:.1f} bytes ideally")
    results = []
    for lanes in LANES:
        steps = [data.steps(n, lanes) for n in range(len(data.symbols))]
        start = time.perf_counter()
        streams = encode([symbols for symbols, _ in steps], [tables for _, tables in steps], data.tables)
        encoding = time.perf_counter() - start
        size, contexts = float(np.mean([len(stream) for stream in streams])), ideal_bytes(data, lanes) - ideal
        row: dict[str, Any] = {
            "lanes": lanes,
            "bytes": round(size, 1),
            "overhead_percent": round(100 * (size / ideal - 1), 2),
            "bytes_of_states": round(size - ideal - contexts, 1),
            "bytes_of_contexts": round(contexts, 1),
            "encode_ms_per_image": round(1e3 * encoding / len(streams), 2),
        }
        for batch in BATCHES:
            mine = streams[:batch]
            decode = on_cpu(data, mine, lanes) if arguments.device == "cpu" else on_gpu(data, mine, lanes, arguments.device)
            took = seconds(decode, arguments.repeat)
            row[f"batch_{batch}"] = {"ms_per_image": round(1e3 * took / batch, 3), "ns_per_symbol": round(1e9 * took / batch / total, 2)}
        print(row)
        results.append(row)
    about = {"tiles": ROWS * COLUMNS, "classes": round(total - per_picture), "symbols": round(per_picture), "zeros": round(zeros, 3)}
    write_result("rans", {**about, "ideal_bytes": round(ideal, 1), "rows": results}, arguments.device)


if __name__ == "__main__":
    main()
