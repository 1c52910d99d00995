"""A slow reader of the family `tile`, written from docs/FORMAT.md alone: Python's integers, float64, one tile after the other."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rect = Sequence[int]
Columns = Mapping[str, NDArray[Any]]
NONE = 6  # the context of what has no neighbour


class States:
    """The lanes of one stream."""

    def __init__(self, stream: bytes, lanes: int, tables: Sequence[Sequence[int]]) -> None:
        self.stream, self.tables, self.at = stream, tables, 4 * lanes
        self.states = list(struct.unpack_from(f"<{lanes}I", stream))

    def step(self, tables: Sequence[int | None]) -> list[int]:
        """One symbol of each lane that has a table."""
        symbols = []
        for lane, table in enumerate(tables):
            symbol = before = 0
            if table is not None:
                slot = self.states[lane] % 4096
                while before + self.tables[table][symbol] <= slot:
                    before += self.tables[table][symbol]
                    symbol += 1
                self.states[lane] = self.tables[table][symbol] * (self.states[lane] // 4096) + slot - before
            symbols.append(symbol)
        for lane, state in enumerate(self.states):
            if state < 2**15:
                (word,) = struct.unpack_from("<H", self.stream, self.at)
                self.states[lane] = state * 2**16 + word
                self.at += 2
        return symbols


def lattice(rect: Rect, tile: int) -> tuple[int, int]:
    return math.ceil((rect[3] - rect[1]) / tile), math.ceil((rect[2] - rect[0]) / tile)


def read_stream(columns: Columns, stream: bytes, lanes: int, rects: Sequence[Rect]) -> list[NDArray[np.int64]]:
    """Latents of the background and of each residual, `(tiles, channels)`; asserts that the stream ends where it should."""
    symbol_tables = columns["symbols"].tolist()
    tables = symbol_tables + columns["background.classes"].tolist() + columns["residual.classes"].tolist()
    states = States(stream, lanes, tables)
    shapes = [lattice(rect, 8 if i else 16) for i, rect in enumerate(rects)]

    def classes_of(kind: str, base: int, has_left: list[bool], extra: list[int]) -> list[list[int]]:
        buckets = columns[f"{kind}.buckets"].tolist()
        groups, tiles = len(buckets), len(extra)
        share = math.ceil(tiles / lanes)
        found: list[list[int]] = [[0] * groups for _ in range(tiles)]
        for i in range(share):
            for g in range(groups):
                mine = [lane * share + i for lane in range(lanes)]
                wanted: list[int | None] = []
                for t in mine:
                    if t >= tiles:
                        wanted.append(None)
                        continue
                    a = buckets[g][found[t - 1][g]] if i > 0 and has_left[t] else NONE
                    b = extra[t] if g == 0 else buckets[g - 1][found[t][g - 1]]
                    wanted.append(base + (g * 7 + a) * 7 + b)
                for t, symbol in zip(mine, states.step(wanted), strict=True):
                    if t < tiles:
                        found[t][g] = symbol
        return found

    rows, across = shapes[0]
    base = len(symbol_tables)
    background = classes_of("background", base, [t % across > 0 for t in range(rows * across)], [NONE] * (rows * across))
    has_left, extra = [], []
    buckets = columns["background.buckets"].tolist()
    for (x0, y0, _, _), (down, right) in zip(rects[1:], shapes[1:], strict=True):
        for t in range(down * right):
            has_left.append(t % right > 0)
            row = min((y0 + 8 * (t // right) + 4) // 16, rows - 1)
            column = min((x0 + 8 * (t % right) + 4) // 16, across - 1)
            known = [buckets[g][k] for g, k in enumerate(background[row * across + column])]
            known = known[1:] or known
            extra.append(math.floor(sum(known) / len(known) + 0.5))
    below = classes_of("residual", base + len(columns["background.classes"]), has_left, extra)

    places: list[tuple[int, int, int, int]] = []  # lattice, tile, channel, table
    first = 0
    for n, (down, right) in enumerate(shapes):
        kind, mine = ("residual", below[first : first + down * right]) if n else ("background", background)
        first += down * right if n else 0
        ends = columns[f"{kind}.ends"].tolist()
        for t, chosen in enumerate(mine):
            for g, k in enumerate(chosen):
                if k:
                    places += [(n, t, c, int(columns[f"{kind}.tables"][k][c])) for c in range([0, *ends][g], ends[g])]
    symbols: list[int] = []
    for i in range(0, len(places), lanes):
        listed: list[int | None] = [place[3] for place in places[i : i + lanes]]
        symbols += states.step(listed + [None] * (lanes - len(listed)))
    assert states.states == [2**15] * lanes

    channels = [len(columns["residual.basis"]) if n else len(columns["basis"]) for n in range(len(shapes))]
    found = [np.zeros((down * right, count), np.int64) for (down, right), count in zip(shapes, channels, strict=True)]
    at = states.at
    for (n, t, c, table), symbol in zip(places, symbols, strict=False):
        radius = int(columns["radius"][table])
        value = symbol - radius
        if symbol == 2 * radius + 1:
            (value,) = struct.unpack_from("<h", stream, at)
            at += 2
        found[n][t, c] = value
    assert at == len(stream)
    for c in range(int(columns["predicted"][0])):
        for t in range(rows * across):
            if t % across:
                found[0][t, c] += found[0][t - 1, c]
            elif t:
                found[0][t, c] += found[0][t - across, c]
    return found


def linear(columns: Columns, latents: NDArray[np.int64], step: float, rows: int, across: int) -> NDArray[np.float64]:
    """Tiles added up and folded: grey levels around 0, `(3, 16 rows, 16 across)`."""
    canvas = np.zeros((3, 16 * rows + 8, 16 * across + 8))
    basis = columns["basis"].astype(np.float64)
    for t, mine in enumerate(latents):
        y, x = 16 * (t // across), 16 * (t % across)
        canvas[:, y : y + 24, x : x + 24] += step * np.tensordot(mine.astype(np.float64), basis, 1)
    for axis in (1, 2):
        turned = np.moveaxis(canvas, axis, 0)
        for i in range(4):
            turned[4 + i] += turned[3 - i]
            turned[-5 - i] += turned[-4 + i]
        canvas = np.moveaxis(turned[4:-4], 0, axis)
    return np.ascontiguousarray(canvas)


def filtered(columns: Columns, image: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """The filter of `tile-2`."""
    _, height, width = image.shape
    hidden = (image / 64).reshape(3, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3).reshape(12, height // 2, width // 2)
    for i in range(3):
        weight = columns[f"filter.{i}.weight"].astype(np.float64)
        padded = np.pad(hidden, ((0, 0), (1, 1), (1, 1)))
        total = np.zeros((len(weight), *hidden.shape[1:])) + columns[f"filter.{i}.bias"].astype(np.float64)[:, None, None]
        for y in range(3):
            for x in range(3):
                total += np.tensordot(weight[:, :, y, x], padded[:, y : y + hidden.shape[1], x : x + hidden.shape[2]], 1)
        if i < 2:
            total += math.log(step / 70) * columns[f"filter.{i}.step"].astype(np.float64)[:, None, None]
            total = np.where(total > 0, total, 0.1 * total)
        hidden = total
    change = hidden.reshape(3, 2, 2, height // 2, width // 2).transpose(0, 3, 1, 4, 2).reshape(3, height, width)
    return np.asarray(image + 64 * change)


def ramp(rect: Rect, feather: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Weight of a residual at the centres of its pixels."""
    x0, y0, x1, y1 = rect
    weight = np.ones((y1 - y0, x1 - x0))
    for i in range(y1 - y0):
        for j in range(x1 - x0):
            distances = [(j + 0.5, x0 > 0), (i + 0.5, y0 > 0), (x1 - x0 - j - 0.5, x1 < size[1]), (y1 - y0 - i - 0.5, y1 < size[0])]
            weight[i, j] = min([1.0] + [min(1.0, d / feather) for d, inner in distances if inner and feather])
    return weight


def change_of(columns: Columns, latents: NDArray[np.int64], step: float, rect: Rect) -> NDArray[np.float64]:
    """What a residual adds, not weighted: `(3, y1 - y0, x1 - x0)`."""
    rows, across = lattice(rect, 8)
    whole = np.zeros((3, 8 * rows, 8 * across))
    for t, mine in enumerate(latents):
        y, x = 8 * (t // across), 8 * (t % across)
        whole[:, y : y + 8, x : x + 8] = step * np.tensordot(mine.astype(np.float64), columns["residual.basis"].astype(np.float64), 1)
    return whole[:, : rect[3] - rect[1], : rect[2] - rect[0]]


def read_picture(
    columns: Columns,
    stream: bytes,
    *,
    layers: int,
    lanes: int,
    rects: Sequence[Rect],
    steps: Sequence[float],
    feathers: Sequence[int],
) -> NDArray[np.float64]:
    """The stored picture as grey levels, `(3, H, W)`, not clamped."""
    background, *residuals = read_stream(columns, stream, lanes, rects)
    size = (rects[0][3], rects[0][2])
    image = linear(columns, background, steps[0], *lattice(rects[0], 16))
    if layers == 2:
        image = filtered(columns, image, steps[0])
    image = image[:, : size[0], : size[1]].copy()
    for latents, rect, step, feather in zip(residuals, rects[1:], steps[1:], feathers[1:], strict=True):
        x0, y0, x1, y1 = rect
        image[:, y0:y1, x0:x1] += change_of(columns, latents, step, rect) * ramp(rect, feather, size)
    return image + 127.5
