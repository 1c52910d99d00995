"""What the benchmarks share: real frames, and results as JSON with the device's name."""

from __future__ import annotations

import json
import os
import platform
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
