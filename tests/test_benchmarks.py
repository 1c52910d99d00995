"""What the benchmarks compute from what they measure: between points of a curve, from qualities to bytes, from bytes to their parts."""

from __future__ import annotations

import argparse
import io
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import common
import formats
import numpy as np
import pytest
import quality
import rate_distortion
import rates
import torch
from conftest import assert_close, draw_scene
from formats import Stored
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_datasets import drawn
from tiny_shards import TINY

from rinr_loader import encode, presets, residuals
from rinr_loader.bundle import HEADER, parse
from rinr_loader.dataset import RinrDataset
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.quality import jpeg_bytes, psnr
from rinr_loader.source import Sample


def framed(boxes: list[tuple[float, float, float, float]], *, width: int = 96, height: int = 64, seed: int = 0) -> Picture:
    """A drawn picture with these boxes; the last one marks a crowd where there are three."""
    pixels = draw_scene(seed, width=width, height=height).image
    crowd = np.arange(len(boxes)) == 2
    return Picture(pixels, (height, width), np.array(boxes, np.float32).reshape(-1, 4), np.zeros(len(boxes), np.int64), crowd)


# --- between points ---

LINE = [(1000 * 2 ** ((dB - 24) / 6), dB) for dB in (24.0, 26.0, 29.0, 33.0, 37.0, 40.0)]  # a doubling each 6 dB


def test_a_curve_of_a_share_of_the_bytes_has_that_bd_rate() -> None:
    for share in (0.6, 1.0, 1.7):
        found = rates.bd_rate(LINE, [(share * size, dB) for size, dB in LINE], 27, 36)
        assert found.percent == pytest.approx(100 * (share - 1))
        assert (found.low, found.high) == (27, 36)


def test_bd_rate_is_the_mean_of_the_logarithm_over_the_interval() -> None:
    steeper = [(1000 * 2 ** ((dB - 24) / 5 - 0.5), dB) for dB in (20.0, 25.0, 31.0, 38.0)]
    difference = (31.5 - 24) / 5 - 0.5 - (31.5 - 24) / 6  # both are lines: the mean is the value in the middle
    assert rates.bd_rate(LINE, steeper, 27, 36).percent == pytest.approx(100 * (2**difference - 1))


def test_bd_rates_both_ways_cancel() -> None:
    curved = [(900.0, 23.0), (1500.0, 28.0), (4000.0, 32.0), (9000.0, 37.0)]
    there, back = rates.bd_rate(LINE, curved, 27, 36), rates.bd_rate(curved, LINE, 27, 36)
    assert (1 + there.percent / 100) * (1 + back.percent / 100) == pytest.approx(1)


def test_bd_rate_tells_what_both_curves_cover() -> None:
    short = [(0.5 * size, dB) for size, dB in LINE if 28 < dB < 35]
    found = rates.bd_rate(LINE, short, 27, 36)
    assert (found.low, found.high, found.percent) == (29, 33, pytest.approx(-50))
    with pytest.raises(ValueError, match=r"interval of 38.00 to 36.00 dB"):
        rates.bd_rate(LINE, [(1.0, 38.0), (2.0, 41.0)], 27, 36)


def test_points_that_another_one_beats_do_not_count() -> None:
    worse = [(9000.0, 25.0), (1100.0, 24.0), *reversed(LINE)]
    assert rates.front(worse) == LINE
    assert rates.bd_rate(LINE, worse, 27, 36).percent == pytest.approx(0)
    with pytest.raises(ValueError, match="at least 2 points"):
        rates.bd_rate(LINE, [(10.0, 30.0), (20.0, 29.0)], 27, 36)


def test_the_cubic_between_points_is_the_monotone_one() -> None:
    x, y = np.array([0.0, 1, 2]), np.array([0.0, 1, 8])  # slopes 0, 7/4 and 10, worked out by hand
    assert rates.interpolated(x, y, np.array([0.5, 1.5])) == pytest.approx([0.28125, 3.46875])
    uneven = np.array([0.0, 1, 3]), np.array([0.0, 1, 3.5])  # slopes 11/12, 45/41 and 17/12
    assert rates.interpolated(*uneven, np.array([0.5, 2.0])) == pytest.approx([0.4773882, 2.1702236])
    at = np.linspace(0.2, 1.7, 200_001)
    assert rates.integral(x, y, 0.2, 1.7) == pytest.approx(np.trapezoid(rates.interpolated(x, y, at), at), rel=1e-8)


@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(-5, 5)), min_size=2, max_size=8))
def test_the_cubic_goes_through_its_points_and_not_beyond_its_neighbours(steps: list[tuple[float, float]]) -> None:
    x, y = np.cumsum([h for h, _ in steps]), np.array([value for _, value in steps])
    assert rates.interpolated(x, y, x) == pytest.approx(y, abs=1e-9)
    for i in range(len(x) - 1):
        between = rates.interpolated(x, y, np.linspace(x[i], x[i + 1], 20))
        low, high = sorted(y[i : i + 2])
        assert (between >= low - 1e-9).all()
        assert (between <= high + 1e-9).all()
        assert (np.diff(between) * np.sign(y[i + 1] - y[i]) >= -1e-9).all()


def test_a_curve_is_read_at_a_size_and_at_a_psnr() -> None:
    assert rates.psnr_at(LINE, 1000 * 2 ** (7 / 6)) == pytest.approx(31)
    assert rates.size_at(LINE, 31) == pytest.approx(1000 * 2 ** (7 / 6))
    assert rates.psnr_at(LINE, 999) is rates.size_at(LINE, 23.9) is rates.size_at(LINE, 40.1) is None


# --- other formats ---


@pytest.mark.parametrize("kind", ["JPEG", "WebP"])
def test_a_picture_in_another_format_is_that_file(kind: str) -> None:
    frame = framed([(10, 10, 40, 30)])
    size, decoded = formats.encoded(frame.pixels, kind, 40)
    file = io.BytesIO()
    Image.fromarray(frame.pixels).save(file, kind.upper(), quality=40, **({"optimize": True} if kind == "JPEG" else {"method": 6}))
    assert size == len(file.getvalue())
    assert np.array_equal(decoded, np.array(Image.open(file)))
    if kind == "JPEG":
        assert size == jpeg_bytes(frame.pixels, 40)
    points = formats.curve(frame, kind, (20, 40, 90))
    assert points[1] == (size, (size,), psnr(decoded, frame.pixels), psnr(decoded, frame.pixels, frame.object_mask))
    assert [point.psnr for point in points] == sorted(point.psnr for point in points)


def test_crops_are_the_boxes_with_a_margin_inside_the_picture() -> None:
    frame = framed([(20.2, 10.9, 40.5, 30.0), (0, 50, 6, 64), (50, 20, 60, 30)])
    assert formats.roi_crops(frame) == [(16, 6, 45, 34), (0, 46, 10, 64)]  # the crowd has none
    shrunk = Picture(frame.pixels, (128, 192), frame.boxes * 2, frame.classes, frame.crowd)
    assert formats.roi_crops(shrunk) == formats.roi_crops(frame)


def test_roi_keeps_the_frame_and_replaces_its_objects() -> None:
    frame = framed([(20, 10, 40, 30), (60, 40, 80, 60)])
    base, whole = formats.encoded(frame.pixels, "JPEG", 5)
    points = formats.roi_curve(frame, "JPEG", 5, (30, 95))
    for point, quality_of_crops in zip(points, (30, 95), strict=True):
        pasted = whole.copy()
        crops = formats.roi_crops(frame)
        sizes = []
        for x0, y0, x1, y1 in crops:
            size, pasted[y0:y1, x0:x1] = formats.encoded(frame.pixels[y0:y1, x0:x1].copy(), "JPEG", quality_of_crops)
            sizes.append(size)
        assert point.files == (base, *sizes)
        assert point.bytes == base + sum(sizes)
        assert point.psnr == psnr(pasted, frame.pixels)
        assert point.object_psnr == psnr(pasted, frame.pixels, frame.object_mask)
    assert points[1].object_psnr > points[0].object_psnr + 3


def test_the_cheapest_that_meets_the_targets() -> None:
    points = [Stored(10, (10,), 26.0, 36.0), Stored(20, (20,), 27.0, 34.0), Stored(40, (40,), 28.0, 36.0), Stored(30, (30,), 27.5, 35.0)]
    assert formats.cheapest(points, 27.0, None) == points[1]
    assert formats.cheapest(points, None, 35.0) == points[0]
    assert formats.cheapest(points, 27.0, 35.0) == points[3]
    assert formats.cheapest(points, 29.0, None) is None
    needs = quality.needs([points, points[:2]])
    assert needs["both"] == {"bytes": 30, "in_tar": 1024, "reached": 1, "of": 2}
    assert needs["image_27"] == {"bytes": 20, "in_tar": 1024, "reached": 2, "of": 2}
    assert quality.needs([points[:1]])["image_27"] == {"bytes": None, "in_tar": None, "reached": 0, "of": 1}


@pytest.mark.parametrize("files", [(1,), (512, 513), (4000, 600, 7)])
def test_what_files_take_in_a_tar(files: tuple[int, ...]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, size in enumerate(files):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
        end = tar.offset
    assert Stored(sum(files), files, 0.0, 0.0).tar_bytes == end


# --- ours ---


def small(key: str, seed: int, objects: int = 2, width: int = 32) -> Sample:
    """A drawn sample whose objects have one class, as those of the benchmark."""
    sample = drawn(key, seed, objects=objects, width=width)
    return replace(sample, classes=np.zeros_like(sample.classes))


def test_a_row_of_ours_holds_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", TINY)
    samples = [small("b", 1), small("a", 2, objects=0, width=40)]
    row = quality.ours("some name", samples, Settings(preset="fast", family="siren", object_psnr=1.0), tmp_path)
    dataset = RinrDataset(tmp_path / "some-name")
    files = [path for path in (tmp_path / "some-name/train").iterdir() if path.suffix in (".tar", ".safetensors")]
    assert row["stored_bytes"] == round(sum(path.stat().st_size for path in files) / 2)
    assert sum(row["parts"].values()) == pytest.approx(row["stored_bytes"], abs=3)
    bundles = row["parts"]["background"] + row["parts"]["objects"] + row["parts"]["header"]
    assert bundles == pytest.approx(row["bundle_bytes"], abs=2)
    assert row["parts"]["header"] >= HEADER.size + 32
    assert row["psnr"] == pytest.approx(dataset.column("psnr").tolist(), abs=0.006)
    assert [math.nan if value is None else value for value in row["object_psnr"]] == pytest.approx(
        dataset.column("object_psnr").tolist(), abs=0.006, nan_ok=True
    )
    assert row["object_psnr"].count(None) == 1


def test_parts_of_a_dataset_are_those_of_its_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", TINY)
    quality.ours("one", [small("a", 1)], Settings(preset="fast", family="siren", object_psnr=90.0), tmp_path)
    shard = tmp_path / "one/train/train-000000.tar"
    with tarfile.open(shard) as tar:
        data = tar.extractfile("a.rinr").read()  # type: ignore[union-attr]
    networks = parse(data).networks
    assert len(networks) == 3
    assert quality.parts(tmp_path / "one") == {
        "background": len(networks[0].weights),
        "objects": len(networks[1].weights) + len(networks[2].weights),
        "header": len(data) - sum(len(network.weights) for network in networks),
        "tar": shard.stat().st_size - len(data),
        "index": shard.with_suffix(".safetensors").stat().st_size,
    }


def test_objects_are_what_a_stream_grows_by_with_them() -> None:
    row = {"parts": {"background": 900, "objects": 0, "header": 90, "tar": 600, "index": 30}}
    alone = {"parts": {"background": 700, "objects": 0, "header": 70, "tar": 500, "index": 20}}
    assert quality.share_stream(row, alone)["parts"] == {"background": 700, "objects": 200, "header": 90, "tar": 600, "index": 30}


def test_frames_that_meet_the_targets_are_counted() -> None:
    found = quality.reached([26.9, 27.0, 30.0, 30.0], [40.0, 35.0, 34.9, math.nan])
    assert found == {"image_27": 3, "object_35": 3, "both": 2}


# --- what hides the label boxes ---


def test_without_margin_jitter_and_soft_edges_a_residual_is_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = framed([(20.5, 12.0, 40.0, 30.2)])
    monkeypatch.setattr(encode, "MARGIN", residuals.MARGIN, raising=False)  # as if it had been imported by name
    before = {name: getattr(residuals, name) for name in quality.WITHOUT["without any"]}

    def rect() -> tuple[int, int, int, int]:
        return residuals.place_residuals(frame, torch.Generator().manual_seed(0))[0].rect

    usual = rect()
    assert usual != (20, 12, 40, 31)

    def fail_inside() -> None:
        with quality.constants(**quality.WITHOUT["without any"]):
            assert rect() == (20, 12, 40, 31)
            assert (residuals.FEATHER, encode.MARGIN) == (0, 0)  # type: ignore[attr-defined]
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail_inside()
    assert {name: getattr(residuals, name) for name in before} == before
    assert encode.MARGIN == residuals.MARGIN  # type: ignore[attr-defined]
    assert rect() == usual
    with quality.constants(**quality.WITHOUT["without jitter"]):
        assert rect() == (20 - residuals.MARGIN, 12 - residuals.MARGIN, 40 + residuals.MARGIN, 31 + residuals.MARGIN)


def test_costs_of_what_hides_the_label_boxes() -> None:
    sizes = dict(zip(quality.WITHOUT, (1000, 970, 990, 900, 860), strict=True))
    assert quality.costs(sizes) == {"jitter": 30, "soft edges": 10, "margin": 90, "all": 140}


# --- curves of several pictures ---


def test_a_sweep_goes_on_until_the_table_is_covered() -> None:
    pictures = [framed([], seed=seed) for seed in range(3)]
    unit = rate_distortion.scaled(pictures[0])
    at_27 = dict(zip([id(one) for one in pictures], (2_500, 24_000, 3_500), strict=True))  # bytes for 640x360 pixels
    asked: list[tuple[float, int]] = []

    def encoder(some: list[Picture], target: float) -> list[rates.Point | None]:
        asked.append((target, len(some)))
        points: list[rates.Point | None] = [(at_27[id(one)] * unit * 2 ** ((target - 27) / 3), target + 0.01) for one in some]
        return [None if one is pictures[2] and target == 31.5 else point for one, point in zip(some, points, strict=True)]  # as from a fallback

    curves = rate_distortion.sweep(encoder, pictures)
    assert asked[:7] == [(target, 3) for target in rate_distortion.TARGETS]
    assert asked[7:] == [(25.5, 1), (24.0, 1), (22.5, 1), (37.5, 2), (39.0, 1)]
    assert [[round(dB - 0.01, 2) for _, dB in sorted(points)] for points in curves] == [
        [*rate_distortion.TARGETS, 37.5, 39.0],
        [22.5, 24.0, 25.5, *rate_distortion.TARGETS],
        [target for target in rate_distortion.TARGETS if target != 31.5] + [37.5],
    ]
    for points in curves:
        assert all(rates.psnr_at(points, size * unit) is not None for size in rate_distortion.SIZES)


def test_rows_are_compared_picture_by_picture() -> None:
    far = [(8 * size, dB - 3) for size, dB in LINE]
    rows = {
        "JPEG": {"curves": [LINE, far]},
        "tile-1": {"curves": [[(0.5 * size, dB) for size, dB in LINE], [(0.7 * size, dB) for size, dB in far]]},
        "siren": {"curves": [[(500.0, 20.0), (900.0, 22.0)], [(0.9 * size, dB) for size, dB in far]]},
    }
    rate_distortion.compare(rows, [0.15, 1.0])
    assert rows["JPEG"]["bd_rate"] == {}
    found = rows["tile-1"]["bd_rate"]["JPEG"]
    assert (found["mean"], found["each"], found["pictures"]) == (-40.0, [-50.0, -30.0], 2)
    assert found["covered"] == [[27.0, 36.0], [27.0, 36.0]]
    assert rows["siren"]["bd_rate"]["JPEG"] == {"mean": -10.0, "pictures": 1, "each": [None, -10.0], "covered": [None, [27.0, 36.0]]}
    at = [(24 + 6 * math.log2(0.15 * size / 1000) + 21 + 6 * math.log2(size / 8000)) / 2 for size in rate_distortion.SIZES]
    assert rows["JPEG"]["psnr_at"] == pytest.approx(at, abs=0.01)
    assert rows["siren"]["psnr_at"] == [None] * 4


def test_points_are_measured_on_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "fast", TINY)
    frames = [framed([], width=40, height=24), framed([], width=24, height=32, seed=3)]
    bundles = encode.encode_unit(frames, Settings(preset="fast", family="siren"), unit="test")
    points = rate_distortion.points_of(frames, bundles)
    assert points == [(len(bundle), pytest.approx(parse(bundle).psnr, abs=0.006)) for bundle in bundles]


def test_every_format_has_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [framed([], seed=seed) for seed in range(2)]
    for kind in ("JPEG", "WebP"):
        curves = rate_distortion.CURVES[kind](frames)
        assert [len(points) for points in curves] == [len(rate_distortion.SHOWN_QUALITIES[kind])] * 2
        assert all(points[0][0] < points[-1][0] and points[0][1] + 5 < points[-1][1] for points in curves)


@pytest.mark.real_data("kodak")
def test_webp_is_ahead_of_jpeg_on_a_photograph(monkeypatch: pytest.MonkeyPatch, real_data: Path) -> None:
    monkeypatch.setattr(common, "DATA", real_data)
    whole = common.picture(common.kodak()[0]).pixels
    assert whole.shape == (512, 768, 3)
    middle = Picture(whole[128:384, 192:576], (256, 384), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    jpeg, webp = (rate_distortion.others(kind, [middle]) for kind in ("JPEG", "WebP"))
    found = rate_distortion.mean_bd_rate(jpeg, webp)
    assert found["pictures"] == 1
    assert -60 < found["mean"] < -10


@pytest.mark.real_data("dac_sdc")
def test_objects_stored_once_more_save_bytes_on_a_real_frame(monkeypatch: pytest.MonkeyPatch, real_data: Path) -> None:
    monkeypatch.setattr(common, "DATA", real_data)
    samples = common.dac_frames("test", 5)
    assert {sample.split for sample in samples} == {"test"}
    frame = common.picture(samples[2])
    whole = formats.curve(frame, "JPEG", range(5, 100, 10))
    base = next(quality for quality, point in zip(range(5, 100, 10), whole, strict=True) if point.psnr >= 27)
    found = [formats.cheapest(points, 27, 35) for points in (whole, formats.roi_curve(frame, "JPEG", base, range(5, 100, 10)))]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].bytes < found[0].bytes / 2


@pytest.mark.requires("matplotlib")
def test_curves_are_drawn_where_every_picture_has_one(tmp_path: Path) -> None:
    import rate_distortion_plot as plot

    far = [(8 * size, dB - 3) for size, dB in LINE]
    sizes, values = plot.mean_curve([LINE, far], [1.0, 2.0])
    assert sizes[0] == pytest.approx(4000)  # where the second begins, 8,000 bytes on twice the area
    assert sizes[-1] == pytest.approx(LINE[-1][0])
    assert values[0] == pytest.approx((24 + 6 * math.log2(4) + 21) / 2)
    assert plot.mean_curve([LINE, [(20_000.0, 30.0), (30_000.0, 31.0)]], [1.0, 1.0]) == ([], [])
    rows = {name: {"curves": [[(4 * size, dB) for size, dB in LINE]]} for name in ("JPEG", "tile-2", "unknown")}
    plot.draw({"rows": rows, "units": [1.0]}, tmp_path / "new/plot.png")
    with Image.open(tmp_path / "new/plot.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


# --- speed ---


@pytest.mark.requires("torchvision")
def test_contenders_take_turns() -> None:
    import speed

    now, called = [0.0], []
    took = {"a": 1.0, "b": 4.0, "c": 2.0}

    def work(name: str) -> None:
        called.append(name)
        now[0] += took[name] * (10 if len(called) <= 3 else 1)  # the first round is slow

    seconds = speed.take_turns({name: lambda name=name: work(name) for name in took}, 3, clock=lambda: now[0])
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [value] * 3 for name, value in took.items()}
    rows = {row["name"]: row for row in speed.speeds({**seconds, "b": [4.0, 5.0, 8.0]}, 20, "c")}
    assert rows["c"] == {"name": "c", "images_per_s": 10.0, "slowest": 10.0}
    assert rows["b"] == {"name": "b", "images_per_s": 4.0, "slowest": 2.5, "ratio": 0.4, "ratio_min": 0.25, "ratio_max": 0.5}


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.requires("torchvision")
def test_jpegs_are_decoded_to_the_same_batch_as_ours() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import speed

    files, expected = [], []
    for seed in range(3):
        file = io.BytesIO()
        Image.fromarray(draw_scene(seed).image).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
        expected.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(speed.pillow(pool, files, (64, 96)), torch.stack(expected))
        assert_close(speed.torchvision(pool, tensors, (64, 96)), torch.stack(expected), "pixels")
        halves = [decode(pool, data, (32, 48)) for decode, data in ((speed.pillow, files), (speed.torchvision, tensors))]
        with pytest.raises(ValueError, match="expected a decoder that gives 50x30"):
            speed.pillow(pool, files, (30, 50))
    smaller = torch.nn.functional.avg_pool2d(torch.stack(expected).float(), 2)
    for half in halves:
        assert (half.dtype, half.shape, half.is_contiguous()) == (torch.uint8, (3, 3, 32, 48), True)
        assert float((half.float() - smaller).abs().mean()) < 4


# --- options ---


def test_rows_are_chosen_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    common.add_rows(parser, common.TILE_ROWS)
    names = ["JPEG", *common.TILE_ROWS]
    assert common.chosen_rows(parser, parser.parse_args([]).rows, names) == names
    assert common.chosen_rows(parser, ["tile-2*", "JPEG"], names) == ["JPEG", "tile-2", "tile-2-refine-10", "tile-2-refine-100"]
    with pytest.raises(SystemExit):
        common.chosen_rows(parser, ["JPEG", "tile-7"], names)
    assert "got tile-7" in capsys.readouterr().err


def test_results_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert common.read_result("some") == {}
    common.write_result("some", {"rows": [1, 2]})
    assert common.read_result("some")["rows"] == [1, 2]
