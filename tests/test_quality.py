"""PSNR, masks and JPEG sizes."""

from __future__ import annotations

import io
import math
import tracemalloc

import numpy as np
import pytest
from conftest import draw_scene
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from rinr_loader import quality
from rinr_loader.quality import box_mask, jpeg, jpeg_bytes, mean_of, psnr


def flat(value: int, height: int = 4, width: int = 5) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize(("a", "b"), [(0, 255), (0, 1), (100, 110), (255, 0), (200, 190)])
def test_psnr_of_a_constant_error(a: int, b: int) -> None:
    assert psnr(flat(a), flat(b)) == pytest.approx(20 * math.log10(255 / abs(a - b)))
    assert psnr(flat(b), flat(a)) == psnr(flat(a), flat(b))


def test_equal_pictures_have_99_db_and_no_error_has_more() -> None:
    assert psnr(flat(7), flat(7)) == 99
    almost = flat(7, 1000, 1000)
    almost[0, 0, 0] = 8
    assert 90 < psnr(almost, flat(7, 1000, 1000)) <= 99


def test_a_mask_chooses_the_pixels_that_count() -> None:
    decoded = flat(10)
    decoded[0, 0] = 20
    mask = np.zeros((4, 5), bool)
    assert math.isnan(psnr(decoded, flat(10), mask))
    mask[0, :2] = True  # one wrong by 10, one right
    assert psnr(decoded, flat(10), mask) == pytest.approx(10 * math.log10(255**2 / 50))
    mask[0, 0] = False
    assert psnr(decoded, flat(10), mask) == 99


@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (5, 40), (40, 1)])
@pytest.mark.parametrize("pixels", [1, 8, 100])
def test_psnr_is_the_same_however_many_rows_are_compared_at_a_time(shape: tuple[int, int], pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(2))
    mask = rng.random(shape) < 0.5
    mask[0, 0] = True
    monkeypatch.setattr(quality, "_ROWS", pixels)
    wrong = (a.astype(float) - b) ** 2
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / wrong.mean()))
    assert psnr(a, b, mask) == pytest.approx(10 * math.log10(255**2 / wrong[mask].mean()))


def test_psnr_takes_little_memory() -> None:
    picture = np.zeros((3000, 3000, 3), np.uint8)
    tracemalloc.start()
    try:
        psnr(picture, picture)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * picture.nbytes


def test_psnr_is_over_all_channels() -> None:
    decoded = flat(10)
    decoded[..., 1] = 13
    assert psnr(decoded, flat(10)) == pytest.approx(10 * math.log10(255**2 / 3))


@example([(-5.0, -4.0, -1.0, -1.0)])
@example([(0.0, -4.0, 5.0, -1.0)])
@example([(12.0, 9.0, 13.0, 10.0)])
@given(st.lists(st.tuples(*[st.floats(-3, 12, allow_nan=False)] * 4), max_size=4))
def test_a_mask_is_every_pixel_that_a_box_touches(boxes: list[tuple[float, float, float, float]]) -> None:
    sorted_boxes = np.array([[min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)] for x0, y0, x1, y1 in boxes], np.float64).reshape(-1, 4)
    expected = np.zeros((7, 9), bool)
    for x0, y0, x1, y1 in sorted_boxes:
        for i in range(7):
            for j in range(9):  # the box rounded outward: from the pixel that holds its corner to the one that its end reaches into
                expected[i, j] |= math.floor(x0) <= j < math.ceil(x1) and math.floor(y0) <= i < math.ceil(y1)
    assert np.array_equal(box_mask(sorted_boxes, 7, 9), expected)


def test_jpeg_bytes_are_those_of_the_file() -> None:
    pixels = draw_scene(0).image
    sizes = [jpeg_bytes(pixels, quality) for quality in (5, 30, 95)]
    assert sizes == sorted(set(sizes))
    assert jpeg_bytes(flat(90, 64, 96), 30) < jpeg_bytes(pixels, 30)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=30, optimize=True)
    assert sizes[1] == len(file.getvalue())


def test_a_mean_leaves_out_what_was_not_measured() -> None:
    assert mean_of([np.array([30, np.nan], np.float32), np.array([40], np.float32)]) == pytest.approx(35)
    assert mean_of([np.array([np.nan], np.float32)]) is None
    assert mean_of([]) is None


@pytest.mark.parametrize("shape", [(64, 80, 3), (64, 80), (1, 1, 3), (3, 700, 3)])
@pytest.mark.parametrize("quality", [1, 94, 100])
def test_a_jpeg_of_noise(quality: int, shape: tuple[int, ...]) -> None:
    """More than Pillow makes room for at first."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(jpeg(pixels, quality, full_colour=True))) as image:
        image.load()
        assert image.size == shape[1::-1]
        if quality == 100:
            assert psnr(np.asarray(image.convert("RGB")), np.broadcast_to(pixels.reshape(*shape[:2], -1), (*shape[:2], 3))) > 40
