"""Interleaved rANS: the entropy coder of the family `tile`, in numpy, vectorised over images and lanes.

Source: Duda, "Asymmetric numeral systems" (2013); Giesen, "Interleaved entropy coders" (2014). An image is coded by L lanes, each with
a state in [2^15, 2^31), that share one stream: L states (uint32), then words (uint16), all little-endian. A step decodes one symbol in
every active lane; then the lanes whose state fell below 2^15 read one word each, in the order of the lanes.

Everything is integers, so every machine decodes the same symbols. `rinr_loader.kernels.rans` has the same for a GPU; no loader uses it yet.
Any bytes decode to some symbols in a number of steps that the caller fixes: what is read past the end of a stream is 0, and
`Decoder.intact` tells whether the stream was whole. An encoder starts every lane at 2^15 and works backwards; a decoder that ends there,
with every word read, has seen what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
LOW = 1 << 15  # the smallest state; an encoder starts and a decoder ends here
STATE_BYTES, WORD_BYTES = 4, 2
MAX_SYMBOLS = 256

# How an entry of `Tables.lookup` is packed: 12 bits slot - cumulative, 8 bits symbol, 12 bits frequency - 1.
SYMBOL_SHIFT, FREQUENCY_SHIFT = 12, 20
# A step is a few dozen calls on small arrays: a ufunc takes an array without axes in half the time that it needs for an int.
_SLOTS, _BITS, _FREQUENCY, _ONE, _LOW = (np.array(value, np.uint32) for value in (TOTAL - 1, PROBABILITY_BITS, FREQUENCY_SHIFT, 1, LOW))
_RUN = 64  # steps whose table rows `Decoder.run` lays out at a time


class Tables:
    """Integer probabilities.

    Args:
        frequencies: How many of 4096 slots each symbol has, integers `(T, A)` with A <= 256; rows sum to 4096. What has none cannot be coded.

    Attributes:
        frequencies: As given, uint16.
        cumulative: Slots before each symbol, uint16 `(T, A)`.
        lookup: What a slot means, uint32 `(T + 1, 4096)`, packed as the constants above say. Row 0 changes no state: it is for lanes without
            a symbol, so table t is row t + 1.

    Raises:
        ValueError: A row does not sum to 4096, or the shape is another.
    """

    def __init__(self, frequencies: ArrayLike) -> None:
        counts = np.asarray(frequencies)
        if counts.ndim != 2 or counts.dtype.kind not in "iu" or not 0 < counts.shape[1] <= MAX_SYMBOLS:
            raise ValueError(f"frequencies: expected integers (T, A) with A from 1 to {MAX_SYMBOLS}, got {counts.dtype} {counts.shape}")
        counts = counts.astype(np.int64)
        wrong = np.flatnonzero((counts.sum(1) != TOTAL) | (counts < 0).any(1))
        if len(wrong):
            raise ValueError(f"frequencies: expected rows that sum to {TOTAL}, got {counts[wrong[0]].sum()} in row {wrong[0]}")
        rows, symbols = counts.shape
        before = counts.cumsum(1) - counts
        lookup = np.empty((rows + 1, TOTAL), np.uint32)
        lookup[0] = (TOTAL - 1) << FREQUENCY_SHIFT | np.arange(TOTAL)
        entry = (counts - 1) << FREQUENCY_SHIFT | np.arange(symbols) << SYMBOL_SHIFT  # [T, A]
        entry -= before + np.arange(rows)[:, None] * TOTAL  # what is added to it is slot - cumulative
        lookup[1:] = (np.repeat(entry.ravel(), counts.ravel()) + np.arange(rows * TOTAL)).reshape(rows, TOTAL)
        self.frequencies: NDArray[np.uint16] = counts.astype(np.uint16)
        self.cumulative: NDArray[np.uint16] = before.astype(np.uint16)
        self.lookup: NDArray[np.uint32] = lookup

    def __len__(self) -> int:
        return len(self.frequencies)


def encode(symbols: Sequence[NDArray[Any]], tables: Sequence[NDArray[Any]], probabilities: Tables) -> list[bytes]:
    """Code a batch of images.

    Args:
        symbols: For each image what each lane codes in each step, integers `(steps, L)`; steps and lanes may differ between images.
        tables: The table of each symbol, shaped alike; -1 where a lane has no symbol.
        probabilities: The tables.

    Returns:
        A stream for each image: 4 bytes a lane, then the words.

    Raises:
        ValueError: A symbol has no probability in its table, or a table does not exist.
    """
    if not symbols:
        return []
    steps, lanes = max(len(part) for part in tables), max(part.shape[1] for part in tables)
    shape = (steps, len(tables), lanes)
    # Images end in steps without symbols, which change nothing: frequency 4096, cumulative 0.
    frequency, cumulative = np.full(shape, TOTAL, np.uint32), np.zeros(shape, np.uint32)
    for n, (values, rows) in enumerate(zip(symbols, tables, strict=True)):
        where = (slice(len(rows)), n, slice(rows.shape[1]))
        frequency[where], cumulative[where] = _intervals(np.asarray(values), np.asarray(rows), probabilities, n)
    frequency, cumulative = frequency.reshape(steps, shape[1] * lanes), cumulative.reshape(steps, shape[1] * lanes)
    word, written = np.zeros(frequency.shape, "<u2"), np.zeros(frequency.shape, np.bool_)
    state = np.full(frequency.shape[1], LOW, np.uint32)
    for i in range(steps - 1, -1, -1):
        full = (state >= frequency[i] << 19).nonzero()[0]  # 2^31 / 4096 = 2^19: more would not fit after this symbol
        word[i, full] = state[full] & 0xFFFF
        written[i, full] = True
        state[full] >>= 16
        quotient, remainder = np.divmod(state, frequency[i])
        state = (quotient << PROBABILITY_BITS) + remainder + cumulative[i]
    word, written, state = word.reshape(shape), written.reshape(shape), state.reshape(shape[1:])
    streams = []
    for n, rows in enumerate(tables):
        states = state[n, : rows.shape[1]].astype("<u4")
        streams.append(states.tobytes() + word[:, n][written[:, n]].tobytes())
    return streams


def _intervals(symbols: NDArray[Any], tables: NDArray[Any], probabilities: Tables, image: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Frequency and cumulative sum of each symbol of one image; 4096 and 0 where there is none."""
    if symbols.shape != tables.shape or tables.ndim != 2:
        raise ValueError(f"image {image}: expected symbols and tables of one shape (steps, L), got {symbols.shape} and {tables.shape}")
    rows, columns = probabilities.frequencies.shape
    active = tables >= 0
    symbols = np.where(active, symbols, 0)
    if tables.size and (tables.min() < -1 or tables.max() >= rows or symbols.min() < 0 or symbols.max() >= columns):
        raise ValueError(
            f"image {image}: expected tables from -1 to {rows - 1} and symbols from 0 to {columns - 1}, "
            f"got {tables.min()} to {tables.max()} and {symbols.min()} to {symbols.max()}"
        )
    frequency = np.where(active, probabilities.frequencies[tables, symbols], TOTAL)
    if not frequency.all():
        step, lane = np.argwhere(frequency == 0)[0]
        raise ValueError(f"image {image}: expected symbols with a probability, got {symbols[step, lane]} in table {tables[step, lane]}")
    return frequency, np.where(active, probabilities.cumulative[tables, symbols], 0)


class Decoder:
    """Decode a batch of streams, one step of all lanes at a time.

    Args:
        data: What the streams lie in, uint8, one axis.
        starts, ends: First byte of each stream, and the one behind its last, `(N,)`.
        lanes: Lanes of each stream, at least 1, `(N,)`. Fewer than the most are filled up with lanes that never decode.
        tables: Probabilities.

    Attributes:
        lanes: int64 `(N,)`.
        tables: As given.

    Raises:
        ValueError: A stream does not lie in `data`, or has no lane.

    Example:
        >>> tables = Tables([[4000, 96]])
        >>> [stream] = encode([np.array([[0, 1]])], [np.array([[0, 0]])], tables)
        >>> decoder = Decoder(np.frombuffer(stream, np.uint8), [0], [len(stream)], [2], tables)
        >>> decoder.step(np.zeros((1, 2), np.int64)).tolist(), decoder.intact().tolist()
        ([[0, 1]], [True])
    """

    def __init__(self, data: NDArray[np.uint8], starts: ArrayLike, ends: ArrayLike, lanes: ArrayLike, tables: Tables) -> None:
        first, last, self.lanes = (np.asarray(values, np.int64).reshape(-1) for values in (starts, ends, lanes))
        if not len(first) == len(last) == len(self.lanes):
            raise ValueError(f"expected a start, an end and a number of lanes for each stream, got {len(first)}, {len(last)} and {len(self.lanes)}")
        if not ((first >= 0) & (first <= last) & (last <= len(data)) & (self.lanes > 0)).all():
            raise ValueError(f"expected streams inside {len(data)} bytes with at least one lane each, got {first} to {last} and {self.lanes}")
        self.tables = tables
        self.width = int(self.lanes.max(initial=1))
        self._size = last - first

        # Words of all streams, aligned, each followed by zeros: a step reads at most one word a lane, so a stream that is spent
        # stays one word behind its end (which `intact` sees) and a step from there still reads zeros of its own.
        count = np.maximum(self._size - STATE_BYTES * self.lanes, 0) // WORD_BYTES
        self._base = np.concatenate([[0], (count + self.width + 1).cumsum()])[:-1].astype(np.int64)
        words = np.zeros(int((count + self.width + 1).sum()), np.uint16)
        states = np.full((len(first), self.width), LOW, np.uint32)
        for n, (a, b, start, length, mine) in enumerate(zip(*(v.tolist() for v in (first, last, self._base, count, self.lanes)), strict=True)):
            head = data[a : min(a + STATE_BYTES * mine, b)].tobytes().ljust(STATE_BYTES * mine, b"\0")
            states[n, :mine] = np.frombuffer(head, "<u4")
            a += STATE_BYTES * mine
            words[start : start + length] = np.frombuffer(data[a : a + WORD_BYTES * length].tobytes(), "<u2")
        # No encoder writes a state outside [2^15, 2^31). Decoding goes on from one that is large enough, so that a lane without a symbol never reads.
        self._sound = np.all((states >= LOW) & (states < 1 << 31), axis=1)
        states[states < LOW] |= LOW
        self._stand = _Stand(states, self._base.copy(), self._base + count + 1, words, tables.lookup.reshape(-1))
        self._unused = np.arange(self.width) >= self.lanes[:, None] if (self.lanes < self.width).any() else None

    @property
    def position(self) -> NDArray[np.int64]:
        """Bytes of each stream that have been consumed; more than it has where it ended early."""
        consumed: NDArray[np.int64] = STATE_BYTES * self.lanes + WORD_BYTES * (self._stand.position - self._base)
        return consumed

    def intact(self, behind: ArrayLike = 0) -> NDArray[np.bool_]:
        """Tell for each stream whether it is whole and has been decoded to its end, bool `(N,)`.

        Args:
            behind: Bytes that follow the last word of each stream and are no words.

        Damage that swaps two symbols of one frequency leaves no trace here: about one flipped bit in 600 of a picture's stream. A bundle's
        checksum finds it.
        """
        done = np.all(self._stand.state == LOW, axis=1)
        whole: NDArray[np.bool_] = done & self._sound & (self.position + np.asarray(behind) == self._size)
        return whole

    def step(self, tables: NDArray[Any]) -> NDArray[np.uint8]:
        """Decode one symbol in each lane.

        Args:
            tables: The table of each, integers `(N, width)`, -1 for none; `width` is the largest number of lanes.

        Returns:
            Symbols, shaped alike, 0 where there is none.

        Raises:
            ValueError: The shape is another, or a table does not exist.
        """
        symbols: NDArray[np.uint8] = self.run(np.asarray(tables)[None])[0]
        return symbols

    def run(self, tables: NDArray[Any]) -> NDArray[np.uint8]:
        """Decode many steps whose tables are known beforehand.

        Args:
            tables: As for `step`, `(steps, N, width)`.

        Returns:
            Symbols, shaped alike.

        Raises:
            ValueError: The shape is another, or a table does not exist.
        """
        shape = (len(tables), len(self.lanes), self.width)
        if tables.shape != shape:
            raise ValueError(f"expected tables (steps, {shape[1]}, {shape[2]}), got {tables.shape}")
        if tables.size and (tables.min() < -1 or tables.max() >= len(self.tables)):
            raise ValueError(f"expected tables from -1 to {len(self.tables) - 1}, got {tables.min()} to {tables.max()}")
        symbols = np.zeros(shape, np.uint8)
        for i in range(0, len(tables), _RUN):
            part = tables[i : i + _RUN].astype(np.int64)
            if self._unused is not None:
                part[:, self._unused] = -1
            live = np.flatnonzero((part >= 0).any((0, 2)))  # images differ in length: the work is for those that go on
            whole = len(live) == shape[1]
            stand = self._stand if whole else self._stand.part(live)
            rows = (part if whole else part[:, live]) + 1 << PROBABILITY_BITS
            entries = np.empty((len(part), stand.state.size), np.uint32)
            for row, entry in zip(rows.reshape(entries.shape), entries, strict=True):
                stand.advance(row, entry)
            found = (entries >> SYMBOL_SHIFT).astype(np.uint8).reshape(rows.shape)  # astype drops the bits above
            symbols[i : i + _RUN, slice(None) if whole else live] = found
            if not whole:
                self._stand.state[live], self._stand.position[live] = stand.state, stand.position
        return symbols


class _Stand:
    """How far some streams are decoded, and what a step needs besides.

    Args:
        state: Of each lane, uint32 `(N, width)`, changed in place.
        position, limit: Next word of each stream, changed in place, and what it never exceeds, int64 `(N,)`.
        words: Of all streams, uint16.
        lookup: `Tables.lookup`, flat.
    """

    def __init__(
        self, state: NDArray[np.uint32], position: NDArray[np.int64], limit: NDArray[np.int64], words: NDArray[np.uint16], lookup: NDArray[np.uint32]
    ) -> None:
        self.state, self.position, self.limit, self.words, self.lookup = state, position, limit, words, lookup
        count, width = state.shape
        self._flat = state.reshape(-1)
        self._image = np.arange(count).repeat(width)
        self._behind = np.arange(1, count + 1) * width  # lanes of this image and those before it
        self._count = np.arange(state.size)
        self._index = np.empty(state.size, np.int64)
        self._part = np.empty(state.size, np.uint32)
        self._short = np.empty(state.size, np.bool_)
        self._start = np.empty(count, np.int64)

    def part(self, images: NDArray[np.int64]) -> _Stand:
        """A copy for some of the images."""
        return _Stand(self.state[images], self.position[images], self.limit[images], self.words, self.lookup)

    def advance(self, rows: NDArray[np.int64], entries: NDArray[np.uint32]) -> None:
        """Take one step; every line is one pass over all lanes, so there are as few as possible.

        Args:
            rows: Index in `lookup` of each lane's row, int64 `(N * width,)`.
            entries: Where the entries go that the lanes decode to, uint32 `(N * width,)`.
        """
        state, part = self._flat, self._part
        np.bitwise_and(state, _SLOTS, out=part)
        np.add(part, rows, out=self._index)
        self.lookup.take(self._index, out=entries, mode="clip")
        # state = frequency * (state >> 12) + slot - cumulative; below 2^31 if the state was, as the entries of a row partition its slots
        np.right_shift(state, _BITS, out=state)
        np.right_shift(entries, _FREQUENCY, out=part)
        np.add(part, _ONE, out=part)
        np.multiply(state, part, out=state)
        np.bitwise_and(entries, _SLOTS, out=part)
        np.add(state, part, out=state)
        np.less(state, _LOW, out=self._short)
        lanes = self._short.nonzero()[0]
        if len(lanes) == 0:
            return
        behind = lanes.searchsorted(self._behind)  # how many lanes read, of this image and those before it
        start = self._start
        start[0] = self.position[0]
        np.subtract(self.position[1:], behind[:-1], out=start[1:])
        where = start.take(self._image.take(lanes))
        where += self._count[: len(lanes)]
        low = state.take(lanes)
        low <<= 16
        low |= self.words.take(where)
        state[lanes] = low
        np.add(start, behind, out=self.position)
        np.minimum(self.position, self.limit, out=self.position)


# --- classes of tiles: the table of each depends on those decoded before ---


def class_steps(
    classes: NDArray[Any], has_left: NDArray[np.bool_], extra: NDArray[Any], lanes: int, *, base: int, buckets: NDArray[Any], contexts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List what `encode` has to code so that `decode_classes` gives these classes.

    Args:
        classes: Of one image, integers `(tiles, G)`, below K.
        has_left, extra: As for `decode_classes`, `(tiles,)`.
        lanes: Number of lanes.
        base, buckets, contexts: As for `decode_classes`.

    Returns:
        Symbols and their tables, int64 `(steps, lanes)`.
    """
    tiles, groups = classes.shape
    span = -(-tiles // lanes)
    bucket = np.asarray(buckets, np.int64)[np.arange(groups), classes]  # [tiles, G]
    left = np.full((tiles, groups), contexts - 1)
    left[1:] = np.where((has_left & (np.arange(tiles) % max(span, 1) > 0))[1:, None], bucket[:-1], contexts - 1)
    above = np.concatenate([np.asarray(extra, np.int64)[:, None], bucket[:, :-1]], 1)
    tables = base + (np.arange(groups) * contexts + left) * contexts + above
    steps = []
    for values, nothing in ((np.asarray(classes, np.int64), 0), (tables, -1)):
        filled = np.full((lanes * span, groups), nothing)
        filled[:tiles] = values
        steps.append(filled.reshape(lanes, span * groups).T)
    return steps[0], steps[1]


def decode_classes(
    decoder: Decoder, tiles: ArrayLike, has_left: NDArray[np.bool_], extra: NDArray[Any], *, base: int, buckets: NDArray[Any], contexts: int
) -> NDArray[np.uint8]:
    """Decode the class of each tile and channel group.

    Lane l has the tiles [l * S, (l + 1) * S) of an image, S = ceil(tiles / lanes), and decodes them one after another, group by group. The table
    of tile t and group g is `base + (g * contexts + a) * contexts + b`: a is the bucket of group g's class in tile t - 1, or `contexts - 1`
    where `has_left` is false and in the first tile of a lane; b is the bucket of group g - 1's class in tile t, and `extra` for g = 0.

    Args:
        decoder: Where the streams stand; it goes on from there.
        tiles: Tiles of each image, `(N,)`.
        has_left: Whether the tile before is the left neighbour, bool `(N, most tiles)`.
        extra: Context of the first group, integers below `contexts`, `(N, most tiles)`.
        base: First table.
        buckets: What each class counts as in a context, integers below `contexts - 1`, `(G, K)`; the tables give classes below K.
        contexts: Number of buckets, plus one for none.

    Returns:
        Classes, uint8 `(N, most tiles, G)`, 0 behind the last tile of an image.

    Raises:
        ValueError: The shapes do not fit, or a table that could be named does not exist.
    """
    count, kinds = np.asarray(tiles, np.int64), np.asarray(buckets, np.int64)
    groups, most = len(kinds), has_left.shape[1]
    if has_left.shape != extra.shape or has_left.shape != (*count.shape, most) or count.shape != decoder.lanes.shape or (count > most).any():
        raise ValueError(f"expected left neighbours and contexts (N, tiles), got {has_left.shape} and {extra.shape} for {count.max(initial=0)} tiles")
    if base < 0 or base + groups * contexts**2 > len(decoder.tables) or _outside(kinds, contexts - 1) or _outside(np.asarray(extra), contexts):
        raise ValueError(f"expected contexts below {contexts} whose tables from {base} on are among {len(decoder.tables)}, got others")
    span = -(-count // decoder.lanes)
    first = np.minimum(np.arange(decoder.width) * span[:, None], count[:, None])  # [N, width]
    active = np.arange(span.max(initial=0))[:, None, None] < np.minimum(span[:, None], count[:, None] - first)  # [S, N, width]
    classes = np.zeros((len(count), most, groups), np.uint8)
    if not active.any():
        return classes
    image = np.arange(len(count))[:, None]
    tile = np.minimum(first + np.arange(len(active))[:, None, None], most - 1)
    left = has_left[image, tile]
    left[0] = False
    left, live = left.reshape(len(active), -1), active.reshape(len(active), -1).astype(np.int64)
    # Rows of `lookup` as index, so that a step only adds: table t is row t + 1, and row 0 is for lanes that are done.
    unit = TOTAL
    outer = ((np.asarray(extra, np.int64) + 1 + base) * unit)[image, tile].reshape(len(active), -1)
    none = (contexts - 1) * contexts * unit
    beside, above = kinds * contexts * unit, (kinds + 1 + base) * unit
    before = np.zeros((groups, active[0].size), np.int64)
    entries = np.empty((len(active), groups, active[0].size), np.uint32)
    for j, mine in enumerate(left):
        second = outer[j]
        for g in range(groups):
            rows = np.where(mine, before[g], none)
            rows += second
            rows += g * contexts**2 * unit
            rows *= live[j]
            decoder._stand.advance(rows, entries[j, g])
            symbol = (entries[j, g] >> SYMBOL_SHIFT) & (MAX_SYMBOLS - 1)
            before[g] = beside[g].take(symbol, mode="clip")
            second = above[g].take(symbol, mode="clip")
    symbols = (entries >> SYMBOL_SHIFT).astype(np.uint8).reshape(len(active), groups, len(count), decoder.width)
    for n, (mine, each, lanes) in enumerate(zip(count, span, decoder.lanes, strict=True)):
        classes[n, :mine] = symbols[:each, :, n, :lanes].transpose(2, 0, 1).reshape(-1, groups)[:mine]
    return classes


def _outside(values: NDArray[Any], limit: int) -> bool:
    return values.size > 0 and bool(values.min() < 0 or values.max() >= limit)


# --- symbols: the table of each is known beforehand ---


def deal(values: NDArray[Any], lanes: int) -> NDArray[np.int64]:
    """Deal a list to lanes, value i to lane i % lanes in step i // lanes: int64 `(steps, lanes)`, -1 behind the last."""
    dealt = np.full(-(-len(values) // lanes) * lanes, -1)
    dealt[: len(values)] = values
    return dealt.reshape(-1, lanes)


def decode_symbols(decoder: Decoder, tables: NDArray[Any], counts: ArrayLike) -> NDArray[np.uint8]:
    """Decode lists of symbols that were dealt to the lanes.

    Args:
        decoder: Where the streams stand; it goes on from there.
        tables: The table of each symbol, all images one after another, integers `(sum of counts,)`.
        counts: Symbols of each image, `(N,)`.

    Returns:
        Symbols, uint8, ordered as `tables`.

    Raises:
        ValueError: The counts do not add up, or a table does not exist.
    """
    count = np.asarray(counts, np.int64)
    if count.shape != decoder.lanes.shape or count.sum() != len(tables):
        raise ValueError(f"expected {len(decoder.lanes)} counts that sum to {len(tables)}, got {len(count)} that sum to {count.sum()}")
    steps = int((-(-count // decoder.lanes)).max(initial=0))
    grid = np.full((steps, len(count), decoder.width), -1, np.int32)
    parts = []
    for n, (end, size, lanes) in enumerate(zip(count.cumsum().tolist(), count.tolist(), decoder.lanes.tolist(), strict=True)):
        parts.append((n, slice(end - size, end), size // lanes, lanes))
    for n, part, full, lanes in parts:
        mine = tables[part]
        grid[:full, n, :lanes] = mine[: full * lanes].reshape(full, lanes)
        grid[full : full + 1, n, : len(mine) - full * lanes] = mine[full * lanes :]
    found = decoder.run(grid)
    symbols = np.empty(len(tables), np.uint8)
    for n, part, full, lanes in parts:
        mine = symbols[part]
        mine[: full * lanes] = found[:full, n, :lanes].reshape(-1)
        mine[full * lanes :] = found[full : full + 1, n, : len(mine) - full * lanes].reshape(-1)
    return symbols
