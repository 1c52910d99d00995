"""Decoding: against a slow painter written from the rules, for any placement, size, layout and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, draw_scene, psnr
from networks import BACKGROUNDS, DIRECT, RESIDUALS, Floats, evaluate, random_bundle
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from rinr_loader import decode as decoding
from rinr_loader import presets
from rinr_loader.bundle import NetworkSpec, parse
from rinr_loader.decode import decode, decode_batch, whole
from rinr_loader.encode import encode_unit
from rinr_loader.errors import BundleError
from rinr_loader.fit import Schedule
from rinr_loader.geometry import Letterbox, Placements, Resize, flip, warp
from rinr_loader.image import read_image
from rinr_loader.mosaic import RandomAffine, mosaic_affine
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.reader import ShardBuffer, buffer_of
from rinr_loader.rng import Draws

BUNDLES = (
    random_bundle(0, residuals=[(RESIDUALS[0], (3, 4, 17, 20)), (RESIDUALS[1], (10, 8, 30, 22))]),
    random_bundle(1, stored=(17, 9), source=(51, 28), background=BACKGROUNDS[1], residuals=[(RESIDUALS[0], (0, 0, 9, 8))]),
    random_bundle(2, stored=(30, 30), background=BACKGROUNDS[2]),
    random_bundle(3, stored=(24, 40), source=(48, 80), residuals=[(DIRECT, (20, 0, 40, 14)), (DIRECT, (12, 6, 28, 24))]),
    random_bundle(4, stored=(1, 1), residuals=[(RESIDUALS[1], (0, 0, 1, 1))]),
    random_bundle(
        5, stored=(11, 64), background=BACKGROUNDS[1], residuals=[(RESIDUALS[0], (40, 2, 64, 11)), (RESIDUALS[0], (30, 0, 50, 5))], feather=1
    ),
)


@pytest.fixture(scope="module")
def buffer() -> ShardBuffer:
    return buffer_of(BUNDLES)


# --- the painter: from the rules of the format and of decoding, float64, numpy ---


def ramp(points: Floats, rect: tuple[int, int, int, int], feather: int, stored: tuple[int, int]) -> Floats:
    """Weight of a residual: 1 inside, 0 outside, rising over `feather` pixels from each edge that is not the picture's own."""
    weight = np.ones(len(points))
    for axis, extent in ((0, stored[1]), (1, stored[0])):
        low, high, at = rect[axis], rect[axis + 2], points[:, axis]
        weight = np.minimum(weight, np.where((at < low) | (at >= high), 0, 1))
        if feather and low > 0:
            weight = np.minimum(weight, np.clip((at - low) / feather, 0, 1))
        if feather and high < extent:
            weight = np.minimum(weight, np.clip((high - at) / feather, 0, 1))
    return weight


def colours(data: bytes, points: Floats) -> Floats:
    """What a bundle shows at pixels of n sample points, stored coordinates (P, n, 2), before clamping: (P, 3)."""
    bundle = parse(data)
    height, width = bundle.stored_size
    count, n, _ = points.shape
    points = np.clip(points, 0.5, [width - 0.5, height - 0.5]).reshape(-1, 2)
    total = np.zeros((count, 3))
    for network in bundle.networks:
        low, high = np.array(network.rect[:2]), np.array(network.rect[2:])
        at = np.clip(points, low + 0.5, high - 0.5)
        value = evaluate(network.weights, network.spec, 2 * (at - low) / (high - low) - 1) * network.scale
        weight = ramp(points, network.rect, network.feather, bundle.stored_size)[:, None]
        if network.spec.kind == "background":
            total = (value + 0.5).reshape(count, n, 3).mean(1)
        elif network.spec.kind == "direct":
            covered = weight.reshape(count, n, 1).mean(1)
            total = total * (1 - covered) + ((value + 0.5) * weight).reshape(count, n, 3).mean(1)
        else:
            total = total + (value * weight).reshape(count, n, 3).mean(1)
    return total


def mapped(matrix: Floats, x: Floats, y: Floats) -> Floats:
    at = np.stack([x, y, np.ones_like(x)], -1) @ matrix.T
    return np.asarray(at[..., :2] / at[..., 2:])


def spread(matrix: Floats, clip: Floats, ratio: Floats) -> float:
    """Stored pixels between neighbouring output pixels in the middle of the clip, measured: the larger of both axes."""
    middle = np.linalg.solve(matrix, [*(clip[:2] + clip[2:]) / 2, 1])
    x, y = middle[:2] / middle[2]
    here = mapped(matrix, x, y)
    return max(float(np.linalg.norm((mapped(matrix, x + dx, y + dy) - here) * ratio)) / 1e-4 for dx, dy in ((1e-4, 0), (0, 1e-4)))


def paint(
    bundles: Sequence[bytes], placements: Placements, size: tuple[int, int], *, samples: int | None = None, fill: float = 114
) -> tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """Images (N, 3, H, W) in [0, 1], and which pixels are sure: their centre is not within rounding of a clip's edge.

    `samples` is the number of points along a pixel's side; None takes the rule: stored pixels per output pixel, rounded up, at most 8.
    """
    count = int(placements.output.max()) + 1
    images = np.full((count, *size, 3), fill / 255)
    sure = np.ones((count, *size), bool)
    columns, rows = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    for output, sample, matrix, clip in zip(
        placements.output.tolist(), placements.sample.tolist(), placements.matrix.double().numpy(), placements.clip.double().numpy(), strict=True
    ):
        bundle = parse(bundles[sample])
        ratio = np.array([bundle.stored_size[1] / bundle.source_size[1], bundle.stored_size[0] / bundle.source_size[0]])
        centre = mapped(matrix, columns + 0.5, rows + 0.5)  # source pixels
        shown = ((centre >= clip[:2]) & (centre < clip[2:])).all(-1)
        near = np.minimum(np.abs(centre - clip[:2]), np.abs(centre - clip[2:])).min(-1) < 1e-3
        sure[output] &= ~near
        n = samples
        if n is None:
            n = int(np.clip(np.ceil(spread(matrix, clip, ratio) - 1e-3), 1, 8))
        steps = [((i + 0.5) / n, (j + 0.5) / n) for i in range(n) for j in range(n)]
        points = np.stack([mapped(matrix, columns[shown] + j, rows[shown] + i) * ratio for i, j in steps], 1)
        images[output][shown] = np.clip(colours(bundles[sample], points), 0, 1)
    return images.transpose(0, 3, 1, 2), sure


def check(bundles: Sequence[bytes], placements: Placements, size: tuple[int, int], *, antialias: bool = False, atol: float = 2e-3) -> torch.Tensor:
    """Compare with the painter; return the decoded floats. The tolerance is half a level: float32 against float64 through w0 = 30."""
    decoded = decode(buffer_of(bundles), placements, size=size, antialias=antialias, dtype=torch.float32)
    expected, sure = paint(bundles, placements, size, samples=None if antialias else 1)
    wrong = np.abs(decoded.double().numpy() - expected).max(1)
    assert sure.mean() > 0.9
    assert wrong[sure].max() <= atol, f"{(wrong[sure] > atol).sum()} of {sure.sum()} pixels differ, by up to {wrong[sure].max():.4f}"
    return decoded


def turned(buffer: ShardBuffer, size: tuple[int, int], degrees: float, *, scale: float = 1.0, perspective: float = 0.0) -> Placements:
    """Every sample in the middle of its output, turned and scaled, seen askew."""
    angle = math.radians(degrees)
    placed = Resize()(buffer.source_size, size=size, random=_none)
    middle = torch.tensor([[1.0, 0, size[1] / 2], [0, 1, size[0] / 2], [0, 0, 1]], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [perspective, perspective / 2, 1]])
    turn[:2, :2] *= scale
    forward = middle @ turn.double() @ torch.linalg.inv(middle)
    return warp(placed, forward.repeat(len(buffer), 1, 1))


def _none(count: int) -> torch.Tensor:
    raise AssertionError("no random numbers expected")


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, torch.arange(count))


# --- placements ---


@pytest.mark.parametrize("size", [(24, 40), (1, 1), (7, 93), (64, 64), (150, 20)])
@pytest.mark.parametrize("antialias", [False, True])
def test_any_output_size(buffer: ShardBuffer, size: tuple[int, int], antialias: bool) -> None:
    check(BUNDLES, whole(buffer, size), size, antialias=antialias)


def test_at_its_stored_size_a_picture_is_its_networks_at_the_pixel_centres() -> None:
    decoded = decode_batch([BUNDLES[0]])
    y, x = np.mgrid[0:24, 0:40] + 0.5
    expected = np.clip(colours(BUNDLES[0], np.stack([x.ravel(), y.ravel()], 1)[:, None]), 0, 1).reshape(24, 40, 3)
    assert_close(decoded[0].permute(1, 2, 0), np.rint(expected * 255).astype(np.uint8), "pixels")


@pytest.mark.parametrize("antialias", [False, True])
def test_flips_crops_and_letterboxes(buffer: ShardBuffer, antialias: bool) -> None:
    size = (33, 31)
    sides = torch.tensor([True, False, True, True, False, False])
    letterbox = Letterbox()(buffer.source_size, size=size, random=_none)
    check(BUNDLES, flip(letterbox, size=size, horizontal=sides, vertical=~sides), size, antialias=antialias)
    # A crop: the middle of each source, a quarter of its area.
    source = buffer.source_size.flip(1).float()
    crop = torch.cat([source / 4, source * 3 / 4], 1)
    matrix = whole(buffer, size).matrix.clone()
    matrix[:, :2] /= 2
    matrix[:, :2, 2] += crop[:, :2]
    check(BUNDLES, Placements(torch.arange(6), torch.arange(6), matrix, crop), size, antialias=antialias)
    # The same view with a clip that is smaller than it: fill around.
    decoded = check(BUNDLES, Placements(torch.arange(6), torch.arange(6), whole(buffer, size).matrix, crop), size, antialias=antialias)
    assert_close(decoded[:, :, 0], torch.full_like(decoded[:, :, 0], 114 / 255))


def test_a_flipped_picture_is_the_mirrored_picture(buffer: ShardBuffer) -> None:
    size = (24, 40)
    placed = whole(buffer, size)
    everything = torch.ones(len(buffer), dtype=torch.bool)
    upright = decode(buffer, placed, size=size, dtype=torch.float32)
    assert_close(decode(buffer, flip(placed, size=size, horizontal=everything), size=size, dtype=torch.float32), upright.flip(3), "float16")
    assert_close(decode(buffer, flip(placed, size=size, vertical=everything), size=size, dtype=torch.float32), upright.flip(2), "float16")


@pytest.mark.parametrize(
    ("degrees", "scale", "perspective"), [(30, 1.0, 0), (-95, 0.6, 0), (180, 2.5, 0), (45, 0.3, 0), (20, 0.9, 0.004), (0, 1, -0.006)]
)
def test_rotation_and_perspective(buffer: ShardBuffer, degrees: float, scale: float, perspective: float) -> None:
    size = (40, 44)
    check(BUNDLES, turned(buffer, size, degrees, scale=scale, perspective=perspective), size)


@pytest.mark.parametrize("degrees", [0, 30])
def test_rotation_filtered(buffer: ShardBuffer, degrees: float) -> None:
    check(BUNDLES, turned(buffer, (20, 22), degrees, scale=0.7), (20, 22), antialias=True, atol=6e-3)


def test_a_picture_that_crosses_the_horizon_is_shown_wherever_its_pixels_map(buffer: ShardBuffer) -> None:
    size = (40, 44)
    for perspective in (0.03, -0.05):
        check(BUNDLES, turned(buffer, size, 10, perspective=perspective), size)


def test_perspective_is_filtered_by_the_scale_where_the_picture_is(buffer: ShardBuffer) -> None:
    # At the origin of the output this perspective magnifies, in its middle it does not.
    size = (10, 11)
    placed = turned(buffer, size, 0, scale=0.5, perspective=0.06)
    decoded = decode(buffer, placed, size=size, dtype=torch.float32)
    expected, sure = paint(BUNDLES, placed, size, samples=8)
    one, _ = paint(BUNDLES, placed, size, samples=1)
    error = [float(((image - expected).transpose(0, 2, 3, 1)[sure] ** 2).mean()) for image in (decoded.double().numpy(), one)]
    assert error[0] < error[1] / 4


def test_mosaics(buffer: ShardBuffer) -> None:
    size = (48, 48)
    samples = torch.tensor([[0, 1, 2, 3], [5, 5, 4, 0], [3, -1, -1, -1]])
    for seed in range(3):
        placed = mosaic_affine(buffer.source_size, samples, RandomAffine(degrees=10, shear=3), size=size, random=draws(3, seed))
        decoded = check(BUNDLES, placed, size)
        assert decoded.shape == (3, 3, 48, 48)


def test_a_sample_may_land_anywhere_often_or_not_at_all(buffer: ShardBuffer) -> None:
    size = (16, 20)
    order = torch.tensor([3, 0, 0, 2])
    placed = replace(whole(buffer, size).select(order), output=torch.tensor([2, 0, 3, 5]))
    decoded = check(BUNDLES, placed, size)
    assert decoded.shape == (6, 3, *size)
    for empty in (1, 4):
        assert_close(decoded[empty], torch.full((3, *size), 114 / 255))
    assert_close(decoded[0], decoded[3], "exact")
    outside = placed.matrix.clone()
    outside[:, :2, 2] += 1000
    assert decode(buffer, replace(placed, matrix=outside), size=size, fill=7).eq(7).all()


def test_no_placements_and_no_samples_give_no_images() -> None:
    nothing = buffer_of([])
    assert decode(nothing, whole(nothing, (4, 5)), size=(4, 5)).shape == (0, 3, 4, 5)
    assert decode_batch([], size=(4, 5)).shape == (0, 3, 4, 5)


def test_an_object_at_the_border_is_whole_up_to_the_last_pixel() -> None:
    # A residual of one colour over the whole picture: filtered pixels that stick out over the picture's edge must have all of it.
    bundles = [random_bundle(9, stored=(20, 20), residuals=[(RESIDUALS[0], (0, 0, 20, 20))])]
    buffer = buffer_of(bundles)
    placed = Letterbox(scaleup=False, center=False)(buffer.source_size, size=(13, 9), random=_none)
    moved = replace(placed, matrix=placed.matrix.clone())
    moved.matrix[:, :2, 2] -= 0.9
    check(bundles, moved, (13, 9), antialias=True)


# --- batches ---


@pytest.mark.parametrize("antialias", [False, True])
def test_a_mixed_batch_is_its_pictures_one_by_one(buffer: ShardBuffer, antialias: bool) -> None:
    """Grouping may sum in another order, so a level may round to the other side: at most 1."""
    size = (37, 29)
    order = torch.tensor([5, 0, 3, 1, 4, 2, 0, 3])
    together = decode(buffer, replace(whole(buffer, size).select(order), output=torch.arange(8)), size=size, antialias=antialias)
    for image, sample in zip(together, order.tolist(), strict=True):
        alone = buffer_of([BUNDLES[sample]])
        assert_close(image[None], decode(alone, whole(alone, size), size=size, antialias=antialias), "pixels")


@pytest.mark.parametrize("pixels", [1023, 1024, 1025, 2048, 2049, 4100])
def test_tiles_have_no_seams(pixels: int) -> None:
    wide = [random_bundle(pixels, stored=(8, 16), residuals=[(RESIDUALS[0], (2, 1, 15, 8)), (DIRECT, (0, 0, 9, 8))])]
    for size in ((1, pixels), (pixels, 1), (3, -(-pixels // 3))):
        check(wide, whole(buffer_of(wide), size), size)


def test_the_size_of_a_launch_decides_nothing(buffer: ShardBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (21, 19)
    placed = turned(buffer, size, 12, scale=0.5)
    for antialias in (False, True):
        expected = decode(buffer, placed, size=size, antialias=antialias)
        for tile, points in ((7, 30), (64, 100), (10**6, 10**7)):
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "TILE", tile)
                patch.setitem(decoding.POINTS, "cpu", points)
                assert_close(decode(buffer, placed, size=size, antialias=antialias), expected, "pixels")


def test_a_residual_without_a_feather_covers_its_pixels_and_no_others() -> None:
    rect = (3, 2, 9, 7)
    with_it, without = ([random_bundle(0, stored=(10, 12), residuals=residuals, feather=0)] for residuals in ([(RESIDUALS[0], rect)], []))
    changed, plain = (decode(buffer_of(b), whole(buffer_of(b), (40, 48)), size=(40, 48), dtype=torch.float32) for b in (with_it, without))
    expected = torch.zeros(40, 48, dtype=torch.bool)
    expected[8:28, 12:36] = True
    assert torch.equal((changed != plain).any(1)[0], expected)
    points = torch.tensor([[[3.0, 2.0], [9.0, 6.9], [8.9, 7.0], [8.9, 6.9], [2.9, 2.0]]]).transpose(1, 2)  # x0 y0 inside, x1 y1 not
    weight = decoding.feather(points, torch.tensor([rect]).float(), torch.zeros(1), torch.tensor([[10, 12]]))
    assert weight.tolist() == [[1, 0, 0, 1, 0]]


def test_later_direct_networks_cover_earlier_ones_in_every_sample() -> None:
    rects = [(0, 0, 12, 12), (4, 4, 16, 16), (2, 6, 14, 10)]
    bundles = [random_bundle(seed, stored=(16, 16), residuals=[(DIRECT, rect) for rect in rects[: seed + 1]], feather=2) for seed in range(3)]
    check(bundles, whole(buffer_of(bundles), (32, 24)), (32, 24))


# --- filtering ---


def fitted(pixels: NDArray[np.uint8]) -> bytes:
    """A picture, fitted until its texture is there."""
    height, width, _ = pixels.shape
    picture = Picture(pixels, (height, width), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "fast", replace(presets.PRESETS["fast"], backgrounds=((5, 48),), background=Schedule(400, 1.5e-3, 1024)))
        (bundle,) = encode_unit([picture], Settings("fast", mode="be", family="siren"), unit="detailed", threads=1)
    return bundle


@pytest.fixture(scope="module")
def detailed() -> bytes:
    pixels = draw_scene(3, width=192, height=144, objects=3).image
    bundle = fitted(pixels)
    assert psnr(decode_batch([bundle])[0].permute(1, 2, 0), pixels) > 24
    return bundle


def sharpness(bundle: bytes, factor: int) -> tuple[float, float]:
    """PSNR against torch's own filter of the whole picture, filtered and with one point a pixel."""
    buffer = buffer_of([bundle])
    height, width = buffer.stored_size[0].tolist()
    size = (height // factor, width // factor)
    full = decode(buffer, whole(buffer, (height, width)), size=(height, width), dtype=torch.float32)
    full = full[..., : size[0] * factor, : size[1] * factor]
    expected = F.interpolate(full, size=size, mode="bilinear", antialias=True).mul(255).round().byte()
    matrix = whole(buffer, size).matrix.clone()
    matrix[:, 0, 0], matrix[:, 1, 1] = factor, factor
    placed = replace(whole(buffer, size), matrix=matrix)
    filtered, point = (psnr(decode(buffer, placed, size=size, antialias=antialias), expected) for antialias in (True, False))
    # What the filter is: the mean of the stored pixels under each output pixel. It is clamped once, after the mean, the whole picture before it.
    mean = F.avg_pool2d(full, factor).mul(255).round()
    assert float(((decode(buffer, placed, size=size).float() - mean).abs() > 1).float().mean()) < 0.02
    return filtered, point


@pytest.mark.parametrize("factor", [3, 4])
def test_filtered_downscaling_is_near_to_torchs(detailed: bytes, factor: int) -> None:
    filtered, point = sharpness(detailed, factor)
    assert filtered >= 35
    assert filtered >= point + 6


@pytest.mark.slow
@pytest.mark.real_data("kodak")
def test_filtered_downscaling_of_photographs(real_data: Path) -> None:
    """Torch's filter is a triangle, ours a box: on the sharpest facades even the photographs themselves differ by 32 dB between the two."""
    crops = [read_image(path).pixels[100:244, 200:392] for path in sorted((real_data / "kodak").glob("*.png"))]
    bundles = [fitted(crop) for crop in crops]
    for factor in (3, 4):
        both = [sharpness(bundle, factor) for bundle in bundles]
        assert np.mean([filtered for filtered, _ in both]) >= 35, both
        assert min(filtered for filtered, _ in both) >= 31, both
        assert min(filtered - point for filtered, point in both) >= 6, both


def test_samples_a_pixel_follow_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = [random_bundle(1, stored=(64, 64))]
    buffer = buffer_of(bundle)
    seen: list[int] = []
    genuine = decoding._evaluate

    def spy(*args: object) -> None:
        seen.append(args[4])  # type: ignore[arg-type]
        genuine(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "_evaluate", spy)
    for size, expected in (((64, 64), 1), ((128, 128), 1), ((63, 64), 2), ((32, 32), 2), ((31, 32), 3), ((16, 64), 4), ((8, 8), 8), ((2, 2), 8)):
        seen.clear()
        decode(buffer, whole(buffer, size), size=size)
        assert seen == [expected], size
        seen.clear()
        decode(buffer, whole(buffer, size), size=size, antialias=False)
        assert seen == [1]


# --- what comes out ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_the_same_picture(buffer: ShardBuffer, dtype: torch.dtype) -> None:
    size = (20, 24)
    floats = decode(buffer, whole(buffer, size), size=size, dtype=dtype)
    assert floats.dtype == dtype
    assert float(floats.min()) >= 0
    assert float(floats.max()) <= 1
    levels = decode(buffer, whole(buffer, size), size=size)
    assert levels.dtype == torch.uint8
    tolerance = {torch.float32: 0.51, torch.float16: 0.7, torch.bfloat16: 1.1}[dtype]
    assert float((floats.float() * 255 - levels.float()).abs().max()) <= tolerance


def test_normalize_is_torchvisions(buffer: ShardBuffer) -> None:
    size, mean, std = (20, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    placed = Letterbox()(buffer.source_size, size=size, random=_none)
    plain = decode(buffer, placed, size=size, dtype=torch.float32)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_close(decode(buffer, placed, size=size, dtype=torch.float32, normalize=(mean, std)), expected)
    half = decode(buffer, placed, size=size, dtype=torch.float16, normalize=(mean, std))
    assert half.dtype == torch.float16
    assert_close(half.float(), expected, "float16")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_memory_format_changes_strides_only(buffer: ShardBuffer, dtype: torch.dtype) -> None:
    size = (20, 24)
    plain, last = (decode(buffer, whole(buffer, size), size=size, dtype=dtype, channels_last=flag) for flag in (False, True))
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(plain, last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_out_is_filled_in_place(buffer: ShardBuffer, dtype: torch.dtype, channels_last: bool) -> None:
    size = (20, 24)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.ones(8, 3, *size).to(dtype).to(memory_format=layout)
    result = decode(buffer, whole(buffer, size), size=size, out=out, dtype=torch.float64)
    assert result is out
    assert torch.equal(out[:6], decode(buffer, whole(buffer, size), size=size, dtype=dtype))
    assert float(out[6:].float().max()) == pytest.approx(114 if dtype == torch.uint8 else 114 / 255, abs=1e-3)  # beyond the placements: fill


def test_fill_is_a_level(buffer: ShardBuffer) -> None:
    placed = Letterbox()(buffer.source_size, size=(30, 30), random=_none)
    for fill in (0, 114, 255):
        decoded = decode(buffer, placed, size=(30, 30), fill=fill)
        assert decoded[0, :, 0].eq(fill).all()


def test_wrong_arguments_are_told(buffer: ShardBuffer) -> None:
    size = (20, 24)
    with pytest.raises(ValueError, match=r"normalize: expected a floating dtype, got torch.uint8; pass dtype=torch.float32"):
        decode(buffer, whole(buffer, size), size=size, normalize=((0.5,) * 3, (0.5,) * 3))
    decode(buffer, whole(buffer, size), size=size, normalize=((0.5,) * 3, (0.5,) * 3), dtype=torch.float32)  # the advice works
    for shape in ((6, 3, 20, 25), (6, 1, 20, 24), (5, 3, 20, 24), (3, 20, 24)):
        with pytest.raises(ValueError, match=r"out: expected shape .*got"):
            decode(buffer, whole(buffer, size), size=size, out=torch.zeros(shape))


# --- whatever the caller has set ---


def test_the_callers_precision_changes_nothing_and_is_kept(buffer: ShardBuffer) -> None:
    size = (20, 24)
    expected = decode(buffer, whole(buffer, size), size=size, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(decode(buffer, whole(buffer, size), size=size, dtype=torch.float32), expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(IndexError):
            decode(buffer, replace(whole(buffer, size), sample=torch.full((6,), 99)), size=size)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("place", [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["all", "cuda", "mkldnn"])
def test_precision_may_be_set_a_backend_at_a_time(buffer: ShardBuffer, place: Any) -> None:
    # Torch then refuses to tell the precision of all backends together.
    before = [at.fp32_precision for at in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    seen: list[str] = []
    genuine = decoding.siren.forward

    def spy(*args: Any) -> torch.Tensor:
        seen.extend([torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision])
        return genuine(*args)

    try:
        place.fp32_precision = "tf32"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding.siren, "forward", spy)
            decode(buffer, whole(buffer, (8, 8)), size=(8, 8))
        assert set(seen) <= {"ieee", "none"}
        assert place.fp32_precision == "tf32"
        place.fp32_precision = "ieee"  # what was inherited still is
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", before[1])
    finally:
        for at, precision in zip((torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), before, strict=True):
            at.fp32_precision = precision


def test_nothing_is_recorded_for_a_gradient(buffer: ShardBuffer) -> None:
    placed = whole(buffer, (8, 8))
    placed.matrix.requires_grad_()
    assert not decode(buffer, placed, size=(8, 8), dtype=torch.float32).requires_grad


def test_arguments_are_left_alone(buffer: ShardBuffer) -> None:
    placed = whole(buffer, (8, 8))
    matrix, data = placed.matrix.clone(), buffer.data.clone()
    decode(buffer, placed, size=(8, 8))
    assert torch.equal(placed.matrix, matrix)
    assert torch.equal(buffer.data, data)


# --- a handful of bundles ---


def test_decode_batch_stretches_to_the_size_asked_for(buffer: ShardBuffer) -> None:
    assert torch.equal(decode_batch(BUNDLES, size=(9, 13)), decode(buffer, whole(buffer, (9, 13)), size=(9, 13)))
    assert decode_batch([BUNDLES[0], BUNDLES[0]]).shape == (2, 3, 24, 40)


def test_decode_batch_without_a_size_needs_one_stored_size() -> None:
    with pytest.raises(ValueError, match=r"size: expected one size .*\(11, 64\), \(24, 40\).*; pass size=\(height, width\)"):
        decode_batch([BUNDLES[0], BUNDLES[5]])
    with pytest.raises(ValueError, match="size: expected"):
        decode_batch([])


def test_decode_batch_names_the_damaged_bundle() -> None:
    broken = bytearray(BUNDLES[1])
    broken[-1] ^= 1
    with pytest.raises(BundleError, match=r"bundle 1: .*checksum"):
        decode_batch([BUNDLES[0], bytes(broken)], size=(8, 8))
    with pytest.raises(BundleError, match="bundle 0"):
        decode_batch([BUNDLES[0][:-20]], size=(8, 8))


# --- memory ---


def peak(buffer: ShardBuffer, size: tuple[int, int], **options: Any) -> int:
    """Bytes that one decode holds at most, its result included, as torch's allocator tells it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        decode(buffer, whole(buffer, size), size=size, **options)
    held = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize(
    ("stored", "count", "size", "options"),
    [
        ((40, 60), 1, (2000, 2000), {}),
        ((40, 60), 2, (600, 600), {"dtype": torch.float32, "normalize": ((0.5,) * 3, (0.5,) * 3), "channels_last": True}),
        ((40, 60), 300, (2, 2), {"antialias": False}),
        ((1200, 1200), 1, (150, 150), {}),
    ],
)
def test_memory_stays_below_the_stated_bound(stored: tuple[int, int], count: int, size: tuple[int, int], options: dict[str, Any]) -> None:
    spec = NetworkSpec("background", 3 if count == 1 else 7, 32, "int8")
    buffer = buffer_of([random_bundle(0, stored=stored, background=spec, residuals=[(RESIDUALS[0], (5, 5, 35, 30))])] * count)
    pixels = count * size[0] * size[1]
    result = pixels * 3 * options.get("dtype", torch.uint8).itemsize
    launch = decoding.POINTS["cpu"] * (8 * spec.width + 128)
    parameters = min(launch, 32 * spec.weights * count)
    highest = peak(buffer, size, **options)
    assert result < highest <= result + 16 * pixels + launch + parameters
