"""PSNR as the design defines it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rinr_loader.quality import box_mask, jpeg_bytes, mean_of, psnr


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    source = np.full((4, 5, 3), 100, np.uint8)
    decoded = source.copy()
    decoded[0, 0, 0] += 30
    assert psnr(decoded, source) == pytest.approx(10 * math.log10(255**2 / (900 / 60)))
    assert psnr(source, decoded) == psnr(decoded, source), "unsigned differences do not wrap"


def test_equal_pictures_have_99_db_and_nothing_has_none() -> None:
    source = np.zeros((2, 2, 3), np.uint8)
    assert psnr(source, source) == 99.0
    assert math.isnan(psnr(source, source, np.zeros((2, 2), np.bool_)))


def test_only_masked_pixels_count() -> None:
    source, decoded = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    decoded[1, 1] = 255
    mask = np.array([[True, False], [False, False]])
    assert psnr(decoded, source, mask) == 99.0
    assert psnr(decoded, source, ~mask) == pytest.approx(10 * math.log10(3))


def test_boxes_are_rounded_outward_and_joined() -> None:
    mask = box_mask(np.array([[0.9, 0.1, 2.1, 1.0], [2.0, 0.0, 9.0, 0.5]]), 2, 4)
    assert mask.tolist() == [[True, True, True, True], [False, False, False, False]]
    assert not box_mask(np.zeros((0, 4)), 2, 4).any()


def test_detail_costs_jpeg_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert jpeg_bytes(noise, 30) > 4 * jpeg_bytes(np.zeros_like(noise), 30)
    assert jpeg_bytes(noise, 90) > jpeg_bytes(noise, 30)


def test_a_mean_leaves_out_what_was_not_measured() -> None:
    assert mean_of([np.array([30, np.nan], np.float32), np.array([40], np.float32)]) == pytest.approx(35)
    assert mean_of([np.array([np.nan], np.float32)]) is None
    assert mean_of([]) is None
