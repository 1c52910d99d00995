"""What `tile-2` gives at 1/2, 1/4 and 1/8: the linear basis at that scale, a light head trained for it, and full size filtered and averaged.

    python benchmarks/scales.py [--head-steps 3000]

PSNR in dB against block means of the source, Kodak and 8 frames of DAC-SDC's test half at 27 and 33 dB. The head has the shape of the filter,
works on the picture at that scale, and is trained with all else frozen, on frames of DAC-SDC's train half and COCO. Writes
benchmarks/results/scales-cpu.json.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import DATA, dac_frames, kodak, picture, write_result
from torch import Tensor

from rinr_loader.bundle import parse
from rinr_loader.codecs.tile import FILTER_WIDTH, TYPICAL_STEP, UNIT, smooth
from rinr_loader.converters import open_source
from rinr_loader.encode import encode_unit
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.reader import buffer_of
from rinr_loader.surfaces import block_means
from rinr_loader.tiles import open_tiles

TARGETS, SCALES = (27.0, 33.0), (2, 4, 8)
TRAINED_ON, TRAIN_TARGETS = 48, (26.0, 29.0, 32.0, 35.0)  # pictures, and dB that they are encoded to
CROP, BATCH, RATE = 64, 8, 3e-3


def encoded(pictures: Sequence[Picture], target: float) -> list[bytes]:
    return encode_unit(pictures, Settings(family="tile", mode="be", target_psnr=target), unit="scales")


def surfaces(bundles: Sequence[bytes], number: int, scales: Sequence[int]) -> list[Tensor]:
    """A picture at some scales, grey levels around 0 over `UNIT`, `(3, H, W)`."""
    everything = (0, 0, *parse(bundles[number]).stored_size[::-1])
    found = open_tiles(buffer_of(bundles), [number])([number] * len(scales), scales, [everything] * len(scales))
    return [surface.mul(255).sub(127.5).div(UNIT) for surface in found]


def wanted(one: Picture, k: int) -> Tensor:
    return block_means(torch.from_numpy(one.pixels).permute(2, 0, 1), k).sub(127.5).div(UNIT)


def psnr(image: Tensor, target: Tensor) -> float:
    limit = 127.5 / UNIT
    return -10 * math.log10(float((image.clamp(-limit, limit) - target).square().mean()) * (UNIT / 255) ** 2)


def step_of(bundle: bytes) -> float:
    return parse(bundle).networks[0].scale / TYPICAL_STEP


def filtered(image: Tensor, head: Mapping[str, Tensor], step: float) -> Tensor:
    """A picture of any size through a head."""
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image[None], (0, width % 2, 0, height % 2), mode="replicate")
    return smooth(padded, head, torch.tensor([step]))[0, :, :height, :width]


def train_head(k: int, steps: int) -> dict[str, Tensor]:
    """A filter for pictures at 1/k."""
    coco = [sample for sample in open_source(DATA / "coco_yolo").samples if sample.split == "train"]
    pictures = [picture(sample) for sample in [*dac_frames("train", TRAINED_ON // 2), *coco[: TRAINED_ON // 2]]]
    material = []
    for target in TRAIN_TARGETS:
        bundles = encoded(pictures, target)
        for i, one in enumerate(pictures):
            if parse(bundles[i]).family == "tile":
                material.append((surfaces(bundles, i, [k])[0], wanted(one, k), step_of(bundles[i])))
    material = [part for part in material if min(part[0].shape[1:]) >= CROP]
    torch.manual_seed(0)
    rng = random.Random(0)
    head: dict[str, Tensor] = {}
    for i, (out, into) in enumerate(((FILTER_WIDTH, 12), (FILTER_WIDTH, FILTER_WIDTH), (12, FILTER_WIDTH))):
        head[f"filter.{i}.weight"] = torch.nn.init.kaiming_normal_(torch.zeros(out, into, 3, 3), a=0.1) * (i < 2)
        head[f"filter.{i}.bias"] = torch.zeros(out)
        head |= {f"filter.{i}.step": torch.zeros(out)} if i < 2 else {}
    for value in head.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(head.values(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        crops = []
        for image, target, step in rng.choices(material, k=BATCH):
            y, x = (rng.randrange(side - CROP + 1) for side in image.shape[1:])
            crops.append((image[:, y : y + CROP, x : x + CROP], target[:, y : y + CROP, x : x + CROP], step))
        images, targets = (torch.stack([crop[i] for crop in crops]) for i in range(2))
        at = torch.tensor([crop[2] for crop in crops])
        loss = ((smooth(images, head, at) - targets).square().mean((1, 2, 3)) / at**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in head.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-steps", type=int, default=3000)
    steps = parser.parse_args().head_steps
    heads = {k: train_head(k, steps) for k in SCALES}
    rows: list[dict[str, Any]] = []
    for name, samples in (("Kodak", kodak()), ("DAC-SDC", dac_frames("test", 8))):
        pictures = [picture(sample) for sample in samples]
        for target in TARGETS:
            bundles = encoded(pictures, target)
            for k in SCALES:
                found = []
                for i, one in enumerate(pictures):
                    linear, whole = surfaces(bundles, i, [k, 1])
                    headed = filtered(linear, heads[k], step_of(bundles[i]))
                    found.append([psnr(image, wanted(one, k)) for image in (linear, headed, block_means(whole, k))])
                means = dict(zip(("linear", "head", "averaged"), np.mean(found, 0).round(2).tolist(), strict=True))
                rows.append({"pictures": name, "target": target, "k": k, **means})
                print(rows[-1], flush=True)
    write_result("scales", {"head_steps": steps, "rows": rows})


if __name__ == "__main__":
    main()
