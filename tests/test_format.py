"""docs/FORMAT.md is the specification: read bundles and indexes by its tables alone, decode them by its text alone, and compare."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tile_reader
from conftest import REPOSITORY, assert_close
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load, load_file

from rinr_loader import dictionary, jpeg_header, specs, stream
from rinr_loader.bundle import NO_OBJECT, NetworkSpec, TileSpec, parse
from rinr_loader.index import encode_key

GOLDEN = REPOSITORY / "tests" / "golden"
BUNDLES = sorted(path.stem for path in (GOLDEN / "bundles").glob("*.rinr"))
DATASETS = ("dataset", "dataset-jpeg")
SHARDS = sorted(shard for root in DATASETS for shard in (GOLDEN / root).glob("*/*.tar"))
KINDS, DTYPES = ("background", "residual", "direct"), ("int8", "float16", "latents", "jpeg")  # as numbered in the document
FAMILIES = (None, "siren", "tile", "jpeg")
CODES = {"u8": "B", "u16": "H", "u32": "I", "i32": "i", "f32": "f"}


@cache
def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading of the document."""
    text = (REPOSITORY / "docs" / "FORMAT.md").read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#)", text, re.DOTALL | re.MULTILINE)
    assert section, f"FORMAT.md has no section {heading!r}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section[1].splitlines() if line.startswith("|")]
    assert len(rows) > 2, f"no table in {heading!r}"
    return rows[2:]


def total(heading: str) -> int:
    """The number of bytes that a section's first sentence states."""
    text = (REPOSITORY / "docs" / "FORMAT.md").read_text()
    stated = re.search(rf"^### {heading}\n\n(\d+) bytes", text, re.MULTILINE)
    assert stated
    return int(stated[1])


def layout(heading: str) -> list[tuple[str, int, struct.Struct]]:
    """Name, offset and type of each field of a table."""
    fields = []
    for offset, kind, name, _ in table(heading):
        match = re.fullmatch(r"(\w+?)(?:\[(\d+)\])?", kind)
        assert match
        fields.append((name, int(offset), struct.Struct(f"<{match[2] or ''}{CODES[match[1]]}")))
    return fields


def read(heading: str, data: bytes, start: int) -> dict[str, Any]:
    """One record, by its table."""
    record = {}
    for name, offset, form in layout(heading):
        values = form.unpack_from(data, start + offset)
        record[name] = values[0] if len(values) == 1 else values
    return record


def read_bundle(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Header, objects and networks."""
    header = read("Header", data, 0)
    at = total("Header")
    objects = [read("Object", data, at + i * total("Object")) for i in range(header["objects"])]
    at += header["objects"] * total("Object")
    networks = [read("Network", data, at + i * total("Network")) for i in range(header["networks"])]
    return header, objects, networks


@pytest.mark.parametrize("heading", ["Header", "Object", "Network"])
def test_tables_leave_no_gap_and_add_up(heading: str) -> None:
    at = 0
    for name, offset, form in layout(heading):
        assert offset == at, name
        at += form.size
    assert at == total(heading)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_read_by_the_tables_is_the_bundle_that_is_parsed(name: str) -> None:
    data = (GOLDEN / "bundles" / f"{name}.rinr").read_bytes()
    header, objects, networks = read_bundle(data)
    parsed = parse(data)
    assert bytes(header["magic"]) == b"RINR"
    assert (header["version"], header["flags"], header["reserved"], header["length"]) == (1, 0, 0, len(data))
    assert FAMILIES[header["family"]] == parsed.family
    assert header["checksum"] == zlib.crc32(data[:12] + bytes(4) + data[16:])
    assert (header["stored_size"], header["source_size"], header["label"]) == (parsed.stored_size, parsed.source_size, parsed.label)
    assert (bytes(header["shared"]), bytes(header["source_hash"])) == (parsed.shared, parsed.source_hash)
    assert [header[key] / 100 or None for key in ("psnr", "object_psnr")] == [parsed.psnr, parsed.object_psnr]
    assert [o["box"] for o in objects] == [tuple(box) for box in parsed.boxes.tolist()]
    assert [o["class_id"] for o in objects] == parsed.classes.tolist()
    assert [bool(o["flags"]) for o in objects] == parsed.crowd.tolist()
    for record, network in zip(networks, parsed.networks, strict=True):
        spec = network.spec
        assert KINDS[record["kind"]] == spec.kind
        if isinstance(spec, NetworkSpec):
            assert DTYPES[record["dtype"]] == spec.dtype
            assert (record["depth"], record["width"], record["w0"]) == (spec.depth, spec.width, spec.w0)
        elif isinstance(spec, TileSpec):
            assert DTYPES[record["dtype"]] == "latents"
            assert (record["depth"], record["width"], record["w0"]) == (spec.layers, spec.lanes, 0)
        else:
            assert DTYPES[record["dtype"]] == "jpeg"
            assert (record["depth"], record["width"], record["w0"], record["scale"]) == (0, 0, 0, 1)
        assert (record["rect"], record["scale"], record["feather"]) == (network.rect, network.scale, network.feather)
        assert record["object"] == (65535 if network.object < 0 else network.object)
        assert record["offset"] % 16 == 0 or not record["length"]
        assert data[record["offset"] : record["offset"] + record["length"]] == network.weights


def read_weights(data: bytes, record: dict[str, Any]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Weights and biases of each layer, by the section "Weights"."""
    shapes = [(record["width"], 2)] + [(record["width"], record["width"])] * (record["depth"] - 1) + [(3, record["width"])]
    rows, weights = sum(r for r, _ in shapes), sum(r * c for r, c in shapes)
    at = record["offset"]
    scales = np.ones(rows)
    if record["dtype"] == 0:
        scales = np.frombuffer(data, "<f2", rows, at).astype(float)
        at += 2 * rows
    biases = np.frombuffer(data, "<f2", rows, at).astype(float)
    at += 2 * rows
    values = np.frombuffer(data, "<i1" if record["dtype"] == 0 else "<f2", weights, at).astype(float)
    assert record["length"] == at + values.size * (1 if record["dtype"] == 0 else 2) - record["offset"]
    result, row, weight = [], 0, 0
    for r, c in shapes:
        matrix = values[weight : weight + r * c].reshape(r, c) * scales[row : row + r, None]
        result.append((matrix, biases[row : row + r, None]))
        row, weight = row + r, weight + r * c
    return result


def dictionary_of(shared: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """The tensors of the golden dictionary, which a bundle has to name."""
    data = (GOLDEN / "dictionary.bin").read_bytes()
    assert bytes(shared) == hashlib.sha256(data).digest()[:8]
    tensors: dict[str, NDArray[Any]] = load(data)
    return tensors


@pytest.mark.parametrize("path", [GOLDEN / "dictionary.bin", REPOSITORY / "rinr_loader" / "dictionaries" / "generic.bin"], ids=lambda path: path.name)
def test_a_dictionary_has_the_tensors_of_its_table(path: Path) -> None:
    columns = load(path.read_bytes())
    size = {"C": len(columns["basis"]), "T": len(columns["radius"])}
    listed = set()
    for names, dtype, shapes, _ in table("Dictionary"):
        tensors = names.split(", ")
        each = shapes.split("; ") if ";" in shapes else [shapes] * len(tensors)
        for name, shape in zip(tensors, each, strict=True):
            kind = name.split(".")[0]
            if name.endswith(("ends", "tables", "buckets", "classes")):
                size |= {"C": len(columns["basis"]) if kind == "background" else 192, "G": len(columns[f"{kind}.ends"])}
                size |= {"K": len(columns[f"{kind}.tables"]), "49 G": 49 * size["G"]}
            wanted = tuple(size.get(side, 0) or int(side) for side in shape.split(", "))
            assert (str(columns[name].dtype), columns[name].shape) == (dtype, wanted), name
            listed.add(name)
    assert listed == set(columns)
    stated = re.search(r"C is at most (\d+), K (\d+), G (\d+) and T (\d+)", (REPOSITORY / "docs" / "FORMAT.md").read_text())
    assert stated
    limits = dictionary.MAX_CHANNELS, dictionary.MAX_CLASSES, dictionary.MAX_GROUPS, dictionary.MAX_TABLES
    assert tuple(map(int, stated.groups())) == limits


def decode_by_the_text(data: bytes) -> NDArray[np.uint8]:
    """The picture at its stored size, by the section "Decoding", one network after the other, in float64."""
    header, _, networks = read_bundle(data)
    height, width = header["stored_size"]
    if FAMILIES[header["family"]] == "jpeg":
        (record,) = networks
        file = data[record["offset"] : record["offset"] + record["length"]]
        return np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    if FAMILIES[header["family"]] == "tile":
        levels = tile_reader.read_picture(
            dictionary_of(header["shared"]),
            data[networks[0]["offset"] : networks[0]["offset"] + networks[0]["length"]],
            layers=networks[0]["depth"],
            lanes=networks[0]["width"],
            rects=[record["rect"] for record in networks],
            steps=[record["scale"] for record in networks],
            feathers=[record["feather"] for record in networks],
        )
        return np.rint(np.clip(levels, 0, 255)).astype(np.uint8).transpose(1, 2, 0)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    colour = np.zeros((3, height, width))
    for record in networks:
        x0, y0, x1, y1 = record["rect"]
        u, v = (2 * (np.clip(p, a + 0.5, b - 0.5) - a) / (b - a) - 1 for p, a, b in ((x, x0, x1), (y, y0, y1)))
        h = np.stack([u.ravel(), v.ravel()])
        *sine, (matrix, bias) = read_weights(data, record)
        for w, b in sine:
            h = np.sin(record["w0"] * (w @ h + b))
        value = (matrix @ h + bias).reshape(3, height, width) * record["scale"] + (0 if record["kind"] == 1 else 0.5)
        weight = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).astype(float)
        for distance, inner in ((x - x0, x0 > 0), (y - y0, y0 > 0), (x1 - x, x1 < width), (y1 - y, y1 < height)):
            if inner and record["feather"]:
                weight = np.minimum(weight, np.clip(distance / record["feather"], 0, 1))
        if record["kind"] == 0:
            colour = value
        elif record["kind"] == 1:
            colour = colour + value * weight
        else:
            colour = colour * (1 - weight) + value * weight
    return np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_picture_decoded_by_the_text_is_the_golden_one(name: str) -> None:
    decoded = decode_by_the_text((GOLDEN / "bundles" / f"{name}.rinr").read_bytes())
    assert_close(decoded, np.array(Image.open(GOLDEN / "pixels" / f"{name}.png")), "pixels")


def name_of(shard: Path) -> str:
    return shard.relative_to(GOLDEN).as_posix()


@pytest.mark.parametrize("shard", SHARDS, ids=name_of)
def test_an_index_has_the_columns_of_its_table(shard: Path) -> None:
    file = shard.with_suffix(".safetensors")
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = json.loads(header.pop("__metadata__")["rinr"])
    assert sorted(about) == ["groups", "shard_bytes", "version"]
    assert (about["version"], about["shard_bytes"]) == (1, shard.stat().st_size)
    columns = load_file(file)
    counts = {
        "sample": len(columns["offset"]),
        "object": len(columns["box"]),
        "network": len(columns["network_group"]),
        "key byte": len(columns["key"]),
    }
    counts["sample+"] = counts["sample"] + 1
    rows = table("Index")
    assert sorted(row[0] for row in rows) == sorted(columns)
    for name, dtype, of, _ in rows:
        match = re.fullmatch(r"(\w+?)(?:\[(\d+)\])?", dtype)
        assert match
        assert (columns[name].dtype, columns[name].shape) == (match[1], (counts[of], int(match[2])) if match[2] else (counts[of],)), name


@pytest.mark.parametrize("shard", SHARDS, ids=name_of)
def test_an_index_says_what_the_bundles_say(shard: Path) -> None:
    data, columns = shard.read_bytes(), load_file(shard.with_suffix(".safetensors"))
    raw = shard.with_suffix(".safetensors").read_bytes()
    about = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["rinr"])
    for i, (offset, size) in enumerate(zip(columns["offset"].tolist(), columns["size"].tolist(), strict=True)):
        bundle = data[offset : offset + size]
        header, objects, networks = read_bundle(bundle)
        for name in ("checksum", "stored_size", "source_size", "label", "source_hash"):
            assert columns[name][i].tolist() == (list(header[name]) if isinstance(header[name], tuple) else header[name]), name
        for name in ("psnr", "object_psnr"):
            expected = header[name] / 100 if header[name] else math.nan
            assert columns[name][i] == pytest.approx(expected, rel=1e-6, nan_ok=True)
        of = slice(*columns["object_start"][i : i + 2].tolist())
        assert columns["box"][of].tolist() == [list(o["box"]) for o in objects]
        assert columns["class_id"][of].tolist() == [o["class_id"] for o in objects]
        assert columns["crowd"][of].tolist() == [o["flags"] & 1 for o in objects]
        of = slice(*columns["network_start"][i : i + 2].tolist())
        shapes = [[KINDS[n["kind"]], n["depth"], n["width"], DTYPES[n["dtype"]], n["w0"]] for n in networks]
        assert [about["groups"][g] for g in columns["network_group"][of].tolist()] == shapes
        assert columns["network_offset"][of].tolist() == [offset + n["offset"] for n in networks]
        assert columns["network_object"][of].tolist() == [-1 if n["object"] == 65535 else n["object"] for n in networks]
        for name in ("rect", "scale", "feather"):
            assert columns[name][of].tolist() == [list(n[name]) if name == "rect" else n[name] for n in networks]


def test_limits_are_those_of_the_code() -> None:
    limits = {name: float(value) for name, value in table("Limits")}
    assert limits == {
        "depth": specs.MAX_DEPTH,
        "width": specs.MAX_WIDTH,
        "w0": specs.MAX_W0,
        "objects": 2**16 - 1,
        "networks": NO_OBJECT,
        "layers of a `tile`": specs.MAX_LAYERS,
        "lanes of a `tile`": specs.MAX_LANES,
        "tiles of all lattices for each byte of a `tile` stream": stream.TILES_A_BYTE,
        "pixels for each byte of a `jpeg`": jpeg_header.PIXELS_A_BYTE,
        "scans of a `jpeg`": jpeg_header.MAX_SCANS,
    }


@pytest.mark.parametrize("root", DATASETS)
def test_dataset_json_has_the_keys_of_its_table(root: str) -> None:
    described = json.loads((GOLDEN / root / "dataset.json").read_bytes())
    assert sorted(described) == sorted(row[0] for row in table("dataset.json"))
    text = (REPOSITORY / "docs" / "FORMAT.md").read_text()
    listed = re.search(r"A row of `shards` has (.*?);", text)
    assert listed
    for split in described["splits"].values():
        assert sorted(split) == ["objects", "samples", "shards"]
        for row in split["shards"]:
            assert sorted(row) == sorted(re.findall(r"`(\w+)`", listed[1]))


def test_key_characters_are_those_listed() -> None:
    text = (REPOSITORY / "docs" / "FORMAT.md").read_text()
    listed = re.search(r"ASCII, and ``(.*?)``\.", text)
    assert listed
    encoded = {chr(c) for c in range(33, 127) if encode_key(f"a{chr(c)}") != f"a{chr(c)}"}
    assert encoded == {".", *listed[1]}
