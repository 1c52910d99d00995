"""What a picture is encoded to: the PSNR that it and its objects shall have."""

from __future__ import annotations

from rinr_loader.picture import Picture
from rinr_loader.presets import Settings

# PSNR in dB of the family `tile` where no target is given: modest where residuals give the objects their quality, and higher where nothing else will.
TARGET_WITH_RESIDUALS, TARGET_ALONE, OBJECT_TARGET = 27.0, 32.0, 35.0


def takes_residuals(picture: Picture, settings: Settings) -> bool:
    """Whether a picture's objects are encoded for themselves."""
    return settings.has_residuals and not picture.blind and bool((~picture.crowd).any())


def targets_of(picture: Picture, settings: Settings) -> tuple[float | None, float | None]:
    """PSNR in dB that a picture and its objects shall have, None for none: those of the settings, and those of `tile` where there are none."""
    objects = takes_residuals(picture, settings)
    target, object_target = settings.target_psnr, settings.object_psnr if objects else None
    if settings.family == "tile":
        if target is None:
            target = TARGET_WITH_RESIDUALS if objects else TARGET_ALONE
        if objects and object_target is None:
            object_target = OBJECT_TARGET
    return target, object_target
