"""What the benchmarks share: real frames, the rows of the family `tile`, and results as JSON with the device's name."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rinr_loader.annotations import annotate
from rinr_loader.converters import open_source
from rinr_loader.image import read_image
from rinr_loader.picture import Picture
from rinr_loader.source import Sample

RESULTS = Path(__file__).resolve().parent / "results"
DATA = Path(os.environ.get("RINR_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

# Settings of the encoder for each row of the family `tile`: number of layers, and steps of refinement after the one pass.
TILE_ROWS: dict[str, dict[str, Any]] = {
    f"tile-{layers}" + (f"-refine-{refine}" if refine else ""): {"family": "tile", "layers": layers, "refine": refine}
    for layers in (1, 2)
    for refine in (0, 10, 100)
}


def device_name(device: str = "cpu") -> str:
    """What a result was measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"


def write_result(name: str, result: dict[str, Any], device: str = "cpu") -> Path:
    """Write one benchmark's figures to benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    where = RESULTS / f"{name}-{torch.device(device).type}.json"
    about = {"benchmark": name, "device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    where.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    print(f"wrote {where}")
    return where


def read_result(name: str, device: str = "cpu") -> dict[str, Any]:
    """What an earlier run wrote; nothing where none did."""
    where = RESULTS / f"{name}-{torch.device(device).type}.json"
    found: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {}
    return found


def add_rows(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Give a benchmark the option `--rows`."""
    listed = ", ".join(names)
    parser.add_argument("--rows", nargs="*", default=["*"], help=f"rows to measure (wildcards allowed), of {listed}; the others stay")


def chosen_rows(parser: argparse.ArgumentParser, patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that match any of the patterns, in their own order; a pattern without a match is a usage error."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            parser.error(f"--rows: expected names like {', '.join(names[:4])}, got {pattern}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def dac_frames(split: str, count: int) -> list[Sample]:
    """Frames of DAC-SDC, evenly spread over a half of its split."""
    samples = [s for s in open_source(DATA / "dac_sdc").samples if s.split == split]
    return [samples[i] for i in np.linspace(0, len(samples) - 1, count).round().astype(int)]


def kodak() -> list[Sample]:
    """The eight lossless photographs."""
    return list(open_source(DATA / "kodak").samples)


def picture(sample: Sample) -> Picture:
    """A sample as the encoder takes it, at its full size."""
    image = read_image(sample.image)
    height, width = image.pixels.shape[:2]
    found = annotate(sample, width, height)
    return Picture(image.pixels, (height, width), found.boxes, found.classes, found.crowd)
