"""Bytes as stored and PSNR on DAC-SDC: `tile` and the modes of `siren` beside JPEG, WebP and AVIF.

    python benchmarks/quality.py WORKDIR [--rows JPEG WebP AVIF siren "tile-*" label-leak] [--frames 24] [--long 2]

On frames of the test half, at the targets of 27 dB for the picture and 35 dB for its objects on every frame. Writes
benchmarks/results/quality-cpu.json; rows that are not named keep what an earlier run measured on the same frames.

- Formats of Pillow's: the first of all qualities that meets the targets, for each frame; and as ROI, the frame at the first quality that
  gives it 27 dB plus its object, with a margin of 4 pixels, in a file of its own at the first that gives the object 35 dB. Bytes are
  those of the files; `in_tar` adds what a tar makes of them. Their labels and the places of their crops cost nothing here.
- Ours: `rinr convert` as it is, with labels, tar and index. PSNR is measured on what the reader decodes. WORKDIR keeps conversions:
  an interrupted `siren` row goes on; those of `tile` start anew, since they follow the code.
- Where the bytes of `tile` go: a bundle's stream is shared by background and objects, so objects are what it grows by with them.
- `label-leak`: what margin, jitter and soft edges cost, without which a residual's rectangle would tell where the label box is.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from common import TILE_ROWS, add_rows, chosen_rows, dac_frames, picture, read_result, write_result
from formats import OPTIONS, QUALITIES, Stored, cheapest, roi_curve
from formats import curve as format_curve

from rinr_loader.bundle import parse
from rinr_loader.convert import Job, convert
from rinr_loader.dataset import RinrDataset
from rinr_loader.index import SUFFIX
from rinr_loader.picture import Picture
from rinr_loader.pictures import decode_pictures
from rinr_loader.presets import PRESETS, Mode, PresetName, Settings
from rinr_loader.quality import psnr
from rinr_loader.source import Sample, Source

IMAGE_PSNR, OBJECT_PSNR = 27.0, 35.0
TARGETS: dict[str, tuple[float | None, float | None]] = {
    "image_27": (IMAGE_PSNR, None),
    "object_35": (None, OBJECT_PSNR),
    "both": (IMAGE_PSNR, OBJECT_PSNR),
}
MODES: tuple[Mode, ...] = ("bs", "be", "de", "re", "qre")
SHAPES = cast(PresetName, "paper-balanced")  # the paper's shapes, fitted as long as `balanced`
PRESETS[SHAPES] = replace(PRESETS["paper"], background=PRESETS["balanced"].background, residual=PRESETS["balanced"].residual)
# What each row of `label-leak` goes without. A margin is there for the soft edge to lie in, so it goes together with that.
WITHOUT: dict[str, dict[str, float]] = {
    "as it is": {},
    "without jitter": {"JITTER": 0, "JITTER_SHARE": 0.0},
    "without soft edges": {"FEATHER": 0},
    "without soft edges and margin": {"FEATHER": 0, "MARGIN": 0},
    "without any": {"FEATHER": 0, "MARGIN": 0, "JITTER": 0, "JITTER_SHARE": 0.0},
}

Row = dict[str, Any]


# --- formats of Pillow's ---


def others(kind: str, frames: Sequence[Picture]) -> list[Row]:
    """One format, for the whole frame and as ROI."""
    curves = [format_curve(frame, kind) for frame in frames]
    rois = []
    for frame, points in zip(frames, curves, strict=True):
        base = next((quality for quality, point in zip(QUALITIES, points, strict=True) if point.psnr >= IMAGE_PSNR), QUALITIES[-1])
        rois.append(roi_curve(frame, kind, base))
    shown = [quality for quality in QUALITIES if quality % 5 == 0 and quality < 100]
    means = [[mean([getattr(points[QUALITIES.index(q)], part) for points in curves]) for part in ("bytes", "psnr", "object_psnr")] for q in shown]
    return [{"name": kind, "qualities": shown, "mean": means, **needs(curves)}, {"name": f"ROI-{kind}", **needs(rois)}]


def mean(values: Sequence[float]) -> float | None:
    """Rounded mean of what was measured."""
    there = [value for value in values if not math.isnan(value)]
    return round(sum(there) / len(there), 2) if there else None


def needs(curves: Sequence[Sequence[Stored]]) -> Row:
    """Mean bytes for each target, over the frames that reach it, and how many do."""
    found: Row = {}
    for name, (image, obj) in TARGETS.items():
        good = [point for points in curves if (point := cheapest(points, image, obj)) is not None]
        found[name] = {
            "bytes": round(sum(point.bytes for point in good) / len(good)) if good else None,
            "in_tar": round(sum(point.tar_bytes for point in good) / len(good)) if good else None,
            "reached": len(good),
            "of": len(curves),
        }
    return found


# --- ours ---


def ours(name: str, samples: Sequence[Sample], settings: Settings, folder: Path) -> Row:
    """Convert with the product as it is, and measure what it stored."""
    samples = [replace(sample, split="train") for sample in samples]  # with residuals: the objects are what is measured
    where = folder / name.replace(" ", "-")
    resumed = where.exists()
    report = convert(Source("benchmark", samples, ("object",)), where, Job(settings=settings))
    dataset = RinrDataset(where)
    by_key = {sample.key: picture(sample) for sample in samples}
    frames = [by_key[key] for key in dataset.keys]
    decoded = list(decode_pictures(dataset, range(len(frames))))
    whole = [psnr(image, frame.pixels) for image, frame in zip(decoded, frames, strict=True)]
    objects = [psnr(image, frame.pixels, frame.object_mask) for image, frame in zip(decoded, frames, strict=True)]
    shards = dataset.metadata["splits"]["train"]["shards"]
    row = {
        "name": name,
        "samples": len(frames),
        "stored_bytes": round(sum(shard["bytes"] + shard["index_bytes"] for shard in shards) / len(frames)),
        "bundle_bytes": round(float(dataset.column("size").mean())),
        "parts": parts(where),
        "psnr": [round(value, 3) for value in whole],
        "object_psnr": [None if math.isnan(value) else round(value, 3) for value in objects],
        "reached": reached(whole, objects),
        "groups": dataset.metadata["groups"],
        "bytes": dataset.column("size").tolist(),
        "seconds": None if resumed else round(report.seconds, 1),
    }
    return row


def reached(whole: Sequence[float], objects: Sequence[float]) -> dict[str, int]:
    """How many frames meet each target; a frame without objects meets theirs."""
    pairs = list(zip(whole, objects, strict=True))
    return {
        name: sum((image is None or value >= image) and (obj is None or math.isnan(part) or part >= obj) for value, part in pairs)
        for name, (image, obj) in TARGETS.items()
    }


def parts(where: Path) -> dict[str, int]:
    """Mean bytes a sample of a dataset: the background's and the other networks' own, what is around them, tar and index."""
    total: Counter[str] = Counter()
    samples = 0
    for shard in sorted(where.glob("train/*.tar")):
        inside = 0
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(SUFFIX):
                    data = file.read()
                    first, *rest = [len(network.weights) for network in parse(data).networks]
                    total.update(background=first, objects=sum(rest), header=len(data) - first - sum(rest))
                    samples, inside = samples + 1, inside + len(data)
        total.update(tar=shard.stat().st_size - inside, index=shard.with_suffix(".safetensors").stat().st_size)
    return {name: round(total[name] / samples) for name in ("background", "objects", "header", "tar", "index")}


def siren(samples: Sequence[Sample], folder: Path) -> list[Row]:
    """Every mode at the paper's shapes, and the targets with the preset `balanced`."""
    rows = [ours(f"{mode} 10x28 balanced", samples, Settings(SHAPES, mode, family="siren"), folder) for mode in MODES]
    return [*rows, ours("qre balanced to targets", samples, Settings("balanced", "qre", IMAGE_PSNR, OBJECT_PSNR, family="siren"), folder)]


def full_schedule(samples: Sequence[Sample], folder: Path) -> list[Row]:
    """The paper's 10,000 steps beside 2,000."""
    return [
        ours("qre 10x28 paper", samples, Settings("paper", family="siren"), folder),
        ours("qre 10x28 balanced", samples, Settings(SHAPES, family="siren"), folder),
    ]


def tile(name: str, samples: Sequence[Sample], folder: Path) -> list[Row]:
    """To the targets; and the backgrounds alone, which tell what of the stream is the objects'."""
    settings = tile_settings(name)
    row, alone = fresh(name, samples, settings, folder), fresh(f"{name} alone", samples, replace(settings, mode="be"), folder)
    return [share_stream(row, alone)]


def share_stream(row: Row, alone: Row) -> Row:
    """Divide what a row counts as its background: all that one encoded without objects does not have is theirs."""
    both = row["parts"]["background"] + row["parts"]["objects"]
    background = alone["parts"]["background"]
    return {**row, "parts": {**row["parts"], "background": background, "objects": both - background}}


def label_leak(samples: Sequence[Sample], folder: Path) -> list[Row]:
    """Bytes a sample that each measure against telling the label box costs, with `tile-2` in one pass."""
    settings = tile_settings("tile-2")
    variants: dict[str, Row] = {}
    for name, values in WITHOUT.items():
        with constants(**values):
            found = fresh(f"label-leak {name}", samples, settings, folder)
        variants[name] = {"stored_bytes": found["stored_bytes"], "bundle_bytes": found["bundle_bytes"], "reached": found["reached"]}
    cost = costs({name: variant["bundle_bytes"] for name, variant in variants.items()})
    print("label-leak:", cost, flush=True)
    return [{"name": "label-leak", "of": "tile-2", "cost": cost, "variants": variants}]


def costs(size: dict[str, int]) -> dict[str, int]:
    """Bytes that each measure costs, from the sizes of the rows of `WITHOUT`."""
    return {
        "jitter": size["as it is"] - size["without jitter"],
        "soft edges": size["as it is"] - size["without soft edges"],
        "margin": size["without soft edges"] - size["without soft edges and margin"],
        "all": size["as it is"] - size["without any"],
    }


def tile_settings(name: str) -> Settings:
    return Settings(**TILE_ROWS[name], mode="qre", target_psnr=IMAGE_PSNR, object_psnr=OBJECT_PSNR)


def fresh(name: str, samples: Sequence[Sample], settings: Settings, folder: Path) -> Row:
    """Convert anew: a finished conversion would be taken as it is, whatever has changed in the encoder."""
    shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
    return ours(name, samples, settings, folder)


@contextmanager
def constants(**values: float) -> Iterator[None]:
    """Give constants of rinr_loader.residuals other values for a while, also where another module has imported them by name."""
    home = vars(sys.modules["rinr_loader.residuals"])
    before = {name: home[name] for name in values}
    modules = [module for name, module in sys.modules.items() if name.startswith("rinr_loader.") and module is not None]
    places = [(module, name) for module in modules for name in values if vars(module).get(name) is not None]
    places = [(module, name) for module, name in places if vars(module)[name] == before[name]]
    try:
        for module, name in places:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name in places:
            setattr(module, name, before[name])


# --- what is run and told ---


def tell(row: Row) -> None:
    objects = [value for value in row["object_psnr"] if value is not None]
    told = [f"{row['name']}: {row['stored_bytes']} B stored, {row['bundle_bytes']} B bundle, image {np.mean(row['psnr']):.2f} dB"]
    if objects:
        told.append(f"object {np.mean(objects):.2f} dB")
    told += [f"{name} {count} of {row['samples']}" for name, count in row["reached"].items()]
    print(", ".join(told), row["parts"], f"{row['seconds']} s", flush=True)


def main() -> None:
    measures: dict[str, Callable[[Sequence[Sample], Path], list[Row]]] = {
        **{kind: partial(lambda kind, samples, _: others(kind, [picture(sample) for sample in samples]), kind) for kind in OPTIONS},
        "siren": siren,
        **{name: partial(tile, name) for name in TILE_ROWS},
        "label-leak": label_leak,
        "full-schedule": full_schedule,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    add_rows(parser, measures)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--long", type=int, default=2, help="frames for the paper's full schedule")
    arguments = parser.parse_args()
    samples = dac_frames("test", arguments.frames)
    keys = [sample.key for sample in samples]
    before = read_result("quality")
    result: dict[str, Any] = {"frames": keys, "targets": {"image": IMAGE_PSNR, "object": OBJECT_PSNR}}
    result |= {name: before.get(name, []) if before.get("frames") == keys else [] for name in ("dac_sdc", "full_schedule")}
    for name in chosen_rows(parser, arguments.rows, measures):
        place, some = ("full_schedule", samples[: arguments.long]) if name == "full-schedule" else ("dac_sdc", samples)
        found = measures[name](some, arguments.workdir / place)
        names = {row["name"] for row in found}
        result[place] = [row for row in result[place] if row["name"] not in names] + found
        write_result("quality", result)
        for row in found:
            if name in OPTIONS:
                print(row["name"], {target: row[target] for target in TARGETS}, flush=True)
            elif "parts" in row:
                tell(row)


if __name__ == "__main__":
    main()
