"""The entropy-coded stream of a `tile` bundle: classes of the background's tiles, classes of the residuals' tiles, all symbols, escapes.

Tiles are listed row by row, the background's first, then each residual's. Within a tile, symbols stand in the order of the channels; a group
of class 0 has none. What does not fit its table follows behind the last word as int16. docs/FORMAT.md is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rinr_loader.codecs import rans
from rinr_loader.codecs.rans import PROBABILITY_BITS
from rinr_loader.codecs.tile import RESIDUAL_TILE, TILE, lattice_of
from rinr_loader.dictionary import CONTEXTS, Dictionary, Prior
from rinr_loader.errors import BundleError

NONE = CONTEXTS - 1  # the context of what has no neighbour
ESCAPED = np.dtype("<i2")
LARGEST = 32767
# A lane costs 3 bytes, 1 % of what so many symbols take. Twice the lanes would decode 1.8 times (batches of 64) or 1.3 times (256) as fast on a
# CPU (benchmarks/rans.py); bytes come first here.
SYMBOLS_A_LANE, MOST_LANES = 2048, 64
TILES_A_BYTE = 256  # at most; the emptiest picture has some 15, and without a limit a few bytes could claim work for hours

Rect = tuple[int, int, int, int]


@dataclass(frozen=True)
class Lattice:
    """Latents of the background, or of one residual.

    Args:
        symbols: What is coded (differences where the prior predicts), int64 `(T, C)`.
        classes: Of each tile and group, `(T, groups)`; where one is 0, so are the symbols of its group.
        rect: Stored pixels that it covers.
    """

    symbols: NDArray[np.int64]
    classes: NDArray[np.int64]
    rect: Rect


def write_streams(dictionary: Dictionary, pictures: Sequence[tuple[Lattice, Sequence[Lattice]]]) -> list[tuple[bytes, int]]:
    """Code the latents of pictures: the background of each, and its residuals.

    Returns:
        The stream of each picture, and the number of its lanes.
    """
    found = [_steps(dictionary, background, residuals) for background, residuals in pictures]
    streams = rans.encode([symbols for symbols, _, _ in found], [rows for _, rows, _ in found], dictionary.tables)
    return [(stream + escaped, rows.shape[1]) for stream, (_, rows, escaped) in zip(streams, found, strict=True)]


def write_stream(dictionary: Dictionary, background: Lattice, residuals: Sequence[Lattice]) -> tuple[bytes, int]:
    """`write_streams` of one picture."""
    return write_streams(dictionary, [(background, residuals)])[0]


def _steps(dictionary: Dictionary, background: Lattice, residuals: Sequence[Lattice]) -> tuple[NDArray[np.int64], NDArray[np.int64], bytes]:
    """What the coder takes for one picture: symbols and their tables, `(steps, lanes)`, and the escapes."""
    lists = [_symbols(dictionary, dictionary.background, background)]
    lists += [_symbols(dictionary, dictionary.residual, part) for part in residuals]
    values, tables, escaped = (np.concatenate(parts) for parts in zip(*lists, strict=True))
    coded = len(values) + sum(part.classes.size for part in (background, *residuals))
    lanes = 1 << max(0, min(MOST_LANES, coded // SYMBOLS_A_LANE).bit_length() - 1)
    columns = lattice_of(background.rect, TILE)[1]
    steps = [_class_steps(dictionary.background, [background], lanes, np.full(len(background.classes), NONE), TILE)]
    if residuals:
        extra = np.concatenate([context_below(dictionary.background, background.classes, columns, part.rect) for part in residuals])
        steps.append(_class_steps(dictionary.residual, residuals, lanes, extra, RESIDUAL_TILE))
    dealt = rans.deal(tables, lanes)
    steps.append((np.where(dealt < 0, 0, rans.deal(values, lanes)), dealt))
    symbols, rows = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    return symbols, rows, escaped.astype(ESCAPED).tobytes()


def read_streams(
    dictionary: Dictionary,
    data: NDArray[np.uint8],
    spans: Sequence[tuple[int, int]],
    lanes: Sequence[int],
    rects: Sequence[Sequence[Rect]],
    names: Sequence[str],
) -> list[list[NDArray[np.int32]]]:
    """Decode the latents of pictures that share a dictionary.

    Args:
        dictionary: What they name.
        data: Where the streams lie.
        spans: First byte of each stream and the one behind its last.
        lanes: Of each.
        rects: For each picture, the stored pixels of its background and of each residual.
        names: What an error calls each picture.

    Returns:
        For each picture the latents of its background `(T, C)` and of each residual `(T, 192)`, in steps, int32.

    Raises:
        BundleError: A stream is damaged.
    """
    return _decode(dictionary, data, spans, lanes, rects, names)[0]


def count_bytes(
    dictionary: Dictionary,
    data: NDArray[np.uint8],
    spans: Sequence[tuple[int, int]],
    lanes: Sequence[int],
    rects: Sequence[Sequence[Rect]],
    names: Sequence[str],
) -> list[dict[str, float]]:
    """Where the bytes of streams go; the arguments are those of `read_streams`.

    Returns:
        For each picture the ideal bytes of the classes and of the latents of each channel group, of the background and of the residuals
        (`objects`), the values behind `escapes`, and what `lanes` add. They sum to the stream's length.

    Raises:
        BundleError: A stream is damaged.
    """
    _, classes, extra, symbols = _decode(dictionary, data, spans, lanes, rects, names)
    bits = PROBABILITY_BITS - np.log2(np.maximum(dictionary.tables.frequencies, 1))
    found = []
    for i, (chosen, mine, (begin, end)) in enumerate(zip(classes, rects, spans, strict=True)):
        parts: dict[str, float] = {}
        at = escapes = 0
        for prior, kind, tile, lattices, around in (
            (dictionary.background, "background", TILE, mine[:1], np.full(len(chosen[0]), NONE)),
            (dictionary.residual, "objects", RESIDUAL_TILE, mine[1:], np.concatenate([*extra[i], np.zeros(0, np.int64)])),
        ):
            own = chosen[kind == "objects"]
            left = _has_left([lattice_of(rect, tile) for rect in lattices])
            values, rows = rans.class_steps(own, left, around, lanes[i], base=prior.first_table, buckets=prior.buckets, contexts=CONTEXTS)
            parts[f"{kind} classes"] = float(bits[rows, values][rows >= 0].sum()) / 8
            coded, tables = _coded(prior, own)
            spent = bits[tables, symbols[i][at : at + len(tables)]] / 8
            escapes += int((symbols[i][at : at + len(tables)] == 2 * dictionary.radius[tables] + 1).sum())
            at += len(tables)
            group = prior.group_of[coded % prior.tables.shape[1]]
            for g, (first, last) in enumerate(prior.bounds):
                parts[f"{kind} latents {first} to {last - 1}"] = float(spent[group == g].sum())
        parts["escapes"] = float(ESCAPED.itemsize * escapes)
        found.append({**parts, "lanes": end - begin - sum(parts.values())})
    return found


def _decode(
    dictionary: Dictionary,
    data: NDArray[np.uint8],
    spans: Sequence[tuple[int, int]],
    lanes: Sequence[int],
    rects: Sequence[Sequence[Rect]],
    names: Sequence[str],
) -> tuple[list[list[NDArray[np.int32]]], list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], list[list[NDArray[np.int64]]], list[NDArray[np.int64]]]:
    """For each picture: latents; classes of background and residuals; contexts of the residuals' first group; symbols as coded."""
    shapes = [[lattice_of(rect, RESIDUAL_TILE if i else TILE) for i, rect in enumerate(mine)] for mine in rects]
    for lattices, (begin, end), name in zip(shapes, spans, names, strict=True):
        tiles = sum(down * across for down, across in lattices)
        if tiles > TILES_A_BYTE * (end - begin):
            raise BundleError(f"{name}: expected at most {TILES_A_BYTE} tiles a byte, got {tiles} in {end - begin} bytes; fetch or convert it again")
    starts, ends = (np.array([span[i] for span in spans], np.int64) for i in range(2))
    decoder = rans.Decoder(data, starts, ends, np.array(lanes), dictionary.tables)
    backgrounds = _decode_classes(decoder, dictionary.background, [mine[:1] for mine in shapes], None)
    extra = [
        [context_below(dictionary.background, classes, mine[0][1], rect) for rect in boxes[1:]]
        for classes, mine, boxes in zip(backgrounds, shapes, rects, strict=True)
    ]
    below = _decode_classes(decoder, dictionary.residual, [mine[1:] for mine in shapes], extra)
    places, sizes, tables = [], [], []
    for classes, inside in zip(backgrounds, below, strict=True):
        for prior, chosen in ((dictionary.background, classes), (dictionary.residual, inside)):
            coded, rows = _coded(prior, chosen)
            places.append(coded)
            sizes.append((len(chosen), prior.tables.shape[1]))
            tables.append(rows)
    counts = [len(tables[2 * i]) + len(tables[2 * i + 1]) for i in range(len(rects))]
    listed = np.concatenate(tables) if tables else np.zeros(0, np.int64)
    symbols = rans.decode_symbols(decoder, listed, counts).astype(np.int64)
    radius = dictionary.radius[listed]
    escaped = symbols == 2 * radius + 1
    values = symbols - radius

    ends_of = np.cumsum(counts, dtype=np.int64)
    found = []
    position, sound = decoder.position, decoder.intact(escapes_of(escaped, ends_of, counts) * ESCAPED.itemsize)
    for i, (end, count, name) in enumerate(zip(ends_of.tolist(), counts, names, strict=True)):
        mine = slice(end - count, end)
        if not sound[i]:
            raise BundleError(f"{name}: expected a stream that decodes to its end, got a damaged one; fetch or convert it again")
        where = np.flatnonzero(escaped[mine])
        start = int(starts[i] + position[i])
        values[mine][where] = np.frombuffer(data[start : start + ESCAPED.itemsize * len(where)].tobytes(), ESCAPED)
        first, at = [], end - count
        for coded, size in zip(places[2 * i : 2 * i + 2], sizes[2 * i : 2 * i + 2], strict=True):
            latents = np.zeros(size, np.int32)
            latents.reshape(-1)[coded] = values[at : at + len(coded)]
            at += len(coded)
            first.append(latents)
        sums = first[0][:, : dictionary.predicted].reshape(*shapes[i][0], dictionary.predicted)
        sums[:, 0] = sums[:, 0].cumsum(0)
        first[0][:, : dictionary.predicted] = sums.cumsum(1).reshape(len(first[0]), dictionary.predicted)
        areas = [a * b for a, b in shapes[i][1:]]
        found.append([first[0], *np.split(first[1], np.cumsum(areas)[:-1])] if areas else [first[0]])
    listed_symbols = [symbols[end - count : end] for end, count in zip(ends_of.tolist(), counts, strict=True)]
    return found, list(zip(backgrounds, below, strict=True)), extra, listed_symbols


def escapes_of(escaped: NDArray[np.bool_], ends: NDArray[np.int64], counts: Sequence[int]) -> NDArray[np.int64]:
    """How many escapes each picture has, int64 `(N,)`.

    Args:
        escaped: Whether each symbol of all pictures is an escape, `(symbols,)`.
        ends: Where the symbols of each picture end, `(N,)`.
        counts: Symbols of each picture.
    """
    before = np.concatenate([[0], np.cumsum(escaped)])
    total: NDArray[np.int64] = before[ends] - before[ends - np.array(counts, np.int64)]
    return total


def context_below(prior: Prior, classes: NDArray[np.integer], columns: int, rect: Rect) -> NDArray[np.int64]:
    """Context for a residual's tiles: how busy the background is under the middle of each.

    Args:
        prior: Of the background.
        classes: Of its tiles, `(T, groups)`.
        columns: Tiles of a row.
        rect: Stored pixels of the residual.

    Returns:
        The mean bucket of all groups but the first, rounded, one for each tile of the residual, row by row.
    """
    chosen = classes[:, -max(1, len(prior.ends) - 1) :]
    groups = chosen.shape[1]
    buckets = prior.buckets[np.arange(len(prior.ends))[-groups:], chosen].astype(np.int64)
    busy = ((2 * buckets.sum(1) + groups) // (2 * groups)).reshape(-1, columns)
    rows, across = lattice_of(rect, RESIDUAL_TILE)
    y = np.minimum((rect[1] + RESIDUAL_TILE * np.arange(rows) + RESIDUAL_TILE // 2) // TILE, len(busy) - 1)
    x = np.minimum((rect[0] + RESIDUAL_TILE * np.arange(across) + RESIDUAL_TILE // 2) // TILE, columns - 1)
    context: NDArray[np.int64] = busy[y[:, None], x].ravel()
    return context


def _symbols(dictionary: Dictionary, prior: Prior, lattice: Lattice) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Symbols, their tables, and the values behind the escapes."""
    coded, tables = _coded(prior, lattice.classes)
    values = np.clip(lattice.symbols.reshape(-1)[coded], -LARGEST, LARGEST)
    radius = dictionary.radius[tables]
    fits = np.abs(values) <= radius
    return np.where(fits, values + radius, 2 * radius + 1), tables, values[~fits]


def _coded(prior: Prior, classes: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the latents `(T, C)`, flat, have a symbol, in order, and the table of each."""
    channels = prior.tables.shape[1]
    coded = np.flatnonzero((classes > 0)[:, prior.group_of])
    tile, channel = np.divmod(coded, channels)
    chosen = classes[tile, prior.group_of[channel]]
    return coded, prior.tables[chosen, channel]


def _class_steps(
    prior: Prior, lattices: Sequence[Lattice], lanes: int, extra: NDArray[np.int64], tile: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    classes = np.concatenate([part.classes for part in lattices])
    left = _has_left([lattice_of(part.rect, tile) for part in lattices])
    return rans.class_steps(classes, left, extra, lanes, base=prior.first_table, buckets=prior.buckets, contexts=CONTEXTS)


def _has_left(shapes: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    return np.concatenate([np.tile(np.arange(columns) > 0, rows) for rows, columns in shapes]) if shapes else np.zeros(0, np.bool_)


def _decode_classes(
    decoder: rans.Decoder, prior: Prior, shapes: Sequence[Sequence[tuple[int, int]]], extra: Sequence[Sequence[NDArray[np.int64]]] | None
) -> list[NDArray[np.uint8]]:
    counts = [sum(rows * columns for rows, columns in mine) for mine in shapes]
    left, context = np.zeros((len(shapes), max(counts, default=0)), np.bool_), np.full((len(shapes), max(counts, default=0)), NONE)
    for i, (mine, count) in enumerate(zip(shapes, counts, strict=True)):
        left[i, :count] = _has_left(mine)
        if extra is not None and count:
            context[i, :count] = np.concatenate(extra[i])
    found = rans.decode_classes(decoder, counts, left, context, base=prior.first_table, buckets=prior.buckets, contexts=CONTEXTS)
    return [classes[:count] for classes, count in zip(found, counts, strict=True)]
