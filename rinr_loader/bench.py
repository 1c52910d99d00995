"""How fast a dataset is read and decoded on this machine, beside JPEG files where some are given."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rinr_loader.dataset import RinrDataset
from rinr_loader.decode import decode, whole

BATCH_SIZES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Speed:
    """Images a second at one batch size: read and decoded together, and milliseconds of each part per batch."""

    batch_size: int
    images_per_second: float
    read_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Speeds:
    """What was measured, and on what."""

    device: str
    torch: str
    threads: int
    split: str
    size: tuple[int, int]
    speeds: tuple[Speed, ...]


def measure(
    dataset: RinrDataset,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
) -> Speeds:
    """Read and decode random batches of a split for a while, one after the other.

    Args:
        dataset: The split.
        batch_sizes: Images in a batch.
        size: Height and width of the images; without it the most frequent stored size.
        device: Where to decode.
        seconds: For each batch size, after one batch to warm up.
    """
    device = torch.device(device)
    if size is None:
        sizes, counts = np.unique(dataset.column("stored_size"), axis=0, return_counts=True)
        height, width = sizes[counts.argmax()].tolist()
        size = (int(height), int(width))
    random = np.random.default_rng(0)
    speeds = []
    for batch_size in batch_sizes:
        _batch(dataset, random.integers(0, len(dataset), batch_size), size, device)
        taken = [0.0, 0.0]
        batches = 0
        while sum(taken) < seconds or batches == 0:
            for i, part in enumerate(_batch(dataset, random.integers(0, len(dataset), batch_size), size, device)):
                taken[i] += part
            batches += 1
        read, decoded = (1000 * part / batches for part in taken)
        speeds.append(Speed(batch_size, batch_size * batches / sum(taken), read, decoded))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Speeds(name, torch.__version__, torch.get_num_threads(), dataset.split, size, tuple(speeds))


def _batch(
    dataset: RinrDataset, indices: np.ndarray[tuple[int], np.dtype[np.int64]], size: tuple[int, int], device: torch.device
) -> tuple[float, float]:
    """Seconds that reading and decoding one batch take."""
    started = time.perf_counter()
    buffer = dataset.read(indices)
    read = time.perf_counter()
    buffer = buffer.to(device)
    decode(buffer, whole(buffer, size), size=size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return read - started, time.perf_counter() - read


def measure_jpeg(files: Sequence[Path], *, seconds: float = 2.0) -> float:
    """Images a second that Pillow reads and decodes on one thread, at their own size."""

    def read_all() -> None:
        for file in files:
            with Image.open(file) as image:
                np.asarray(image.convert("RGB"))

    return len(files) * _rate(read_all, seconds)


def _rate(function: Callable[[], None], seconds: float) -> float:
    """Calls a second."""
    function()
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or calls == 0:
        function()
        calls += 1
    return calls / elapsed
