"""Trainings that take seconds, and the dictionary that one of them gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from conftest import draw_scene
from torch import Tensor

from rinr_loader import assemble, training
from rinr_loader.analysis import dump_analysis
from rinr_loader.training import Pictures, TrainSettings, train

TINY = TrainSettings(steps=3, channels=16, classes=4, groups=(4, 8, 12, 16), crop=32, batch=2)


@contextmanager
def small() -> Iterator[None]:
    """Fit components and tables to a few crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "START_BATCHES", 4)
        patch.setattr(training, "SAVE_EVERY", 2)
        patch.setattr(training, "VALIDATE_EVERY", 2)
        patch.setattr(assemble, "CROPS", 3)
        patch.setattr(assemble, "SIDE", 64)
        patch.setattr(assemble, "STEPS", (40.0, 100.0))
        patch.setattr(assemble, "ITERATIONS", 1)
        patch.setattr(assemble, "RESIDUAL_STEPS", (12.0,))
        yield


def scene(seed: int, *, width: int = 96, height: int = 64) -> Tensor:
    """A drawn picture, uint8 `(3, H, W)`."""
    return torch.from_numpy(np.ascontiguousarray(draw_scene(seed, width=width, height=height).image.transpose(2, 0, 1)))


@cache
def tiny_pictures() -> Pictures:
    """Drawn pictures of two sources."""
    return Pictures([[scene(k) for k in range(4)], [scene(9, width=40, height=80)]], [scene(5)], [2.0, 1.0])


@cache
def tiny_files() -> tuple[bytes, bytes]:
    """A dictionary of 16 channels and its analysis."""
    with small():
        model, _ = train(tiny_pictures(), TINY)
        dictionary = assemble.assemble(model, tiny_pictures(), TINY, {"steps": TINY.steps})
    return dictionary, dump_analysis(assemble.trained_analysis(model), hashlib.sha256(dictionary).hexdigest())
