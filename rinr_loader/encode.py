"""Pictures with boxes to bundles, a unit of pictures at a time.

A unit is fitted alone, and everything in it happens in an order that only its content decides: fits are dealt to a fixed number of
lanes, each lane runs on one thread with a generator of its own. So the bytes do not depend on how many threads or processes work.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.bundle import Bundle, Network, NetworkSpec, pack
from rinr_loader.codecs import siren
from rinr_loader.decode import decode_batch, feather
from rinr_loader.errors import ConfigError
from rinr_loader.fit import CHUNK, Fitted, Schedule, Task, fit, psnr_of
from rinr_loader.presets import Settings
from rinr_loader.quality import box_mask, jpeg_bytes, psnr

LANES = {"cpu": 8, "cuda": 1}
SLOTS_CUDA = 64
FEATHER = 4  # stored pixels
MARGIN = 5  # stored pixels at least between a label box and its residual's edge: above FEATHER, so that the box has full weight
JITTER, JITTER_SHARE = 3, 1 / 8  # stored pixels, or share of the box's side, at most by which each edge moves further out
DEFAULT_PSNR = 27.0  # dB of a background that no target was given for
# A background's PSNR from bytes a pixel, its own as int8 and the picture's as a JPEG: fitted to 8 frames of DAC-SDC, within 0.7 dB
# (benchmarks/shapes.py). A JPEG's size says how much detail there is, and detail costs a sine network far more than it costs a JPEG.
JPEG_QUALITY, JPEG_TABLES = 10, 400  # bytes of a JPEG that do not depend on the picture
PSNR_AT, PSNR_PER_DOUBLING, PSNR_PER_JPEG_DOUBLING = -4.0, 1.5, -7.4

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Picture:
    """What is encoded into one bundle.

    Args:
        pixels: As stored, RGB, uint8, `(H, W, 3)`.
        source_size: Height and width of the original.
        boxes: Label boxes inside the original, float32 xyxy in its pixels, `(n, 4)`.
        classes, crowd: Of each box, int64 and bool, `(n,)`.
        label: Class id of the picture, or -1.
        source_hash: See `SourceImage`.
        blind: Encode without looking at the boxes, one step further up the ladder: for val and test.
    """

    pixels: NDArray[np.uint8]
    source_size: tuple[int, int]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    label: int = -1
    source_hash: bytes = bytes(4)
    blind: bool = False

    @property
    def stored_boxes(self) -> NDArray[np.float64]:
        """The label boxes in stored pixels."""
        height, width = self.pixels.shape[:2]
        x, y = width / self.source_size[1], height / self.source_size[0]
        scaled: NDArray[np.float64] = self.boxes.astype(np.float64) * np.array([x, y, x, y])
        return scaled

    @property
    def object_mask(self) -> NDArray[np.bool_]:
        """The union of the label boxes in stored pixels; crowds do not count."""
        return box_mask(self.stored_boxes[~self.crowd], *self.pixels.shape[:2])


@dataclass(frozen=True)
class _Residual:
    """A residual to be fitted."""

    picture: int
    object: int
    rect: tuple[int, int, int, int]
    spec: NetworkSpec
    level: int  # 0 where no earlier residual of the picture overlaps


class _Unit:
    """One unit in work: settings, where it runs, and the generators of its lanes."""

    def __init__(self, settings: Settings, unit: str, device: torch.device, threads: int, on_background: Callable[[], None] | None) -> None:
        self.settings, self.unit, self.device, self.on_background = settings, unit, device, on_background
        self.cancelled = threading.Event()
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator that is a function of the seed, the unit and a purpose alone."""
        digest = hashlib.sha256(repr((self.settings.seed, self.unit, *purpose)).encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return list(self.pool.map(function, items))

    def fit(
        self, tasks: Sequence[Callable[[], Task]], spec: NetworkSpec, schedule: Schedule, stage: str, on_done: Callable[[], None] | None = None
    ) -> list[Fitted]:
        """Fit tasks of one shape, dealt to the lanes one by one."""
        lanes = min(LANES[self.device.type], len(tasks))
        slots = SLOTS_CUDA if self.device.type == "cuda" else max(1, CHUNK["cpu"] // schedule.pixels)

        def lane(number: int) -> list[Fitted]:
            return fit(
                tasks[number::lanes],
                spec,
                schedule,
                generator=self.generator(stage, str(spec), number),
                slots=slots,
                half=self.settings.half,
                on_done=on_done,
                cancelled=self.cancelled,
            )

        results: list[Fitted | None] = [None] * len(tasks)
        for number, fitted in enumerate(self.map(lane, range(lanes))):
            results[number::lanes] = fitted
        return [result for result in results if result is not None]


def check_device(device: torch.device | str) -> torch.device:
    """The device to encode on.

    Raises:
        ConfigError: It is neither a CPU nor CUDA, or not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: expected cpu or cuda, got {device!r}") from None
    if found.type not in LANES:
        raise ConfigError(f"device: expected cpu or cuda, got {found.type}; encode on the CPU")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one that is here, got {found}, of {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return found


def encode_unit(
    pictures: Sequence[Picture],
    settings: Settings,
    *,
    unit: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    on_background: Callable[[], None] | None = None,
) -> list[bytes]:
    """Encode pictures together.

    Args:
        pictures: At most a few dozen; sizes may differ.
        settings: Shapes, schedules, targets and seed.
        unit: Name of the unit; with the seed it decides all randomness.
        device: Where to fit.
        threads: Threads that share the work on a CPU; the bytes do not depend on it. All cores by default.
        on_background: Called, from any thread, after each background: most of the work of a picture.

    Returns:
        One bundle each, in order.

    Raises:
        ConfigError: The device is not there.
    """
    work = _Unit(settings, unit, check_device(device), threads or torch.get_num_threads(), on_background)
    with _one_thread_each(), torch.no_grad(), work.pool, _cancelling(work):
        backgrounds = _fit_backgrounds(work, pictures)
        networks: list[list[Network]] = [[background] for background in backgrounds]
        if settings.has_residuals:
            _fit_residuals(work, pictures, networks)
        return work.map(lambda i: _finish(pictures[i], networks[i], work.device), range(len(pictures)))


@contextmanager
def _cancelling(work: _Unit) -> Iterator[None]:
    """End the fits in work when something goes wrong, Ctrl-C included, instead of waiting minutes for them."""
    try:
        yield
    except BaseException:
        work.cancelled.set()
        work.pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One thread an operation, so that sums are formed in the same order on every machine with the same build."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit_backgrounds(work: _Unit, pictures: Sequence[Picture]) -> list[Network]:
    """Fit every background at the predicted step of the ladder, and once more a step up where the target was missed."""
    settings, ladder = work.settings, work.settings.ladder()
    rungs = work.map(lambda picture: predict_rung(picture, settings), pictures)
    fitted: dict[int, tuple[NetworkSpec, Fitted]] = {}
    for attempt in range(2):
        again = list(range(len(pictures)))
        if attempt == 1:
            again = [i for i in again if _missed(fitted[i][1], settings.target_psnr) and rungs[i] + 1 < len(ladder)]
            rungs = [rung + (i in again) for i, rung in enumerate(rungs)]
        for rung, spec in enumerate(ladder):
            mine = [i for i in again if rungs[i] == rung]
            tasks = [partial(_background_task, pictures[i], settings, work.device) for i in mine]
            on_done = work.on_background if attempt == 0 else None
            for i, result in zip(mine, work.fit(tasks, spec, settings.background_schedule(spec), f"background {attempt}", on_done), strict=True):
                if i not in fitted or result.psnr > fitted[i][1].psnr:
                    fitted[i] = (spec, result)
    return [
        Network(fitted[i][0], (0, 0, picture.pixels.shape[1], picture.pixels.shape[0]), 0.5, fitted[i][1].weights)
        for i, picture in enumerate(pictures)
    ]


def _missed(fitted: Fitted, target: float | None) -> bool:
    return target is not None and fitted.psnr < target


def predict_rung(picture: Picture, settings: Settings) -> int:
    """The first step of the ladder that should reach the target, from the picture's size as a JPEG; the last one where none should."""
    area = picture.pixels.shape[0] * picture.pixels.shape[1]
    detail = max(jpeg_bytes(picture.pixels, JPEG_QUALITY) - JPEG_TABLES, 64) / area
    target = DEFAULT_PSNR if settings.target_psnr is None else settings.target_psnr
    ladder = settings.ladder()
    # The shape counts, not how its weights are stored: as many float16 weights carry hardly more than int8 ones.
    sizes = [replace(spec, dtype="int8").nbytes / area for spec in ladder]
    expected = [PSNR_AT + PSNR_PER_DOUBLING * math.log2(size) + PSNR_PER_JPEG_DOUBLING * math.log2(detail) for size in sizes]
    rung = next((i for i, value in enumerate(expected) if value >= target), len(ladder) - 1)
    return min(rung + 1, len(ladder) - 1) if picture.blind and settings.has_residuals else rung


def _background_task(picture: Picture, settings: Settings, device: torch.device) -> Task:
    height, width = picture.pixels.shape[:2]
    points = _points((0, 0, width, height), device)
    target = torch.from_numpy(picture.pixels).to(device).float().flatten(0, 1).T / 255
    ones = torch.ones(height * width, device=device)
    return Task(_normalised(points, (0, 0, width, height)), target * 2 - 1, ones, ones.bool(), 0.5, settings.target_psnr)


def _points(rect: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Centres of a rectangle's pixels, `(2, N)`, row by row."""
    x0, y0, x1, y1 = rect
    y, x = torch.meshgrid(torch.arange(y0, y1, device=device) + 0.5, torch.arange(x0, x1, device=device) + 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


def _normalised(points: Tensor, rect: tuple[int, int, int, int]) -> Tensor:
    low = torch.tensor(rect[:2], device=points.device)[:, None]
    extent = torch.tensor([rect[2] - rect[0], rect[3] - rect[1]], device=points.device)[:, None]
    return (points - low) / extent * 2 - 1


def place_residuals(picture: Picture, settings: Settings, generator: torch.Generator, number: int = 0) -> list[_Residual]:
    """Choose rectangle, shape and order of a picture's residuals: one for each box that marks an object, largest first.

    The rectangle is the box with a margin, a random step outward at each edge, cut at the picture's border, so that neither its size
    nor its edges tell where the box is.
    """
    height, width = picture.pixels.shape[:2]
    boxes = picture.stored_boxes
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    jitter = torch.rand(len(boxes), 4, generator=generator, device=generator.device).tolist()
    chosen: list[_Residual] = []
    for i in sorted(np.flatnonzero(~picture.crowd).tolist(), key=lambda i: (-areas[i], i)):
        x0, y0, x1, y1 = boxes[i].tolist()
        reach = [1 + max(JITTER, JITTER_SHARE * side) for side in (x1 - x0, y1 - y0)] * 2
        left, top, right, bottom = (MARGIN + int(share * most) for share, most in zip(jitter[i], reach, strict=True))
        rect = max(0, math.floor(x0) - left), max(0, math.floor(y0) - top), min(width, math.ceil(x1) + right), min(height, math.ceil(y1) + bottom)
        level = max((r.level + 1 for r in chosen if _overlap(r.rect, rect)), default=0)
        chosen.append(_Residual(number, i, rect, settings.residual_spec(areas[i]), level))
    return chosen


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fit_residuals(work: _Unit, pictures: Sequence[Picture], networks: list[list[Network]]) -> None:
    """Fit residuals level by level, each against the background and the residuals before it, and append them in their order."""
    settings = work.settings
    placed: list[_Residual] = []
    for i, picture in enumerate(pictures):
        if not picture.blind:
            placed += place_residuals(picture, settings, work.generator("place", i), i)
    done: dict[_Residual, Network] = {}
    best: dict[_Residual, float] = {}

    def before(residual: _Residual) -> list[Network]:
        earlier = [done[r] for r in placed if r.picture == residual.picture and r.level < residual.level and r in done]
        return [networks[residual.picture][0], *earlier]

    for level in range(max((r.level for r in placed), default=-1) + 1):
        now = [r for r in placed if r.level == level]
        found = work.map(lambda r: _residual_task(pictures[r.picture], r, before(r), settings, work.device), now)
        wanted = [(r, r.spec, task) for r, task in zip(now, found, strict=True) if task is not None]
        for attempt in range(2):
            missed: list[tuple[_Residual, NetworkSpec, Task]] = []
            for spec in sorted({spec for _, spec, _ in wanted}):
                mine = [(r, task) for r, s, task in wanted if s == spec]
                tasks = [partial(_given, task) for _, task in mine]
                fits = work.fit(tasks, spec, settings.residual_schedule(spec), f"residual {level} {attempt}")
                for (r, task), fitted in zip(mine, fits, strict=True):
                    if fitted.psnr > best.get(r, task.psnr_without):  # a residual that makes its object worse is left out
                        best[r] = fitted.psnr
                        done[r] = Network(spec, r.rect, task.scale, fitted.weights, FEATHER, r.object)
                    larger = settings.larger_residual(spec)
                    if larger is not None and _missed(fitted, settings.object_psnr):
                        missed.append((r, larger, task))
            wanted = missed
    for r in placed:
        if r in done:
            networks[r.picture].append(done[r])


def _residual_task(picture: Picture, residual: _Residual, before: Sequence[Network], settings: Settings, device: torch.device) -> Task | None:
    """What a residual's network should give; None where the object is good enough already."""
    x0, y0, x1, y1 = residual.rect
    points = _points(residual.rect, device)
    image = torch.from_numpy(picture.pixels[y0:y1, x0:x1]).to(device).float().flatten(0, 1).T / 255
    size = torch.tensor([picture.pixels.shape[:2]], device=device)
    current = render(before, points, size)
    inner = box_mask(picture.stored_boxes[residual.object][None] - [x0, y0, x0, y0], y1 - y0, x1 - x0)
    measured = torch.from_numpy(inner.ravel()).to(device)
    wrong = image - current
    already = psnr_of(float(wrong[:, measured].square().mean()))
    if settings.object_psnr is not None and already >= settings.object_psnr:
        return None
    weight = feather(points[None], torch.tensor([residual.rect], device=device).float(), torch.tensor([float(FEATHER)], device=device), size)[0]
    target = wrong
    if residual.spec.kind == "direct":  # weight * (0.5 + network) replaces what is there
        target = image - (1 - weight) * current - 0.5 * weight
    scale = max(2 * float(target.square().mean().sqrt()), 1 / 255)
    return Task(_normalised(points, residual.rect), target / scale, weight, measured, scale, settings.object_psnr, psnr_without=already)


def _given(task: Task) -> Task:
    return task


def render(networks: Sequence[Network], points: Tensor, stored_size: Tensor) -> Tensor:
    """Colour at points of one picture before clamping, float32 `(3, N)`, from its networks in their order.

    Args:
        networks: The background and residuals after it.
        points: Stored pixels, `(2, N)`.
        stored_size: Height and width, `(1, 2)`.
    """
    total = torch.zeros(3, points.shape[1], device=points.device)
    for network in networks:
        rect = torch.tensor([network.rect], device=points.device).float()
        parameters = siren.parameters_of([network.weights], network.spec, points.device)
        weight = feather(points[None], rect, torch.tensor([float(network.feather)], device=points.device), stored_size)[0]
        inside = weight > 0
        coordinates = _normalised(points[:, inside].clamp(rect[0, :2, None] + 0.5, rect[0, 2:, None] - 0.5), network.rect)
        value = torch.cat([siren.forward(parameters, network.spec, part[None])[0] for part in coordinates.split(CHUNK["cpu"], 1)], 1) * network.scale
        if network.spec.kind == "background":
            total[:, inside] = value + 0.5
        elif network.spec.kind == "direct":
            total[:, inside] = total[:, inside] * (1 - weight[inside]) + (value + 0.5) * weight[inside]
        else:
            total[:, inside] += value * weight[inside]
    return total


def _finish(picture: Picture, networks: Sequence[Network], device: torch.device) -> bytes:
    """Measure the bundle as a reader will see it, and pack it with what was measured."""
    bundle = Bundle(
        stored_size=(picture.pixels.shape[0], picture.pixels.shape[1]),
        source_size=picture.source_size,
        networks=tuple(networks),
        boxes=picture.boxes,
        classes=picture.classes,
        crowd=picture.crowd,
        label=picture.label,
        source_hash=picture.source_hash,
    )
    decoded = decode_batch([pack(bundle)], device=device)[0].permute(1, 2, 0).cpu().numpy()
    mask = picture.object_mask
    return pack(replace(bundle, psnr=psnr(decoded, picture.pixels), object_psnr=psnr(decoded, picture.pixels, mask) if mask.any() else None))
