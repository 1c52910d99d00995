"""What storing a background in int8 costs: trained for it, rounded afterwards row by row, and rounded afterwards with one range a tensor.

    python benchmarks/quantize.py [--frames 8] [--shape 10x28]

All at the same total steps, on frames of the test half of DAC-SDC, in dB of the whole frame, beside the float32 fit.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from common import dac_frames, picture, write_result
from torch import Tensor

from rinr_loader import encode_siren
from rinr_loader.bundle import NetworkSpec
from rinr_loader.codecs import siren
from rinr_loader.fit import Schedule, Task, fit, psnr_of
from rinr_loader.picture import Picture
from rinr_loader.presets import LR_LIMIT, PRESETS, Settings


def measure(flat: Tensor, spec: NetworkSpec, task: Task) -> float:
    parts = zip(task.points.split(4096, 1), task.target.split(4096, 1), strict=True)
    wrong = sum(float((siren.forward(flat, spec, points[None])[0] - target).square().sum()) for points, target in parts)
    return psnr_of(wrong / task.target.numel() * task.scale**2)


def per_tensor(flat: Tensor, spec: NetworkSpec) -> Tensor:
    """The papers' quantization: 256 steps between the smallest and the largest value of each weight matrix and bias."""
    rounded = flat.clone()
    for tensors in siren.layers(rounded, spec):
        for values in tensors:
            low, high = values.min(), values.max()
            step = (high - low) / 255
            values.copy_(((values - low) / step).round_() * step + low)
    return rounded


def compare(job: tuple[Picture, NetworkSpec, Schedule]) -> dict[str, float]:
    torch.set_num_threads(1)
    frame, spec, schedule = job
    task = encode_siren._background_task(frame, Settings(family="siren"), torch.device("cpu"))
    weights = {}
    for dtype in ("float16", "int8"):
        shape = replace(spec, dtype=dtype)  # type: ignore[arg-type]
        fitted = fit([lambda: task], shape, schedule, generator=torch.Generator().manual_seed(0), slots=1)[0]
        weights[dtype] = siren.parameters_of([fitted.weights], shape)
    best = weights["float16"]
    by_row = siren.round_as_stored(best, spec, siren.expand_rows(siren.row_scales(best, spec), spec))
    rows = {"float16": best, "int8_trained": weights["int8"], "int8_rows_afterwards": by_row, "int8_tensors_afterwards": per_tensor(best, spec)}
    return {name: round(measure(flat, spec, task), 2) for name, flat in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--shape", default="10x28")
    arguments = parser.parse_args()
    depth, width = map(int, arguments.shape.split("x"))
    spec = NetworkSpec("background", depth, width, "int8")
    balanced = PRESETS["balanced"].background
    schedule = replace(balanced, lr=min(balanced.lr, LR_LIMIT / (depth * width)))
    samples = dac_frames("test", arguments.frames)
    with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        rows = list(pool.map(compare, [(picture(sample), spec, schedule) for sample in samples]))
    for sample, row in zip(samples, rows, strict=True):
        print(sample.key, row)
    losses = {name: [round(row["float16"] - row[name], 2) for row in rows] for name in rows[0]}
    worst = {name: max(values) for name, values in losses.items()}
    print("mean loss", {name: round(float(np.mean(values)), 2) for name, values in losses.items()}, "worst", worst)
    write_result("quantize", {"shape": arguments.shape, "frames": [s.key for s in samples], "rows": rows, "worst_loss": worst})


if __name__ == "__main__":
    main()
