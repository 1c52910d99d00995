"""Pictures of every mode, orientation and state of health become upright RGB, or a reason."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_scene
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rinr_loader.errors import ConvertError
from rinr_loader.image import MAX_SIDE, fit_inside, hash_of, read_bytes, read_image
from rinr_loader.source import ByteRange

ORIENTATION = 0x0112


def encoded(image: Image.Image | NDArray[np.uint8], form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def drawn(width: int = 23, height: int = 17) -> NDArray[np.uint8]:
    return draw_scene(1, width=width, height=height, objects=1).image


# --- what is read ---


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    data = encoded(drawn())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    (tmp_path / "archive").write_bytes(b"before" + data + b"after")
    for image in (data, path, ByteRange(tmp_path / "archive", 6, len(data))):
        found = read_image(image)
        np.testing.assert_array_equal(found.pixels, drawn())
        assert found.pixels.dtype == np.uint8
        assert found.source_bytes == len(data)
        assert found.source_hash == hashlib.sha256(data).digest()[:4] == hash_of(data)
        assert read_bytes(image) == data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_as_pillow_does(orientation: int, form: str) -> None:
    picture = Image.fromarray(drawn())
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    found = read_image(data).pixels
    np.testing.assert_array_equal(found, wanted)
    assert found.shape == ((23, 17, 3) if orientation >= 5 else (17, 23, 3))


UPRIGHT = {  # what turns a picture stored with this orientation upright, written out
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_puts_pixels_where_they_belong(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(read_image(encoded(drawn(), exif=exif)).pixels, UPRIGHT[orientation](drawn()))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_is_passed_over(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(read_image(encoded(drawn(), exif=exif)).pixels, drawn())


def test_grayscale_is_repeated() -> None:
    gray = drawn()[..., 0]
    np.testing.assert_array_equal(read_image(encoded(gray)).pixels, np.stack([gray] * 3, axis=-1))


def test_bilevel() -> None:
    bits = drawn()[..., 0] > 128
    np.testing.assert_array_equal(read_image(encoded(Image.fromarray(bits))).pixels, np.stack([bits * np.uint8(255)] * 3, axis=-1))


def test_alpha_is_dropped() -> None:
    alpha = np.linspace(0, 255, 17 * 23).astype(np.uint8).reshape(17, 23, 1)
    np.testing.assert_array_equal(read_image(encoded(np.concatenate([drawn(), alpha], axis=2))).pixels, drawn())
    gray = drawn()[..., :1]
    np.testing.assert_array_equal(read_image(encoded(np.concatenate([gray, alpha], axis=2))).pixels, np.repeat(gray, 3, axis=2))


def test_a_palette_with_a_transparent_colour_is_rgb() -> None:
    picture = Image.fromarray(drawn()).quantize(8)
    data = encoded(picture, transparency=3)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "P"
        assert "transparency" in opened.info
    np.testing.assert_array_equal(read_image(data).pixels, np.array(picture.convert("RGB")))


def test_cmyk_is_converted_as_pillow_does() -> None:
    picture = Image.fromarray(drawn()).convert("CMYK")
    found = read_image(encoded(picture, "TIFF")).pixels
    np.testing.assert_array_equal(found, np.array(picture.convert("RGB")))
    np.testing.assert_allclose(found.astype(int), drawn(), atol=1)


@pytest.mark.parametrize(("form", "kind"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bits_are_scaled_and_not_cut_off(form: str, kind: str) -> None:
    values = np.linspace(0, 65535, 516).astype(np.uint16).reshape(12, 43)
    picture = Image.fromarray(values)
    if kind == ">u2":
        picture = Image.frombytes("I;16B", (43, 12), values.astype(">u2").tobytes())
    wanted = np.round(values / 257).astype(np.uint8)
    assert wanted.max() == 255
    np.testing.assert_array_equal(read_image(encoded(picture, form)).pixels, np.stack([wanted] * 3, axis=-1))


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    """Its range is that of 16 bits, whatever its brightest pixel; pictures of one camera must not jump in brightness."""
    dark = np.full((4, 5), 200, np.uint16)
    assert read_image(encoded(Image.fromarray(dark))).pixels.max() == 1


def test_integers_and_floats_without_a_range() -> None:
    for dtype in (np.int32, np.float32):
        low = np.arange(20, dtype=dtype).reshape(4, 5)
        np.testing.assert_array_equal(read_image(encoded(Image.fromarray(low), "TIFF")).pixels[..., 0], low)
        high = low * 3000
        np.testing.assert_array_equal(read_image(encoded(Image.fromarray(high), "TIFF")).pixels[..., 0], np.round(high / 257))
    holes = np.array([[np.nan, 5, -3, 300]], np.float32)
    assert read_image(encoded(Image.fromarray(holes), "TIFF")).pixels[0, :, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 77, np.uint8)
    np.testing.assert_array_equal(read_image(encoded(pixels)).pixels, pixels)


def test_the_first_picture_of_several_is_taken() -> None:
    frames = [Image.fromarray(np.full((5, 6, 3), value, np.uint8)) for value in (10, 200)]
    assert read_image(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])).pixels.max() == 10


# --- what is not ---


def reason(image: Path | bytes | ByteRange) -> str:
    with pytest.raises(ConvertError) as caught:
        read_image(image)
    return str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_every_cut_is_a_reason_or_the_whole_picture(form: str) -> None:
    """Some cuts take nothing but a trailer. None may give half a picture."""
    data = encoded(drawn(40, 30), form)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.array(opened.convert("RGB"))
    reasons = set()
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        try:
            found = read_image(data[:length])
        except ConvertError as error:
            reasons.add(str(error).split(":")[0])
        else:
            np.testing.assert_array_equal(found.pixels, wanted)
    assert reasons <= {"not a picture that Pillow can identify", "damaged"}
    assert reasons


@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]), st.data())
@settings(max_examples=80)
def test_damaged_bytes_give_a_picture_or_a_reason(form: str, data: st.DataObject) -> None:
    raw = bytearray(encoded(drawn(), form))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_image(bytes(raw))
    except ConvertError:
        return
    assert found.pixels.dtype == np.uint8
    assert found.pixels.ndim == 3
    assert found.pixels.shape[2] == 3


@given(st.binary(max_size=100))
def test_random_bytes_are_no_picture(data: bytes) -> None:
    assert reason(data)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.jpg") == "cannot be read: No such file or directory"
    assert reason(ByteRange(tmp_path / "none.tar", 512, 10)) == "cannot be read: No such file or directory"
    assert reason(tmp_path) == "cannot be read: Is a directory"


def test_an_empty_file_and_a_text_file() -> None:
    assert reason(b"") == "not a picture that Pillow can identify"
    assert reason(b"<html>not found</html>") == "not a picture that Pillow can identify"


def test_a_decompression_bomb() -> None:
    """A small file that claims to be huge is refused before its pixels are made."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    tracemalloc.start()
    assert reason(data).startswith("too large: ")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_side_that_a_bundle_cannot_state() -> None:
    assert reason(encoded(Image.new("L", (MAX_SIDE + 1, 1)))) == "expected 1 to 65535 pixels a side, got 65536x1"
    assert read_image(encoded(Image.new("L", (MAX_SIDE, 1)))).pixels.shape == (1, MAX_SIDE, 3)


# --- files found in the wild ---

WHOLE = {  # height and width, upright
    "pillow_hopper.png": (128, 128),
    "pillow_hopper.bmp": (128, 128),
    "pillow_hopper.gif": (128, 128),
    "pillow_hopper.ppm": (128, 128),
    "pillow_hopper.tif": (128, 128),
    "pillow_hopper.webp": (128, 128),
    "pillow_hopper_gray.jpg": (128, 128),
    "pillow_hopper_idat_after_image_end.png": (128, 128),
    "pillow_i_trns.png": (64, 64),
    "pillow_p_trns_single.png": (64, 64),
    "pillow_pil_sample_cmyk.jpg": (100, 100),
    "pillow_transparent.png": (150, 200),
    "pillow_sugarshack.mpo": (480, 640),
    "pillow_exif_typeerror.jpg": (531, 800),
    "pillow_exif_gps_typeerror.jpg": (531, 800),
    "pillow_invalid-exif.jpg": (200, 200),
    "pillow_multiple_exif.jpg": (1, 1),
    "pillow_truncated_exif_dpi.jpg": (640, 480),
    "torchcodec_bad_huffman.jpg": (768, 1024),
    "torchcodec_cmyk.jpg": (720, 1280),
    "torchcodec_gradient_16bit.png": (48, 64),
    "torchcodec_grayscale_alpha.png": (720, 1280),
    "torchcodec_rgba.png": (720, 1280),
}
BROKEN = {
    "pillow_broken.png": "not a picture that Pillow can identify",
    "pillow_broken_data_stream.png": "damaged: OSError: ",
    "pillow_truncated_end_chunk.png": "damaged: ",
    "pillow_truncated_jpeg.jpg": "damaged: OSError: image file is truncated",
    "pillow_zero_height.j2k": "not a picture that Pillow can identify",
    "pillow_zero_width.gif": "not a picture that Pillow can identify",
    "torchcodec_gradient_rotated.heic": "not a picture that Pillow can identify",
    "torchcodec_heapbof.png": "not a picture that Pillow can identify",
}


@pytest.mark.real_data("odd_inputs")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", WHOLE)
def test_odd_but_whole_files(real_data: Path, name: str) -> None:
    found = read_image(real_data / "odd_inputs" / name).pixels
    assert found.shape[:2] == WHOLE[name]
    with Image.open(real_data / "odd_inputs" / name) as opened:
        if opened.mode != "I;16":
            np.testing.assert_array_equal(found, np.array(ImageOps.exif_transpose(opened).convert("RGB")))


@pytest.mark.real_data("odd_inputs")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(real_data: Path, name: str) -> None:
    assert reason(real_data / "odd_inputs" / name).startswith(BROKEN[name])


@pytest.mark.real_data("odd_inputs")
@pytest.mark.parametrize("orientation", [2, 3, 4, 6, 7])
def test_turned_files_show_the_same_picture(real_data: Path, orientation: int) -> None:
    folder = real_data / "odd_inputs"
    straight = read_image(folder / "pillow_hopper.jpg").pixels.astype(float)
    turned = read_image(folder / f"pillow_hopper_orientation_{orientation}.jpg").pixels.astype(float)
    assert abs(turned - straight).mean() < 8  # another JPEG of the same picture; turned the wrong way it is above 40
    assert abs(turned[::-1] - straight).mean() > 20


# --- fitting inside ---


@pytest.mark.parametrize(
    ("shape", "size", "wanted"),
    [
        ((30, 40), None, (30, 40)),
        ((30, 40), (40, 30), (30, 40)),
        ((30, 40), (400, 300), (30, 40)),  # never enlarged
        ((30, 40), (20, 20), (15, 20)),
        ((40, 30), (20, 20), (20, 15)),
        ((30, 40), (40, 10), (10, 13)),
        ((2, 1000), (100, 100), (1, 100)),  # never less than a pixel
        ((1000, 1), (10, 10), (10, 1)),
    ],
)
def test_fit_inside(shape: tuple[int, int], size: tuple[int, int] | None, wanted: tuple[int, int]) -> None:
    found = fit_inside(np.full((*shape, 3), 90, np.uint8), size)
    assert found.shape == (*wanted, 3)
    assert found.dtype == np.uint8
    assert (found == 90).all()


def test_fit_inside_keeps_the_picture() -> None:
    pixels = drawn(64, 48)
    assert fit_inside(pixels, None) is pixels
    half = np.array(Image.fromarray(pixels).resize((32, 24), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(fit_inside(pixels, (32, 999)), half)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=60)
def test_what_is_fitted_is_inside_and_keeps_its_aspect(width: int, height: int, limit_x: int, limit_y: int) -> None:
    rows, columns = fit_inside(np.zeros((height, width, 3), np.uint8), (limit_x, limit_y)).shape[:2]
    assert 1 <= rows <= min(height, limit_y)
    assert 1 <= columns <= min(width, limit_x)
    ratio = min(1, limit_x / width, limit_y / height)
    assert abs(columns - max(1, width * ratio)) <= 1
    assert abs(rows - max(1, height * ratio)) <= 1
