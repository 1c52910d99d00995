"""Stacked fitting against fitting one network after another: pixel-steps a second, by shape and pixels a step.

    python benchmarks/encode.py [--device cuda]

Both run the same networks for the same steps, pixels, optimizer and threads. One by one is what the papers' code does: `torch.nn`
modules, autograd, `torch.optim.Adam`. On a CPU it may use all threads inside an operation, while the stacked fit runs one lane a thread.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from common import write_result
from torch import Tensor, nn

from rinr_loader.bundle import NetworkSpec
from rinr_loader.fit import CHUNK, Schedule, Task, fit
from rinr_loader.lanes import SLOTS_CUDA

SHAPES = (NetworkSpec("background", 10, 28, "float16"), NetworkSpec("residual", 3, 10, "float16"))
PIXELS = (256, 1024, 4096)


class Siren(nn.Module):
    """The seeds' network."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.w0 = spec.w0
        self.layers = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in spec.shapes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.w0 * layer(x))
        return self.layers[-1](x)


def one_by_one(tasks: list[Task], spec: NetworkSpec, schedule: Schedule, device: torch.device) -> None:
    for task in tasks:
        network = Siren(spec).to(device)
        optimizer = torch.optim.Adam(network.parameters(), schedule.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
        points, target = task.points.T.contiguous(), task.target.T.contiguous()
        for _ in range(schedule.steps):
            chosen = torch.randint(len(points), (schedule.pixels,), device=device)
            optimizer.zero_grad()
            nn.functional.mse_loss(network(points[chosen]), target[chosen]).backward()
            optimizer.step()
            scheduler.step()


def stacked(tasks: list[Task], spec: NetworkSpec, schedule: Schedule, device: torch.device, threads: int) -> None:
    slots = SLOTS_CUDA if device.type == "cuda" else max(1, CHUNK["cpu"] // schedule.pixels)
    lanes = 1 if device.type == "cuda" else threads

    def lane(number: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator(device).manual_seed(number)
        fit([lambda task=task: task for task in tasks[number::lanes]], spec, schedule, generator=generator, slots=slots)

    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(lane, range(lanes)))


def seconds(function: object, *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--networks", type=int, default=0, help="networks of each shape; 64 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    device, threads = torch.device(arguments.device), arguments.threads
    networks = arguments.networks or (64 if device.type == "cuda" else 16)
    rows = []
    for spec in SHAPES:
        for pixels in PIXELS:
            schedule = Schedule(arguments.steps, 1e-4, pixels, checks=1, patience=10**6)
            count = 16384
            points = torch.rand(2, count, device=device) * 2 - 1
            ones = torch.ones(count, device=device)
            tasks = [Task(points, torch.rand(3, count, device=device), ones, ones.bool(), 0.5) for _ in range(networks)]
            pairs = []
            for _ in range(arguments.rounds + 1):  # in turn, so that a change of the machine's speed meets both
                torch.set_num_threads(threads)
                alone = seconds(one_by_one, tasks, spec, schedule, device)
                together = seconds(stacked, tasks, spec, schedule, device, threads)
                pairs.append((alone, together))
            pairs = pairs[1:]
            work = networks * arguments.steps * pixels
            row = {
                "shape": f"{spec.depth}x{spec.width}",
                "pixels": pixels,
                "networks": networks,
                "one_by_one_pixel_steps_per_s": round(work / median(a for a, _ in pairs)),
                "stacked_pixel_steps_per_s": round(work / median(b for _, b in pairs)),
                "ratio": round(median(a / b for a, b in pairs), 2),
                "ratio_min": round(min(a / b for a, b in pairs), 2),
            }
            print(row, flush=True)
            rows.append(row)
    torch.set_num_threads(threads)
    write_result(
        f"encode-{threads}-threads" if device.type == "cpu" else "encode",
        {"steps": arguments.steps, "rounds": arguments.rounds, "rows": rows},
        arguments.device,
    )


if __name__ == "__main__":
    main()
