"""Make the golden files of a family again: `python tests/golden/make.py siren`. Only for a new version of the format, or a new family; the
files that are there then stay beside the new ones.

Drawn pictures, really encoded with small networks and a short schedule: what is committed is what they decode to, not a good likeness.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from dictionaries import analysis_of, natural, tiny_dictionary

from rinr_loader import presets, stream
from rinr_loader.bundle import Bundle, pack, parse
from rinr_loader.codecs import siren
from rinr_loader.convert import Job, convert
from rinr_loader.dataset import RinrDataset
from rinr_loader.decode import decode_batch
from rinr_loader.dictionary import Dictionary, load
from rinr_loader.encode import Picture, encode_unit
from rinr_loader.fit import Schedule
from rinr_loader.presets import Preset, Settings
from rinr_loader.source import Sample, Source

GOLDEN = Path(__file__).parent
DICTIONARY = GOLDEN / "dictionary.bin"
TINY = Preset(((3, 16),), Schedule(400, 2e-3, 512), ((2, 10), (3, 14)), (150.0,), Schedule(800, 3e-3, 256))
BOXES = np.array([[6, 8, 21, 20], [15, 12, 38, 33], [0, 28, 9.5, 37]], np.float32)  # two that overlap, one cut by the border
CLASSES = np.array([1, 0, 2], np.int64)
CROWD = np.array([False, False, True])


def drawn(width: int, height: int, *, gray: bool = False) -> np.ndarray:
    """A smooth background with two shapes on it, uint8 `(H, W, 3)`."""
    y, x = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    picture = np.stack([120 + 90 * np.sin(4 * x + c) * np.cos(3 * y - c) for c in range(3)], axis=-1)
    picture[(x - 0.3) ** 2 + (y - 0.38) ** 2 < 0.02] = (230, 60, 40)
    picture[(abs(x - 0.6) < 0.22) & (abs(y - 0.6) < 0.25)] = (30, 90, 210)
    if gray:
        picture = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def picture(width: int, height: int, *, source: tuple[int, int] | None = None, boxes: bool = True, label: int = -1, gray: bool = False) -> Picture:
    count = 3 if boxes else 0
    scale = 1 if source is None else source[0] / width
    return Picture(
        pixels=drawn(width, height, gray=gray),
        source_size=(height, width) if source is None else (source[1], source[0]),
        boxes=BOXES[:count] * np.float32(scale),
        classes=CLASSES[:count],
        crowd=CROWD[:count],
        label=label,
        source_hash=bytes([width, height, count, 255]),
    )


def int8_residuals(data: bytes) -> bytes:
    """What the format allows and no mode of the encoder writes: residuals as int8, of another frequency, of no object, with hard edges."""
    bundle = parse(data)
    networks = list(bundle.networks)
    for i, network in enumerate(networks[1:], 1):
        flat = siren.parameters_of([network.weights], network.spec)
        spec = replace(network.spec, dtype="int8", w0=20.0)
        networks[i] = replace(network, spec=spec, weights=siren.to_bytes(flat, spec, siren.row_scales(flat, spec))[0], object=-1, feather=0)
    return pack(replace(bundle, networks=tuple(networks)))


def jpeg_file(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_bundles() -> dict[str, bytes]:
    """A JPEG for a target, and files that were kept: gray, progressive, with full colour."""

    def encode(picture: Picture, **settings: Any) -> bytes:
        return encode_unit([picture], Settings(family="jpeg", **settings), unit="jpeg", threads=1)[0]

    def kept(picture: Picture, **options: Any) -> bytes:
        pixels = picture.pixels[..., 0] if options.pop("gray", False) else picture.pixels
        file = jpeg_file(pixels, **options)
        return encode(replace(picture, original=file, pixels=np.array(Image.open(io.BytesIO(file)).convert("RGB"))))

    return {
        "jpeg": encode(picture(45, 37), target_psnr=30.0, object_psnr=32.0),
        "jpeg-gray": kept(picture(19, 23, boxes=False, label=3, gray=True), gray=True, quality=60),
        "jpeg-progressive": kept(picture(45, 37, source=(90, 74)), progressive=True, quality=70, subsampling=0),
    }


def siren_bundles() -> dict[str, bytes]:
    def encode(mode: presets.Mode, picture: Picture) -> bytes:
        return encode_unit([picture], Settings("fast", mode, family="siren"), unit=mode, threads=1)[0]

    qre = encode("qre", picture(45, 37))
    return {
        "qre": qre,
        "re-smaller-than-source": encode("re", picture(45, 37, source=(90, 74))),
        "de": encode("de", picture(45, 37)),
        "be": encode("be", picture(45, 37)),
        "bs-label-no-objects": encode("bs", picture(24, 31, boxes=False, label=3)),
        "gray-one-row": encode("qre", picture(19, 1, boxes=False, gray=True)),
        "int8-residuals": int8_residuals(qre),
    }


def dictionary() -> Dictionary:
    """The dictionary of the golden tiles: once made, never again."""
    if not DICTIONARY.exists():
        DICTIONARY.write_bytes(tiny_dictionary().data)
    return load(DICTIONARY.read_bytes(), DICTIONARY.name)


def tile_bundles() -> dict[str, bytes]:
    """Both layers, with residuals that overlap; one with several lanes, one smaller than a tile, one without latents."""
    shared = {dictionary().sha256: dictionary().data, "analysis": analysis_of(dictionary())}

    def encode(picture: Picture, **settings: Any) -> bytes:
        picture = replace(picture, pixels=softer(picture.pixels))
        return encode_unit([picture], Settings(family="tile", dictionary=dictionary().sha256, **settings), unit="tile", threads=1, shared=shared)[0]

    one = encode(picture(45, 37), target_psnr=27.0, object_psnr=34.0, layers=1)
    lanes, stream.SYMBOLS_A_LANE = stream.SYMBOLS_A_LANE, 200
    two = encode(picture(45, 37, source=(90, 74)), target_psnr=26.0, object_psnr=33.0, layers=2)
    stream.SYMBOLS_A_LANE = lanes
    return {"tile-1": one, "tile-2": two, "tile-one-row": encode(picture(19, 1, boxes=False, label=3), target_psnr=21.0)}


def described(bundle: Bundle) -> dict[str, Any]:
    """What parsing must give, weights aside."""
    networks = [{"spec": str(n.spec), "rect": n.rect, "scale": n.scale, "feather": n.feather, "object": n.object} for n in bundle.networks]
    return {
        "stored_size": bundle.stored_size,
        "source_size": bundle.source_size,
        "boxes": bundle.boxes.tolist(),
        "classes": bundle.classes.tolist(),
        "crowd": bundle.crowd.tolist(),
        "label": bundle.label,
        "psnr": bundle.psnr,
        "object_psnr": bundle.object_psnr,
        "source_hash": bundle.source_hash.hex(),
        "networks": networks,
    }


def softer(pixels: np.ndarray) -> np.ndarray:
    """A picture that few channels can show: without hard edges."""
    height, width, _ = pixels.shape
    return np.rint(0.75 * natural(height, height, width) + 0.25 * pixels).astype(np.uint8)


def source(*, soft: bool = False) -> Source:
    def encoded(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def sample(key: str, split: str, width: int, count: int) -> Sample:
        pixels = softer(drawn(width, 37)) if soft else drawn(width, 37)
        boxes = np.minimum(BOXES[:count], [width, 37, width, 37]).astype(np.float32)
        extra = {"objects": [{"track": i} for i in range(count)]} if key.startswith("v1.2") else {}
        return Sample(key, split, encoded(pixels), boxes, CLASSES[:count], CROWD[:count], extra=extra)  # type: ignore[arg-type]

    samples = [sample("plain", "train", 45, 3), sample("v1.2/frame 07.left", "train", 41, 2), sample("ü", "train", 45, 0), sample("a", "val", 45, 2)]
    return Source("drawn", samples, ("box", "ball", "corner"))


FAMILIES = {"siren": siren_bundles, "tile": tile_bundles, "jpeg": jpeg_bundles}
FOLDERS = {"siren": "dataset", "tile": "dataset-tile", "jpeg": "dataset-jpeg"}


def job(family: str) -> Job:
    if family != "tile":
        return Job(Settings("fast", family="siren") if family == "siren" else Settings(family="jpeg"), shard_samples=2)
    files = {hashlib.sha256(data).hexdigest(): data for data in (dictionary().data, analysis_of(dictionary()))}
    return Job(Settings(family="tile", dictionary=dictionary().sha256, target_psnr=26.0, object_psnr=33.0), shard_samples=2, shared=files)


def main(family: str) -> None:
    presets.PRESETS["fast"] = TINY
    described_in = GOLDEN / "bundles.json"
    expected = json.loads(described_in.read_text()) if described_in.exists() else {}
    for name, data in FAMILIES[family]().items():
        (GOLDEN / "bundles" / f"{name}.rinr").write_bytes(data)
        Image.fromarray(decode_batch([data], shared={dictionary().key: dictionary()})[0].permute(1, 2, 0).numpy()).save(
            GOLDEN / "pixels" / f"{name}.png"
        )
        expected[name] = described(parse(data))
    lines = [f"{json.dumps(name)}: {json.dumps(about)}" for name, about in expected.items()]
    described_in.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    folder = FOLDERS[family]
    shutil.rmtree(GOLDEN / folder, ignore_errors=True)
    convert(source(soft=family == "tile"), GOLDEN / folder, job(family))
    for split in ("train", "val"):
        for image, target in RinrDataset(GOLDEN / folder, split):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(GOLDEN / "pixels" / f"{folder}-{split}-{target['index']}.png")


if __name__ == "__main__":
    main(sys.argv[1])
