"""Named settings of the encoder: network shapes and schedules."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from rinr_loader.bundle import Dtype, Kind, NetworkSpec
from rinr_loader.errors import ConfigError
from rinr_loader.fit import Schedule
from rinr_loader.specs import Family

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
        residuals: Depth and width of the residuals, from small to large.
        residual_areas: Largest box area in stored pixels of each class of residuals but the last, for fits without a target.
        residual: How a residual is fitted.
        object_psnr: Target in dB inside label boxes where none is given; None runs every step.
    """

    backgrounds: tuple[tuple[int, int], ...]
    background: Schedule
    residuals: tuple[tuple[int, int], ...]
    residual_areas: tuple[float, ...]
    residual: Schedule
    object_psnr: float | None = None


# Residual-INR, ICCAD'24: classes by box area. The seeds' learning rate is for 10,000 steps; shorter fits need a higher one.
PAPER_RESIDUALS = ((3, 10), (3, 15), (5, 17), (5, 24))
PAPER_AREAS = (1000.0, 3000.0, 10000.0)
# At equal bytes, five wide layers are 0.7 to 1.3 dB ahead of ten narrow ones and fit 1.3 times as fast (benchmarks/shapes.py).
LADDER = ((5, 24), (5, 32), (5, 48), (5, 64))
# By target: the paper's 283 weights leave most DAC-SDC objects near 26 dB, 1,400 bring those below 1,000 pixels to 36, and an object
# that the background already gives well needs few.
RESIDUALS = ((3, 10), (3, 16), (4, 20), (4, 32), (5, 40))
OBJECT_PSNR = 35.0


def _preset(background: Schedule, residual: Schedule) -> Preset:
    return Preset(LADDER, background, RESIDUALS, (*PAPER_AREAS, float("inf")), residual, OBJECT_PSNR)


PRESETS: dict[PresetName, Preset] = {
    "paper": Preset(((10, 28),), Schedule(10_000, 2e-4, 8192), PAPER_RESIDUALS, PAPER_AREAS, Schedule(10_000, 2e-4, 1024)),
    "fast": _preset(Schedule(600, 2e-3, 1024), Schedule(500, 3e-3, 256)),
    "balanced": _preset(Schedule(2_000, 2e-3, 2048), Schedule(1_500, 3e-3, 512)),
    "best": _preset(Schedule(8_000, 2e-3, 4096), Schedule(5_000, 2e-3, 1024)),
}


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a bundle, besides the picture and its boxes.

    A family has a meaning for some of them only, see `UNDERSTOOD`; the others keep their defaults.

    Args:
        preset: Name of the shapes and schedules.
        mode: What is stored, as in Residual-INR's table: `qre` int8 background and 16-bit residuals, `re` both in 16 bits, `de` objects as
            networks of their own colour instead of residuals, `be` no objects, `bs` no objects and a wider background.
        target_psnr: PSNR in dB of the whole picture at which a background is good enough; None runs every step.
        object_psnr: PSNR in dB inside a label box at which a residual is good enough; None takes the preset's: 35, but for `paper`,
            which runs every step.
        seed: Of all randomness.
        half: Fit with float16 matrix products (CUDA only).
        family: What pictures are stored as.
        refine: Steps in which latents are refined.
        max_bytes: Bytes of a bundle at most.
        layers: Layers of the synthesis, 1 or 2.
        dictionary: SHA-256, in hexadecimal, of the file of shared parameters.
    """

    preset: PresetName = "balanced"
    mode: Mode = "qre"
    target_psnr: float | None = None
    object_psnr: float | None = None
    seed: int = 0
    half: bool = False
    family: Family = "tile"
    refine: int = 0
    max_bytes: int | None = None
    layers: int = 2
    dictionary: str = ""

    def describe(self) -> dict[str, Any]:
        """The settings that the family understands, as stored in `dataset.json`."""
        return {"family": self.family, **{name: getattr(self, name) for name in UNDERSTOOD[self.family]}}

    @property
    def has_residuals(self) -> bool:
        return self.mode in ("qre", "re", "de")

    def ladder(self) -> tuple[NetworkSpec, ...]:
        """Shapes a background can have, from small to large."""
        dtype: Dtype = "int8" if self.mode == "qre" else "float16"
        widen = SINGLE_WIDTH if self.mode == "bs" else 1
        shapes = PRESETS[self.preset].backgrounds
        return tuple(NetworkSpec("background", depth, round(width * widen), dtype) for depth, width in shapes)

    @property
    def object_target(self) -> float | None:
        """PSNR in dB that a residual is fitted to."""
        return PRESETS[self.preset].object_psnr if self.object_psnr is None else self.object_psnr

    def residual_ladder(self) -> tuple[NetworkSpec, ...]:
        """Shapes a residual can have, from small to large."""
        kind: Kind = "direct" if self.mode == "de" else "residual"
        return tuple(NetworkSpec(kind, depth, width, "float16") for depth, width in PRESETS[self.preset].residuals)

    def residual_class(self, area: float) -> NetworkSpec:
        """Shape of the residual of a box of `area` stored pixels, where no target decides."""
        return self.residual_ladder()[sum(area > limit for limit in PRESETS[self.preset].residual_areas)]

    def larger_residual(self, spec: NetworkSpec) -> NetworkSpec | None:
        """The next step of the ladder of residuals, None at its end."""
        ladder = self.residual_ladder()
        return next(iter(ladder[ladder.index(spec) + 1 :]), None)

    def background_schedule(self, spec: NetworkSpec) -> Schedule:
        return _for_shape(PRESETS[self.preset].background, spec)

    def residual_schedule(self, spec: NetworkSpec) -> Schedule:
        schedule = PRESETS[self.preset].residual
        # Deep residuals are those of large boxes: more pixels a step, or they idle through a short fit.
        return _for_shape(replace(schedule, pixels=schedule.pixels * 2 ** max(0, spec.depth - 3)), spec)


# Settings that each family has a meaning for, besides `family`.
UNDERSTOOD: dict[Family, tuple[str, ...]] = {
    "siren": ("preset", "mode", "target_psnr", "object_psnr", "seed", "half"),
    "tile": ("mode", "target_psnr", "object_psnr", "seed", "refine", "max_bytes", "layers", "dictionary"),
    "jpeg": ("target_psnr", "object_psnr", "seed", "max_bytes"),  # a seed without randomness does no harm
}
MODES: dict[Family, tuple[Mode, ...]] = {"siren": ("qre", "re", "de", "be", "bs"), "tile": ("qre", "be"), "jpeg": ("qre",)}


def check_settings(settings: Settings) -> None:
    """Check that settings fit their family.

    Raises:
        ConfigError: One has no meaning for it, or is out of its range.
    """
    family = settings.family
    if family not in UNDERSTOOD:
        raise ConfigError(f"family: expected one of {', '.join(UNDERSTOOD)}, got {family!r}")
    defaults = Settings()
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name not in ("family", *UNDERSTOOD[family]) and value != getattr(defaults, field.name):
            raise ConfigError(f"{field.name}: expected none for family {family}, got {value!r}; leave it out, or choose another family")
    if settings.mode not in MODES[family]:
        raise ConfigError(f"mode: expected one of {', '.join(MODES[family])} for family {family}, got {settings.mode!r}; choose one of these")
    ranges = (
        ("refine", "0 steps or more", settings.refine >= 0),
        ("max_bytes", "at least 1", settings.max_bytes is None or settings.max_bytes >= 1),
        ("layers", "1 or 2", settings.layers in (1, 2)),
    )
    for name, expected, good in ranges:
        if not good:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(settings, name)}")


def _for_shape(schedule: Schedule, spec: NetworkSpec) -> Schedule:
    """Deep and wide networks take smaller steps: above about LR_LIMIT / (depth * width) they fall apart again and again."""
    return replace(schedule, lr=min(schedule.lr, LR_LIMIT / (spec.depth * spec.width)))
