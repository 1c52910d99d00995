"""The entropy decoder on a GPU: Triton twins of `rinr_loader.codecs.rans`, bit for bit.

A program decodes one image, its lanes side by side. Between launches the states rest in memory, so that classes, the sums that place the symbols, and
symbols follow each other on one stream without waiting for the CPU. Loops end where the arguments say, and reads are masked by the end of
the stream, whatever it holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rinr_loader.codecs import rans

_BITS: tl.constexpr = tl.constexpr(rans.PROBABILITY_BITS)
_SLOTS: tl.constexpr = tl.constexpr(rans.TOTAL - 1)
_LOW: tl.constexpr = tl.constexpr(rans.LOW)
_SYMBOL: tl.constexpr = tl.constexpr(rans.SYMBOL_SHIFT)
_FREQUENCY: tl.constexpr = tl.constexpr(rans.FREQUENCY_SHIFT)
_LAST: tl.constexpr = tl.constexpr(rans.MAX_SYMBOLS - 1)


class Decoder:
    """Streams on a GPU, and how far they are decoded; see `rinr_loader.codecs.rans.Decoder`.

    Args:
        data: What the streams lie in, uint8, one axis.
        starts, ends: First byte of each stream, and the one behind its last, int64 `(N,)`. They are trusted only inside `data`.
        lanes: Lanes of each stream, int32 `(N,)`.
        width: The most lanes of a stream; more in `lanes` do not count.
        lookup: What `upload` gave.
    """

    def __init__(self, data: Tensor, starts: Tensor, ends: Tensor, lanes: Tensor, *, width: int, lookup: Tensor) -> None:
        self.data, self.lookup, self.width = data, lookup, triton.next_power_of_2(width)
        self.warps = max(1, min(8, self.width // 32))
        self.starts, self.ends, self.lanes = starts.clamp(0, len(data)), ends.clamp(0, len(data)), lanes.clamp(1, width)
        self.state = torch.empty(len(starts), self.width, dtype=torch.int32, device=data.device)
        self.position = torch.zeros(len(starts), dtype=torch.int32, device=data.device)  # words
        self.sound = torch.empty(len(starts), dtype=torch.int32, device=data.device)
        if len(starts):
            _start[(len(starts),)](data, self.starts, self.ends, self.lanes, self.state, self.sound, WIDTH=self.width, num_warps=self.warps)

    def intact(self) -> Tensor:
        """Tell for each stream whether it is whole and has been decoded to its end, bool `(N,)`."""
        size = rans.STATE_BYTES * self.lanes.long() + rans.WORD_BYTES * self.position.long()
        return (self.state == rans.LOW).all(1) & (self.sound != 0) & (size == self.ends - self.starts)


def upload(tables: rans.Tables, device: torch.device | str) -> Tensor:
    """What kernels look up: the bits of `Tables.lookup` as int32 `(T + 1, 4096)` on `device`."""
    return torch.from_numpy(tables.lookup.view("int32")).to(device)


def decode_classes(decoder: Decoder, tiles: Tensor, has_left: Tensor, extra: Tensor, *, base: int, buckets: Tensor, contexts: int) -> Tensor:
    """Decode the class of each tile and channel group; see `rinr_loader.codecs.rans.decode_classes`.

    Nothing is checked, as that would wait for the GPU: a table that does not exist is taken for the nearest that does.

    Args:
        decoder: Where the streams stand; it goes on from there.
        tiles: Tiles of each image, int32 `(N,)`, at most as many as `has_left` has columns.
        has_left: Whether the tile before is the left neighbour, bool `(N, most tiles)`.
        extra: Context of the first group, uint8 `(N, most tiles)`.
        base: First table.
        buckets: What each class counts as in a context, uint8 `(G, K)`.
        contexts: Number of buckets, plus one for none.

    Returns:
        Classes, uint8 `(N, most tiles, G)`, 0 behind the last tile of an image.
    """
    count, most = has_left.shape
    groups, kinds = buckets.shape
    classes = torch.zeros(count, most, groups, dtype=torch.uint8, device=has_left.device)
    if classes.numel():
        _classes[(count,)](
            *_streams(decoder),
            tiles,
            has_left.contiguous().view(torch.uint8),
            extra.contiguous(),
            buckets.contiguous(),
            classes,
            most,
            kinds,
            base,
            contexts,
            GROUPS=groups,
            COLUMNS=triton.next_power_of_2(groups),
            WIDTH=decoder.width,
            num_warps=decoder.warps,
        )
    return classes


def decode_symbols(decoder: Decoder, tables: Tensor, counts: Tensor) -> Tensor:
    """Decode lists of symbols that were dealt to the lanes; see `rinr_loader.codecs.rans.decode_symbols`.

    Args:
        decoder: Where the streams stand; it goes on from there.
        tables: The table of each symbol, all images one after another, int16 or int32 `(sum of counts,)`.
        counts: Symbols of each image, `(N,)`.

    Returns:
        Symbols, uint8, ordered as `tables`.
    """
    symbols = torch.empty(len(tables), dtype=torch.uint8, device=tables.device)
    if len(tables):
        ends = counts.long().cumsum(0).clamp(0, len(tables))
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        _symbols[(len(counts),)](*_streams(decoder), tables, first, ends, symbols, WIDTH=decoder.width, num_warps=decoder.warps)
    return symbols


def _streams(decoder: Decoder) -> tuple[Tensor | int, ...]:
    """What every kernel that takes steps begins with."""
    return decoder.data, decoder.starts, decoder.ends, decoder.lanes, decoder.lookup, len(decoder.lookup), decoder.state, decoder.position


@triton.jit
def _byte(data, at, end, wanted):
    return tl.load(data + at, mask=wanted & (at < end), other=0).to(tl.uint32)


@triton.jit
def _start(data, starts, ends, lanes, state, sound, WIDTH: tl.constexpr):
    """Read the states of one image; what no encoder writes becomes a state that is one, and clears `sound`."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    mine = lane < tl.load(lanes + n)
    at, end = tl.load(starts + n) + 4 * lane, tl.load(ends + n)
    x = _byte(data, at, end, mine) | _byte(data, at + 1, end, mine) << 8 | _byte(data, at + 2, end, mine) << 16 | _byte(data, at + 3, end, mine) << 24
    bad = mine & ((x < _LOW) | (x >= 1 << 31))
    x = tl.where(mine, tl.where(x < _LOW, x | _LOW, x), _LOW)
    tl.store(state + n * WIDTH + lane, x.to(tl.int32, bitcast=True))
    tl.store(sound + n, (tl.sum(bad.to(tl.int32)) == 0).to(tl.int32))


@triton.jit
def _step(x, position, table, active, data, first, words, lookup, rows):
    """One step of all lanes: new states and position, and the symbols."""
    row = tl.where(active, tl.minimum(tl.maximum(table, -1), rows - 2) + 1, 0)
    slot = x & _SLOTS
    entry = tl.load(lookup + row.to(tl.int64) * (_SLOTS + 1) + slot.to(tl.int64)).to(tl.uint32, bitcast=True)
    x = ((entry >> _FREQUENCY) + 1) * (x >> _BITS) + (entry & _SLOTS)
    short = x < _LOW
    order = tl.cumsum(short.to(tl.int32))
    at = position + order - 1
    there = short & (at < words)
    where = first + 2 * at.to(tl.int64)
    word = tl.load(data + where, mask=there, other=0).to(tl.uint32) | tl.load(data + where + 1, mask=there, other=0).to(tl.uint32) << 8
    x = tl.where(short, x << 16 | word, x)
    # One behind the end says that too much was read, however much.
    position = tl.minimum(position + tl.sum(short.to(tl.int32)), words + 1)
    return x, position, (entry >> _SYMBOL & _LAST).to(tl.int32)


@triton.jit
def _classes(
    data, starts, ends, lanes, lookup, rows, state, position,
    tiles, has_left, extra, buckets, classes, most, kinds, base, contexts,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    of = tl.load(lanes + n)
    first = tl.load(starts + n) + 4 * of
    words = (tl.maximum(tl.load(ends + n) - first, 0) // 2).to(tl.int32)
    x = tl.load(state + n * WIDTH + lane).to(tl.uint32, bitcast=True)
    at = tl.load(position + n)

    count = tl.minimum(tl.maximum(tl.load(tiles + n), 0), most)
    span = (count + of - 1) // of
    column = tl.arange(0, COLUMNS)
    before = tl.zeros([WIDTH, COLUMNS], tl.int32)  # buckets of the lane's last tile
    for j in range(span):
        tile = lane * span + j
        active = tile < count  # none of a lane that the image does not have
        where = n * most + tile
        left = (tl.load(has_left + where, mask=active, other=0) != 0) & (j > 0)
        above = tl.load(extra + where, mask=active, other=0).to(tl.int32)
        for g in range(GROUPS):
            beside = tl.where(left, tl.sum(tl.where(column[None, :] == g, before, 0), 1), contexts - 1)
            table = base + (g * contexts + beside) * contexts + above
            x, at, symbol = _step(x, at, table, active, data, first, words, lookup, rows)
            tl.store(classes + where * GROUPS + g, symbol.to(tl.uint8), mask=active)
            above = tl.load(buckets + g * kinds + tl.minimum(symbol, kinds - 1)).to(tl.int32)
            before = tl.where(column[None, :] == g, above[:, None], before)
    tl.store(state + n * WIDTH + lane, x.to(tl.int32, bitcast=True))
    tl.store(position + n, at)


@triton.jit
def _symbols(data, starts, ends, lanes, lookup, rows, state, position, tables, first_symbol, last_symbol, symbols, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    of = tl.load(lanes + n)
    first = tl.load(starts + n) + 4 * of
    words = (tl.maximum(tl.load(ends + n) - first, 0) // 2).to(tl.int32)
    x = tl.load(state + n * WIDTH + lane).to(tl.uint32, bitcast=True)
    at = tl.load(position + n)

    begin, end = tl.load(first_symbol + n), tl.load(last_symbol + n)
    for i in range(begin, end, of):
        where = i + lane
        active = (lane < of) & (where < end)
        table = tl.load(tables + where, mask=active, other=-1).to(tl.int32)
        x, at, symbol = _step(x, at, table, active, data, first, words, lookup, rows)
        tl.store(symbols + where, symbol.to(tl.uint8), mask=active)
    tl.store(state + n * WIDTH + lane, x.to(tl.int32, bitcast=True))
    tl.store(position + n, at)
