"""Settings whose fits take a fraction of a second, also in spawned worker processes, where patched presets would not arrive."""

from __future__ import annotations

from dataclasses import dataclass

from rinr_loader.bundle import NetworkSpec
from rinr_loader.fit import Schedule
from rinr_loader.presets import Settings
from rinr_loader.specs import Family


@dataclass(frozen=True)
class TinySettings(Settings):
    """One small shape of each kind, a few dozen steps."""

    family: Family = "siren"

    def ladder(self) -> tuple[NetworkSpec, ...]:
        return (NetworkSpec("background", 2, 6, "int8"),)

    def residual_ladder(self) -> tuple[NetworkSpec, ...]:
        return (NetworkSpec("residual", 2, 5, "float16"),)

    def residual_class(self, area: float) -> NetworkSpec:
        return self.residual_ladder()[0]

    def background_schedule(self, spec: NetworkSpec) -> Schedule:
        return Schedule(30, 2e-3, 128)

    def residual_schedule(self, spec: NetworkSpec) -> Schedule:
        return Schedule(20, 3e-3, 64)
