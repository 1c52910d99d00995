"""The family `tile`: latents of a shared basis, in one pass or refined, with the steps that a picture's targets ask for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rinr_loader.analysis import Analysis, analysis_among, shipped_analysis
from rinr_loader.bundle import Network, TileSpec, parse
from rinr_loader.codecs.tile import (
    BAND,
    RESIDUAL_CHANNELS,
    RESIDUAL_TILE,
    TILE,
    TYPICAL_STEP,
    UNIT,
    blocks_of,
    lattice_of,
    picture,
    residual,
    smooth,
    synthesise,
)
from rinr_loader.dictionary import Dictionary, load, shipped
from rinr_loader.encode_jpeg import best_jpeg, jpeg_bundle, limit_of, reaching_jpeg
from rinr_loader.errors import ConfigError
from rinr_loader.lanes import Lanes, check_device, running
from rinr_loader.latents import RESIDUAL_STRENGTH, STRENGTH, Costs, costs_of, differences, improve, psnr_of, quantise, recode
from rinr_loader.measured import pack_all
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.quality import box_mask
from rinr_loader.residuals import FEATHER, place_residuals
from rinr_loader.stream import NONE, Lattice, Rect, context_below, write_streams
from rinr_loader.targets import targets_of
from rinr_loader.tiles import weight_of

LEAST_STEP, MOST_STEP, FIRST_STEP = 4.0, 260.0, 100.0  # grey levels: far outside of what was trained, colours turn blotchy
LEAST_RESIDUAL_STEP, FIRST_RESIDUAL_STEP = 1.0, 22.0
ROUNDS = 3  # of residuals, until none that overlap spoil another's object
TRIALS, CLOSE = 7, 0.04  # of a step, and dB above a target that are near enough
REFINED = 1.06  # by how much coarser a step may be where latents are refined, as a first guess
SLOPE = 10.0  # dB that a step ten times as fine gives, as a first guess
LEAST_MOVE, FARTHER = 0.02, 2.0  # of a step's logarithm, and by how much more with every trial, while the target is not between two of them
COARSER = 1.2  # by which steps grow where a bundle is too large
TOGETHER = 1 << 22  # pixels of pictures that are entropy coded and measured at once, or one picture
SHOWN = 1 << 20  # pixels that are compared at a time
LARGE = 1 << 22  # pixels above which a picture is analysed in bands, and encoded while no other large one is
BAND_TILES, HALO_TILES = 32, 4  # the analysis sees 2 tiles far


T = TypeVar("T")


@dataclass(frozen=True)
class Coder:
    """What encoding needs of a dictionary.

    Args:
        dictionary: The shared parameters.
        analysis: Its analysis network.
        background, residual: Bits under its tables.
        energy: Squared norm of each basis function of the background.
    """

    dictionary: Dictionary
    analysis: Analysis
    background: Costs
    residual: Costs
    energy: Tensor


@dataclass(frozen=True)
class Coded:
    """A background as quantised.

    Args:
        integers, classes: `(T, C)` and `(T, groups)`.
        step: In grey levels.
        image: What it decodes to, grey levels around 0, `(3, H, W)`.
        psnr: In dB.
    """

    integers: Tensor
    classes: Tensor
    step: float
    image: Tensor
    psnr: float


@dataclass(frozen=True)
class Latents:
    """All of a picture as quantised.

    Args:
        background: The whole of it.
        residuals: Latents, step in grey levels and object of each, in their order.
    """

    background: Coded
    residuals: Sequence[tuple[Lattice, float, int]]


def encode_unit(
    pictures: Sequence[Picture],
    settings: Settings,
    *,
    unit: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    on_background: Callable[[], None] | None = None,
    shared: Mapping[str, bytes] | None = None,
) -> list[bytes]:
    """Encode pictures; see `encode.encode_unit`. Each is encoded alone.

    Args:
        shared: The dictionary that `settings.dictionary` names and the analysis that belongs to it; the shipped ones without it.
    """
    lanes = Lanes(settings.seed, unit, check_device(device), threads or torch.get_num_threads(), False)
    coder = coder_of(settings.dictionary, shared or {})

    alone = threading.Lock()  # one large picture at a time: each takes some 60 bytes a pixel

    @torch.no_grad()  # which holds for one thread only
    def encode(i: int) -> bytes | Latents:
        height, width = pictures[i].pixels.shape[:2]
        with alone if height * width > LARGE else nullcontext():
            found = _encode(pictures[i], settings, coder, lanes.generator("place", i))
        if on_background is not None:
            on_background()
        # What waits for the others of its unit waits without its pixels, which are four times as large as all else.
        return found if isinstance(found, bytes) else replace(found, background=replace(found.background, image=torch.empty(0)))

    @torch.no_grad()
    def finish(rows: Sequence[int]) -> list[bytes]:
        return _pack(coder, [pictures[i] for i in rows], settings, [part for i in rows if isinstance(part := coded[i], Latents)])

    with running(lanes):
        coded = lanes.map(encode, range(len(pictures)))
        # The entropy coder takes a step for many pictures in the time that it needs for one.
        waiting = [i for i, found in enumerate(coded) if isinstance(found, Latents)]
        together: list[list[int]] = [[]]
        for i in waiting:
            if together[-1] and sum(pictures[j].pixels.size for j in (*together[-1], i)) > 3 * TOGETHER:
                together.append([])
            together[-1].append(i)
        packed = dict(zip(waiting, (bundle for part in lanes.map(finish, together) for bundle in part), strict=True))
    return [packed[i] if isinstance(found, Latents) else found for i, found in enumerate(coded)]


def coder_of(sha256: str, shared: Mapping[str, bytes]) -> Coder:
    """The coder of a dictionary, by its hash; the shipped one where none is named.

    Raises:
        ConfigError: There is no such dictionary, or no analysis for it.
    """
    analysis = analysis_among(shared, sha256) if sha256 in shared else None
    if analysis is not None:
        return _coder(load(shared[sha256], sha256), analysis)
    if sha256 in ("", shipped().sha256):
        return _shipped_coder()
    what = "its analysis network beside it" if sha256 in shared else f"it among the shared parameters {sorted(shared)}"
    raise ConfigError(f"dictionary {sha256}: expected {what}, got none; pass both files, or train the dictionary again")


@cache
def _shipped_coder() -> Coder:
    return _coder(shipped(), shipped_analysis())


def _coder(dictionary: Dictionary, analysis: Analysis) -> Coder:
    symbols, radius = dictionary.tables.frequencies[: len(dictionary.radius)].astype("int64"), dictionary.radius
    background, inside = costs_of(symbols, radius, dictionary.background), costs_of(symbols, radius, dictionary.residual)
    return Coder(dictionary, analysis, background, inside, dictionary.basis.square().sum((1, 2, 3)))


def _encode(picture: Picture, settings: Settings, coder: Coder, generator: torch.Generator) -> bytes | Latents:
    """What reaches the targets with the fewest bytes; where nothing does within `max_bytes`, a JPEG that does, or else the best there is."""
    source = torch.from_numpy(picture.pixels).permute(2, 0, 1).float() - 127.5
    target, object_target = cast(tuple[float, float | None], targets_of(picture, settings))  # this family always has a target
    latents = analyse(coder.analysis, source)
    background = _search(coder, latents, source, target, settings)
    rects = [(placed.object, placed.rect) for placed in place_residuals(picture, generator)] if object_target is not None else []
    residuals, reached = _residuals(coder, picture, source, background, rects, object_target)
    reached &= background.psnr >= target
    finest, most = Latents(background, residuals), settings.max_bytes

    def bundle(latents: Latents) -> bytes:
        return _pack(coder, [picture], settings, [latents])[0]

    def coarser() -> bytes:
        """The finest of coarser steps that fit, by bisection; where not even the coarsest do, the background alone."""
        low, high = 1, math.ceil(math.log(MOST_STEP / LEAST_RESIDUAL_STEP, COARSER)) + 1
        fitting: bytes | None = None
        known = {number: step for _, step, number in residuals}
        while low < high:
            middle = (low + high) // 2
            factor = COARSER**middle
            coarse = _trial(coder, latents, source, min(background.step * factor, MOST_STEP), settings)
            steps = {number: min(known.get(number, FIRST_RESIDUAL_STEP) * factor, MOST_STEP) for number, _ in rects}
            data = bundle(Latents(coarse, _residuals(coder, picture, source, coarse, rects, object_target, steps)[0]))
            if most is None or len(data) <= most:
                fitting, high = data, middle
            else:
                low = middle + 1
        return fitting or bundle(Latents(_trial(coder, latents, source, MOST_STEP, settings), []))

    def falls_short(data: bytes) -> tuple[bool, float]:
        """Whether a bundle is too large, and by how many dB it misses the targets."""
        found = parse(data)
        pairs = ((target, found.psnr), (object_target, found.object_psnr))
        missing = sum(max(0.0, wanted - seen) for wanted, seen in pairs if wanted is not None and seen is not None)
        return most is not None and len(data) > most, missing

    if reached and most is None:
        return finest
    data = bundle(finest)
    fits = most is None or len(data) <= most
    if reached and fits:
        return data
    file = reaching_jpeg(picture, target, object_target, most)
    if file is not None:
        return jpeg_bundle(picture, file)
    return min(data if fits else coarser(), jpeg_bundle(picture, best_jpeg(picture.pixels, limit_of(picture, most))), key=falls_short)


def _pack(coder: Coder, pictures: Sequence[Picture], settings: Settings, latents: Sequence[Latents]) -> list[bytes]:
    """Bundles of pictures whose latents are chosen."""
    wholes = [(0, 0, picture.pixels.shape[1], picture.pixels.shape[0]) for picture in pictures]
    lattices = []
    for found, whole in zip(latents, wholes, strict=True):
        symbols = differences(found.background.integers, lattice_of(whole, TILE)[1], coder.dictionary.predicted).long().numpy()
        lattices.append((Lattice(symbols, found.background.classes.numpy(), whole), [lattice for lattice, _, _ in found.residuals]))
    networks = []
    for found, whole, (stream, lanes) in zip(latents, wholes, write_streams(coder.dictionary, lattices), strict=True):
        background = Network(TileSpec("background", settings.layers, lanes), whole, found.background.step, stream)
        residuals = [Network(TileSpec("residual"), lattice.rect, step, b"", FEATHER, number) for lattice, step, number in found.residuals]
        networks.append([background, *residuals])
    return pack_all(pictures, networks, "cpu", shared_hash=coder.dictionary.key, shared={coder.dictionary.key: coder.dictionary})


def analyse(analysis: Analysis, source: Tensor) -> Tensor:
    """Latents of a picture, in bands where it is large.

    Args:
        analysis: The network.
        source: Grey levels around 0, `(3, H, W)`.

    Returns:
        `(C, h, w)`, one column for each tile of 16 x 16 pixels that the picture touches.
    """
    height, width = source.shape[1:]
    padded = F.pad(source[None], (0, -width % TILE, 0, -height % TILE), mode="replicate")
    if height * width <= LARGE:
        return _latents(analysis, padded)
    rows = padded.shape[2] // TILE
    parts = []
    for first in range(0, rows, BAND_TILES):
        low, high = max(0, first - HALO_TILES), min(rows, first + BAND_TILES + HALO_TILES)
        part = _latents(analysis, padded[:, :, low * TILE : high * TILE])
        parts.append(part[:, first - low : min(rows, first + BAND_TILES) - low])
    return torch.cat(parts, 1)


def _latents(analysis: Analysis, padded: Tensor) -> Tensor:
    found: Tensor = analysis(padded)[0]
    return found


def _search(coder: Coder, latents: Tensor, source: Tensor, target: float, settings: Settings) -> Coded:
    """The coarsest step that reaches a PSNR, or the finest there is."""

    def with_refinement(refine: int, first: float) -> Coded:
        def measure(step: float) -> tuple[Coded, float]:
            coded = _trial(coder, latents, source, step, replace(settings, refine=refine))
            return coded, coded.psnr

        return search(measure, target, first, LEAST_STEP, MOST_STEP)

    found = with_refinement(0, FIRST_STEP)
    # Refined trials take many times as long: they begin near where they end.
    return with_refinement(settings.refine, min(found.step * REFINED, MOST_STEP)) if settings.refine else found


def search(measure: Callable[[float], tuple[T, float]], target: float, first: float, least: float, most: float) -> T:
    """The coarsest step that reaches a PSNR in a few trials; what comes nearest where none does.

    Args:
        measure: What a step gives, and its PSNR.
        target: In dB.
        first, least, most: The first step to try, and the range of steps.
    """
    low: tuple[float, float] | None = None  # logarithm of the coarsest step known to be fine enough, and its PSNR
    high: tuple[float, float] | None = None
    at, least_move = math.log10(first), LEAST_MOVE
    best, reached = measure(first)
    psnr = reached
    for _ in range(TRIALS - 1):
        enough = psnr >= target
        if enough:
            low = (at, psnr)
        else:
            high = (at, psnr)
        if enough and psnr <= target + CLOSE:
            break
        if low is not None and high is not None:
            share = (low[1] - target - CLOSE / 2) / max(low[1] - high[1], 1e-6)
            at = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
        else:
            # At least a little too far, so that there are two sides, and ever farther: where a coarse step keeps nothing, the PSNR does not move.
            far = abs(psnr - target - CLOSE / 2) / SLOPE
            at += max(far, least_move) if enough else -max(far, least_move)
            least_move *= FARTHER
        if at <= math.log10(least):
            if high is not None and high[0] <= math.log10(least):
                break
            at = math.log10(least)
        if at >= math.log10(most):
            if low is not None and low[0] >= math.log10(most):
                break
            at = math.log10(most)
        found, psnr = measure(10**at)
        if target <= psnr < reached or reached < min(psnr, target):
            best, reached = found, psnr
    return best


def _trial(coder: Coder, latents: Tensor, source: Tensor, step: float, settings: Settings) -> Coded:
    """Quantise with a step, refine, decode and measure."""
    columns, predicted = latents.shape[2], coder.dictionary.predicted
    values = latents.flatten(1).T / step
    none = torch.full((len(values),), NONE)
    integers, classes = quantise(coder.background, values, coder.energy, STRENGTH, columns, none, predicted)
    weights = dict(coder.dictionary.filter) if settings.layers == 2 else None
    if settings.refine:
        integers, classes = _refine(coder, integers, classes, source, latents.shape[1:], step, weights, settings.refine)
    image = picture(integers.T.unflatten(1, latents.shape[1:]), coder.dictionary.basis, weights, step)
    image = image[:, : source.shape[1], : source.shape[2]]
    return Coded(integers, classes, step, image, _psnr(image, source))


def _refine(
    coder: Coder,
    integers: Tensor,
    classes: Tensor,
    source: Tensor,
    shape: Sequence[int],
    step: float,
    weights: Mapping[str, Tensor] | None,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Move latents down the gradient of the picture's squared error wherever that is worth the bits; see `latents.improve`.

    Large pictures a band of tiles at a time, each with those above as they have become.
    """
    predicted, (rows, columns) = coder.dictionary.predicted, shape
    padded = F.pad(source[None], (0, -source.shape[2] % TILE, 0, -source.shape[1] % TILE), mode="replicate")
    integers, classes = integers.clone(), classes.clone()
    band = max(1, BAND // columns)
    for first in range(0, rows, band):
        last = min(rows, first + band)
        low, high = max(0, first - 1), min(rows, last + 1)
        mine = slice(first * columns, last * columns)
        measure = partial(_error, coder, integers[low * columns : high * columns], first - low, padded[:, :, low * TILE : high * TILE], step, weights)
        integers[mine], classes[mine] = improve(
            coder.background, integers[mine], classes[mine], measure, coder.energy, STRENGTH, columns, predicted, steps
        )
    return integers, recode(coder.background, integers, classes, columns, predicted)


def _error(
    coder: Coder, around: Tensor, above: int, wanted: Tensor, step: float, weights: Mapping[str, Tensor] | None, integers: Tensor
) -> tuple[Tensor, float]:
    """Squared error of a band of tiles in squared steps, and its gradient.

    Args:
        coder: The dictionary.
        around: Integers of the band with a row of tiles on each side, where there is one, `(T, C)`.
        above: Rows above the band, 0 or 1.
        wanted: Grey levels of all those tiles, `(1, 3, H, W)`.
        step, weights: See `picture`.
        integers: Of the band.
    """
    height, columns = (side // TILE for side in wanted.shape[2:])
    rows, first = len(integers) // columns, above * columns
    below = height - rows - above
    with torch.enable_grad():
        moved = (integers * step).requires_grad_()
        values = torch.cat([around[:first] * step, moved, around[first + len(integers) :] * step])
        image = synthesise(values.T.unflatten(1, (height, columns))[None], coder.dictionary.basis)
        if weights is not None:
            image = smooth(image / UNIT, weights, torch.full((1,), step / TYPICAL_STEP)) * UNIT
        # Half a tile beyond the band: further on, what is cut off is missed.
        seen = slice(above * TILE // 2, height * TILE - (TILE // 2 if below else 0))
        error = (image - wanted)[:, :, seen].square().sum()
        (found,) = torch.autograd.grad(error, moved)
    return found / step, float(error.detach()) / step**2


def _residuals(
    coder: Coder,
    picture: Picture,
    source: Tensor,
    background: Coded,
    rects: Sequence[tuple[int, Rect]],
    target: float | None,
    steps: Mapping[int, float] | None = None,
) -> tuple[list[tuple[Lattice, float, int]], bool]:
    """Residuals, each against the background and all others, and whether all objects reach the target, each alone and all together.

    With `steps`, by the number of the object, none is searched for.
    """
    if target is None:
        return [], True
    size = (source.shape[1], source.shape[2])
    columns = lattice_of((0, 0, size[1], size[0]), TILE)[1]
    objects = torch.from_numpy(picture.object_mask)
    shown = background.image.clone()
    found: dict[int, tuple[Lattice, float, Tensor]] = {}  # with what it adds to the picture
    aim, reached = target, False
    for _ in range(ROUNDS if steps is None else 1):
        for number, rect in rects:
            x0, y0, x1, y1 = rect
            inner = _inner(picture, number, rect)
            wanted, now = source[:, y0:y1, x0:x1], shown[:, y0:y1, x0:x1]
            if _psnr(now, wanted, inner) >= aim:
                continue
            if number in found:  # another that lies over it has made it worse
                now = now - found[number][2]
            padding = (0, -(x1 - x0) % RESIDUAL_TILE, 0, -(y1 - y0) % RESIDUAL_TILE)
            blocks = blocks_of(F.pad((wanted - now)[None], padding, mode="replicate")[0])
            values = blocks.flatten(1) @ coder.dictionary.residual_basis.flatten(1).T
            extra = torch.from_numpy(context_below(coder.dictionary.background, background.classes.numpy(), columns, rect))
            weight = weight_of(rect, FEATHER, size, source.device)
            measure = _residual_trial(coder, values, extra, rect, weight, now, wanted, inner)
            if steps is None:
                integers, classes, step, image = search(measure, aim, FIRST_RESIDUAL_STEP, LEAST_RESIDUAL_STEP, MOST_STEP)
            else:
                integers, classes, step, image = measure(steps[number])[0]
            found[number] = Lattice(integers.long().numpy(), classes.numpy(), rect), step, image - now
            shown[:, y0:y1, x0:x1] = image
        together = _psnr(shown, source, objects)
        reached = together >= target and all(
            _psnr(shown[:, y0:y1, x0:x1], source[:, y0:y1, x0:x1], _inner(picture, number, (x0, y0, x1, y1))) >= target
            for number, (x0, y0, x1, y1) in rects
        )
        if reached:
            break
        if together < target:  # where boxes overlap, each may be good enough and their union not
            aim += target - together + CLOSE
    return [(lattice, step, number) for number, (lattice, step, _) in found.items()], reached


def _inner(picture: Picture, number: int, rect: Rect) -> Tensor:
    """Which pixels of a residual's rectangle are in its object's label box, bool `(y1 - y0, x1 - x0)`."""
    x0, y0, x1, y1 = rect
    return torch.from_numpy(box_mask(picture.stored_boxes[number][None] - [x0, y0, x0, y0], y1 - y0, x1 - x0))


_Trial = tuple[Tensor, Tensor, float, Tensor]  # integers, classes, step, what the rectangle then shows


def _residual_trial(
    coder: Coder, values: Tensor, extra: Tensor, rect: Rect, weight: Tensor, now: Tensor, wanted: Tensor, inner: Tensor
) -> Callable[[float], tuple[_Trial, float]]:
    """What a residual becomes with a step, and the PSNR of its object then."""
    columns = lattice_of(rect, RESIDUAL_TILE)[1]
    ones = torch.ones(RESIDUAL_CHANNELS)

    def measure(step: float) -> tuple[_Trial, float]:
        integers, classes = quantise(coder.residual, values / step, ones, RESIDUAL_STRENGTH, columns, extra)
        image = now + residual(integers, coder.dictionary.residual_basis, step, rect) * weight
        return (integers, classes, step, image), _psnr(image, wanted, inner)

    return measure


def _psnr(image: Tensor, wanted: Tensor, mask: Tensor | None = None) -> float:
    """PSNR of grey levels around 0 `(3, H, W)` as a reader will see them; of the masked pixels only, where there is a mask."""
    total, count = 0.0, 0
    rows = max(1, SHOWN // image.shape[2])
    for top in range(0, image.shape[1], rows):
        part = slice(top, top + rows)
        wrong = image[:, part].add(127.5).round_().clamp_(0, 255).sub_(127.5).sub_(wanted[:, part]).square_()
        wrong = wrong if mask is None else wrong[:, mask[part]]
        total, count = total + float(wrong.sum(dtype=torch.float64)), count + wrong.numel()
    return psnr_of(total / max(1, count))  # a box without a pixel has nothing wrong
