"""Encoding to the family `tile`: targets, limits, kinds of pictures and boxes, and what the bytes depend on."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_scene
from conftest import psnr as whole_psnr
from dictionaries import natural, tiny_analysis, tiny_dictionary, tiny_shared
from numpy.typing import NDArray
from PIL import Image

from rinr_loader import encode_tile
from rinr_loader.analysis import dump_analysis, load_analysis
from rinr_loader.bundle import Bundle, JpegSpec, TileSpec, parse
from rinr_loader.codecs import tile
from rinr_loader.decode import decode_batch
from rinr_loader.dictionary import shipped
from rinr_loader.encode import encode_unit
from rinr_loader.encode_tile import CLOSE, MOST_STEP, analyse, search
from rinr_loader.errors import ConfigError
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.residuals import FEATHER
from rinr_loader.targets import OBJECT_TARGET, TARGET_ALONE, TARGET_WITH_RESIDUALS

CHANNELS = 96
TINY = tiny_dictionary(CHANNELS)
SHARED = {TINY.key: TINY}


def picture(
    pixels: NDArray[np.uint8], boxes: Any = (), *, crowd: Sequence[bool] | None = None, source: tuple[int, int] | None = None, **more: Any
) -> Picture:
    corners = np.asarray(boxes, np.float32).reshape(-1, 4)
    flags = np.zeros(len(corners), np.bool_) if crowd is None else np.asarray(crowd, np.bool_)
    return Picture(pixels, source or (pixels.shape[0], pixels.shape[1]), corners, np.arange(len(corners)), flags, **more)


def busy(seed: int = 0, height: int = 80, width: int = 112, *, boxes: bool = True, **more: Any) -> Picture:
    """A smooth picture with two textured objects, which a background shows badly."""
    pixels = natural(seed, height, width).astype(np.int64)
    corners = [[10, 12, 38.5, 40], [60.25, 30, 96, 61]]
    rng = np.random.default_rng(seed)
    for x0, y0, x1, y1 in corners:
        part = pixels[int(y0) : int(y1), int(x0) : int(x1)]
        part += rng.integers(-10, 11, part.shape)
    return picture(np.clip(pixels, 0, 255).astype(np.uint8), corners if boxes else (), **more)


def encode_bytes(*pictures: Picture, unit: str = "unit", threads: int = 1, **settings: Any) -> list[bytes]:
    wanted = Settings(family="tile", dictionary=TINY.sha256, **settings)
    return encode_unit(pictures, wanted, unit=unit, threads=threads, shared=tiny_shared(CHANNELS))


def encode(one: Picture, **settings: Any) -> Bundle:
    return parse(encode_bytes(one, **settings)[0])


def decoded(data: bytes) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = decode_batch([data], shared=SHARED)[0].permute(1, 2, 0).numpy()
    return pixels


def inside(one: Picture, number: int | None = None) -> NDArray[np.bool_]:
    """Stored pixels of a box, rounded outward, or of all boxes that are no crowd."""
    mask = np.zeros(one.pixels.shape[:2], bool)
    for i, (x0, y0, x1, y1) in enumerate(one.stored_boxes):
        if i == number or (number is None and not one.crowd[i]):
            mask[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] = True
    return mask


def specs(bundle: Bundle) -> list[str]:
    return [network.spec.kind for network in bundle.networks]


# --- targets ---


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("target", [28.0, 29.5, 31.5])
def test_a_target_is_reached_and_not_by_far(target: float, layers: int) -> None:
    one = busy(boxes=False)
    data = encode_bytes(one, target_psnr=target, layers=layers)[0]
    found = whole_psnr(decoded(data), one.pixels)
    assert target <= found < target + 0.25
    parsed = parse(data)
    assert parsed.psnr == pytest.approx(found, abs=0.006)
    first = parsed.networks[0].spec
    assert isinstance(first, TileSpec)
    assert (first.layers, parsed.shared) == (layers, TINY.key)


def test_a_higher_target_costs_more() -> None:
    sizes = [len(encode_bytes(busy(boxes=False), target_psnr=target)[0]) for target in (26.0, 28.0, 30.0, 32.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2 * sizes[0]


@pytest.mark.parametrize("object_target", [31.0, 36.0])
def test_the_objects_reach_their_target(object_target: float) -> None:
    one = busy()
    data = encode_bytes(one, target_psnr=24.0, object_psnr=object_target)[0]
    parsed, pixels = parse(data), decoded(data)
    assert specs(parsed) == ["background", "residual", "residual"]
    assert [network.object for network in parsed.networks[1:]] == [1, 0]  # the largest first
    assert all(network.feather == FEATHER for network in parsed.networks[1:])
    for number in range(2):
        mask = inside(one, number)
        assert object_target <= whole_psnr(pixels[mask], one.pixels[mask]) < object_target + 1
    mask = inside(one)
    assert parsed.object_psnr == pytest.approx(whole_psnr(pixels[mask], one.pixels[mask]), abs=0.006)
    for network in parsed.networks[1:]:  # no seam tells where the box is
        x0, y0, x1, y1 = one.stored_boxes[network.object]
        left, top, right, bottom = network.rect
        assert left <= x0 - FEATHER or left == 0
        assert top <= y0 - FEATHER or top == 0
        assert right >= x1 + FEATHER or right == one.pixels.shape[1]
        assert bottom >= y1 + FEATHER or bottom == one.pixels.shape[0]


def overlapping(seed: int) -> Picture:
    """Objects that lie over each other, each with a texture of its own."""
    rng = np.random.default_rng(seed)
    pixels, boxes = natural(seed % 5, 80, 112).astype(np.int64), []
    for _ in range(4):
        x0, y0 = rng.integers(0, 70), rng.integers(0, 50)
        boxes.append([x0, y0, x0 + rng.integers(8, 42), y0 + rng.integers(8, 30)])
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        part = pixels[y0:y1, x0:x1]
        part += rng.integers(-8 * (k + 1), 8 * (k + 1) + 1, part.shape)
    return picture(np.clip(pixels, 0, 255).astype(np.uint8), boxes)


@pytest.mark.parametrize("seed", [0, 16, 33])  # of the latter two, the last residual spoils another's object by 1 dB
def test_objects_that_overlap_reach_their_target_together(seed: int) -> None:
    one = overlapping(seed)
    data = encode_bytes(one, target_psnr=24.0, object_psnr=33.0)[0]
    networks = parse(data).networks
    assert parse(data).family == "tile"
    assert [network.spec.kind for network in networks] == ["background", *["residual"] * (len(networks) - 1)]
    numbers = [network.object for network in networks[1:]]
    assert len(set(numbers)) == len(numbers), "one for an object"
    pixels = decoded(data)
    for number in range(4):
        mask = inside(one, number)
        assert whole_psnr(pixels[mask], one.pixels[mask]) >= 33.0


def test_an_object_that_is_good_enough_has_no_residual() -> None:
    one = picture(natural(3, 64, 64), [[20, 20, 40, 40]])
    assert specs(encode(one, target_psnr=30.0, object_psnr=20.0)) == ["background"]


def test_without_a_target_there_is_a_sensible_one() -> None:
    with_objects, without = encode(busy()), encode(busy(boxes=False))
    assert (with_objects.psnr or 0) >= TARGET_WITH_RESIDUALS
    assert (with_objects.object_psnr or 0) >= OBJECT_TARGET - 0.01
    assert TARGET_ALONE <= (without.psnr or 0) < TARGET_ALONE + 0.5


def test_refinement_lowers_bytes_at_the_same_psnr() -> None:
    one = picture(natural(5, 128, 160))
    analysis, _ = load_analysis(tiny_analysis(CHANNELS), "tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # that of the tests is exact: refinement would find nothing to mend
        analysis.linear.weight[3:] *= 1 + 0.3 * torch.randn(CHANNELS - 3, 1, 1, 1, generator=generator)
    shared = {TINY.sha256: TINY.data, "analysis": dump_analysis(analysis, TINY.sha256)}
    plain, refined = (
        encode_unit([one], Settings(family="tile", dictionary=TINY.sha256, target_psnr=29.0, refine=steps), unit="u", threads=1, shared=shared)[0]
        for steps in (0, 40)
    )
    for data in (plain, refined):
        assert parse(data).family == "tile"
        assert 29.0 <= whole_psnr(decoded(data), one.pixels) < 29.2
    assert len(refined) < len(plain)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("first", "last"), [(0, 7), (0, 3), (3, 5), (5, 7), (2, 3)])
def test_the_error_of_a_band_falls_as_that_of_the_picture(layers: int, first: int, last: int) -> None:
    dictionary, columns, step = TINY, 4, 60.0
    coder = encode_tile._coder(dictionary, load_analysis(tiny_analysis(CHANNELS), "tiny")[0])
    generator = torch.Generator().manual_seed(first)
    integers = torch.randn(7 * columns, CHANNELS, generator=generator).mul(0.7).round()
    weights = dict(dictionary.filter) if layers == 2 else None
    wanted = torch.from_numpy(natural(2, 112, 64)).permute(2, 0, 1)[None].float() - 127.5
    band, low, high = slice(first * columns, last * columns), max(0, first - 1), min(7, last + 1)
    around, part = integers[low * columns : high * columns], wanted[:, :, low * 16 : high * 16]
    gradient, error = encode_tile._error(coder, around, first - low, part, step, weights, integers[band])

    def whole(moved: torch.Tensor) -> torch.Tensor:
        values = torch.cat([integers[: band.start], moved, integers[band.stop :]]).T.unflatten(1, (7, columns))
        return (tile.picture(values, dictionary.basis, weights, step) - wanted[0]).square()[:, max(0, first * 16 - 8) : last * 16 + 8].sum() / step**2

    moved = integers[band].clone().requires_grad_()
    expected = whole(moved)
    (wanted_gradient,) = torch.autograd.grad(expected, moved)
    assert error == pytest.approx(float(expected.detach()), rel=1e-4)
    scale = float(wanted_gradient.abs().max())
    torch.testing.assert_close(gradient / scale, wanted_gradient / scale, atol=2e-3, rtol=0)


def test_a_large_picture_is_refined_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    one = picture(natural(5, 128, 160))
    sizes = {}
    for band in (8192, 20, 1):
        monkeypatch.setattr(encode_tile, "BAND", band)
        data = encode_bytes(one, target_psnr=29.0, refine=12, mode="be")[0]
        assert 29.0 <= whole_psnr(decoded(data), one.pixels) < 29.2
        sizes[band] = len(data)
    assert sizes[20] == pytest.approx(sizes[8192], rel=0.03)
    assert sizes[1] == pytest.approx(sizes[8192], rel=0.05)


# --- search ---


def test_psnr_is_that_of_the_pixels_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    image, wanted = 160 * torch.rand(3, 30, 20, generator=generator) - 80, 255 * torch.rand(3, 30, 20, generator=generator).round() - 127.5
    image[:, :3] += 300  # brighter than can be shown
    mask = torch.rand(30, 20, generator=generator) < 0.3
    shown, source = ((part + 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).numpy() for part in (image, wanted))
    for rows in (1, 7, 30):
        monkeypatch.setattr(encode_tile, "SHOWN", 20 * rows)
        assert encode_tile._psnr(image, wanted) == pytest.approx(whole_psnr(shown, source))
        assert encode_tile._psnr(image, wanted, mask) == pytest.approx(whole_psnr(shown[mask], source[mask]))
    assert encode_tile._psnr(image, wanted, torch.zeros_like(mask)) > 99, "a box without a pixel has nothing wrong"


def test_the_search_finds_the_coarsest_step_that_is_fine_enough() -> None:
    for target in (26.0, 27.5, 33.0, 38.0):
        tried: list[float] = []

        def measure(step: float, tried: list[float] = tried) -> tuple[float, float]:
            tried.append(step)
            return step, 52 - 11 * np.log10(step) + 0.02 * np.sin(40 * step)

        step = search(measure, target, 100.0, 4.0, 260.0)
        psnr = 52 - 11 * np.log10(step) + 0.02 * np.sin(40 * step)
        assert target <= psnr < target + 2 * CLOSE
        assert len(tried) <= encode_tile.TRIALS
        assert 3.99 < min(tried) <= max(tried) < 260.1


@pytest.mark.parametrize("flat", [22.0, 12.0, 6.0])
def test_the_search_crosses_steps_that_change_nothing(flat: float) -> None:
    """Where all is zero down to some step, the PSNR stands just below the target until then."""

    def measure(step: float) -> tuple[float, float]:
        return step, 32.65 if step > flat else 33.2 + 20 * np.log10(flat / step)

    step = search(measure, 33.0, 22.0, 1.0, 260.0)
    assert measure(step)[1] >= 33.0


@pytest.mark.parametrize(("psnr", "expected"), [(10.0, 4.0), (90.0, 260.0)])
def test_the_search_ends_at_its_limits(psnr: float, expected: float) -> None:
    count = 0

    def measure(step: float) -> tuple[float, float]:
        nonlocal count
        count += 1
        return step, psnr - step / 1000

    assert search(measure, 30.0, 100.0, 4.0, 260.0) == pytest.approx(expected, rel=1e-4)
    assert count <= encode_tile.TRIALS


# --- boxes ---


def test_a_blind_picture_has_no_residual_and_a_better_background() -> None:
    seen, blind = encode(busy()), encode(busy(blind=True))
    assert specs(blind) == ["background"]
    assert (blind.psnr or 0) >= TARGET_ALONE > TARGET_WITH_RESIDUALS
    assert len(seen.networks) == 3
    np.testing.assert_array_equal(blind.boxes, busy().boxes)
    assert blind.object_psnr is not None


def test_the_bytes_of_a_blind_picture_do_not_know_its_boxes() -> None:
    one, other = busy(blind=True), busy(boxes=False, blind=True)
    a, b = (encode(each) for each in (one, other))
    assert a.networks == b.networks


def test_the_mode_without_objects_has_no_residual() -> None:
    assert specs(encode(busy(), mode="be")) == ["background"]


def test_crowds_are_labels_only() -> None:
    one = busy(crowd=[False, True])
    found = encode(one, target_psnr=24.0, object_psnr=33.0)
    assert [network.object for network in found.networks[1:]] == [0]
    assert found.crowd.tolist() == [False, True]
    assert specs(encode(busy(crowd=[True, True]), target_psnr=24.0)) == ["background"]


def test_objects_that_overlap_reach_their_targets_together() -> None:
    one = busy()
    boxes = [[10, 12, 60, 50], [30, 20, 75, 60], [35, 25, 45, 35], [34.5, 24.5, 45.5, 35.5]]
    noisy = one.pixels.astype(np.int64) + np.random.default_rng(1).integers(-20, 21, one.pixels.shape)
    one = picture(np.clip(noisy, 0, 255).astype(np.uint8), boxes)
    data = encode_bytes(one, target_psnr=22.0, object_psnr=33.0)[0]
    pixels = decoded(data)
    mask = inside(one)
    assert whole_psnr(pixels[mask], one.pixels[mask]) >= 33.0 - 0.1
    assert len(parse(data).networks) >= 3


def test_boxes_at_the_border_and_of_a_pixel() -> None:
    one = picture(busy().pixels, [[0, 0, 9.5, 80], [111.2, 79.5, 112, 80], [50, 0, 50.25, 0.5], [0, 0, 112, 80]])
    found = encode(one, target_psnr=24.0, object_psnr=34.0)
    assert (found.object_psnr or 0) >= 34.0 - 0.1


def test_boxes_are_in_pixels_of_the_source() -> None:
    one = busy()
    scaled = picture(one.pixels, one.boxes * 3, source=(240, 336))
    a, b = encode(one, target_psnr=24.0, object_psnr=33.0), encode(scaled, target_psnr=24.0, object_psnr=33.0)
    assert [network.rect for network in a.networks] == [network.rect for network in b.networks]
    assert b.source_size == (240, 336)


# --- pictures ---


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (15, 17), (16, 16), (17, 600), (1, 40), (3, 2)])
def test_pictures_of_any_size(size: tuple[int, int], layers: int) -> None:
    one = picture(natural(1, *size))
    data = encode_bytes(one, target_psnr=28.0, layers=layers)[0]
    assert whole_psnr(decoded(data), one.pixels) >= 28.0


@pytest.mark.parametrize("level", [0, 127, 128, 255])
def test_a_picture_of_one_colour_is_a_few_bytes(level: int) -> None:
    one = picture(np.full((48, 64, 3), level, np.uint8), [[10, 10, 30, 30]])
    data = encode_bytes(one)[0]
    assert whole_psnr(decoded(data), one.pixels) >= TARGET_WITH_RESIDUALS
    assert parse(data).family == "tile"
    assert len(data) < 400


def test_labels_and_hash_are_kept() -> None:
    one = busy(label=4, source_hash=b"abcd")
    found = encode(one)
    assert (found.label, found.source_hash, found.stored_size) == (4, b"abcd", (80, 112))
    np.testing.assert_array_equal(found.boxes, one.boxes)
    np.testing.assert_array_equal(found.classes, one.classes)


def test_a_large_picture_is_analysed_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis, _ = load_analysis(tiny_analysis(CHANNELS), "tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in analysis.correction.parameters():  # a correction that sees as far as any
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        source = torch.from_numpy(natural(2, 700, 50)).permute(2, 0, 1).float() - 127.5
        whole = analyse(analysis, source)
        for band in (1, 5, 32):
            monkeypatch.setattr(encode_tile, "LARGE", 0)
            monkeypatch.setattr(encode_tile, "BAND_TILES", band)
            parts = analyse(analysis, source)
            assert parts.shape == whole.shape == (CHANNELS, 44, 4)
            torch.testing.assert_close(parts, whole, atol=1e-2, rtol=1e-4)


# --- limits ---


def test_max_bytes_is_kept_by_coarser_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = busy()
    monkeypatch.setattr(encode_tile, "best_jpeg", lambda pixels, most: jpeg_file(np.zeros_like(pixels), 1)[0])  # never the better choice
    free = encode_bytes(one, target_psnr=28.0, object_psnr=34.0)[0]
    for most in (len(free) // 2, len(free) // 3):
        data = encode_bytes(one, target_psnr=28.0, object_psnr=34.0, max_bytes=most)[0]
        assert len(data) <= most
        assert parse(data).family == "tile"
        assert (parse(data).psnr or 0) > 18
        assert len(parse(data).networks) == 3  # objects keep their residuals as long as there is room
    assert encode_bytes(one, target_psnr=28.0, object_psnr=34.0, max_bytes=len(free))[0] == free


def test_a_limit_that_nothing_keeps_gives_the_least_there_is() -> None:
    data = encode_bytes(busy(), target_psnr=28.0, max_bytes=60)[0]
    assert 60 < len(data) < 400
    assert specs(parse(data)) == ["background"]
    np.testing.assert_array_equal(parse(data).boxes, busy().boxes)


def test_a_target_out_of_reach_of_tiles_is_a_jpeg() -> None:
    """White noise: a basis of few channels shows little of it."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    data = encode_bytes(picture(noise), target_psnr=30.0)[0]
    parsed = parse(data)
    assert parsed.networks[0].spec == JpegSpec()
    assert whole_psnr(decoded(data), noise) >= 30.0
    assert parsed.shared == bytes(8)
    small = encode_bytes(picture(noise), target_psnr=30.0, max_bytes=len(data) - 1)[0]
    assert len(small) < len(data)
    assert 20 < (parse(small).psnr or 0) < 30, "the best there is within the limit"


def jpeg_file(pixels: NDArray[np.uint8], quality: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A JPEG, and what it shows."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue(), np.array(Image.open(file).convert("RGB"))


@pytest.mark.parametrize("target", [45.0, 60.0, 80.0])
def test_where_tiles_do_not_reach_the_target_the_file_itself_may_be_the_smallest_that_does(target: float) -> None:
    file, pixels = jpeg_file(np.random.default_rng(0).integers(60, 190, (48, 64, 3), np.uint8), 70)
    parsed = parse(encode_bytes(picture(pixels, original=file), target_psnr=target)[0])
    assert parsed.networks[0].weights == file
    assert parsed.psnr == pytest.approx(99.0)


def test_a_target_that_nothing_reaches_gives_the_best_there_is() -> None:
    noise = picture(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8), [[8, 8, 24, 24]])
    data = encode_bytes(noise, target_psnr=80.0, object_psnr=80.0)[0]
    best = encode_unit([noise], Settings(family="jpeg", target_psnr=80.0), unit="u", threads=1)[0]
    assert data == best, "tiles show white noise far worse than a JPEG of the highest quality"
    assert 40 < (parse(data).psnr or 0) < 80
    most = len(best) // 4
    limited = encode_bytes(noise, target_psnr=40.0, max_bytes=most)[0]
    other = encode_unit([noise], Settings(family="jpeg", target_psnr=40.0, max_bytes=most), unit="u", threads=1)[0]
    tiles = encode_bytes(noise, target_psnr=10.0, object_psnr=5.0, max_bytes=most)[0]
    assert len(limited) <= most
    assert parse(tiles).family == "tile"
    assert (parse(limited).psnr or 0) >= max(parse(other).psnr or 0, parse(tiles).psnr or 0)


@pytest.mark.parametrize("share", [0.5, 0.4, 0.3])
def test_within_a_limit_what_is_nearest_to_the_targets_is_stored(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    one, targets = busy(), {"target_psnr": 27.0, "object_psnr": 33.0}
    most = int(share * len(encode_bytes(one, **targets)[0]))

    def short(data: bytes) -> float:
        found = parse(data)
        assert len(data) <= most
        return max(0.0, 27.0 - (found.psnr or 0)) + max(0.0, 33.0 - (found.object_psnr or 0))

    chosen = encode_bytes(one, **targets, max_bytes=most)[0]
    jpeg = encode_unit([one], Settings(family="jpeg", target_psnr=99.0, max_bytes=most), unit="unit", threads=1)[0]
    monkeypatch.setattr(encode_tile, "best_jpeg", lambda pixels, most: jpeg_file(np.zeros_like(pixels), 1)[0])
    tiles = encode_bytes(one, **targets, max_bytes=most)[0]
    assert (parse(jpeg).family, parse(tiles).family) == ("jpeg", "tile")
    assert short(chosen) == min(short(jpeg), short(tiles))


def test_steps_stay_within_what_was_trained() -> None:
    flat = picture(np.full((32, 32, 3), 90, np.uint8))
    assert encode(flat, target_psnr=10.0).networks[0].scale <= MOST_STEP + 1e-3


# --- what the bytes depend on ---


def mixed() -> list[Picture]:
    return [busy(0), busy(1, 64, 96), busy(2, boxes=False), busy(3, blind=True), picture(natural(4, 33, 70))]


@pytest.mark.parametrize("threads", [2, 4])
def test_the_bytes_do_not_depend_on_threads(threads: int) -> None:
    expected = encode_bytes(*mixed(), target_psnr=26.0, refine=3)
    assert encode_bytes(*mixed(), target_psnr=26.0, refine=3, threads=threads) == expected


@pytest.mark.parametrize("together", [1, 20_000])
def test_the_bytes_do_not_depend_on_how_many_are_coded_at_once(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encode_bytes(*mixed(), target_psnr=26.0)
    monkeypatch.setattr(encode_tile, "TOGETHER", together)
    assert encode_bytes(*mixed(), target_psnr=26.0, threads=2) == expected


def test_what_waits_for_its_unit_holds_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    genuine = encode_tile._pack

    def spy(coder: Any, pictures: Any, settings: Any, latents: Any) -> list[bytes]:
        seen.extend(found.background.image.numel() for found in latents)
        return genuine(coder, pictures, settings, latents)

    monkeypatch.setattr(encode_tile, "_pack", spy)
    encode_bytes(*mixed(), target_psnr=24.0)
    assert seen == [0] * 5


def test_a_picture_does_not_depend_on_its_unit_but_for_where_residuals_lie() -> None:
    without = [one for one in mixed() if not len(one.boxes) or one.blind]
    together = encode_bytes(*without, target_psnr=26.0)
    assert [encode_bytes(one, unit=f"other {i}", target_psnr=26.0)[0] for i, one in enumerate(without)] == together
    a, b = (parse(encode_bytes(busy(), unit=unit, target_psnr=24.0)[0]) for unit in ("a", "b"))
    assert [network.rect for network in a.networks] != [network.rect for network in b.networks]
    assert encode_bytes(busy(), unit="a", target_psnr=24.0) == encode_bytes(busy(), unit="a", target_psnr=24.0)


def test_large_pictures_are_encoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that one takes grows with its pixels, and would with the threads too."""
    at_once: list[int] = []
    running: list[int] = []
    genuine = encode_tile._encode

    def spy(one: Picture, *rest: Any) -> Any:
        running.append(1)
        at_once.append(len(running))
        time.sleep(0.05)
        try:
            return genuine(one, *rest)
        finally:
            running.pop()

    monkeypatch.setattr(encode_tile, "_encode", spy)
    ones = [picture(natural(i, 48, 64)) for i in range(6)]
    expected = encode_bytes(*ones, threads=3)
    assert max(at_once) > 1
    at_once.clear()
    monkeypatch.setattr(encode_tile, "LARGE", 48 * 64 - 1)
    assert encode_bytes(*ones, threads=3) == expected
    assert at_once == [1] * 6


def test_no_gradients_are_kept() -> None:
    """Each thread has its own switch: activations of a large picture would stay in memory."""
    seen: list[bool] = []
    genuine = encode_tile.analyse

    def spy(*args: Any) -> torch.Tensor:
        found = genuine(*args)
        seen.append(found.requires_grad)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_tile, "analyse", spy)
        encode_bytes(*mixed()[:3], threads=2)
    assert seen == [False] * 3


def test_every_picture_is_told_once_it_is_done() -> None:
    calls: list[int] = []
    lock = threading.Lock()

    def on_background() -> None:
        with lock:
            calls.append(1)

    settings = Settings(family="tile", dictionary=TINY.sha256)
    encode_unit(mixed(), settings, unit="u", threads=2, shared=tiny_shared(CHANNELS), on_background=on_background)
    assert len(calls) == len(mixed())


# --- dictionaries ---


def test_a_dictionary_without_its_analysis_is_an_error() -> None:
    settings = Settings(family="tile", dictionary=TINY.sha256)
    for shared in ({}, {TINY.sha256: TINY.data}, {"analysis": tiny_analysis(CHANNELS)}, {TINY.sha256: TINY.data, "analysis": tiny_analysis()}):
        with pytest.raises(ConfigError, match=TINY.sha256):
            encode_unit([busy()], settings, unit="u", threads=1, shared=shared)


def test_the_shipped_dictionary_shows_a_drawn_scene() -> None:
    scene = draw_scene(0, width=160, height=120)
    data = encode_unit([picture(scene.image, scene.boxes)], Settings(family="tile"), unit="u", threads=1)[0]
    parsed = parse(data)
    assert parsed.shared == shipped().key
    assert (parsed.psnr or 0) >= TARGET_WITH_RESIDUALS
    assert (parsed.object_psnr or 0) >= OBJECT_TARGET - 0.1
    found = decode_batch([data])[0].permute(1, 2, 0).numpy()
    assert whole_psnr(found, scene.image) == pytest.approx(parsed.psnr, abs=0.006)
