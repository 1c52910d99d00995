"""The encoder: what is in a bundle for every kind of picture, boxes and settings, and what its bytes depend on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import Scene, draw_scene
from conftest import psnr as whole_psnr
from networks import evaluate
from numpy.typing import NDArray
from PIL import Image

from rinr_loader import encode_siren as encoding
from rinr_loader import presets, residuals
from rinr_loader.bundle import Bundle, Network, pack, parse
from rinr_loader.codecs import siren
from rinr_loader.decode import decode_batch
from rinr_loader.encode import encode_unit
from rinr_loader.encode_siren import predict_rung
from rinr_loader.fit import Schedule
from rinr_loader.lanes import Lanes
from rinr_loader.picture import Picture
from rinr_loader.presets import Mode, Preset, PresetName, Settings
from rinr_loader.residuals import FEATHER, JITTER, JITTER_SHARE, MARGIN, place_residuals

TINY = Preset(
    backgrounds=((2, 6), (2, 12), (2, 20)),
    background=Schedule(40, 5e-3, 256),
    residuals=((3, 6), (3, 10), (3, 14)),
    residual_areas=(150.0, 600.0, float("inf")),
    residual=Schedule(40, 5e-3, 64),
)
RESIDUAL_MODES: tuple[Mode, ...] = ("qre", "re", "de")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` with few steps of small networks: these tests are about what is encoded, not how well."""
    monkeypatch.setitem(presets.PRESETS, "fast", TINY)


def picture(
    pixels: NDArray[np.uint8], boxes: Any = (), *, crowd: Sequence[bool] | None = None, source: tuple[int, int] | None = None, **more: Any
) -> Picture:
    corners = np.asarray(boxes, np.float32).reshape(-1, 4)
    flags = np.zeros(len(corners), np.bool_) if crowd is None else np.asarray(crowd, np.bool_)
    return Picture(pixels, source or (pixels.shape[0], pixels.shape[1]), corners, np.arange(len(corners)), flags, **more)


def scene_picture(seed: int, *, width: int = 48, height: int = 32, objects: int = 2, **more: Any) -> Picture:
    scene: Scene = draw_scene(seed, width=width, height=height, objects=objects)
    return picture(scene.image, scene.boxes, **more)


def encode(*pictures: Picture, unit: str = "unit", threads: int = 1, **settings: Any) -> list[Bundle]:
    return [parse(data) for data in encode_unit(pictures, Settings("fast", **settings, family="siren"), unit=unit, threads=threads)]


def decoded(bundle: Bundle) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = decode_batch([pack(bundle)])[0].permute(1, 2, 0).numpy()
    return pixels


def masked_psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], boxes: NDArray[np.floating]) -> float:
    """PSNR over the union of boxes, rounded outward."""
    mask = np.zeros(a.shape[:2], bool)
    for x0, y0, x1, y1 in boxes:
        mask[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] = True
    return whole_psnr(a[mask], b[mask])


# --- determinism ---


def mixed() -> list[Picture]:
    return [
        scene_picture(0),
        scene_picture(1, width=31, height=45, objects=3),
        scene_picture(2, blind=True),
        scene_picture(3, objects=0),
        scene_picture(4, width=64),
    ]


@pytest.fixture(scope="module")
def reference() -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "fast", TINY)
        return encode_unit(mixed(), Settings("fast", target_psnr=24.0, object_psnr=30.0, family="siren"), unit="unit", threads=1)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_bytes_do_not_depend_on_threads(reference: list[bytes], threads: int) -> None:
    assert encode_unit(mixed(), Settings("fast", target_psnr=24.0, object_psnr=30.0, family="siren"), unit="unit", threads=threads) == reference


def test_the_bytes_do_not_depend_on_what_the_caller_has_set(reference: list[bytes]) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        torch.manual_seed(99)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = encode_unit(mixed(), Settings("fast", target_psnr=24.0, object_psnr=30.0, family="siren"), unit="unit", threads=2)
        assert torch.get_num_threads() == 3
        assert torch.get_float32_matmul_precision() == "medium"
        assert again == reference
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def test_fits_run_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    seen: set[str] = set()
    genuine = siren.forward_backward

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update([torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision])  # type: ignore[attr-defined]
        return genuine(*args, **kwargs)

    monkeypatch.setattr(siren, "forward_backward", spy)
    try:
        torch.set_float32_matmul_precision("medium")
        encode(*mixed(), threads=4)
        assert seen <= {"ieee", "none"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_unit_and_seed_choose_the_randomness(reference: list[bytes]) -> None:
    settings = Settings("fast", target_psnr=24.0, object_psnr=30.0, family="siren")
    for other in (encode_unit(mixed(), settings, unit="other"), encode_unit(mixed(), replace(settings, seed=1), unit="unit")):
        for a, b in zip(reference, other, strict=True):
            assert [n.weights for n in parse(a).networks] != [n.weights for n in parse(b).networks]


def test_a_picture_that_comes_later_changes_nothing_before_it_but_its_lanes() -> None:
    # What a picture's bytes may depend on is its own unit; the order of results is that of the pictures.
    pictures = mixed()
    together = encode(*pictures)
    for bundle, of in zip(together, pictures, strict=True):
        assert bundle.stored_size == of.pixels.shape[:2]
        assert np.array_equal(bundle.boxes, of.boxes)
        assert bundle.psnr is not None


# --- what is in a bundle ---


@pytest.mark.parametrize("mode", get_args(Mode))
def test_modes_decide_kinds_and_dtypes(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, residual=Schedule(200, 5e-3, 128)))
    (bundle,) = encode(scene_picture(5), mode=mode)
    background, *rest = bundle.networks
    assert background.spec.kind == "background"
    assert background.spec.dtype == ("int8" if mode == "qre" else "float16")
    assert background.rect == (0, 0, 48, 32)
    assert background.scale == 0.5
    assert background.feather == 0
    assert {n.spec.kind for n in rest} == ({"qre": {"residual"}, "re": {"residual"}, "de": {"direct"}}.get(mode, set()))
    assert {n.spec.dtype for n in rest} <= {"float16"}
    assert len(rest) == (2 if mode in RESIDUAL_MODES else 0)
    if mode == "bs":
        assert background.spec.width in [round(width * 35 / 28) for _, width in TINY.backgrounds]


def test_what_is_known_of_a_picture_is_stored_with_it() -> None:
    of = picture(draw_scene(0).image, [[3, 4, 30, 41], [100, 0, 192, 128]], source=(128, 192), label=7, source_hash=b"abcd", crowd=[False, True])
    (bundle,) = encode(of)
    assert bundle.stored_size == (64, 96)
    assert bundle.source_size == (128, 192)
    assert bundle.label == 7
    assert bundle.source_hash == b"abcd"
    assert bundle.boxes.tolist() == [[3, 4, 30, 41], [100, 0, 192, 128]]
    assert bundle.classes.tolist() == [0, 1]
    assert bundle.crowd.tolist() == [False, True]


NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
SMOOTH = draw_scene(11, width=50, height=40, objects=2).image
ODD_BOXES: dict[str, tuple[NDArray[np.uint8], Any]] = {
    "none": (SMOOTH, []),
    "many": (SMOOTH, [[x, y, x + 6.5, y + 5] for x in range(0, 42, 10) for y in (1, 12, 23, 34)]),
    "some": (SMOOTH, [[x, y, x + 9.5, y + 8] for x in (4, 16) for y in (3, 14, 25)]),
    "nested": (SMOOTH, [[5, 5, 45, 35], [10, 10, 30, 30], [15, 15, 20, 20]]),
    "same twice": (SMOOTH, [[5, 5, 25, 25], [5, 5, 25, 25]]),
    "chain": (SMOOTH, [[0, 5, 14, 20], [10, 5, 24, 20], [20, 5, 34, 20], [30, 5, 50, 20]]),
    "the whole picture": (SMOOTH, [[0, 0, 50, 40]]),
    "corners": (SMOOTH, [[0, 0, 7, 6], [43, 0, 50, 6], [0, 34, 7, 40], [43, 34, 50, 40]]),
    "1-pixel sides": (SMOOTH, [[10, 10, 11, 30], [20, 39, 45, 40], [49, 0, 50, 1], [30.4, 12.2, 30.6, 12.3]]),
    "noise": (NOISE, [[3, 3, 20, 20], [15, 15, 33, 39]]),
    "1x1": (NOISE[:1, :1], [[0, 0, 1, 1]]),
    "1 row": (NOISE[:1, :17], [[3.5, 0, 9, 1]]),
    "1 column": (NOISE[:13, :1], [[0, 2, 1, 12.9]]),
    "odd sides": (SMOOTH[:37, :23], [[1, 2, 22, 30]]),
    "gray": (np.repeat(SMOOTH[..., :1], 3, 2), [[4, 4, 30, 30]]),
    "black": (np.zeros((16, 16, 3), np.uint8), [[4, 4, 12, 12]]),
    "white": (np.full((16, 16, 3), 255, np.uint8), [[0, 0, 12, 12]]),
}


@pytest.fixture(scope="module", params=RESIDUAL_MODES)
def odd(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[Picture, Bundle]]]:
    """Every odd picture, encoded together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "fast", TINY)
        pictures = {name: picture(*of) for name, of in ODD_BOXES.items()}
        bundles = encode(*pictures.values(), mode=request.param)
        yield {name: (pictures[name], bundle) for name, bundle in zip(pictures, bundles, strict=True)}


@pytest.mark.parametrize("name", ODD_BOXES)
def test_odd_pictures_and_boxes(odd: dict[str, tuple[Picture, Bundle]], name: str) -> None:
    of, bundle = odd[name]
    height, width = of.pixels.shape[:2]
    assert decoded(bundle).shape == of.pixels.shape
    assert np.array_equal(bundle.boxes, of.boxes)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in of.boxes.tolist()]
    drawn = [network.object for network in bundle.networks[1:]]
    assert len(set(drawn)) == len(drawn)
    assert [areas[i] for i in drawn] == sorted((areas[i] for i in drawn), reverse=True)  # largest first
    for network in bundle.networks[1:]:
        x0, y0, x1, y1 = of.boxes[network.object].tolist()
        for side, (edge, border) in enumerate(((np.floor(x0), 0), (np.floor(y0), 0), (np.ceil(x1), width), (np.ceil(y1), height))):
            away, extent = abs(network.rect[side] - edge), (x1 - x0, y1 - y0)[side % 2]
            assert away <= MARGIN + np.ceil(max(JITTER, JITTER_SHARE * extent))
            assert away >= MARGIN or network.rect[side] == border
        assert network.feather == FEATHER
        assert network.spec == Settings("fast", mode="de" if network.spec.kind == "direct" else "qre", family="siren").residual_class(
            areas[network.object]
        )


@pytest.mark.parametrize("name", ODD_BOXES)
def test_every_residual_makes_its_own_object_better(odd: dict[str, tuple[Picture, Bundle]], name: str) -> None:
    of, bundle = odd[name]
    for k, network in enumerate(bundle.networks[1:], start=1):
        box = of.boxes[network.object][None]
        after, before = (masked_psnr(decoded(replace(bundle, networks=bundle.networks[:n])), of.pixels, box) for n in (k + 1, k))
        assert after >= before - 0.2  # the fit compares before the picture is rounded and clamped


@pytest.mark.parametrize("mode", RESIDUAL_MODES)
@pytest.mark.parametrize("name", ["some", "nested", "same twice", "chain", "corners", "1-pixel sides", "noise"])
def test_no_object_is_worse_than_its_background_alone(mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Residuals overlap their neighbours' objects, so this takes fits that have converged.
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, residual=Schedule(200, 5e-3, 128), residuals=((3, 12), (3, 16), (3, 20))))
    of = picture(*ODD_BOXES[name])
    (bundle,) = encode(of, mode=mode, threads=2)
    whole, background = decoded(bundle), decoded(replace(bundle, networks=bundle.networks[:1]))
    gains = [masked_psnr(whole, of.pixels, box[None]) - masked_psnr(background, of.pixels, box[None]) for box in of.boxes]
    assert min(gains) > -0.05
    assert max(gains) > 1


@pytest.mark.parametrize("name", ODD_BOXES)
def test_the_psnr_told_is_that_of_the_decoded_picture(odd: dict[str, tuple[Picture, Bundle]], name: str) -> None:
    of, bundle = odd[name]
    pixels = decoded(bundle)
    assert bundle.psnr == pytest.approx(min(whole_psnr(pixels, of.pixels), 99), abs=0.006)
    if len(of.boxes):
        assert bundle.object_psnr == pytest.approx(min(masked_psnr(pixels, of.pixels, of.boxes), 99), abs=0.006)
    else:
        assert bundle.object_psnr is None


def test_psnr_of_a_picture_stored_smaller_is_against_what_is_stored() -> None:
    of = picture(SMOOTH, [[7, 9, 60, 41]], source=(80, 100))
    (bundle,) = encode(of)
    pixels = decoded(bundle)
    assert bundle.psnr == pytest.approx(whole_psnr(pixels, of.pixels), abs=0.006)
    assert bundle.object_psnr == pytest.approx(masked_psnr(pixels, of.pixels, of.boxes / 2), abs=0.006)
    x0, y0, x1, y1 = bundle.networks[1].rect
    assert x0 <= 3
    assert y0 <= 4
    assert x1 >= 30 + MARGIN
    assert y1 >= 21 + MARGIN


# --- labels do not leak ---


def test_crowds_get_no_residual() -> None:
    of = picture(SMOOTH, [[3, 3, 20, 20], [25, 10, 45, 30]], crowd=[True, False])
    (bundle,) = encode(of)
    assert [n.object for n in bundle.networks[1:]] == [1]
    assert bundle.object_psnr == pytest.approx(masked_psnr(decoded(bundle), of.pixels, of.boxes[1:]), abs=0.006)
    (all_crowd,) = encode(replace(of, crowd=np.array([True, True])))
    assert len(all_crowd.networks) == 1
    assert all_crowd.object_psnr is None


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_blind_picture_is_encoded_without_a_look_at_its_boxes(mode: Mode) -> None:
    boxes: list[Any] = [[], [[3, 3, 20, 20]], [[0, 0, 50, 40], [7, 8, 9, 10]]]
    bundles = [encode(picture(SMOOTH, some, blind=True), picture(NOISE, some[:1], blind=True), mode=mode) for some in boxes]
    assert all(len(bundle.networks) == 1 for unit in bundles for bundle in unit)
    assert len({tuple(n.weights for bundle in unit for n in bundle.networks) for unit in bundles}) == 1
    assert len({unit[0].psnr for unit in bundles}) == 1


def test_the_whole_label_box_has_full_weight() -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        x0, y0 = rng.uniform(0, 40), rng.uniform(0, 30)
        box = [x0, y0, min(50, x0 + rng.uniform(0.5, 30)), min(40, y0 + rng.uniform(0.5, 30))]
        (residual,) = place_residuals(picture(SMOOTH, [box]), torch.Generator().manual_seed(seed))
        y, x = np.mgrid[np.floor(box[1]) : np.ceil(box[3]), np.floor(box[0]) : np.ceil(box[2])] + 0.5
        points = torch.tensor(np.stack([x.ravel(), y.ravel()]))[None].float()
        weight = residuals.feather(points, torch.tensor([residual.rect]).float(), torch.tensor([float(FEATHER)]), torch.tensor([[40, 50]]))
        assert bool((weight == 1).all())


def test_rectangles_are_moved_at_random() -> None:
    of = picture(np.zeros((100, 100, 3), np.uint8), [[40, 40, 60, 60], [20, 70, 30, 80]])

    def rects(seed: int) -> list[tuple[int, ...]]:
        return [r.rect for r in place_residuals(of, torch.Generator().manual_seed(seed))]

    assert rects(3) == rects(3)
    seen = np.array([rects(seed)[0] for seed in range(60)])
    for side, edge in enumerate((40, 40, 60, 60)):  # every distance occurs at every side, on its own
        assert set(abs(seen[:, side] - edge)) == set(range(MARGIN, MARGIN + JITTER + 1))
    assert len({tuple(row) for row in seen.tolist()}) > 30
    a, b = (encode(scene_picture(5), seed=seed)[0] for seed in (0, 1))
    assert [n.rect for n in a.networks] != [n.rect for n in b.networks]


def test_levels_are_the_depth_of_overlap() -> None:
    of = picture(np.zeros((200, 200, 3), np.uint8), [[10, 10, 60, 60], [50, 50, 90, 90], [150, 150, 180, 180], [85, 85, 100, 100], [55, 20, 75, 58]])
    placed = place_residuals(of, torch.Generator().manual_seed(0))
    assert [(r.object, r.level) for r in placed] == [(0, 0), (1, 1), (2, 0), (4, 2), (3, 2)]


# --- residuals ---


@pytest.mark.parametrize("mode", RESIDUAL_MODES)
def test_a_residual_is_fitted_against_what_is_there_before_it(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: dict[int, list[torch.Tensor]] = {}
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, residual=Schedule(200, 5e-3, 128)))
    genuine = residuals.residual_task

    def spy(of: Picture, residual: Any, before: Sequence[Network], *args: Any) -> Any:
        task = genuine(of, residual, before, *args)
        assert task is not None
        targets[residual.object] = [task.target * task.scale, task.weight, torch.tensor(residual.rect), list(before)]  # type: ignore[list-item]
        return task

    monkeypatch.setattr(residuals, "residual_task", spy)
    of = picture(SMOOTH, [[5, 5, 40, 30], [20, 10, 45, 35], [25, 12, 32, 20]])
    (bundle,) = encode(of, mode=mode)
    assert [n.object for n in bundle.networks[1:]] == [0, 1, 2]
    for k, network in enumerate(bundle.networks[1:]):
        target, weight, rect, before = targets[network.object]
        assert list(before) == list(bundle.networks[: k + 1])
        # Where the weight is 1, target + what the networks before it give is the source.
        x0, y0, x1, y1 = rect.tolist()
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5
        total = np.zeros((x.size, 3))
        for earlier in before:
            points = np.stack([x.ravel(), y.ravel()], 1)
            low, high = np.array(earlier.rect[:2]), np.array(earlier.rect[2:])  # type: ignore[attr-defined]
            value = evaluate(earlier.weights, earlier.spec, 2 * (points - low) / (high - low) - 1) * earlier.scale  # type: ignore[attr-defined]
            inside = ((points >= low + FEATHER) & (points <= high - FEATHER)).all(1)
            if earlier.spec.kind == "background":  # type: ignore[attr-defined]
                total = value + 0.5
            elif earlier.spec.kind == "direct":  # type: ignore[attr-defined]
                total[inside] = value[inside] + 0.5
            else:
                total[inside] += value[inside]
            ramp = ((points >= low) & (points <= high)).all(1) & ~inside
            total[ramp] = np.nan
        sure = (weight.numpy() == 1) & np.isfinite(total).all(1)
        assert sure.sum() > 20
        source = of.pixels[y0:y1, x0:x1].reshape(-1, 3) / 255
        expected = source - (0.5 if mode == "de" else total)
        assert np.abs(target.numpy().T - expected)[sure].max() < 2e-3


def test_an_object_that_is_good_enough_gets_no_residual() -> None:
    of = scene_picture(5)
    assert len(encode(of, object_psnr=5.0)[0].networks) == 1
    assert len(encode(of, object_psnr=60.0)[0].networks) == 3


def test_a_residual_that_makes_its_object_worse_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = [0.0]
    genuine = Lanes.fit

    def spy(self: Lanes, tasks: Sequence[Any], spec: Any, *more: Any) -> Any:
        results = genuine(self, tasks, spec, *more)
        if spec.kind == "background":
            return results
        return [replace(result, psnr=make().psnr_without + gain[0]) for make, result in zip(tasks, results, strict=True)]

    monkeypatch.setattr(Lanes, "fit", spy)
    of = picture(SMOOTH, [[3, 3, 20, 20], [30, 20, 45, 39]])
    for gain[0], expected in ((0.01, 3), (0.0, 1), (-0.01, 1), (-np.inf, 1)):
        assert len(encode(of)[0].networks) == expected


# --- ladders ---


def test_the_predicted_step_rises_with_detail_and_target() -> None:
    flat, rich = picture(np.full((96, 96, 3), 90, np.uint8)), picture(np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8))
    for preset in get_args(PresetName):
        ladder = Settings(preset, family="siren").ladder()
        assert 1 <= len(ladder) <= 4
        assert [s.nbytes for s in ladder] == sorted(s.nbytes for s in ladder)
        for mode in get_args(Mode):
            steps = [predict_rung(of, Settings(preset, mode=mode, family="siren")) for of in (flat, rich)]
            assert 0 == steps[0] <= steps[1] == len(ladder) - 1
    middle = picture(np.asarray(Image.fromarray(SMOOTH).resize((200, 160))))
    rising = [predict_rung(middle, Settings("balanced", target_psnr=target, family="siren")) for target in (1.0, 15, 20, 25, 30, 35, 40, 60)]
    assert rising == sorted(rising)
    assert rising[0] == 0
    assert rising[-1] == len(Settings("balanced", family="siren").ladder()) - 1


def test_a_blind_picture_starts_one_step_up() -> None:
    flat = picture(np.full((96, 96, 3), 90, np.uint8))
    assert predict_rung(replace(flat, blind=True), Settings("balanced", family="siren")) == 1
    assert predict_rung(replace(flat, blind=True), Settings("balanced", mode="be", family="siren")) == 0
    rich = replace(picture(np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)), blind=True)
    assert predict_rung(rich, Settings("balanced", family="siren")) == len(Settings("balanced", family="siren").ladder()) - 1


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Every call of the fitter: stage, shape, how many."""
    seen: list[tuple[str, str, int]] = []
    genuine = Lanes.fit

    def spy(self: Any, tasks: Sequence[Any], spec: Any, schedule: Schedule, stage: str, *more: Any) -> Any:
        if tasks:
            seen.append((stage, str(spec), len(tasks)))
        return genuine(self, tasks, spec, schedule, stage, *more)

    monkeypatch.setattr(Lanes, "fit", spy)
    return seen


def predicted(monkeypatch: pytest.MonkeyPatch, rung: Callable[[Picture], int]) -> None:
    monkeypatch.setattr(encoding, "predict_rung", lambda of, settings: rung(of))


def test_a_background_that_misses_its_target_is_fitted_once_more_a_step_up(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted(monkeypatch, lambda of: 0)
    easy, hard = picture(np.full((20, 20, 3), 128, np.uint8)), picture(SMOOTH)
    bundles = encode(easy, hard, mode="be", target_psnr=33.0)
    assert stages == [("background 0", "background 2x6 float16", 2), ("background 1", "background 2x12 float16", 1)]
    assert [bundle.networks[0].spec.width for bundle in bundles] == [6, 12]
    first = encode(easy, hard, mode="be")
    assert first[1].psnr is not None
    assert bundles[1].psnr is not None
    assert bundles[1].psnr > first[1].psnr


def test_the_better_of_both_tries_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, backgrounds=((2, 12), (2, 1))))
    predicted(monkeypatch, lambda of: 0)
    (bundle,) = encode(picture(SMOOTH), mode="be", target_psnr=60.0)
    assert bundle.networks[0].spec.width == 12


def test_the_last_step_of_a_ladder_is_the_last(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted(monkeypatch, lambda of: 2)
    encode(picture(SMOOTH), mode="be", target_psnr=60.0)
    assert [stage for stage, *_ in stages] == ["background 0"]


def test_a_residual_that_misses_its_target_climbs_its_ladder(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of = picture(SMOOTH, [[5, 5, 15, 15], [2, 2, 48, 38]])
    (plain,) = encode(of)
    assert [row for row in stages if "residual" in row[0]] == [("residual 0", "residual 3x14 float16", 1), ("residual 1", "residual 3x6 float16", 1)]
    assert [(n.object, n.spec.width) for n in plain.networks[1:]] == [(1, 14), (0, 6)]
    stages.clear()
    first = Settings("fast", family="siren").residual_ladder()[0]
    monkeypatch.setattr(residuals, "predict_spec", lambda *_: first)
    (wanted,) = encode(of, object_psnr=60.0)
    widths = [(stage, int(shape.split()[1].split("x")[1])) for stage, shape, _ in stages if "residual" in stage]
    assert widths == [(f"residual {level}", width) for level in (0, 1) for width in (6, 10, 14)]
    assert masked_psnr(decoded(wanted), of.pixels, of.boxes) > masked_psnr(decoded(plain), of.pixels, of.boxes) - 0.5
    # One that is reached is not climbed any further.
    stages.clear()
    reached = masked_psnr(decoded(plain), of.pixels, of.boxes[1:]) - 3
    encode(picture(SMOOTH, of.boxes[1:]), object_psnr=reached)
    assert len([stage for stage, *_ in stages if "residual" in stage]) <= 3


# --- quality of what is stored ---


def test_int8_is_within_half_a_db_of_float(monkeypatch: pytest.MonkeyPatch) -> None:
    # Grainy pictures, as photographs are to networks this small: near to what it can give, a fit of int8 moves on as one of floats does.
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, backgrounds=((3, 20),), background=Schedule(400, 4e-3, 512)))
    grain = np.random.default_rng(0).normal(0, 25, (64, 96, 3))
    pictures = [picture(np.clip(draw_scene(seed).image + grain, 0, 255).astype(np.uint8), blind=True) for seed in range(3)]
    for ours, exact in zip(encode(*pictures, mode="qre", threads=2), encode(*pictures, mode="re", threads=2), strict=True):
        assert ours.psnr is not None
        assert exact.psnr is not None
        assert exact.psnr > 19
        assert ours.psnr > exact.psnr - 0.5


def residual_psnr(pictures: Sequence[Picture], patch: pytest.MonkeyPatch, *, rounded: bool) -> list[float]:
    """PSNR that the fit sees of every residual, as stored or in float32; the steps are the same."""
    found: list[float] = []
    genuine = Lanes.fit

    def spy(self: Any, tasks: Sequence[Any], spec: Any, schedule: Schedule, stage: str, *more: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if not rounded and spec.kind == "residual":
                inner.setattr(siren, "round_as_stored", lambda flat, spec, steps: flat)
            results = genuine(self, tasks, spec, schedule, stage, *more)
        found.extend(result.psnr for result in results if spec.kind == "residual")
        return results

    with patch.context() as inner:
        inner.setattr(Lanes, "fit", spy)
        encode(*pictures)
    return found


def test_float16_residuals_are_within_a_tenth_of_a_db_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, residual=Schedule(200, 5e-3, 128), residuals=((3, 12), (3, 16), (3, 20))))
    pictures = [scene_picture(seed) for seed in range(3)]
    stored, exact = (residual_psnr(pictures, monkeypatch, rounded=rounded) for rounded in (True, False))
    assert len(stored) >= 5
    assert max(exact) > 28
    for a, b in zip(stored, exact, strict=True):
        assert abs(a - b) < 0.1


@pytest.fixture(scope="module")
def frames(real_data: Path) -> list[Picture]:
    """Frames of DAC-SDC, half the size, with their boxes."""
    from rinr_loader.converters import open_source
    from rinr_loader.image import fit_inside, read_image

    source = open_source(real_data / "dac_sdc")
    pictures = []
    for sample in source.samples[:: max(1, len(source.samples) // 6)][:6]:
        pixels = read_image(sample.image).pixels
        height, width = pixels.shape[:2]
        pictures.append(picture(fit_inside(pixels, (320, 180)), sample.boxes, source=(height, width)))
    return pictures


@pytest.mark.slow
@pytest.mark.real_data("dac_sdc")
@pytest.mark.timeout(600)
def test_quantization_costs_little_on_real_frames(frames: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(1000, 2e-3, 1024)
    monkeypatch.setitem(presets.PRESETS, "fast", Preset(((5, 32),), schedule, ((4, 20),), (float("inf"),), Schedule(500, 3e-3, 256)))
    modes: tuple[Mode, Mode] = ("qre", "re")
    backgrounds = {mode: encode(*[replace(p, blind=True) for p in frames], mode=mode, threads=2) for mode in modes}
    for a, b in zip(backgrounds["qre"], backgrounds["re"], strict=True):
        assert a.psnr is not None
        assert b.psnr is not None
        assert a.psnr > b.psnr - 0.5, (a.psnr, b.psnr)
    stored, plain = (residual_psnr(frames, monkeypatch, rounded=rounded) for rounded in (True, False))
    assert len(stored) >= len(frames)
    for c, d in zip(stored, plain, strict=True):
        assert abs(c - d) < 0.1 or d > 42  # far above any target, float16 itself begins to show


# --- progress and trouble ---


def test_every_background_is_counted_once() -> None:
    done: list[int] = []
    encode_unit(mixed(), Settings("fast", target_psnr=60.0, family="siren"), unit="u", threads=2, on_background=lambda: done.append(1))
    assert len(done) == len(mixed())


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_trouble_ends_all_fits_and_their_threads(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", replace(TINY, background=Schedule(10**6, 1e-4, 256)))
    predicted(monkeypatch, lambda of: 0)
    before = set(threading.enumerate())
    genuine = encoding._background_task

    def failing(of: Picture, *args: Any) -> Any:
        if of.pixels.shape[0] == 45:
            time.sleep(0.3)  # the other lane is at work
            raise error
        return genuine(of, *args)

    monkeypatch.setattr(encoding, "_background_task", failing)
    started = time.monotonic()
    with pytest.raises(type(error)):
        encode(*mixed(), threads=2, mode="be")
    assert time.monotonic() - started < 20
    while set(threading.enumerate()) - before and time.monotonic() - started < 20:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before


def test_no_pictures_give_no_bundles() -> None:
    assert encode() == []
