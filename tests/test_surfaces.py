"""Samples that are decoded to whole pictures: against a slow painter written from the rules, for any placement, size and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, draw_scene, psnr
from jpegs import jpeg_bundle, jpeg_file, read_jpeg
from networks import RESIDUALS, random_bundle
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from rinr_loader import surfaces
from rinr_loader.bundle import JpegSpec, parse
from rinr_loader.decode import decode, decode_batch, whole
from rinr_loader.errors import BundleError
from rinr_loader.geometry import Letterbox, Placements, Resize, flip, warp
from rinr_loader.mosaic import RandomAffine, mosaic_affine
from rinr_loader.reader import ShardBuffer, buffer_of
from rinr_loader.rng import Draws
from rinr_loader.surfaces import block_means

Floats = NDArray[np.float64]
Box = tuple[int, int, int, int]

BUNDLES = (
    jpeg_bundle(0),
    jpeg_bundle(1, stored=(17, 9), source=(51, 28)),
    jpeg_bundle(2, stored=(30, 30), subsampling=0),
    jpeg_bundle(3, stored=(24, 40), source=(48, 80), progressive=True),
    jpeg_bundle(4, stored=(1, 1)),
    jpeg_bundle(5, stored=(11, 64), subsampling=1),
)


@pytest.fixture(scope="module")
def buffer() -> ShardBuffer:
    return buffer_of(BUNDLES)


def stored_pixels(bundle: bytes) -> NDArray[np.uint8]:
    return read_jpeg(parse(bundle).networks[0].weights)


# --- the painter: from the rules of decoding, float64, numpy, one pixel after the other ---


def surface_of(picture: NDArray[np.uint8], k: int) -> Floats:
    """Means of k x k pixels, of fewer at the right and lower border."""
    height, width, _ = picture.shape
    rows, columns = -(-height // k), -(-width // k)
    return np.array([[picture[k * i : k * i + k, k * j : k * j + k].mean((0, 1)) / 255 for j in range(columns)] for i in range(rows)])


def bilinear(surface: Floats, points: Floats) -> Floats:
    """Values at points (P, 2), x and y in pixels of the surface, between its pixel centres; beyond the outermost those."""
    height, width, _ = surface.shape
    at = np.clip(points - 0.5, 0, [width - 1, height - 1])
    low = np.floor(at).astype(int)
    part = at - low
    high = np.minimum(low + 1, [width - 1, height - 1])
    total = np.zeros((len(points), 3))
    for x, wx in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
        for y, wy in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
            total += surface[y, x] * (wx * wy)[:, None]
    return total


def mapped(matrix: Floats, x: Floats, y: Floats) -> Floats:
    at = np.stack([x, y, np.ones_like(x)], -1) @ matrix.T
    return np.asarray(at[..., :2] / at[..., 2:])


def spread(matrix: Floats, clip: Floats, ratio: Floats) -> tuple[float, float]:
    """Stored pixels between neighbouring output pixels in the middle of the clip, measured along both output axes."""
    middle = np.linalg.solve(matrix, [*(clip[:2] + clip[2:]) / 2, 1])
    x, y = middle[:2] / middle[2]
    here = mapped(matrix, x, y)
    across, down = (float(np.linalg.norm((mapped(matrix, x + dx, y + dy) - here) * ratio)) / 1e-4 for dx, dy in ((1e-4, 0), (0, 1e-4)))
    return across, down


def rule(scales: tuple[float, float], antialias: bool) -> tuple[int, int]:
    """By how much a surface is reduced, and how many points a side an output pixel has."""
    if not antialias:
        return 1, 1
    k = next(k for k in (8, 4, 2, 1) if k <= min(scales) * 1.001 or k == 1)
    return k, int(np.clip(np.ceil(max(scales) / k - 1e-3), 1, 8))


def paint(bundles: Sequence[bytes], placements: Placements, size: tuple[int, int], antialias: bool) -> tuple[Floats, NDArray[np.bool_]]:
    """Images (N, 3, H, W) in [0, 1], and which pixels are sure: their centre is not within rounding of a clip's edge."""
    count = int(placements.output.max()) + 1
    images = np.full((count, *size, 3), 114 / 255)
    sure = np.ones((count, *size), bool)
    columns, rows = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    for output, sample, matrix, clip in zip(
        placements.output.tolist(), placements.sample.tolist(), placements.matrix.double().numpy(), placements.clip.double().numpy(), strict=True
    ):
        about = parse(bundles[sample])
        ratio = np.array([about.stored_size[1] / about.source_size[1], about.stored_size[0] / about.source_size[0]])
        centre = mapped(matrix, columns + 0.5, rows + 0.5)
        shown = ((centre >= clip[:2]) & (centre < clip[2:])).all(-1)
        sure[output] &= np.minimum(np.abs(centre - clip[:2]), np.abs(centre - clip[2:])).min(-1) >= 1e-3
        k, n = rule(spread(matrix, clip, ratio), antialias)
        surface = surface_of(stored_pixels(bundles[sample]), k)
        total = np.zeros((int(shown.sum()), 3))
        for i in range(n):
            for j in range(n):
                points = mapped(matrix, columns[shown] + (j + 0.5) / n, rows[shown] + (i + 0.5) / n) * ratio / k
                total += bilinear(surface, points)
        images[output][shown] = total / n**2
    return images.transpose(0, 3, 1, 2), sure


def check(bundles: Sequence[bytes], placements: Placements, size: tuple[int, int], *, antialias: bool = False) -> torch.Tensor:
    """Compare with the painter, to a quarter of a level; return the decoded floats."""
    decoded = decode(buffer_of(bundles), placements, size=size, antialias=antialias, dtype=torch.float32)
    expected, sure = paint(bundles, placements, size, antialias)
    wrong = np.abs(decoded.double().numpy() - expected).max(1)
    assert sure.mean() > 0.9
    assert wrong[sure].max() <= 1e-3, f"{(wrong[sure] > 1e-3).sum()} of {sure.sum()} pixels differ, by up to {wrong[sure].max():.4f}"
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


# --- pixels as they are stored ---


@pytest.mark.parametrize("bundle", BUNDLES, ids=range(len(BUNDLES)))
@pytest.mark.parametrize("antialias", [True, False])
def test_at_its_stored_size_a_picture_is_the_file_pixel_by_pixel(bundle: bytes, antialias: bool) -> None:
    buffer = buffer_of([bundle])
    size = parse(bundle).stored_size
    decoded = decode(buffer, whole(buffer, size), size=size, antialias=antialias)
    assert_close(decoded[0].permute(1, 2, 0), stored_pixels(bundle), "exact")


@pytest.mark.parametrize("source", [(24, 40), (48, 80), (77, 131), (24, 41)])
def test_flips_and_crops_at_the_stored_size_move_pixels_only(source: tuple[int, int]) -> None:
    bundle = jpeg_bundle(0, source=source)
    buffer, size, pixels = buffer_of([bundle]), (24, 40), stored_pixels(jpeg_bundle(0))
    yes = torch.tensor([True])
    placed = whole(buffer, size)
    assert_close(decode(buffer, flip(placed, size=size, horizontal=yes), size=size)[0].permute(1, 2, 0), pixels[:, ::-1].copy(), "exact")
    assert_close(decode(buffer, flip(placed, size=size, vertical=yes), size=size)[0].permute(1, 2, 0), pixels[::-1].copy(), "exact")
    both = decode(buffer, flip(placed, size=size, horizontal=yes, vertical=yes), size=size)
    assert_close(both[0].permute(1, 2, 0), pixels[::-1, ::-1].copy(), "exact")
    # A window of 10 x 13 stored pixels from row 5 and column 20.
    matrix = placed.matrix.clone()
    matrix[:, 0, 2], matrix[:, 1, 2] = 20 * matrix[:, 0, 0], 5 * matrix[:, 1, 1]
    cut = decode(buffer, replace(placed, matrix=matrix), size=(10, 13))
    assert_close(cut[0].permute(1, 2, 0), pixels[5:15, 20:33], "exact")
    floats = decode(buffer, flip(placed, size=size, horizontal=yes, vertical=yes), size=size, dtype=torch.float32)
    assert_close(floats[0].permute(1, 2, 0), torch.from_numpy(pixels[::-1, ::-1].copy()) / 255, "exact")


def test_a_letterbox_at_the_stored_size_moves_pixels_only() -> None:
    bundle = jpeg_bundle(0)
    buffer, size = buffer_of([bundle]), (33, 40)
    decoded = decode(buffer, Letterbox()(buffer.source_size, size=size, random=_none), size=size, fill=7)[0].permute(1, 2, 0)
    assert_close(decoded[4:28], stored_pixels(bundle), "exact")
    assert decoded[:4].eq(7).all()
    assert decoded[28:].eq(7).all()


@pytest.mark.parametrize("source", [(48, 64), (101, 131)])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_at_a_half_a_quarter_and_an_eighth_pixels_are_means(k: int, source: tuple[int, int]) -> None:
    bundle = jpeg_bundle(7, stored=(48, 64), source=source)
    expected = stored_pixels(bundle).reshape(48 // k, k, 64 // k, k, 3).mean((1, 3))
    decoded = decode_batch([bundle], size=(48 // k, 64 // k))[0].permute(1, 2, 0).numpy()
    assert np.abs(decoded - expected).max() <= 0.51  # rounded, not moved


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 16), (17, 5), (3, 64)])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_blocks_at_the_border_are_means_of_what_is_left(shape: tuple[int, int], k: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1)
    for means in (block_means(image, k) / 255, block_means(image.float() / 255, k)):
        assert_close(means.permute(1, 2, 0), surface_of(picture, k).astype(np.float32))


# --- placements ---


@pytest.mark.parametrize("size", [(24, 40), (1, 1), (7, 93), (64, 64), (150, 20), (12, 20), (5, 5), (8, 8)])
@pytest.mark.parametrize("antialias", [False, True])
def test_any_output_size(buffer: ShardBuffer, size: tuple[int, int], antialias: bool) -> None:
    check(BUNDLES, whole(buffer, size), size, antialias=antialias)


@pytest.mark.parametrize("antialias", [False, True])
def test_flips_crops_and_letterboxes(buffer: ShardBuffer, antialias: bool) -> None:
    size = (33, 31)
    sides = torch.tensor([True, False, True, True, False, False])
    letterbox = Letterbox()(buffer.source_size, size=size, random=_none)
    check(BUNDLES, flip(letterbox, size=size, horizontal=sides, vertical=~sides), size, antialias=antialias)
    source = buffer.source_size.flip(1).float()
    crop = torch.cat([source / 4, source * 3 / 4], 1)
    matrix = whole(buffer, size).matrix.clone()
    matrix[:, :2] /= 2
    matrix[:, :2, 2] += crop[:, :2]
    check(BUNDLES, Placements(torch.arange(6), torch.arange(6), matrix, crop), size, antialias=antialias)
    decoded = check(BUNDLES, Placements(torch.arange(6), torch.arange(6), whole(buffer, size).matrix, crop), size, antialias=antialias)
    assert_close(decoded[:, :, 0], torch.full_like(decoded[:, :, 0], 114 / 255))


def shown(buffer: ShardBuffer, placed: Placements, size: tuple[int, int]) -> torch.Tensor:
    """Which pixels show a sample and not the fill, bool `(N, H, W)`."""
    dark, light = (decode(buffer, placed, size=size, fill=fill) for fill in (0, 255))
    return dark.eq(light).all(1)


@pytest.mark.parametrize(
    "clip", [(0.0, 0.0, 40.0, 24.0), (3.3, 2.0, 17.5, 20.1), (-20.0, -20.0, 80.0, 80.0), (50.0, 0.0, 60.0, 9.0), (3.6, 2.0, 3.9, 20.0)]
)
@pytest.mark.parametrize("offset", [(-6.0, 3.0), (4.5, -2.25), (0.0, 30.0)])
def test_what_is_shown_is_what_a_sine_network_would_show(clip: tuple[float, ...], offset: tuple[float, float]) -> None:
    """At the stored size, where whole pixels are copied, and between pixels; beyond the picture its border is repeated."""
    jpeg, sine = buffer_of([jpeg_bundle(0)]), buffer_of([random_bundle(0)])
    size = (24, 40)
    placed = whole(jpeg, size)
    matrix = placed.matrix.clone()
    matrix[:, :2, 2] += torch.tensor(offset)
    placed = replace(placed, matrix=matrix, clip=torch.tensor([clip]))
    seen = shown(jpeg, placed, size)
    assert_close(seen, shown(sine, placed, size), "exact")
    decoded = decode(jpeg, placed, size=size, dtype=torch.float32)
    expected, _ = paint([jpeg_bundle(0)], placed, size, antialias=False)
    assert_close(decoded.permute(0, 2, 3, 1)[seen].double(), torch.from_numpy(expected).permute(0, 2, 3, 1)[seen], "float16")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("degrees", "scale", "perspective"),
    [(30, 1.0, 0), (90, 1.0, 0), (-95, 0.6, 0), (180, 2.5, 0), (45, 0.3, 0), (20, 0.9, 0.004), (0, 1, -0.006), (10, 1, 0.03)],
)
def test_rotation_and_perspective(buffer: ShardBuffer, degrees: float, scale: float, perspective: float, antialias: bool) -> None:
    size = (40, 44)
    check(BUNDLES, turned(buffer, size, degrees, scale=scale, perspective=perspective), size, antialias=antialias)


@pytest.mark.parametrize("shear", [(0.2, 0.0), (0.0, -0.1)])
def test_a_slight_shear_is_no_copy(buffer: ShardBuffer, shear: tuple[float, float]) -> None:
    placed = whole(buffer_of([BUNDLES[0]]), (24, 40))
    matrix = placed.matrix.clone()
    matrix[:, 0, 1], matrix[:, 1, 0] = shear
    check([BUNDLES[0]], replace(placed, matrix=matrix), (24, 40))


@pytest.mark.parametrize("antialias", [False, True])
def test_mosaics(buffer: ShardBuffer, antialias: bool) -> None:
    size = (48, 48)
    samples = torch.tensor([[0, 1, 2, 3], [5, 5, 4, 0], [3, -1, -1, -1]])
    for seed in range(3):
        draws = Draws(seed, 0, torch.arange(3))
        placed = mosaic_affine(buffer.source_size, samples, RandomAffine(degrees=10, shear=3), size=size, random=draws)
        assert check(BUNDLES, placed, size, antialias=antialias).shape == (3, 3, 48, 48)


def test_a_sample_may_land_anywhere_often_or_not_at_all(buffer: ShardBuffer) -> None:
    size = (16, 20)
    placed = replace(whole(buffer, size).select(torch.tensor([3, 0, 0, 2])), output=torch.tensor([2, 0, 3, 5]))
    decoded = check(BUNDLES, placed, size)
    for empty in (1, 4):
        assert_close(decoded[empty], torch.full((3, *size), 114 / 255))
    assert_close(decoded[0], decoded[3], "exact")
    outside = placed.matrix.clone()
    outside[:, :2, 2] += 1000
    assert decode(buffer, replace(placed, matrix=outside), size=size, fill=7).eq(7).all()


@pytest.mark.parametrize("points", [50, 3000])
def test_the_size_of_a_launch_decides_nothing(buffer: ShardBuffer, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (31, 47)
    placed = turned(buffer, size, 12, scale=0.5)
    expected = decode(buffer, placed, size=size)
    monkeypatch.setitem(surfaces.POINTS, "cpu", points)
    monkeypatch.setitem(surfaces.PIXELS, "cpu", 500)
    assert_close(decode(buffer, placed, size=size), expected, "exact")


# --- filtering ---


@pytest.mark.parametrize("factor", [3, 4])
def test_filtered_downscaling_is_near_to_torchs(factor: int) -> None:
    pixels = draw_scene(3, width=192, height=144, objects=3).image
    bundle = jpeg_bundle(0, stored=(144, 192), file=jpeg_file(pixels, quality=95))
    buffer, size = buffer_of([bundle]), (144 // factor, 192 // factor)
    full = decode_batch([bundle]).float()
    expected = F.interpolate(full, size=size, mode="bilinear", antialias=True).round().byte()
    filtered, point = (psnr(decode(buffer, whole(buffer, size), size=size, antialias=antialias), expected) for antialias in (True, False))
    assert filtered >= 35
    assert filtered >= point + 6


def reductions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """k and points a side of every placement drawn from here on."""
    seen: list[tuple[int, int]] = []
    genuine = surfaces._draw

    def spy(one: Any, *rest: Any) -> None:
        seen.append((one.reduce, one.points))
        genuine(one, *rest)

    monkeypatch.setattr(surfaces, "_draw", spy)
    return seen


def test_surfaces_and_points_follow_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_of([jpeg_bundle(1, stored=(64, 64))])
    seen = reductions(monkeypatch)
    cases = {
        (64, 64): (1, 1),
        (128, 128): (1, 1),
        (63, 64): (1, 2),
        (33, 33): (1, 2),
        (32, 32): (2, 1),
        (31, 32): (2, 2),
        (20, 20): (2, 2),
        (16, 64): (1, 4),
        (16, 16): (4, 1),
        (9, 9): (4, 2),
        (8, 8): (8, 1),
        (8, 64): (1, 8),
        (2, 2): (8, 4),
        (1, 1): (8, 8),
    }
    for size, expected in cases.items():
        seen.clear()
        decode(buffer, whole(buffer, size), size=size)
        assert seen == [expected], size
        seen.clear()
        decode(buffer, whole(buffer, size), size=size, antialias=False)
        assert seen == [(1, 1)]


# --- work and memory ---


def test_each_distinct_source_is_decoded_once(buffer: ShardBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    genuine = surfaces.decode_files

    def spy(files: Any, sizes: Any, names: Sequence[str], device: Any) -> Any:
        seen.extend(names)
        return genuine(files, sizes, names, device)

    monkeypatch.setattr(surfaces, "decode_files", spy)
    size = (24, 40)
    placed = whole(buffer, size)
    shrunk = replace(placed, matrix=placed.matrix @ torch.diag(torch.tensor([4.0, 4.0, 1])), output=placed.output + 6)
    twice = Placements.concatenate([placed, shrunk, replace(placed, output=placed.output + 12)]).select(torch.tensor([0, 1, 6, 7, 12, 13, 2]))
    together = decode(buffer, twice, size=size)
    assert sorted(seen) == ["0.rinr", "1.rinr", "2.rinr"]
    for output in (0, 1, 2, 6, 7, 12, 13):
        alone = twice.select(twice.output == output)
        assert_close(decode(buffer, replace(alone, output=alone.output * 0), size=size)[0], together[output], "exact")


def test_what_no_output_pixel_shows_is_not_decoded(buffer: ShardBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surfaces, "decode_files", lambda *_: pytest.fail("nothing to decode"))
    placed = whole(buffer, (8, 8))
    moved = placed.matrix.clone()
    moved[:, :2, 2] += 1000
    decode(buffer, replace(placed, matrix=moved), size=(8, 8))
    nothing = buffer_of([])
    assert decode(nothing, whole(nothing, (4, 5)), size=(4, 5)).shape == (0, 3, 4, 5)


def test_a_bounded_number_of_surfaces_stands_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, size = buffer_of([jpeg_bundle(i, stored=(30, 40)) for i in range(12)]), (29, 40)
    placed = whole(buffer, size)
    small = replace(placed, matrix=placed.matrix @ torch.diag(torch.tensor([4.0, 4.0, 1])), output=placed.output + 12)
    placed = Placements.concatenate([placed, small])
    expected = decode(buffer, placed, size=size)
    files: list[int] = []
    made: list[int] = []
    genuine, make = surfaces.decode_files, surfaces.jpeg_surfaces

    def decoded(*arguments: Any) -> list[torch.Tensor]:
        files.append(len(arguments[0]))
        return genuine(*arguments)

    def surface(*arguments: Any) -> list[torch.Tensor]:
        result = make(*arguments)
        made.append(sum(one[0].numel() for one in result))
        return result

    monkeypatch.setattr(surfaces, "decode_files", decoded)
    monkeypatch.setitem(surfaces.SURFACES, JpegSpec, lambda buffer, samples: partial(surface, buffer))
    for most, together in ((1, 1), (2500, 1), (2600, 2), (10**6, 12)):
        files.clear(), made.clear()
        monkeypatch.setitem(surfaces.PIXELS, "cpu", most)
        assert_close(decode(buffer, placed, size=size), expected, "exact")
        each = 30 * 40 + 8 * 10  # the whole picture, and its quarter for the small one
        assert made == [together * each] * (12 // together)
        assert sum(files) == 12
        assert max(files) <= max(1, most // 1200)


def test_what_placements_show_lies_in_the_region_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, size = buffer_of([jpeg_bundle(i, stored=(60, 90)) for i in range(3)]), (50, 40)
    asked: list[Box] = []

    def poisoned(buffer: ShardBuffer, samples: Sequence[int], reduce: Sequence[int], regions: Sequence[Box]) -> list[torch.Tensor]:
        """What lies outside of a region is not there."""
        found = surfaces.jpeg_surfaces(buffer, samples, reduce, regions)
        for surface, k, (x0, y0, x1, y1) in zip(found, reduce, regions, strict=True):
            assert 0 <= x0 < x1 <= 90
            assert 0 <= y0 < y1 <= 60
            asked.append((x0, y0, x1, y1))
            keep = torch.zeros_like(surface, dtype=torch.bool)
            keep[:, y0 // k : -(-y1 // k), x0 // k : -(-x1 // k)] = True
            surface[~keep] = torch.nan
        return found

    placements = [whole(buffer, size)]
    for zoom in (0.3, 1.0, 3.0):
        for shift in (-70.0, -20.0, 0.0, 15.0):
            for turn in (0.0, 0.4):
                cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
                matrix = torch.tensor([[cos, -sin, shift], [sin, cos, shift / 2], [0, 0, 1]]).expand(3, 3, 3)
                placements.append(replace(placements[0], matrix=matrix))
    expected = [decode(buffer, one, size=size, dtype=torch.float32) for one in placements]
    monkeypatch.setitem(surfaces.SURFACES, JpegSpec, lambda buffer, samples: partial(poisoned, buffer))
    for one, wanted in zip(placements, expected, strict=True):
        assert_close(decode(buffer, one, size=size, dtype=torch.float32), wanted)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in asked]
    assert min(areas) < 60 * 90 / 10, "a part of a picture is asked for in part"


def test_memory_of_large_pictures_shown_small() -> None:
    buffer, size = buffer_of([jpeg_bundle(0, stored=(300, 400))] * 12), (30, 40)
    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        patch.setitem(surfaces.PIXELS, "cpu", 1)
        decode(buffer, whole(buffer, size), size=size)
    held = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    assert highest < 300 * 400 * 12, "not even one of them is held as floats"


# --- families side by side ---

MIXED = (
    BUNDLES[0],
    random_bundle(1, residuals=[(RESIDUALS[0], (3, 4, 17, 20))]),
    BUNDLES[1],
    random_bundle(2, stored=(30, 30)),
)


def test_samples_of_several_families_decode_as_they_do_alone() -> None:
    size = (40, 40)
    buffer = buffer_of(MIXED)
    samples = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, -1, -1]])
    placements = [
        whole(buffer, size),
        turned(buffer, size, 25, scale=0.7),
        mosaic_affine(buffer.source_size, samples, RandomAffine(degrees=5), size=size, random=Draws(0, 0, torch.arange(3))),
    ]
    for placed in placements:
        count = int(placed.output.max()) + 1
        together = decode(buffer, placed, size=size, out=torch.zeros(count, 3, *size, dtype=torch.uint8), fill=0)
        expected = torch.zeros_like(together)
        for row in range(len(placed)):
            one = placed.select(torch.tensor([row]))
            alone = decode(buffer_of([MIXED[int(one.sample)]]), replace(one, sample=one.sample * 0, output=one.output * 0), size=size, fill=0)
            expected[int(one.output)] = torch.maximum(expected[int(one.output)], alone[0])
        assert_close(together, expected, "pixels")


@pytest.mark.parametrize("bundles", [BUNDLES[:4], MIXED, MIXED[1::2]], ids=["jpeg", "mixed", "siren"])
def test_type_layout_and_normalisation(bundles: Sequence[bytes]) -> None:
    buffer, size = buffer_of(bundles), (33, 40)
    placed = Letterbox()(buffer.source_size, size=size, random=_none)
    floats = decode(buffer, placed, size=size, dtype=torch.float32)
    assert float(floats.min()) >= 0
    assert float(floats.max()) <= 1
    assert_close(decode(buffer, placed, size=size), floats.mul(255).round().byte(), "pixels")
    assert_close(decode(buffer, placed, size=size, dtype=torch.float16), floats.half(), "exact")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = (floats - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(decode(buffer, placed, size=size, dtype=torch.float32, normalize=(mean, std)), expected)
    last = decode(buffer, placed, size=size, dtype=torch.float32, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, floats, "exact")
    out = torch.full((5, 3, *size), 9, dtype=torch.uint8)
    assert decode(buffer, placed, size=size, out=out, fill=3) is out
    assert_close(out[: len(bundles)], decode(buffer, placed, size=size, fill=3), "exact")
    assert out[len(bundles) :].eq(3).all(), "images without a placement show the fill"


def test_a_damaged_file_names_its_sample() -> None:
    good = jpeg_file(np.full((24, 40, 3), 7, np.uint8))
    # Tables that no scan can use: the header, which is all that a bundle is checked for, is sound.
    tables = good.index(b"\xff\xc4")
    broken = good[: tables + 5] + b"\xff" * 40 + good[tables + 45 :]
    damaged = jpeg_bundle(0, file=broken)
    buffer = buffer_of([BUNDLES[0], damaged], ["a", "b%2Ex"])
    with pytest.raises(BundleError, match=r"^b\.x\.rinr: expected a JPEG, got .*; the bundle is damaged, fetch or convert it again$"):
        decode(buffer, whole(buffer, (8, 8)), size=(8, 8))
