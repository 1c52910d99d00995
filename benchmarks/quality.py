"""Bytes and PSNR of every mode beside JPEG, WebP and ROI-JPEG.

    python benchmarks/quality.py WORKDIR [--frames 24] [--long 2]

On frames of the test half of DAC-SDC and on Kodak. WORKDIR keeps conversions, so that an interrupted run goes on. Prints what each
needs for an object PSNR of 35 dB and an image PSNR of 27 dB, and writes benchmarks/results/quality-cpu.json.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from common import dac_frames, kodak, picture, write_result
from PIL import Image

from rinr_loader.convert import Job, convert
from rinr_loader.dataset import RinrDataset
from rinr_loader.picture import Picture
from rinr_loader.presets import PRESETS, Mode, PresetName, Settings
from rinr_loader.quality import psnr
from rinr_loader.source import Sample, Source

OBJECT_PSNR, IMAGE_PSNR = 35.0, 27.0
ROI_MARGIN = 4  # pixels
MODES: tuple[Mode, ...] = ("bs", "be", "de", "re", "qre")
PRESETS[cast(PresetName, "paper-balanced")] = replace(
    PRESETS["paper"], background=PRESETS["balanced"].background, residual=PRESETS["balanced"].residual
)


def ours(name: str, samples: Sequence[Sample], settings: Settings, folder: Path) -> dict[str, Any]:
    """Convert with the product as it is and take the figures from what it stored."""
    samples = [replace(sample, split="train") for sample in samples]  # with residuals: the objects are what is measured
    report = convert(Source("benchmark", samples, ("object",)), folder / name, Job(settings=settings))
    dataset = RinrDataset(folder / name)
    rows = dataset.metadata["splits"]["train"]["shards"]
    bundles = dataset.column("size")
    found = {
        "name": name,
        "samples": len(dataset),
        "stored_bytes": round(sum(row["bytes"] + row["index_bytes"] for row in rows) / len(dataset)),
        "bundle_bytes": round(float(bundles.mean())),
        "psnr": [round(float(value), 2) for value in dataset.column("psnr")],
        "object_psnr": [None if math.isnan(value) else round(float(value), 2) for value in dataset.column("object_psnr")],
        "bytes": bundles.tolist(),
        "seconds": round(report.seconds, 1),
    }
    tell(found)
    return found


def encoded(pixels: np.ndarray, kind: str, quality: int) -> tuple[int, np.ndarray]:
    """Bytes of a picture in another format, and the picture that comes back."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}[kind]
    Image.fromarray(pixels).save(buffer, kind, quality=quality, **options)
    return buffer.tell(), np.array(Image.open(buffer).convert("RGB"))


def measured(frame: Picture, size: int, decoded: np.ndarray) -> tuple[int, float, float]:
    mask = frame.object_mask
    return size, psnr(decoded, frame.pixels), psnr(decoded, frame.pixels, mask) if mask.any() else math.nan


def curve(frame: Picture, kind: str, qualities: Sequence[int]) -> list[tuple[int, float, float]]:
    return [measured(frame, *encoded(frame.pixels, kind, quality)) for quality in qualities]


def roi_crops(frame: Picture) -> list[tuple[int, int, int, int]]:
    height, width = frame.pixels.shape[:2]
    grown = [(x0 - ROI_MARGIN, y0 - ROI_MARGIN, x1 + ROI_MARGIN, y1 + ROI_MARGIN) for x0, y0, x1, y1 in frame.stored_boxes.tolist()]
    return [(max(0, math.floor(a)), max(0, math.floor(b)), min(width, math.ceil(c)), min(height, math.ceil(d))) for a, b, c, d in grown]


def roi(frame: Picture, kind: str, base: int, qualities: Sequence[int]) -> list[tuple[int, float, float]]:
    """The whole picture at a low quality plus each padded object at a high one; without a container, which flatters it."""
    size, whole = encoded(frame.pixels, kind, base)
    points = []
    for quality in qualities:
        total, pasted = size, whole.copy()
        for x0, y0, x1, y1 in roi_crops(frame):
            crop_size, crop = encoded(np.ascontiguousarray(frame.pixels[y0:y1, x0:x1]), kind, quality)
            total, pasted[y0:y1, x0:x1] = total + crop_size, crop
        points.append(measured(frame, total, pasted))
    return points


def cheapest(points: Sequence[tuple[int, float, float]], image: float | None, obj: float | None) -> int | None:
    """Fewest bytes at which the targets hold; None where they never do."""
    good = [size for size, whole, part in points if (image is None or whole >= image) and (obj is None or part >= obj)]
    return min(good, default=None)


def others(frames: Sequence[Picture], with_objects: bool) -> list[dict[str, Any]]:
    qualities = list(range(5, 100, 5))
    rows = []
    for kind in ("JPEG", "WEBP"):
        curves = [curve(frame, kind, qualities) for frame in frames]
        means = np.nanmean(np.array(curves), 0) if with_objects else np.array(curves)[..., :2].mean(0)
        rows.append({"name": kind, "qualities": qualities, "mean": np.round(means, 2).tolist(), **needs(curves, with_objects)})
        if with_objects:
            rois = []
            for frame, points in zip(frames, curves, strict=True):
                base = next((q for q, point in zip(qualities, points, strict=True) if point[1] >= IMAGE_PSNR), 95)
                rois.append(roi(frame, kind, base, qualities))
            rows.append({"name": f"ROI-{kind}", **needs(rois, with_objects)})
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("qualities", "mean")}, flush=True)
    return rows


def needs(curves: Sequence[Sequence[tuple[int, float, float]]], with_objects: bool) -> dict[str, Any]:
    """Mean bytes for each target, over the frames that reach it, and how many do."""
    targets: dict[str, tuple[float | None, float | None]] = {"image_27": (IMAGE_PSNR, None)}
    if with_objects:
        targets |= {"object_35": (None, OBJECT_PSNR), "both": (IMAGE_PSNR, OBJECT_PSNR)}
    found: dict[str, Any] = {}
    for name, (image, obj) in targets.items():
        sizes = [size for points in curves if (size := cheapest(points, image, obj)) is not None]
        found[name] = {"bytes": round(sum(sizes) / len(sizes)) if sizes else None, "reached": len(sizes), "of": len(curves)}
    return found


def tell(row: dict[str, Any]) -> None:
    objects = [value for value in row["object_psnr"] if value is not None]
    parts = [f"{row['name']}: {row['stored_bytes']} B stored, {row['bundle_bytes']} B bundle, image {np.mean(row['psnr']):.2f} dB"]
    if objects:
        parts.append(f"object {np.mean(objects):.2f} dB, at 35 dB {sum(v >= OBJECT_PSNR for v in objects)} of {len(objects)}")
    parts.append(f"image at 27 dB {sum(v >= IMAGE_PSNR for v in row['psnr'])} of {len(row['psnr'])}, {row['seconds']} s")
    print(", ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--long", type=int, default=2, help="frames for the paper's full schedule")
    arguments = parser.parse_args()
    dac, photos = dac_frames("test", arguments.frames), kodak()
    result: dict[str, Any] = {"frames": [sample.key for sample in dac], "targets": {"image": IMAGE_PSNR, "object": OBJECT_PSNR}}
    sets: list[tuple[str, list[Sample], Callable[[], list[dict[str, Any]]]]] = [
        ("dac_sdc", dac, lambda: others([picture(s) for s in dac], True)),
        ("kodak", photos, lambda: others([picture(s) for s in photos], False)),
    ]
    shapes = cast(PresetName, "paper-balanced")
    for name, samples, baselines in sets:
        rows = baselines()
        folder = arguments.workdir / name
        for mode in MODES:
            if name == "kodak" and mode in ("de", "re"):
                continue  # without objects they are `be`
            rows.append(ours(f"{mode} 10x28 balanced", samples, Settings(shapes, mode), folder))
        rows.append(ours("qre balanced to targets", samples, Settings("balanced", "qre", IMAGE_PSNR, OBJECT_PSNR), folder))
        result[name] = rows
        write_result("quality", result)
    if arguments.long:
        result["full_schedule"] = [
            ours("qre 10x28 paper", dac[: arguments.long], Settings("paper"), arguments.workdir / "long"),
            ours("qre 10x28 balanced", dac[: arguments.long], Settings(shapes), arguments.workdir / "long"),
        ]
        write_result("quality", result)
    print(json.dumps({name: len(result[name]) for name, *_ in sets}))


if __name__ == "__main__":
    main()
