"""The curves of benchmarks/rate_distortion.py as a picture.

python benchmarks/rate_distortion_plot.py docs/rate_distortion.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from common import read_result
from rates import front, psnr_at

AREA_BITS = 8 / (640 * 360)  # bits a pixel for one byte a 640x360 picture
LEFT, RIGHT = 3_000, 45_000  # bytes for 640x360 pixels
# Colour, line and label; rows without one are not drawn.
STYLES: dict[str, tuple[str, str, str]] = {
    "tile-2-refine-10": ("#b2182b", "-", "tile-2, 10 steps of refinement"),
    "tile-2": ("#b2182b", "--", "tile-2, one pass"),
    "tile-1-refine-10": ("#ef8a62", "-", "tile-1, 10 steps of refinement"),
    "tile-1": ("#ef8a62", "--", "tile-1, one pass"),
    "AVIF": ("#1b7837", "-", "AVIF (speed 6)"),
    "WebP": ("#2166ac", "-", "WebP (method 6)"),
    "JPEG": ("#222222", "-", "JPEG (4:2:0, optimized)"),
    "siren": ("#762a83", ":", "siren, int8 (balanced)"),
}


def mean_curve(curves: Sequence[Sequence[Sequence[float]]], units: Sequence[float]) -> tuple[list[float], list[float]]:
    """Bytes for 640x360 pixels and mean PSNR of the pictures, each at that size, wherever every picture has a curve."""
    curves = [front([(size, psnr) for size, psnr in curve]) for curve in curves]
    low = max(curve[0][0] / unit for curve, unit in zip(curves, units, strict=True))
    high = min(curve[-1][0] / unit for curve, unit in zip(curves, units, strict=True))
    drawn: tuple[list[float], list[float]] = ([], [])
    for size in np.geomspace(low, high, 60).tolist() if low < high else []:
        values = [psnr_at(curve, size * unit) for curve, unit in zip(curves, units, strict=True)]
        there = [value for value in values if value is not None]
        if len(there) == len(values):  # the very ends may fall outside by rounding
            drawn[0].append(size)
            drawn[1].append(sum(there) / len(there))
    return drawn


def draw(result: dict[str, Any], where: Path) -> None:
    """Draw a result of benchmarks/rate_distortion.py as PNG."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown: list[float] = []
    figure, axes = plt.subplots(figsize=(8, 5.5), dpi=150)
    for name, (colour, line, label) in STYLES.items():
        if name in result["rows"]:
            sizes, values = mean_curve(result["rows"][name]["curves"], result["units"])
            shown += [value for size, value in zip(sizes, values, strict=True) if LEFT <= size <= RIGHT]
            axes.plot([size * AREA_BITS for size in sizes], values, line, color=colour, label=label, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LEFT * AREA_BITS, RIGHT * AREA_BITS)
    ticks = [t for t in (0.125, 0.25, 0.5, 1.0, 2.0) if LEFT * AREA_BITS <= t <= RIGHT * AREA_BITS]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("bits per pixel")
    above = axes.secondary_xaxis("top")
    sizes_above = [s for s in (4, 7, 10, 14, 22, 29, 40) if LEFT <= 1000 * s <= RIGHT]
    above.set_xticks([1000 * s * AREA_BITS for s in sizes_above], [f"{s}" for s in sizes_above])
    above.minorticks_off()
    axes.minorticks_off()
    above.set_xlabel("KB for 640x360 pixels")
    axes.set_ylabel("PSNR in dB, mean of the pictures at that size")
    low, high = math.floor(min(shown, default=20)), math.ceil(max(shown, default=40))
    axes.set_ylim(low, high)
    axes.set_yticks(range(low, high + 1, 2))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    axes.set_title(f"Kodak, {len(result['units'])} pictures", fontsize=11)
    figure.tight_layout()
    where.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(where)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", type=Path)
    arguments = parser.parse_args()
    draw(read_result("rate_distortion"), arguments.where)


if __name__ == "__main__":
    main()
