"""Which network shapes are worth their bytes: PSNR of backgrounds and residuals by shape, at equal steps and pixels.

    python benchmarks/shapes.py [--frames 8] [--steps 2000]

What the ladders of rinr_loader/presets.py and the prediction of a picture's step in rinr_loader/encode_siren.py are taken from.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from common import dac_frames, picture, write_result

from rinr_loader import encode_siren
from rinr_loader.bundle import Network, NetworkSpec
from rinr_loader.encode_siren import JPEG_QUALITY
from rinr_loader.fit import Schedule, fit
from rinr_loader.picture import Picture
from rinr_loader.presets import LR_LIMIT, Settings
from rinr_loader.quality import jpeg_bytes
from rinr_loader.residuals import place_residuals, residual_task

CPU = torch.device("cpu")
BACKGROUNDS = ((5, 24), (5, 32), (5, 48), (5, 64), (10, 28))
RESIDUALS = ((3, 10), (3, 16), (4, 20), (4, 32), (5, 17), (5, 24), (5, 40))


def background(job: tuple[Picture, NetworkSpec, Schedule]) -> tuple[float, Network]:
    torch.set_num_threads(1)
    frame, spec, schedule = job
    task = partial(encode_siren._background_task, frame, Settings(family="siren"), CPU)
    fitted = fit([task], spec, schedule, generator=torch.Generator().manual_seed(0), slots=1)[0]
    return fitted.psnr, Network(spec, (0, 0, frame.pixels.shape[1], frame.pixels.shape[0]), 0.5, fitted.weights)


def residual(job: tuple[Picture, Network, NetworkSpec, Schedule]) -> tuple[float, float]:
    torch.set_num_threads(1)
    frame, under, spec, schedule = job
    placed = place_residuals(frame, torch.Generator().manual_seed(0))[0]
    task = residual_task(frame, placed, [under], Settings("paper", family="siren"), CPU)
    if task is None:
        raise RuntimeError("without a target there is always something to fit")
    schedule = replace(schedule, pixels=schedule.pixels * 2 ** (spec.depth - 3))
    return task.psnr_without, fit([lambda: task], spec, schedule, generator=torch.Generator().manual_seed(0), slots=1)[0].psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    frames = [picture(sample) for sample in dac_frames("train", arguments.frames)]
    sizes = [jpeg_bytes(frame.pixels, JPEG_QUALITY) for frame in frames]
    areas = [float(np.prod(frame.boxes[0, 2:] - frame.boxes[0, :2])) for frame in frames]
    result: dict[str, object] = {"frames": len(frames), "jpeg_bytes": sizes, "box_area": areas, "backgrounds": [], "residuals": []}
    with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        under: list[Network] = []
        for depth, width in BACKGROUNDS:
            spec = NetworkSpec("background", depth, width, "int8")
            schedule = Schedule(arguments.steps, min(2e-3, LR_LIMIT / (depth * width)), 2048)
            found = list(pool.map(background, [(frame, spec, schedule) for frame in frames]))
            if (depth, width) == (5, 48):
                under = [network for _, network in found]
            row = {"shape": f"{depth}x{width}", "bytes": spec.nbytes, "psnr": [round(psnr, 2) for psnr, _ in found]}
            print(row, flush=True)
            result["backgrounds"].append(row)  # type: ignore[attr-defined]
        for depth, width in RESIDUALS:
            spec = NetworkSpec("residual", depth, width, "float16")
            schedule = Schedule(min(arguments.steps, 1500), min(3e-3, LR_LIMIT / (depth * width)), 512)
            pairs = list(pool.map(residual, [(frame, network, spec, schedule) for frame, network in zip(frames, under, strict=True)]))
            row = {"shape": f"{depth}x{width}", "bytes": spec.nbytes, "psnr": [round(psnr, 2) for _, psnr in pairs]}
            print(row, "without:", [round(without, 2) for without, _ in pairs], flush=True)
            result["residuals"].append(row)  # type: ignore[attr-defined]
    write_result("shapes", result)


if __name__ == "__main__":
    main()
