"""Rate-distortion curves on Kodak: `siren` and `tile` beside JPEG, WebP and AVIF.

    python benchmarks/rate_distortion.py [--rows JPEG WebP AVIF siren "tile-*"] [--pictures 8]

Writes benchmarks/results/rate_distortion-cpu.json and draws it beside that as rate_distortion.png. Bytes are those of the file or of the
bundle; labels cost nothing here, for there are none. Rows that are not named keep what an earlier run measured on the same pictures.

- BD-rate: of each picture over 27 to 36 dB, as far as both curves reach, then the mean over the pictures. Curves are not averaged first:
  pictures at equal quality differ by 10 dB, those at an equal target do not, so that such means would compare different pictures.
- Table: PSNR of each picture at so many bytes for 640x360 pixels of it, then the mean.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from common import RESULTS, TILE_ROWS, add_rows, chosen_rows, kodak, picture, read_result, write_result
from formats import OPTIONS
from formats import curve as format_curve
from rates import BdRate, Point, bd_rate, front, psnr_at

from rinr_loader.bundle import parse
from rinr_loader.decode import decode_batch
from rinr_loader.encode import encode_unit
from rinr_loader.picture import Picture
from rinr_loader.presets import LADDER, PRESETS, PresetName, Settings
from rinr_loader.quality import psnr

LOW, HIGH = 27.0, 36.0  # dB
TARGETS = (27.0, 28.5, 30.0, 31.5, 33.0, 34.5, 36.0)
# Further targets, for pictures whose curve does not reach the table's sizes between those.
LOWER, HIGHER = (25.5, 24.0, 22.5, 21.0, 19.5), (37.5, 39.0, 40.5, 42.0, 43.5)
SIZES = (10_000, 14_000, 22_000, 29_000)  # bytes for each AREA pixels
AREA = 640 * 360
REFERENCES = ("JPEG", "WebP")
SHOWN_QUALITIES: dict[str, Sequence[int]] = {
    "JPEG": (1, 2, 4, 6, 8, 10, 13, 17, 22, 28, 35, 43, 52, 61, 70, 78, 85, 90, 94, 97, 100),
    "WebP": (0, 1, 3, *range(5, 101, 5)),
    "AVIF": (1, 5, *range(10, 101, 5)),
}

Curve = list[Point]
Encode = Callable[[Sequence[Picture], float], list[Point | None]]


def others(kind: str, pictures: Sequence[Picture]) -> list[Curve]:
    """A format of Pillow's, from its lowest to its highest quality."""
    return [[(point.bytes, point.psnr) for point in format_curve(one, kind, SHOWN_QUALITIES[kind])] for one in pictures]


def siren(pictures: Sequence[Picture]) -> list[Curve]:
    """Each step of the ladder of backgrounds for every picture, int8, at the steps of the preset `balanced`."""
    found = []
    for shape in LADDER:
        name = cast(PresetName, f"rate-distortion-{shape}")
        PRESETS[name] = replace(PRESETS["balanced"], backgrounds=(shape,))
        found.append(points_of(pictures, encode_unit(pictures, Settings(preset=name, family="siren"), unit="rate_distortion")))
    return [[point for point in column if point is not None] for column in zip(*found, strict=True)]


def tile(name: str, pictures: Sequence[Picture]) -> list[Curve]:
    """The whole picture at each target."""

    def encode(some: Sequence[Picture], target: float) -> list[Point | None]:
        settings = Settings(**TILE_ROWS[name], mode="be", target_psnr=target)
        return points_of(some, encode_unit(some, settings, unit="rate_distortion"))

    return sweep(encode, pictures)


def points_of(pictures: Sequence[Picture], bundles: Sequence[bytes]) -> list[Point | None]:
    """Bytes and PSNR as decoded; None where the encoder fell back to a JPEG, which is another curve's point."""
    points: list[Point | None] = []
    for one, bundle in zip(pictures, bundles, strict=True):
        decoded = decode_batch([bundle])[0].permute(1, 2, 0).numpy()
        fallback = parse(bundle).family == "jpeg"
        points.append(None if fallback else (len(bundle), psnr(decoded, one.pixels)))
    return points


def sweep(encode: Encode, pictures: Sequence[Picture]) -> list[Curve]:
    """Encode every picture at `TARGETS`; then each on and on at lower and higher ones until its curve covers the table's sizes."""
    curves: list[Curve] = [[] for _ in pictures]

    def add(target: float, chosen: Sequence[int]) -> None:
        for i, point in zip(chosen, encode([pictures[i] for i in chosen], target), strict=True):
            if point is not None:
                curves[i].append(point)

    for target in TARGETS:
        add(target, range(len(pictures)))
    units = [scaled(one) for one in pictures]
    for target in LOWER:
        chosen = [i for i, points in enumerate(curves) if points and min(points)[0] > SIZES[0] * units[i]]
        if chosen:
            add(target, chosen)
    for target in HIGHER:
        chosen = [i for i, points in enumerate(curves) if points and max(points)[0] < SIZES[-1] * units[i]]
        if chosen:
            add(target, chosen)
    return curves


def scaled(one: Picture) -> float:
    """Its area in units of 640x360 pixels."""
    return one.pixels.shape[0] * one.pixels.shape[1] / AREA


CURVES: dict[str, Callable[[Sequence[Picture]], list[Curve]]] = {
    **{kind: partial(others, kind) for kind in OPTIONS},
    "siren": siren,
    **{name: partial(tile, name) for name in TILE_ROWS},
}


def compare(rows: dict[str, dict[str, Any]], units: Sequence[float]) -> None:
    """Add to each row what follows from all curves: BD-rates and the table."""
    for name, row in rows.items():
        row["bd_rate"] = {other: mean_bd_rate(rows[other]["curves"], row["curves"]) for other in REFERENCES if other in rows and other != name}
        at = [[psnr_at(points, size * unit) for points, unit in zip(row["curves"], units, strict=True)] for size in SIZES]
        row["psnr_at"] = [None if None in values else round(float(np.mean(np.array(values, float))), 2) for values in at]


def mean_bd_rate(references: Sequence[Curve], curves: Sequence[Curve]) -> dict[str, Any]:
    """Mean over the pictures, in percent, with what was covered; pictures without a common interval are left out and counted."""
    found: list[BdRate | None] = []
    for reference, points in zip(references, curves, strict=True):
        try:
            found.append(bd_rate(reference, points, LOW, HIGH))
        except ValueError:
            found.append(None)
    there = [one for one in found if one is not None]
    return {
        "mean": round(float(np.mean([one.percent for one in there])), 1) if there else None,
        "pictures": len(there),
        "each": [None if one is None else round(one.percent, 1) for one in found],
        "covered": [None if one is None else [round(one.low, 2), round(one.high, 2)] for one in found],
    }


def tell(name: str, row: dict[str, Any], of: int) -> None:
    parts = []
    for other, found in row["bd_rate"].items():
        whole = sum(covered == [LOW, HIGH] for covered in found["covered"])
        parts.append(f"against {other} {found['mean']} % ({found['pictures']} of {of} pictures, {whole} over all of {LOW:g} to {HIGH:g} dB)")
    table = ", ".join(f"{size / 1000:g} KB: {value}" for size, value in zip(SIZES, row["psnr_at"], strict=True))
    print(f"{name}: {'; '.join([*parts, f'dB at {table}'])}; {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser, CURVES)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--figure", type=Path, default=RESULTS / "rate_distortion.png")
    arguments = parser.parse_args()
    samples = kodak()[: arguments.pictures]
    keys, pictures = [sample.key for sample in samples], [picture(sample) for sample in samples]
    units = [scaled(one) for one in pictures]
    before = read_result("rate_distortion")
    rows: dict[str, dict[str, Any]] = before["rows"] if before.get("pictures") == keys else {}
    for name in chosen_rows(parser, arguments.rows, CURVES):
        started = time.perf_counter()
        curves = [[(size, round(value, 3)) for size, value in front(points)] for points in CURVES[name](pictures)]
        rows[name] = {"seconds": round(time.perf_counter() - started, 1), "curves": curves}
        rows = {known: rows[known] for known in CURVES if known in rows}
        compare(rows, units)
        tell(name, rows[name], len(keys))
        write_result("rate_distortion", {"pictures": keys, "units": units, "sizes": SIZES, "interval": [LOW, HIGH], "rows": rows})
    from rate_distortion_plot import draw  # matplotlib: only where something is drawn

    draw(json.loads(json.dumps({"units": units, "rows": rows})), arguments.figure)
    print(f"wrote {arguments.figure}")


if __name__ == "__main__":
    main()
