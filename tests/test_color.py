"""HSV augmentation with Ultralytics' meaning, and normalisation."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st

from rinr_loader.color import IMAGENET_MEAN, IMAGENET_STD, adjust_hsv, hsv_gains, normalize

GAINS = [(0.0, 0.0, 0.0), (0.015, 0.7, 0.4), (-0.015, -0.7, -0.4), (0.5, 1.0, -1.0), (-0.31, 0.2, 0.9)]


def all_colors() -> torch.Tensor:
    """Every colour on a grid, greys, and pure colours: one image, uint8."""
    levels = torch.tensor([0, 1, 2, 31, 64, 100, 127, 128, 200, 240, 254, 255], dtype=torch.uint8)
    grid = torch.cartesian_prod(levels, levels, levels)
    rest = torch.randint(0, 256, (4096 - len(grid), 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.cat([grid, rest]).T.reshape(1, 3, 64, 64)


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("gains", GAINS)
def test_uint8_equals_ultralytics(gains: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.data.augment import RandomHSV

    images = all_colors()
    bgr = np.ascontiguousarray(images[0].permute(1, 2, 0).numpy()[..., ::-1])
    ranges = {"hgain": 1.0, "sgain": 1.0, "vgain": 1.0}
    with monkeypatch.context() as scope:
        scope.setattr(np.random, "uniform", lambda low, high, count: np.array(gains))
        theirs = RandomHSV(**ranges).apply_image({"img": bgr.copy()})["img"][..., ::-1]
    ours = adjust_hsv(images, torch.tensor([gains]))[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.25  # rounding in another order, not another meaning
    if any(gains):
        assert np.abs(ours.astype(int) - bgr[..., ::-1]).mean() > 5


@given(color=st.tuples(*[st.floats(0, 1, width=32)] * 3), gains=st.tuples(st.floats(-0.5, 0.5), st.floats(-1, 1), st.floats(-1, 1)))
def test_floats_equal_colorsys(color: tuple[float, float, float], gains: tuple[float, float, float]) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*color)
    saturation, value = min(saturation * (1 + gains[1]), 1), min(value * (1 + gains[2]), 1)
    expected = colorsys.hsv_to_rgb((hue + gains[0]) % 1, saturation, value)
    if max(color) - min(color) < 1e-4:
        expected = (value, value, value)  # the hue of a grey is a matter of rounding
    ours = adjust_hsv(torch.tensor(color).view(1, 3, 1, 1), torch.tensor([gains]))
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_every_image_has_its_own_gains(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    images = all_colors().repeat(len(GAINS), 1, 1, 1)
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    before = images.clone()
    together = adjust_hsv(images, torch.tensor(GAINS))
    assert together.dtype == dtype
    assert torch.equal(images, before)
    for k, gains in enumerate(GAINS):
        assert torch.equal(adjust_hsv(images[k : k + 1], torch.tensor([gains]))[0], together[k])
    monkeypatch.setattr("rinr_loader.color._PIXELS_CPU", 2 * 64 * 64)  # two images at a time
    assert torch.equal(adjust_hsv(images, torch.tensor(GAINS)), together)


def test_greys_stay_grey_and_white_stays_white() -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(adjust_hsv(greys, torch.tensor([[0.4, 1.0, 0.0]])), greys)


def test_layout_and_empty_batches_survive() -> None:
    images = all_colors().repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    adjusted = adjust_hsv(images, torch.tensor(GAINS[:2]))
    assert adjusted.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(adjusted, adjust_hsv(images.contiguous(), torch.tensor(GAINS[:2])))
    assert adjust_hsv(images[:0], torch.zeros(0, 3)).shape == (0, 3, 64, 64)


def test_integers_other_than_uint8_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected uint8 or floating point, got torch\.int32"):
        adjust_hsv(torch.zeros(1, 3, 2, 2, dtype=torch.int32), torch.zeros(1, 3))


def test_gains_fill_their_ranges() -> None:
    numbers = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.75, 0.75, 1.0]])
    expected = torch.tensor([[-0.015, -0.7, -0.4], [0.0, 0.0, 0.0], [0.0075, 0.35, 0.4]])
    assert_close(hsv_gains(numbers, hue=0.015, saturation=0.7, value=0.4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize(dtype: torch.dtype) -> None:
    images = all_colors()
    scaled = images.double() / 255
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    expected = ((scaled - mean) / std).to(dtype)
    for given_images in (images, scaled.float()):
        normalized = normalize(given_images, IMAGENET_MEAN, IMAGENET_STD, dtype=dtype)
        assert normalized.dtype == dtype
        torch.testing.assert_close(normalized, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colors_are_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    images = all_colors().repeat(len(GAINS), 1, 1, 1)
    images = images if dtype == torch.uint8 else images / 255
    here, there = adjust_hsv(images, torch.tensor(GAINS)), adjust_hsv(images.cuda(), torch.tensor(GAINS))
    assert there.is_cuda
    assert_close(there, here, "pixels" if dtype == torch.uint8 else "float32")
