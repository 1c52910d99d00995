"""The family `jpeg`: what a picture is stored as, for every target; that every decoder agrees; conversion from end to end."""

from __future__ import annotations

import io
import json
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from conftest import assert_close, draw_scene
from jpegs import jpeg_bundle, jpeg_file, read_jpeg, textured
from networks import RESIDUALS, random_bundle
from numpy.typing import NDArray
from PIL import ExifTags, Image
from small_datasets import edit, tree_hash
from typer.testing import CliRunner, Result

from rinr_loader import DataLoader, RinrDataset, cli, encode_jpeg, units
from rinr_loader.bundle import JpegSpec, parse
from rinr_loader.codecs import jpeg as codec
from rinr_loader.convert import Job, convert, estimate
from rinr_loader.decode import decode, decode_batch, whole
from rinr_loader.encode import encode_unit
from rinr_loader.encode_jpeg import best_jpeg, jpeg_of, overhead, smallest_jpeg
from rinr_loader.errors import BundleError, ConfigError
from rinr_loader.image import read_image
from rinr_loader.info import describe
from rinr_loader.jpeg_header import read_header
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings, check_settings
from rinr_loader.quality import box_mask, psnr
from rinr_loader.reader import buffer_of
from rinr_loader.reindex import reindex
from rinr_loader.source import Sample, Source, Split
from rinr_loader.units import Unit, encode_samples
from rinr_loader.verify import verify
from rinr_loader.writer import describe_dataset, describe_shard, dump_json, write_bytes, write_index, write_tar

Pixels = NDArray[np.uint8]
JPEG, SIREN = Settings(family="jpeg"), Settings(family="siren")
SIZE = (48, 64)


def drawn(seed: int = 0) -> Pixels:
    return draw_scene(seed, width=SIZE[1], height=SIZE[0], objects=2).image


def picture(pixels: Pixels, *, boxes: object = (), blind: bool = False, original: bytes | None = None) -> Picture:
    found = np.asarray(boxes, np.float32).reshape(-1, 4)
    height, width = pixels.shape[:2]
    return Picture(pixels, (height, width), found, np.zeros(len(found), np.int64), np.zeros(len(found), np.bool_), blind=blind, original=original)


def photograph(seed: int = 0, **options: Any) -> Picture:
    """A picture read from a JPEG file."""
    data = jpeg_file(drawn(seed), **options)
    found = read_image(data)
    return picture(found.pixels, original=found.jpeg)


# --- what decoders make of a file ---

FILES = {
    "baseline": jpeg_file(textured(0, (33, 47))),
    "4:4:4": jpeg_file(textured(1, (33, 47)), subsampling=0),
    "4:2:2": jpeg_file(textured(2, (33, 47)), subsampling=1),
    "progressive": jpeg_file(textured(3, (33, 47)), progressive=True),
    "gray": jpeg_file(textured(4, (33, 47))[..., 0]),
    "restart markers": jpeg_file(textured(5, (33, 47)), restart_marker_blocks=2),
    "quality 1": jpeg_file(textured(6, (33, 47)), quality=1),
    "quality 100": jpeg_file(textured(7, (33, 47)), quality=100, subsampling=0, optimize=True),
    "one pixel": jpeg_file(textured(8, (1, 1))),
    "one row": jpeg_file(textured(9, (1, 50))),
}


def decoded(file: bytes, device: str = "cpu") -> torch.Tensor:
    header = read_header(file)
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    return codec.decode_files([data], [(header.height, header.width)], ["x"], torch.device(device))[0]


@pytest.mark.requires("torchvision")
@pytest.mark.parametrize("name", FILES)
def test_torchvision_and_pillow_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codec._has_op("decode_jpeg"), "torchvision decodes here"
    by_torchvision = decoded(FILES[name])
    monkeypatch.setattr(codec, "_has_op", lambda _: False)
    by_pillow = decoded(FILES[name])
    assert by_pillow.shape == by_torchvision.shape == (3, *read_jpeg(FILES[name]).shape[:2])
    assert_close(by_pillow.permute(1, 2, 0), read_jpeg(FILES[name]), "exact")
    assert_close(by_torchvision.contiguous(), by_pillow.contiguous(), "pixels")


@pytest.mark.cuda
@pytest.mark.requires("torchvision")
@pytest.mark.parametrize("name", FILES)
def test_nvjpeg_is_near_to_pillow(name: str) -> None:
    """It interpolates halved colour in another way, so edges of colour differ; the picture does not."""
    found = decoded(FILES[name], "cuda")
    assert found.device.type == "cuda"
    assert psnr(found.permute(1, 2, 0).cpu().numpy(), read_jpeg(FILES[name])) > (45 if name in ("gray", "4:4:4", "quality 100") else 30)


@pytest.mark.cuda
def test_a_buffer_on_a_gpu_decodes_its_jpegs_there() -> None:
    buffer = buffer_of([jpeg_bundle(i, stored=(40, 48)) for i in range(5)])
    size = (40, 48)
    here, there = (decode(where, whole(where, size), size=size) for where in (buffer, buffer.to("cuda")))
    assert there.device.type == "cuda"
    assert psnr(there.permute(0, 2, 3, 1).cpu().numpy().reshape(-1, 48, 3), here.permute(0, 2, 3, 1).numpy().reshape(-1, 48, 3)) > 30


def test_on_a_gpu_files_that_nvjpeg_refuses_are_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for CUDA here is a device without memory."""
    monkeypatch.setattr(codec, "_has_op", lambda name: name != "decode_jpegs_cuda" and codec_has_op(name))
    assert codec._decode_cuda([torch.zeros(3, dtype=torch.uint8)], torch.device("cuda")) is None
    assert codec._decode_cuda([], torch.device("cuda")) is None
    monkeypatch.setattr(codec, "_has_op", lambda _: True)
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", lambda *_: (_ for _ in ()).throw(RuntimeError("unsupported")), raising=False)
    assert codec._decode_cuda([torch.zeros(3, dtype=torch.uint8)], torch.device("cuda")) is None
    monkeypatch.setattr(codec, "_has_op", codec_has_op)
    assert decoded(FILES["baseline"], "meta").device.type == "meta"


codec_has_op = codec._has_op


@pytest.mark.requires("torchvision")
def test_on_a_gpu_all_files_go_to_nvjpeg_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, str]] = []
    sides = [(33, 47), (33, 47)]

    def nvjpeg(files: list[torch.Tensor], mode: int, device: torch.device) -> list[torch.Tensor]:
        calls.append((len(files), mode, str(device)))
        return [torch.full((3, *size), 7, dtype=torch.uint8) for size in sides]

    monkeypatch.setattr(codec, "_has_op", lambda _: codec_has_op("decode_jpeg"))
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", nvjpeg, raising=False)
    files = [torch.frombuffer(bytearray(FILES[name]), dtype=torch.uint8) for name in ("baseline", "4:4:4")]
    found = codec.decode_files(files, [(33, 47)] * 2, ["a", "b"], torch.device("cuda"))
    assert [image.unique().tolist() for image in found] == [[7], [7]]
    assert calls == [(2, 3, "cuda")]
    sides[1] = (33, 46)
    with pytest.raises(BundleError, match=r"^b: expected a picture of 47x33, got shape \(3, 33, 46\)"):
        codec.decode_files(files, [(33, 47)] * 2, ["a", "b"], torch.device("cuda"))


@pytest.mark.parametrize("pillow", [False, True])
def test_a_file_that_does_not_fit_its_bundle_is_not_decoded(pillow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pillow:
        monkeypatch.setattr(codec, "_has_op", lambda _: False)
    file = torch.frombuffer(bytearray(FILES["baseline"]), dtype=torch.uint8)
    tables = FILES["baseline"].index(b"\xff\xc4")
    broken = file.clone()
    broken[tables + 5 : tables + 60] = 255
    cases = {
        "expected a JPEG of 46x33, got 47x33": (file, (33, 46)),
        "expected a JPEG, gray or YCbCr, got no start of an image": (file[2:].clone(), (33, 47)),
        "expected a JPEG, got ": (broken, (33, 47)),
    }
    for words, (data, size) in cases.items():
        with pytest.raises(BundleError, match=rf"^k\.rinr: {words}.*; the bundle is damaged, fetch or convert it again$"):
            codec.decode_files([file, data], [(33, 47), size], ["a.rinr", "k.rinr"], torch.device("cpu"))


@pytest.mark.parametrize("pillow", [False, True])
def test_damaged_scans_are_pixels_or_errors_of_ours(pillow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pillow:
        monkeypatch.setattr(codec, "_has_op", lambda _: False)
    file = FILES["progressive"]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        data = bytearray(file)
        for at in rng.integers(20, len(file), 3):
            data[at] = rng.integers(256)
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        try:
            found = codec.decode_files([tensor], [(33, 47)], ["x"], torch.device("cpu"))[0]
        except BundleError:
            seen.add("error")
            continue
        seen.add("pixels")
        assert (found.dtype, found.shape) == (torch.uint8, (3, 33, 47))
    assert seen == {"error", "pixels"}


def test_a_bomb_costs_nothing() -> None:
    frame = FILES["baseline"].index(b"\xff\xc0") + 5
    bomb = bytearray(FILES["baseline"])
    bomb[frame : frame + 4] = b"\xff\xff\xff\xff"
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="65535x65535 pixels in"):
            codec.decode_files([torch.frombuffer(bomb, dtype=torch.uint8)], [(65535, 65535)], ["x"], torch.device("cpu"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# --- the smallest JPEG that is good enough ---


def sizes(pixels: Pixels, target: float, mask: NDArray[np.bool_] | None = None, object_target: float | None = None) -> list[int]:
    """Bytes of every JPEG that reaches the targets, at all qualities, with halved and with full colour."""
    found = []
    for subsampling in (2, 0):
        for quality in range(1, 101):
            file = jpeg_file(pixels, quality=quality, optimize=True, subsampling=subsampling)
            enough = psnr(read_jpeg(file), pixels) >= target
            if enough and (object_target is None or psnr(read_jpeg(file), pixels, mask) >= object_target):
                found.append(len(file))
    return found


@pytest.mark.parametrize("target", [24.0, 28.0, 33.5, 38.0, 44.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_quality_reaches_the_target_in_fewer_bytes(target: float, seed: int) -> None:
    pixels = drawn(seed)
    found = smallest_jpeg(pixels, target)
    others = sizes(pixels, target)
    if found is None:
        assert not others
        return
    file, reached, objects = found
    assert (reached, objects) == (psnr(read_jpeg(file), pixels), None)
    assert reached >= target
    # PSNR is not quite monotonic in the quality: another one may be smaller by a little.
    assert min(others) <= len(file) <= 1.02 * min(others)


def test_objects_may_ask_for_more_than_the_picture() -> None:
    pixels = drawn(3)
    mask = box_mask(np.array([[10.0, 10, 30, 30]]), *SIZE)
    file, whole_psnr, object_psnr = smallest_jpeg(pixels, 25.0, mask, 36.0) or (b"", 0.0, None)
    assert object_psnr is not None
    assert (whole_psnr, object_psnr) == (psnr(read_jpeg(file), pixels), psnr(read_jpeg(file), pixels, mask))
    assert object_psnr >= 36.0
    assert len(file) <= 1.02 * min(sizes(pixels, 25.0, mask, 36.0))
    alone = smallest_jpeg(pixels, 25.0, mask)
    assert alone is not None
    assert len(alone[0]) < len(file)
    assert smallest_jpeg(pixels, None, mask, 36.0) is not None
    assert smallest_jpeg(pixels, 25.0, np.zeros(SIZE, np.bool_), 36.0) == smallest_jpeg(pixels, 25.0)


def colourful() -> Pixels:
    """Stripes of colour, one pixel wide: halved colour cannot show them."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:, ::2] = (220, 60, 60)
    pixels[:, 1::2] = (60, 60, 220)
    return pixels


def sampling(file: bytes) -> int:
    """Sampling factors of the first component: 0x22 where colour is halved."""
    return file[file.index(b"\xff\xc0") + 11]


def test_full_colour_where_halved_colour_is_not_enough() -> None:
    assert smallest_jpeg(colourful(), 30.0) is not None
    assert sampling((smallest_jpeg(colourful(), 30.0) or (b"",))[0]) == 0x11
    assert sampling((smallest_jpeg(drawn(), 30.0) or (b"",))[0]) == 0x22


def test_a_target_that_no_jpeg_reaches() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    assert smallest_jpeg(noise, 70.0) is None
    best = jpeg_of(picture(noise), replace(JPEG, target_psnr=70.0))
    assert psnr(read_jpeg(best), noise) > psnr(read_jpeg(jpeg_file(noise, quality=95, subsampling=0)), noise)


def test_gray_pictures_have_one_component() -> None:
    pixels = np.repeat(drawn()[..., :1], 3, 2)
    for settings in (JPEG, replace(JPEG, target_psnr=35.0), replace(JPEG, target_psnr=90.0), replace(JPEG, max_bytes=1500)):
        file = jpeg_of(picture(pixels), settings)
        assert read_header(file).components == 1
        assert psnr(read_jpeg(file), pixels) > 20
    assert read_header(jpeg_of(picture(drawn()), JPEG)).components == 3


# --- what a picture is stored as ---


def test_without_a_target_a_jpeg_stays_the_file_that_it_was() -> None:
    for options in ({"quality": 30}, {"quality": 97, "subsampling": 0}, {"progressive": True}, {"comment": b"kept"}):
        of = photograph(**options)
        assert jpeg_of(of, JPEG) == of.original == jpeg_file(drawn(), **options)


def test_without_a_target_another_picture_becomes_a_jpeg_of_quality_95() -> None:
    assert jpeg_of(picture(drawn()), JPEG) == jpeg_file(drawn(), quality=95, optimize=True, subsampling=2)


def test_a_file_that_is_smaller_than_what_the_target_takes_is_kept() -> None:
    of = photograph(quality=40)
    assert jpeg_of(of, replace(JPEG, target_psnr=50.0)) == of.original
    assert jpeg_of(of, replace(JPEG, target_psnr=98.0)) == of.original, "it is exact"
    smaller = jpeg_of(photograph(quality=97), replace(JPEG, target_psnr=30.0))
    assert len(smaller) < len(photograph(quality=97).original or b"") / 2
    assert psnr(read_jpeg(smaller), photograph(quality=97).pixels) >= 30


def test_an_original_that_is_another_picture_is_not_stored() -> None:
    for original in (jpeg_file(drawn(5)), jpeg_file(drawn())[:-200], b"", jpeg_file(drawn()[:, :-1])):
        of = picture(drawn(), original=original)
        assert jpeg_of(of, JPEG) == jpeg_of(picture(drawn()), JPEG)


def test_bytes_are_bounded() -> None:
    of = picture(textured(0, SIZE), boxes=[[3, 3, 20, 30]])
    for target in (None, 45.0):
        for most in (900, 1500, 2200):
            settings = replace(JPEG, max_bytes=most, target_psnr=target)
            (bundle,) = encode_unit([of], settings, unit="u", threads=1)
            assert most * 0.8 < len(bundle) <= most, "as good as fits"
    file = jpeg_of(of, replace(JPEG, max_bytes=1900))
    limit = 1900 - overhead(1)
    one_better = [jpeg_file(of.pixels, quality=q, optimize=True, subsampling=s) for s in (2, 0) for q in range(1, 101)]
    assert psnr(read_jpeg(file), of.pixels) == max(psnr(read_jpeg(other), of.pixels) for other in one_better if len(other) <= limit)
    assert jpeg_of(of, replace(JPEG, max_bytes=5)) == jpeg_file(of.pixels, quality=1, optimize=True, subsampling=2), "nothing fits: the smallest"
    assert best_jpeg(of.pixels, None) == jpeg_file(of.pixels, quality=100, optimize=True, subsampling=0)


def test_an_original_that_is_too_large_is_not_kept() -> None:
    of = photograph(quality=98)
    (bundle,) = encode_unit([of], replace(JPEG, max_bytes=2000), unit="u", threads=1)
    assert len(bundle) <= 2000 < len(of.original or b"")


@pytest.mark.parametrize("objects", [0, 1, 2, 7])
def test_overhead_is_that_of_a_bundle(objects: int) -> None:
    of = picture(drawn(), boxes=[[1, 1, 9, 9]] * objects)
    (bundle,) = encode_unit([of], JPEG, unit="u", threads=1)
    assert len(bundle) == overhead(objects) + len(parse(bundle).networks[0].weights)


def test_objects_count_where_they_may_be_looked_at() -> None:
    box = [[10, 10, 30, 30]]
    settings = replace(JPEG, target_psnr=24.0, object_psnr=38.0)
    seen, blind, without = (jpeg_of(of, settings) for of in (picture(drawn(), boxes=box), picture(drawn(), boxes=box, blind=True), picture(drawn())))
    assert blind == without
    assert len(seen) > len(blind)
    assert psnr(read_jpeg(seen), drawn(), box_mask(np.array(box, np.float64), *SIZE)) >= 38
    only_objects = replace(JPEG, object_psnr=30.0)
    assert jpeg_of(picture(drawn()), only_objects) == jpeg_of(picture(drawn()), JPEG), "no target applies"


def test_a_unit_of_pictures() -> None:
    pictures = [picture(drawn(0), boxes=[[3, 4, 20, 30]]), photograph(1), picture(textured(2, (1, 1))), picture(textured(3, (7, 300)))]
    ticks: list[int] = []
    bundles = encode_unit(pictures, JPEG, unit="u", threads=2, on_background=lambda: ticks.append(1))
    assert len(ticks) == 4
    for of, data in zip(pictures, bundles, strict=True):
        parsed = parse(data)
        assert parsed.stored_size == of.pixels.shape[:2]
        assert parsed.networks == (
            replace(parsed.networks[0], spec=JpegSpec(), rect=(0, 0, *of.pixels.shape[1::-1]), scale=1.0, feather=0, object=-1),
        )
        assert parsed.boxes.tolist() == of.boxes.tolist()
        pixels = decode_batch([data])[0].permute(1, 2, 0).numpy()
        assert parsed.psnr == pytest.approx(psnr(pixels, of.pixels), abs=0.006)
        mask = of.object_mask
        assert (parsed.object_psnr is None) == (not mask.any())
    assert parse(bundles[1]).psnr == 99.0
    for threads in (1, 3):
        assert encode_unit(pictures, JPEG, unit="other", threads=threads) == bundles, "a function of picture and settings alone"
    assert encode_unit([], JPEG, unit="u") == []


def test_trouble_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(encode_jpeg, "jpeg_of", lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="no room"):
        encode_unit([picture(drawn())] * 20, JPEG, unit="u", threads=2)
    assert set(threading.enumerate()) == before


# --- originals ---


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", **options})
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


PHOTO = Image.fromarray(drawn())
KEPT = {
    "colour": encoded(PHOTO),
    "gray": encoded(PHOTO.convert("L")),
    "progressive": encoded(PHOTO, progressive=True),
    "upright": encoded(PHOTO, exif=exif(1)),
    "no orientation that is known": encoded(PHOTO, exif=exif(0)),
    "a profile": encoded(PHOTO, icc_profile=b"some profile"),
}
NOT_KEPT = {
    "turned": encoded(PHOTO, exif=exif(6)),
    "mirrored": encoded(PHOTO, exif=exif(2)),
    "CMYK": encoded(PHOTO.convert("CMYK")),
    "PNG": encoded(PHOTO, format="PNG"),
    "RGB inside": encoded(PHOTO, keep_rgb=True),
    "several pictures": encoded(PHOTO, format="MPO", save_all=True, append_images=[PHOTO]),
}


@pytest.mark.parametrize("name", KEPT)
def test_files_that_may_be_kept(name: str) -> None:
    found = read_image(KEPT[name])
    assert found.jpeg == KEPT[name]
    assert jpeg_of(picture(found.pixels, original=found.jpeg), JPEG) == KEPT[name]


@pytest.mark.parametrize("name", NOT_KEPT)
def test_files_that_may_not_be_kept(name: str) -> None:
    assert read_image(NOT_KEPT[name]).jpeg is None


def sample(key: str, data: bytes, split: Split = "train", **changes: Any) -> Sample:
    return Sample(key, split, data, **{"boxes": np.zeros((0, 4), np.float32), "classes": np.zeros(0, np.int64), **changes})


@pytest.mark.parametrize(("size", "kept"), [(None, True), ((64, 48), True), ((640, 480), True), ((63, 48), False)])
def test_a_file_is_kept_at_its_own_size_only(size: tuple[int, int] | None, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(JPEG, size=size)
    seen: list[Picture] = []

    def spy(pictures: Sequence[Picture], *rest: Any, **options: Any) -> list[bytes]:
        seen.extend(pictures)
        return encode_unit(pictures, *rest, **options)

    monkeypatch.setattr(units, "encode_unit", spy)
    _, members = encode_samples(Unit("u", "s", "train", (sample("a", KEPT["colour"]),)), job, 1, None)
    assert (parse(members[0][1]).networks[0].weights == KEPT["colour"]) == kept
    assert [of.original for of in seen] == [KEPT["colour"] if kept else None]


# --- settings ---

WRONG = {
    "family: expected one of siren, tile, jpeg, got 'webp'": {"family": "webp"},
    "preset: expected none for family jpeg, got 'fast'": {"family": "jpeg", "preset": "fast"},
    "mode: expected none for family jpeg, got 'be'": {"family": "jpeg", "mode": "be"},
    "half: expected none for family jpeg": {"family": "jpeg", "half": True},
    "refine: expected none for family jpeg, got 3": {"family": "jpeg", "refine": 3},
    "layers: expected none for family siren, got 1": {"family": "siren", "layers": 1},
    "max_bytes: expected none for family siren, got 100": {"family": "siren", "max_bytes": 100},
    "dictionary: expected none for family siren": {"family": "siren", "dictionary": "ab"},
    "preset: expected none for family tile, got 'best'": {"family": "tile", "preset": "best"},
    "mode: expected one of qre, be for family tile, got 'de'; choose one of these": {"family": "tile", "mode": "de"},
    "max_bytes: expected at least 1, got 0": {"family": "jpeg", "max_bytes": 0},
    "layers: expected 1 or 2, got 3": {"family": "tile", "layers": 3},
    "refine: expected 0 steps or more, got -1": {"family": "tile", "refine": -1},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_do_not_fit_together(message: str, tmp_path: Path) -> None:
    settings = Settings(**WRONG[message])  # type: ignore[arg-type]
    source = Source("drawn", [sample("a", KEPT["colour"])])
    for attempt in (
        lambda: check_settings(settings),
        lambda: convert(source, tmp_path / "d", Job(settings)),
        lambda: estimate(source, Job(settings)),
        lambda: encode_unit([], settings, unit="u"),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "d").exists()


def test_settings_are_described_by_what_their_family_has() -> None:
    assert JPEG.describe() == {"family": "jpeg", "target_psnr": None, "object_psnr": None, "seed": 0, "max_bytes": None}
    siren = {"family": "siren", "preset": "balanced", "mode": "qre", "target_psnr": None, "object_psnr": None, "seed": 0, "half": False}
    assert Settings(family="siren").describe() == siren, "what an earlier version wrote: its conversions are continued"
    assert set(Settings(family="tile").describe()) >= {"refine", "layers", "max_bytes", "dictionary"}


# --- conversion ---


def source(count: int = 7) -> Source:
    """Photographs, a PNG, a turned one, and one that cannot be read; val with objects of its own."""
    box = {"boxes": np.array([[10, 10, 30, 30]], np.float32), "classes": np.array([1])}
    samples = [sample(f"t{i}", jpeg_file(drawn(i), quality=60 + 5 * i), **box) for i in range(count)]
    samples += [sample("png", encoded(PHOTO, format="PNG")), sample("turned", NOT_KEPT["turned"]), sample("broken", b"no picture")]
    samples += [sample("v", jpeg_file(drawn(50)), "val", **box)]
    return Source("drawn", samples, ("a", "b"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("jpeg") / "shards"
    convert(source(), dest, Job(JPEG, shard_samples=4))
    return dest


def test_a_dataset_of_jpegs_has_the_pixels_of_its_sources(shards: Path) -> None:
    wanted = {f"{s.split}/{s.key}": s.image for s in source().samples}
    for split, count in (("train", 9), ("val", 1)):
        dataset = RinrDataset(shards, split)
        assert len(dataset) == count
        for image, target in dataset:
            file = wanted[f"{split}/{target['key']}"]
            assert isinstance(file, bytes)
            expected = read_image(file)
            if expected.jpeg is not None:
                assert_close(image.permute(1, 2, 0), expected.pixels, "exact")
            else:
                assert 30 < psnr(image.permute(1, 2, 0).numpy(), expected.pixels) < 99
            assert len(target["boxes"]) == (target["key"] not in ("png", "turned"))
    images, targets = next(iter(DataLoader(shards, batch_size=4, size=(24, 32), device="cpu", shuffle=True)))
    assert images.shape == (4, 3, 24, 32)
    assert len(targets.keys) == 4


def test_dataset_json_says_how_it_was_made(shards: Path) -> None:
    about = json.loads((shards / "dataset.json").read_bytes())
    assert about["groups"] == {"background jpeg": 10}
    assert about["shared"] == {}
    codec = {name: about["codec"][name] for name in about["codec"] if name not in ("job", "torch", "pillow")}
    assert about["codec"]["pillow"] == PIL.__version__
    assert "pillow" not in Job(SIREN).describe(), "as an earlier version wrote it"
    rest = {"size": None, "shard_samples": 4, "val_residuals": False, "device": "cpu", "format": 1}
    assert codec == {**JPEG.describe(), **rest}
    assert json.loads((shards / "report.json").read_bytes())["missed"] == []


def test_the_same_command_continues_and_gives_the_same_bytes(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, before = Job(JPEG, shard_samples=4), tree_hash(shards)
    convert(source(), shards, job)
    assert tree_hash(shards) == before
    genuine, calls = units.encode_unit, []

    def failing(*arguments: Any, **options: Any) -> list[bytes]:
        calls.append(options["unit"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*arguments, **options)

    monkeypatch.setattr(units, "encode_unit", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(source(), tmp_path / "d", job)
    convert(source(), tmp_path / "d", job)
    assert calls == ["train-000000-0000", "train-000001-0000", "train-000002-0000", "train-000002-0000", "val-000000-0000"]
    assert tree_hash(tmp_path / "d") == before
    with pytest.raises(ConfigError, match=r"another dataset .*max_bytes None instead of 9000"):
        convert(source(), shards, Job(replace(JPEG, max_bytes=9000), shard_samples=4))
    with pytest.raises(ConfigError, match=r"another dataset .*family jpeg instead of siren"):
        convert(source(), shards, Job(SIREN, shard_samples=4))


@pytest.mark.slow
def test_processes_do_not_change_a_byte(shards: Path, tmp_path: Path) -> None:
    convert(source(), tmp_path / "d", Job(JPEG, shard_samples=4), workers=2)
    assert tree_hash(tmp_path / "d") == tree_hash(shards)


def test_targets_that_were_missed_are_told_picture_by_picture(tmp_path: Path) -> None:
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)), format="PNG")
    box = {"boxes": np.array([[10, 10, 30, 30]], np.float32), "classes": np.array([0])}
    samples = [sample("fine", encoded(PHOTO, format="PNG"), **box), sample("noise", noise, **box), sample("blind", noise, "val", **box)]
    job = Job(replace(JPEG, target_psnr=30.0, object_psnr=33.0, max_bytes=2600))
    report = convert(Source("drawn", samples, ("a",)), tmp_path / "d", job)
    told = [(p.subject, p.reason) for p in report.missed]
    assert [subject for subject, _ in told] == ["train/noise", "train/noise", "val/blind"]
    assert told[0][1].startswith("stored at ")
    assert told[0][1].endswith(" dB, below the target of 30 dB")
    assert told[1][1].endswith(" dB, below the target of 33 dB")
    assert json.loads((tmp_path / "d/report.json").read_bytes())["missed"] == [list(entry) for entry in told]
    assert report.problems == ()
    assert convert(Source("drawn", samples, ("a",)), tmp_path / "d", job).missed == report.missed
    tiny = convert(Source("drawn", samples[:1], ("a",)), tmp_path / "tiny", Job(replace(JPEG, max_bytes=100)))
    assert [p.reason.partition("bytes")[2] for p in tiny.missed] == [", above the limit of 100"]


@pytest.mark.parametrize(
    ("changes", "size", "blind", "missed"),
    [
        ({"target_psnr": 30.04}, 1, False, 0),
        ({"target_psnr": 30.06}, 1, False, 1),
        ({"object_psnr": 25.06}, 1, False, 1),
        ({"object_psnr": 25.06}, 1, True, 0),
        ({"max_bytes": 100}, 100, False, 0),
        ({"max_bytes": 100}, 101, False, 1),
        ({"target_psnr": 40.0, "object_psnr": 40.0, "max_bytes": 5}, 6, False, 3),
        ({}, 10**9, False, 0),
    ],
)
def test_when_a_target_counts_as_missed(changes: dict[str, float], size: int, blind: bool, missed: int) -> None:
    of = picture(drawn(), boxes=[[1, 1, 9, 9]], blind=blind)
    bundle = replace(parse(jpeg_bundle(0)), psnr=30.0, object_psnr=25.0)
    assert len(units._missed(of, bundle, size, replace(JPEG, **changes))) == missed  # type: ignore[arg-type]


def test_pictures_that_tiles_cannot_show_are_told(tmp_path: Path) -> None:
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)), format="PNG")
    samples = [sample("fine", encoded(Image.new("RGB", SIZE[::-1], (90, 120, 60)), format="PNG")), sample("noise", noise)]
    report = convert(Source("drawn", samples, ("a",)), tmp_path / "free", Job(Settings(family="tile")))
    assert (report.fallbacks, report.missed) == (("train/noise",), ())
    assert json.loads((tmp_path / "free/report.json").read_bytes())["fallbacks"] == ["train/noise"]
    assert convert(Source("drawn", samples, ("a",)), tmp_path / "free", Job(Settings(family="tile"))).fallbacks == report.fallbacks
    limited = convert(Source("drawn", samples, ("a",)), tmp_path / "limited", Job(Settings(family="tile", max_bytes=1500)))
    ((subject, reason),) = [(p.subject, p.reason) for p in limited.missed]
    assert subject == "train/noise"
    assert reason.endswith(" dB, below the target of 32 dB"), "the family's own target, where none was given"


def write_dataset(dest: Path, *bundles: bytes) -> Path:
    """A dataset of bundles, one shard."""
    shard = dest / "train/train-000000.tar"
    shard.parent.mkdir(parents=True)
    write_tar(shard, [(f"{chr(97 + i)}.rinr", data) for i, data in enumerate(bundles)])
    index = write_index(shard)
    described = describe_dataset({"train": [(describe_shard(dest, shard, index), index)]}, names=(), codec={}, source={})
    write_bytes(dest / "dataset.json", dump_json(described))
    reindex(dest)
    return dest


def test_a_dataset_of_several_families(tmp_path: Path) -> None:
    bundles = [jpeg_bundle(0), random_bundle(1, residuals=[(RESIDUALS[0], (3, 4, 17, 20))]), jpeg_bundle(2, stored=(30, 30)), random_bundle(3)]
    dest = write_dataset(tmp_path / "d", *bundles)
    assert verify(dest).damage == ()
    about = describe(dest)
    assert {name: (found.samples, found.bytes) for name, found in about.families.items()} == {
        "siren": (2, len(bundles[1]) + len(bundles[3])),
        "jpeg": (2, len(bundles[0]) + len(bundles[2])),
    }
    assert list(about.families) == ["siren", "jpeg"]
    assert about.bytes.background == sum(len(parse(data).networks[0].weights) for data in bundles)
    for (image, _), data in zip(RinrDataset(dest), bundles, strict=True):
        assert_close(image, decode_batch([data])[0], "pixels")
    images, targets = next(iter(DataLoader(dest, batch_size=4, size=(16, 20), device="cpu", shuffle=True)))
    for image, key in zip(images, targets.keys, strict=True):
        assert_close(image, decode_batch([bundles[ord(key) - 97]], size=(16, 20))[0], "pixels")


def test_verify_index_and_damage(shards: Path, tmp_path: Path) -> None:
    dest = Path(shutil.copytree(shards, tmp_path / "d"))
    assert verify(dest).damage == ()
    before = tree_hash(dest)
    (dest / "train/train-000001.safetensors").unlink()
    (dest / "data.yaml").unlink()
    assert verify(dest).damage
    assert reindex(dest).samples == 10
    assert tree_hash(dest) == before
    edit(dest / "train/train-000000.tar", lambda data: data.__setitem__(1500, data[1500] ^ 1))
    found = verify(dest).damage
    assert any("checksum" in damage for damage in found)
    assert len(found) == 2


def test_verify_lists_every_jpeg_that_does_not_decode(tmp_path: Path) -> None:
    """A checksum only tells of accidents."""
    good = jpeg_file(np.full((24, 40, 3), 7, np.uint8))
    tables = good.index(b"\xff\xc4")
    broken = good[: tables + 5] + b"\xff" * 40 + good[tables + 45 :]
    write_dataset(tmp_path / "d", *(jpeg_bundle(0, file=file) for file in (broken, good, broken)))
    found = verify(tmp_path / "d").damage
    assert len(found) == 2
    assert [damage.partition(": expected a JPEG, got ")[0] for damage in found] == [f"train/train-000000.tar:{key}.rinr" for key in "ac"]


# --- the command line ---


def rinr(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result.stdout


def test_from_the_command_line(tmp_path: Path, write_yolo: Callable[..., Path]) -> None:
    data, dest = write_yolo(tmp_path / "source", train=3, val=1), tmp_path / "d"
    options = "--family jpeg --target-psnr 33 --object-psnr 34 --max-bytes 60000 --device cpu"
    assert "train 3, val 1 samples" in done(rinr("convert", data, dest, *options.split()))
    about = json.loads((dest / "dataset.json").read_bytes())["codec"]
    assert {name: about[name] for name in ("family", "target_psnr", "object_psnr", "max_bytes")} == {
        "family": "jpeg",
        "target_psnr": 33,
        "object_psnr": 34,
        "max_bytes": 60000,
    }
    told = done(rinr("info", dest))
    assert "family jpeg, target_psnr 33.0, object_psnr 34.0, max_bytes 60000" in told
    assert "background jpeg" in told
    report = json.loads(done(rinr("info", dest, "--json")))
    assert report["families"] == {"jpeg": {"samples": 4, "bytes": sum(report["bytes"][name] for name in ("background", "residual", "header"))}}
    parts = [value for name, value in report["bytes"].items() if name not in ("total", "source")]
    assert sum(parts) == report["bytes"]["total"] == sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    assert "all is well" in done(rinr("verify", dest, "--device", "cpu"))
    assert "0 index(es) changed" in done(rinr("index", dest))
    assert "4 pictures" in done(rinr("export", dest, tmp_path / "out", "--device", "cpu"))
    exported = np.array(Image.open(tmp_path / "out/images/train/0000.png"))
    stored, _ = next(iter(RinrDataset(dest)))
    assert_close(torch.from_numpy(exported), stored.permute(1, 2, 0).contiguous(), "exact")
    assert "estimated from 4 of 4" in done(rinr("convert", data, tmp_path / "no", "--family", "jpeg", "--dry-run", "--device", "cpu"))


def test_missed_targets_are_warned_of(tmp_path: Path, write_yolo: Callable[..., Path]) -> None:
    data = write_yolo(tmp_path / "source", train=12, val=1)
    result = rinr("convert", data, tmp_path / "d", "--family", "jpeg", "--max-bytes", 200, "--device", "cpu")
    done(result)
    assert f"warning: 13 target(s) missed, all of them in {tmp_path / 'd' / 'report.json'}:" in result.stderr
    assert "train/0000.png: stored in " in result.stderr
    assert "  and 3 more" in result.stderr
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8)).save(noise / f"{i:02}.png")
    told = rinr("convert", noise, tmp_path / "n", "--device", "cpu")
    done(told)
    wanted = "warning: 12 picture(s) stored as JPEGs, which come nearer to what was asked for than tile does: train/00.png, train/01.png"
    assert wanted in " ".join(told.stderr.split())
    assert "train/09.png, and 2 more in " in " ".join(told.stderr.split())
