"""Images a second of the family `tile`: encoding in one pass; decoding a batch at full and half size beside JPEG of the same frames.

    python benchmarks/speed.py [--rows "tile-*" jpeg] [--batch 32] [--rounds 7] [--threads 2]

On frames of the test half of DAC-SDC, 640x360, encoded to 27 dB for the picture and 35 dB for its objects. Everything starts from bytes
in memory, ends in one uint8 batch (N, 3, H, W), and has the same number of threads; contenders take turns, so that a change of the
machine's speed meets all of them. The JPEGs are the files as shipped. At half size Pillow lets the JPEG decoder scale, which is the fastest
it can; torchvision decodes whole pictures and shrinks the batch. Writes benchmarks/results/speed-N-threads-cpu.json.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from common import TILE_ROWS, add_rows, chosen_rows, dac_frames, picture, write_result
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from rinr_loader.decode import decode_batch
from rinr_loader.encode import encode_unit
from rinr_loader.image import read_bytes
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings

TARGETS = {"target_psnr": 27.0, "object_psnr": 35.0}  # dB
ONE_PASS: dict[str, dict[str, Any]] = {name: kind for name, kind in TILE_ROWS.items() if kind["refine"] == 0}
OURS: dict[str, dict[str, Any]] = {**ONE_PASS, "jpeg": {"family": "jpeg"}}
PILLOW = "Pillow, JPEG as shipped"
TORCHVISION = "torchvision, JPEG as shipped"

Work = Callable[[], object]


def pillow(pool: ThreadPoolExecutor, files: Sequence[bytes], size: tuple[int, int]) -> Tensor:
    """Decode a batch with Pillow, the JPEG decoder scaling where it can."""
    height, width = size

    def one(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (width, height))
            if image.size != (width, height):
                raise ValueError(f"JPEG: expected a decoder that gives {width}x{height}, got {image.size}; take half or full size")
            return np.asarray(image.convert("RGB"))

    return torch.from_numpy(np.stack(list(pool.map(one, files)))).permute(0, 3, 1, 2).contiguous()


def torchvision(pool: ThreadPoolExecutor, files: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Decode a batch with torchvision, then shrink it."""
    batch = torch.stack(list(pool.map(partial(decode_jpeg, mode=ImageReadMode.RGB), files)))
    if tuple(batch.shape[2:]) == size:
        return batch
    shrunk: Tensor = F.interpolate(batch, size, mode="bilinear", antialias=True)
    return shrunk


def take_turns(contenders: Mapping[str, Work], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that does not count; each round begins with another one."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            contenders[name]()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def speeds(seconds: Mapping[str, Sequence[float]], images: int, reference: str | None = None) -> list[dict[str, Any]]:
    """Median images a second, and how many times that of the reference, round by round."""
    rows = []
    for name, times in seconds.items():
        row: dict[str, Any] = {"name": name, "images_per_s": round(images / median(times), 1), "slowest": round(images / max(times), 1)}
        if reference is not None and name != reference:
            ratios = [base / own for base, own in zip(seconds[reference], times, strict=True)]
            row |= {"ratio": round(median(ratios), 3), "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3)}
        print(row, flush=True)
        rows.append(row)
    return rows


def encoder(name: str, pictures: Sequence[Picture], threads: int) -> Callable[[], list[bytes]]:
    settings = Settings(**OURS[name], **TARGETS)
    return partial(encode_unit, pictures, settings, unit="speed", threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser, OURS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encode-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = dac_frames("test", arguments.batch)
    pictures = [picture(sample) for sample in samples]
    height, width = pictures[0].pixels.shape[:2]
    encoders = {name: encoder(name, pictures, arguments.threads) for name in chosen_rows(parser, arguments.rows, OURS)}
    passes = {name: work for name, work in encoders.items() if name in ONE_PASS}
    result: dict[str, Any] = {"batch": len(samples), "size": [height, width], "rounds": arguments.rounds}
    if passes:
        print(f"encoding {len(samples)} pictures of {width}x{height}, {arguments.threads} threads")
        result["encode"] = speeds(take_turns(passes, arguments.encode_rounds), len(samples))
    bundles = {name: work() for name, work in encoders.items()}
    files = [read_bytes(sample.image) for sample in samples]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    result["bytes"] = {"JPEG as shipped": round(np.mean([len(data) for data in files]).item())}
    result["bytes"] |= {name: round(np.mean([len(data) for data in found]).item()) for name, found in bundles.items()}
    with ThreadPoolExecutor(arguments.threads) as pool:
        for what, size in {"full": (height, width), "half": (height // 2, width // 2)}.items():
            contenders: dict[str, Work] = {
                PILLOW: partial(pillow, pool, files, size),
                TORCHVISION: partial(torchvision, pool, tensors, size),
                **{name: partial(decode_batch, found, size=size) for name, found in bundles.items()},
            }
            print(f"decoding at {what} size")
            result[f"decode_{what}"] = speeds(take_turns(contenders, arguments.rounds), len(samples), PILLOW)
    write_result(f"speed-{arguments.threads}-threads", result)


if __name__ == "__main__":
    main()
