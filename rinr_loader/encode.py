"""Pictures with boxes to bundles, a unit of pictures at a time, by the family that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from rinr_loader import encode_jpeg, encode_siren, encode_tile
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings, check_settings
from rinr_loader.specs import Family


class Encoder(Protocol):
    """What encodes a unit; see `encode_unit`."""

    def __call__(
        self,
        pictures: Sequence[Picture],
        settings: Settings,
        *,
        unit: str,
        device: torch.device | str,
        threads: int | None,
        on_background: Callable[[], None] | None,
        shared: Mapping[str, bytes],
    ) -> list[bytes]: ...


ENCODERS: dict[Family, Encoder] = {"siren": encode_siren.encode_unit, "tile": encode_tile.encode_unit, "jpeg": encode_jpeg.encode_unit}


def encode_unit(
    pictures: Sequence[Picture],
    settings: Settings,
    *,
    unit: str,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    on_background: Callable[[], None] | None = None,
    shared: Mapping[str, bytes] | None = None,
) -> list[bytes]:
    """Encode pictures together. Their bytes depend on their content and on the settings alone.

    Args:
        pictures: At most a few dozen; sizes may differ.
        settings: Family, targets and seed, and what else the family has.
        unit: Name of the unit; with the seed it decides all randomness.
        device: Where to fit.
        threads: Threads that share the work on a CPU; the bytes do not depend on it. All cores by default.
        on_background: Called, from any thread, after most of the work of each picture.
        shared: Files of shared parameters by the SHA-256 that names them, for families that have some.

    Returns:
        One bundle each, in order.

    Raises:
        ConfigError: The device is not there, or the settings do not fit together.
    """
    check_settings(settings)
    encode = ENCODERS[settings.family]
    return encode(pictures, settings, unit=unit, device=device, threads=threads, on_background=on_background, shared=shared or {})
