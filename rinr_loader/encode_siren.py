"""The family `siren`: backgrounds and residuals as sine networks. A unit is fitted alone; its bytes depend on its content and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from rinr_loader.bundle import Network, NetworkSpec
from rinr_loader.fit import Fitted, Task
from rinr_loader.lanes import Lanes, check_device, running
from rinr_loader.measured import pack_measured
from rinr_loader.picture import Picture, normalised, pixel_centres
from rinr_loader.presets import Settings
from rinr_loader.quality import jpeg_bytes
from rinr_loader.residuals import fit_residuals

DEFAULT_PSNR = 27.0  # dB of a background that no target was given for
# A background's PSNR from bytes a pixel, its own as int8 and the picture's as a JPEG: fitted to 8 frames of DAC-SDC, within 0.7 dB
# (benchmarks/shapes.py). A JPEG's size says how much detail there is, and detail costs a sine network far more than it costs a JPEG.
JPEG_QUALITY, JPEG_TABLES = 10, 400  # bytes of a JPEG that do not depend on the picture
PSNR_AT, PSNR_PER_DOUBLING, PSNR_PER_JPEG_DOUBLING = -4.0, 1.5, -7.4


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
    """Encode pictures; see `encode.encode_unit`. Sine networks share no parameters."""
    lanes = Lanes(settings.seed, unit, check_device(device), threads or torch.get_num_threads(), settings.half)
    with running(lanes):
        networks = [[background] for background in _fit_backgrounds(lanes, pictures, settings, on_background)]
        if settings.has_residuals:
            fit_residuals(lanes, pictures, networks, settings)
        return lanes.map(lambda i: pack_measured(pictures[i], networks[i], lanes.device), range(len(pictures)))


def _fit_backgrounds(lanes: Lanes, pictures: Sequence[Picture], settings: Settings, on_background: Callable[[], None] | None) -> list[Network]:
    """Fit every background at the predicted step of the ladder, and once more a step up where the target was missed."""
    ladder = settings.ladder()
    rungs = lanes.map(lambda picture: predict_rung(picture, settings), pictures)
    fitted: dict[int, tuple[NetworkSpec, Fitted]] = {}
    for attempt in range(2):
        again = list(range(len(pictures)))
        if attempt == 1:
            again = [i for i in again if _missed(fitted[i][1], settings) and rungs[i] + 1 < len(ladder)]
            rungs = [rung + (i in again) for i, rung in enumerate(rungs)]
        for rung, spec in enumerate(ladder):
            mine = [i for i in again if rungs[i] == rung]
            tasks = [partial(_background_task, pictures[i], settings, lanes.device) for i in mine]
            on_done = on_background if attempt == 0 else None
            for i, result in zip(mine, lanes.fit(tasks, spec, settings.background_schedule(spec), f"background {attempt}", on_done), strict=True):
                if i not in fitted or result.psnr > fitted[i][1].psnr:
                    fitted[i] = (spec, result)
    return [
        Network(fitted[i][0], (0, 0, picture.pixels.shape[1], picture.pixels.shape[0]), 0.5, fitted[i][1].weights)
        for i, picture in enumerate(pictures)
    ]


def _missed(fitted: Fitted, settings: Settings) -> bool:
    return settings.target_psnr is not None and fitted.psnr < settings.target_psnr


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
    points = pixel_centres((0, 0, width, height), device)
    target = torch.from_numpy(picture.pixels).to(device).float().flatten(0, 1).T / 255
    ones = torch.ones(height * width, device=device)
    return Task(normalised(points, (0, 0, width, height)), target * 2 - 1, ones, ones.bool(), 0.5, settings.target_psnr)
