"""Residuals: where they lie, what they should give, and fitting them level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rinr_loader.bundle import Network, NetworkSpec
from rinr_loader.codecs import siren
from rinr_loader.fit import CHUNK, Task, psnr_of
from rinr_loader.lanes import Lanes
from rinr_loader.picture import Picture, Rect, normalised, pixel_centres
from rinr_loader.presets import Settings
from rinr_loader.quality import box_mask
from rinr_loader.view import feather

FEATHER = 4  # stored pixels
MARGIN = 5  # stored pixels at least between a label box and its residual's edge: above FEATHER, so that the box has full weight
JITTER, JITTER_SHARE = 3, 1 / 8  # stored pixels, or share of the box's side, at most by which each edge moves further out
# What a weight for each pixel of the rectangle gains, from 8 DAC-SDC objects (benchmarks/shapes.py): a prediction, mended by escalation.
DB_OF_A_WEIGHT_A_PIXEL = 40.0


@dataclass(frozen=True)
class Residual:
    """A residual to be fitted.

    Args:
        picture: Which picture of the unit.
        object: Which of its boxes.
        rect: Stored pixels it covers.
        area: Of its box, in stored pixels.
        level: 0 where no earlier residual of the picture overlaps, else one more than the highest of those.
    """

    picture: int
    object: int
    rect: Rect
    area: float
    level: int


def place_residuals(picture: Picture, generator: torch.Generator, number: int = 0) -> list[Residual]:
    """Choose rectangle and order of a picture's residuals: one for each box that marks an object, largest first.

    The rectangle is the box with a margin, a random step outward at each edge, cut at the picture's border, so that neither its size
    nor its edges tell where the box is.
    """
    height, width = picture.pixels.shape[:2]
    boxes = picture.stored_boxes
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    jitter = torch.rand(len(boxes), 4, generator=generator, device=generator.device).tolist()
    chosen: list[Residual] = []
    for i in sorted(np.flatnonzero(~picture.crowd).tolist(), key=lambda i: (-areas[i], i)):
        x0, y0, x1, y1 = boxes[i].tolist()
        reach = [1 + max(JITTER, JITTER_SHARE * side) for side in (x1 - x0, y1 - y0)] * 2
        left, top, right, bottom = (MARGIN + int(share * most) for share, most in zip(jitter[i], reach, strict=True))
        rect = max(0, math.floor(x0) - left), max(0, math.floor(y0) - top), min(width, math.ceil(x1) + right), min(height, math.ceil(y1) + bottom)
        level = max((r.level + 1 for r in chosen if _overlap(r.rect, rect)), default=0)
        chosen.append(Residual(number, i, rect, float(areas[i]), level))
    return chosen


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def fit_residuals(lanes: Lanes, pictures: Sequence[Picture], networks: list[list[Network]], settings: Settings) -> None:
    """Fit residuals level by level, each against the background and the residuals before it, and append them in their order.

    One that misses its target is fitted again, a step up the ladder, to its end.
    """
    placed: list[Residual] = []
    for i, picture in enumerate(pictures):
        if not picture.blind:
            placed += place_residuals(picture, lanes.generator("place", i), i)
    done: dict[Residual, Network] = {}
    best: dict[Residual, float] = {}

    def before(residual: Residual) -> list[Network]:
        earlier = [done[r] for r in placed if r.picture == residual.picture and r.level < residual.level and r in done]
        return [networks[residual.picture][0], *earlier]

    for level in range(max((r.level for r in placed), default=-1) + 1):
        now = [r for r in placed if r.level == level]
        found = lanes.map(lambda r: residual_task(pictures[r.picture], r, before(r), settings, lanes.device), now)
        waiting = {r: (task, predict_spec(r, task, settings)) for r, task in zip(now, found, strict=True) if task is not None}
        for spec in settings.residual_ladder():
            mine = [r for r in waiting if waiting[r][1] == spec]
            tasks = [partial(_given, waiting[r][0]) for r in mine]
            for r, fitted in zip(mine, lanes.fit(tasks, spec, settings.residual_schedule(spec), f"residual {level}"), strict=True):
                task = waiting.pop(r)[0]
                if fitted.psnr > best.get(r, task.psnr_without):  # a residual that makes its object worse is left out
                    best[r] = fitted.psnr
                    done[r] = Network(spec, r.rect, task.scale, fitted.weights, FEATHER, r.object)
                larger = settings.larger_residual(spec)
                if larger is not None and task.stop_psnr is not None and fitted.psnr < task.stop_psnr:
                    waiting[r] = (task, larger)
    for r in placed:
        if r in done:
            networks[r.picture].append(done[r])


def predict_spec(residual: Residual, task: Task, settings: Settings) -> NetworkSpec:
    """The first step of the ladder that should reach the target; without a target, the class of the box's area."""
    if task.stop_psnr is None:
        return settings.residual_class(residual.area)
    weights = task.points.shape[1] * (task.stop_psnr - task.psnr_without) / DB_OF_A_WEIGHT_A_PIXEL
    ladder = settings.residual_ladder()
    return next((spec for spec in ladder if spec.weights >= weights), ladder[-1])


def residual_task(picture: Picture, residual: Residual, before: Sequence[Network], settings: Settings, device: torch.device) -> Task | None:
    """What a residual's network should give; None where the object is good enough already."""
    x0, y0, x1, y1 = residual.rect
    points = pixel_centres(residual.rect, device)
    image = torch.from_numpy(picture.pixels[y0:y1, x0:x1]).to(device).float().flatten(0, 1).T / 255
    size = torch.tensor([picture.pixels.shape[:2]], device=device)
    current = render(before, points, size)
    inner = box_mask(picture.stored_boxes[residual.object][None] - [x0, y0, x0, y0], y1 - y0, x1 - x0)
    measured = torch.from_numpy(inner.ravel()).to(device)
    wrong = image - current
    already = psnr_of(float(wrong[:, measured].square().mean()))
    target_psnr = settings.object_target
    if target_psnr is not None and already >= target_psnr:
        return None
    weight = feather(points[None], torch.tensor([residual.rect], device=device).float(), torch.tensor([float(FEATHER)], device=device), size)[0]
    target = wrong
    if settings.mode == "de":  # weight * (0.5 + network) replaces what is there
        target = image - (1 - weight) * current - 0.5 * weight
    scale = max(2 * float(target.square().mean().sqrt()), 1 / 255)
    return Task(normalised(points, residual.rect), target / scale, weight, measured, scale, target_psnr, psnr_without=already)


def _given(task: Task) -> Task:
    return task


def render(networks: Sequence[Network], points: Tensor, stored_size: Tensor) -> Tensor:
    """Colour at points of one picture before clamping, float32 `(3, N)`, from its networks in their order.

    Args:
        networks: The background and residuals after it, sine networks.
        points: Stored pixels, `(2, N)`.
        stored_size: Height and width, `(1, 2)`.

    Raises:
        TypeError: A network is of another family.
    """
    total = torch.zeros(3, points.shape[1], device=points.device)
    for network in networks:
        spec = network.spec
        if not isinstance(spec, NetworkSpec):
            raise TypeError(f"networks: expected sine networks, got {spec}")
        rect = torch.tensor([network.rect], device=points.device).float()
        parameters = siren.parameters_of([network.weights], spec, points.device)
        weight = feather(points[None], rect, torch.tensor([float(network.feather)], device=points.device), stored_size)[0]
        inside = weight > 0
        coordinates = normalised(points[:, inside].clamp(rect[0, :2, None] + 0.5, rect[0, 2:, None] - 0.5), network.rect)
        value = torch.cat([siren.forward(parameters, spec, part[None])[0] for part in coordinates.split(CHUNK["cpu"], 1)], 1) * network.scale
        if spec.kind == "background":
            total[:, inside] = value + 0.5
        elif spec.kind == "direct":
            total[:, inside] = total[:, inside] * (1 - weight[inside]) + (value + 0.5) * weight[inside]
        else:
            total[:, inside] += value * weight[inside]
    return total
