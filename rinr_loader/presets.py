"""Named settings of the encoder: network shapes and schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rinr_loader.bundle import Dtype, NetworkSpec
from rinr_loader.fit import Schedule

Mode = Literal["qre", "re", "de", "be", "bs"]
PresetName = Literal["paper", "fast", "balanced", "best"]

LR_LIMIT = 0.32
SINGLE_WIDTH = 35 / 28  # `bs` spends a residual's bytes on a wider background: 10x35 for 10x28


@dataclass(frozen=True)
class Preset:
    """Shapes and schedules of one preset.

    Args:
        backgrounds: Depth and width of the backgrounds, from small to large: the ladder.
        background: How a background is fitted.
        residuals: Largest box area in stored pixels, depth and width of each class of residuals: a ladder too. A residual that misses its
            target is fitted once more, a step up.
        residual: How a residual is fitted.
    """

    backgrounds: tuple[tuple[int, int], ...]
    background: Schedule
    residuals: tuple[tuple[float, int, int], ...]
    residual: Schedule


# Residual-INR, ICCAD'24: classes by box area. The seeds' learning rate is for 10,000 steps; shorter fits need a higher one.
PAPER_RESIDUALS = ((1000.0, 3, 10), (3000.0, 3, 15), (10000.0, 5, 17), (float("inf"), 5, 24))
# At equal bytes, five wide layers are 0.7 to 1.3 dB ahead of ten narrow ones and fit 1.3 times as fast (benchmarks/shapes.py).
LADDER = ((5, 24), (5, 32), (5, 48), (5, 64))
# The paper's 283 weights leave most DAC-SDC objects near 26 dB; 1,400 bring those below 1,000 pixels to 36 (benchmarks/shapes.py).
RESIDUALS = ((400.0, 3, 16), (1000.0, 4, 20), (3000.0, 4, 32), (10000.0, 5, 40), (float("inf"), 5, 48))

PRESETS: dict[PresetName, Preset] = {
    "paper": Preset(((10, 28),), Schedule(10_000, 2e-4, 8192), PAPER_RESIDUALS, Schedule(10_000, 2e-4, 1024)),
    "fast": Preset(LADDER, Schedule(600, 2e-3, 1024), RESIDUALS, Schedule(500, 3e-3, 256)),
    "balanced": Preset(LADDER, Schedule(2_000, 2e-3, 2048), RESIDUALS, Schedule(1_500, 3e-3, 512)),
    "best": Preset(LADDER, Schedule(8_000, 2e-3, 4096), RESIDUALS, Schedule(5_000, 2e-3, 1024)),
}


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a bundle, besides the picture and its boxes.

    Args:
        preset: Name of the shapes and schedules.
        mode: What is stored, as in Residual-INR's table: `qre` int8 background and 16-bit residuals, `re` both in 16 bits, `de` objects as
            networks of their own colour instead of residuals, `be` no objects, `bs` no objects and a wider background.
        target_psnr: PSNR in dB of the whole picture at which a background is good enough; None runs every step.
        object_psnr: PSNR in dB inside a label box at which a residual is good enough; None runs every step.
        seed: Of all randomness.
        half: Fit with float16 matrix products (CUDA only).
    """

    preset: PresetName = "balanced"
    mode: Mode = "qre"
    target_psnr: float | None = None
    object_psnr: float | None = None
    seed: int = 0
    half: bool = False

    @property
    def has_residuals(self) -> bool:
        return self.mode in ("qre", "re", "de")

    def ladder(self) -> tuple[NetworkSpec, ...]:
        """Shapes a background can have, from small to large."""
        dtype: Dtype = "int8" if self.mode == "qre" else "float16"
        widen = SINGLE_WIDTH if self.mode == "bs" else 1
        shapes = PRESETS[self.preset].backgrounds
        return tuple(NetworkSpec("background", depth, round(width * widen), dtype) for depth, width in shapes)

    def residual_spec(self, area: float) -> NetworkSpec:
        """Shape of the residual of a box of `area` stored pixels."""
        return self._residual(next(i for i, (limit, *_) in enumerate(PRESETS[self.preset].residuals) if area <= limit))

    def larger_residual(self, spec: NetworkSpec) -> NetworkSpec | None:
        """The next step of the ladder of residuals, None at its end."""
        steps = [self._residual(i) for i in range(len(PRESETS[self.preset].residuals))]
        return next(iter(steps[steps.index(spec) + 1 :]), None)

    def _residual(self, step: int) -> NetworkSpec:
        _, depth, width = PRESETS[self.preset].residuals[step]
        return NetworkSpec("direct" if self.mode == "de" else "residual", depth, width, "float16")

    def background_schedule(self, spec: NetworkSpec) -> Schedule:
        return _for_shape(PRESETS[self.preset].background, spec)

    def residual_schedule(self, spec: NetworkSpec) -> Schedule:
        schedule = PRESETS[self.preset].residual
        # Deep residuals are those of large boxes: more pixels a step, or they idle through a short fit.
        return _for_shape(replace(schedule, pixels=schedule.pixels * 2 ** (spec.depth - 3)), spec)


def _for_shape(schedule: Schedule, spec: NetworkSpec) -> Schedule:
    """Deep and wide networks take smaller steps: above about LR_LIMIT / (depth * width) they fall apart again and again."""
    return replace(schedule, lr=min(schedule.lr, LR_LIMIT / (spec.depth * spec.width)))
