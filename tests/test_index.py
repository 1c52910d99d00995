"""The index of a shard: what it says, and that nothing hostile, damaged or of another shard gets past it to a decoder."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import bundles, random_network, small_bundle, tile_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jpegs import jpeg_bundle
from numpy.typing import NDArray
from safetensors.numpy import save

from rinr_loader import RinrDataset
from rinr_loader.bundle import Bundle, NetworkSpec, pack, parse
from rinr_loader.decode import decode, whole
from rinr_loader.errors import BundleError, RinrError, ShardError, StorageError
from rinr_loader.index import Row, ShardIndex, build_index, decode_key, dump_index, encode_key, index_shard, load_index, row_of, shard_members
from rinr_loader.index_check import COLUMNS
from rinr_loader.reader import read_samples
from rinr_loader.writer import DATASET, describe_dataset, describe_shard, dump_json, hash_file, write_bytes, write_index, write_tar

Columns = dict[str, NDArray[Any]]


def plain_bundle(seed: int = 0, width: int = 3) -> Bundle:
    return Bundle((9, 7), (9, 7), (random_network("background", "float16", (0, 0, 7, 9), width=width, seed=seed),), label=seed)


MEMBERS = (("a", small_bundle()), ("b%2Ec/d", plain_bundle(1)), ("e", replace(small_bundle(), label=-1, psnr=None)), ("f", plain_bundle(2, width=16)))


def write_shard(path: Path, members: tuple[tuple[str, Bundle], ...] = MEMBERS) -> Path:
    write_tar(path, [(f"{key}.rinr", pack(bundle)) for key, bundle in members])
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shard") / "train-000000.tar")


@pytest.fixture(scope="module")
def raw(shard: Path) -> bytes:
    return dump_index(index_shard(shard), shard_bytes=shard.stat().st_size)


def about(raw: bytes) -> dict[str, Any]:
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"]["rinr"])
    return found


def columns_of(index: ShardIndex) -> Columns:
    columns = {f.name: np.array(getattr(index, f.name)) for f in dataclasses.fields(index) if f.name != "groups"}
    columns["crowd"] = columns["crowd"].astype(np.uint8)
    return columns


def altered(raw: bytes, change: Callable[[Columns], None] = lambda columns: None, **metadata: Any) -> bytes:
    """The index with other columns or metadata."""
    columns = columns_of(load_index(raw, name="x"))
    change(columns)
    return save({name: column.copy(order="C") for name, column in columns.items()}, {"rinr": json.dumps({**about(raw), **metadata})})


# --- what it says ---


def test_an_index_says_what_the_shard_holds(shard: Path) -> None:
    index = index_shard(shard)
    data = shard.read_bytes()
    assert index.keys == [key for key, _ in MEMBERS]
    assert len(index) == 4
    for i, (_, bundle) in enumerate(MEMBERS):
        member = data[index.offset[i] : index.offset[i] + index.size[i]]
        assert member == pack(bundle)
        assert int(index.checksum[i]) == int.from_bytes(member[12:16], "little")
        assert tuple(index.stored_size[i]) == bundle.stored_size
        assert tuple(index.source_size[i]) == bundle.source_size
        assert index.label[i] == bundle.label
        assert index.source_hash[i].tobytes() == bundle.source_hash
        assert index.psnr[i] == pytest.approx(np.nan if bundle.psnr is None else bundle.psnr, nan_ok=True)
        objects = slice(index.object_start[i], index.object_start[i + 1])
        for name, column in (("boxes", index.box), ("classes", index.class_id), ("crowd", index.crowd)):
            np.testing.assert_array_equal(column[objects], getattr(bundle, name))
        networks = range(index.network_start[i], index.network_start[i + 1])
        for row, network in zip(networks, bundle.networks, strict=True):
            assert index.groups[index.network_group[row]] == network.spec
            assert (tuple(index.rect[row]), index.scale[row], index.feather[row]) == (network.rect, network.scale, network.feather)
            assert index.network_object[row] == network.object
            start = index.network_offset[row]
            assert data[start : start + network.spec.nbytes] == network.weights


def test_background_and_residual_bytes(shard: Path) -> None:
    index = index_shard(shard)
    assert index.background_bytes == sum(bundle.networks[0].spec.nbytes for _, bundle in MEMBERS)
    assert index.residual_bytes == sum(network.spec.nbytes for _, bundle in MEMBERS for network in bundle.networks[1:])


def test_an_index_is_read_as_it_was_written(shard: Path, raw: bytes) -> None:
    index = load_index(raw, name="x", shard_bytes=shard.stat().st_size)
    wanted = index_shard(shard)
    for field in dataclasses.fields(ShardIndex):
        a, b = getattr(index, field.name), getattr(wanted, field.name)
        if field.name == "groups":
            assert a == b
        else:
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b)


def test_equal_shards_have_equal_indexes(raw: bytes, tmp_path: Path) -> None:
    other = write_shard(tmp_path / "other-name.tar")
    assert dump_index(index_shard(other), shard_bytes=other.stat().st_size) == raw


@given(st.lists(bundles(), max_size=4))
@settings(max_examples=30)
def test_any_bundles_have_an_index_that_is_read_again(drawn: list[Bundle]) -> None:
    rows, offset = [], 512
    for i, bundle in enumerate(drawn):
        data = pack(bundle)
        rows.append(row_of(f"k{i}", offset, data, "x"))
        offset += 512 * (len(data) // 512 + 2)
    index = build_index(rows)
    raw = dump_index(index, shard_bytes=offset + 1024)
    again = load_index(raw, name="x", shard_bytes=offset + 1024)
    assert dump_index(again, shard_bytes=offset + 1024) == raw
    assert again.groups == index.groups


def test_an_empty_shard_has_an_index(tmp_path: Path) -> None:
    empty = write_shard(tmp_path / "empty.tar", ())
    index = load_index(dump_index(index_shard(empty), shard_bytes=10240), name="x", shard_bytes=10240)
    assert (len(index), index.keys, index.background_bytes) == (0, [], 0)


# --- keys ---

HARD_KEYS = (
    "plain",
    "v1.2/frame.0001",
    "with space",
    "tab\there",
    "100%",
    "a%2Eb",
    "straße",
    "日本/語",
    "__meta__/x",
    "q?*:<>|",
    "back\\slash",
    "x" * 90,
)


@pytest.mark.parametrize("key", HARD_KEYS)
def test_keys_survive(key: str) -> None:
    encoded = encode_key(key)
    assert decode_key(encoded) == key
    assert "." not in encoded
    assert encoded.isascii()
    assert encoded.isprintable()
    assert " " not in encoded
    assert not encoded.startswith("__")


@given(st.text(min_size=1, max_size=40))
def test_any_key_survives(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:  # half a surrogate pair: not a name that a file system gives
        return
    encoded = encode_key(key)
    assert decode_key(encoded) == key
    assert not set(encoded) & set(" .\t\n\r\x0b\x0c")
    assert encoded.isascii()


# --- damage to the file ---


def test_every_truncation_of_an_index_is_a_shard_error(raw: bytes) -> None:
    for length in range(len(raw)):
        with pytest.raises(ShardError, match=r"^train\.safetensors: .*; "):
            load_index(raw[:length], name="train.safetensors")


def test_flipped_bits_of_an_index_are_shard_errors_or_harmless(shard: Path, raw: bytes) -> None:
    """A flip in a label or a key is another index; one that is read must be safe to decode by. `dataset.json` has the hash of the whole."""
    header = 8 + int.from_bytes(raw[:8], "little")
    read = []
    for bit in [*range(64), *range(64, 8 * header, 11), *range(8 * header, 8 * len(raw))]:
        data = bytearray(raw)
        data[bit // 8] ^= 1 << bit % 8
        try:
            index = load_index(bytes(data), name="x", shard_bytes=shard.stat().st_size)
        except ShardError:
            continue
        read.append(index)
    for index in read[::25]:
        safe_to_read(shard, index)


def safe_to_read(shard: Path, index: ShardIndex) -> None:
    """Read and decode everything: an error of ours, or pixels, but nothing else."""
    everything = np.arange(len(index))
    try:
        buffer = read_samples([(shard, index)], np.zeros_like(everything), everything)
    except RinrError:
        return
    ends = buffer.network_offset + buffer.network_bytes
    assert int(buffer.network_offset.min()) >= 0
    assert int(ends.max()) <= len(buffer.data)
    decode(buffer, whole(buffer, (8, 8)), size=(8, 8))


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_few_other_bytes_in_an_index(shard: Path, raw: bytes, data: st.DataObject) -> None:
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = load_index(bytes(damaged), name="x")
    except ShardError:
        return
    safe_to_read(shard, index)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_index(data: bytes) -> None:
    for raw in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(ShardError):
            load_index(raw, name="x")


def header_of(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode()


NESTED = "[" * 100_000
NOT_AN_INDEX = {
    "nothing": b"",
    "a length of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "no metadata": header_of("{}"),
    "metadata is a list": header_of('{"__metadata__":[]}'),
    "metadata is no JSON": header_of('{"__metadata__":{"rinr":"{"}}'),
    "metadata is a number": header_of('{"__metadata__":{"rinr":"3"}}'),
    "metadata is null": header_of('{"__metadata__":{"rinr":"null"}}'),
    "metadata without version": header_of('{"__metadata__":{"rinr":"{}"}}'),
    "deep JSON": header_of(NESTED),
    "deep JSON in the metadata": header_of(json.dumps({"__metadata__": {"rinr": NESTED}})),
    "a column of 2^60 values": header_of('{"key":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}'),
    "bfloat16": header_of('{"__metadata__":{"rinr":"{}"},"key":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'),
    "a tar": bytes(10240),
}


@pytest.mark.parametrize("name", NOT_AN_INDEX)
def test_what_is_no_index_is_a_shard_error_and_cheap(name: str) -> None:
    data = NOT_AN_INDEX[name]
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match="make it again with `rinr index`"):
            load_index(data, name="x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 16 * len(data) + 1_000_000


def test_another_version_of_an_index(raw: bytes) -> None:
    with pytest.raises(ShardError, match="expected index version 1, got 2; upgrade rinr_loader"):
        load_index(altered(raw, version=2), name="x")


def test_an_index_of_a_shard_of_another_size(shard: Path, raw: bytes) -> None:
    size = shard.stat().st_size
    with pytest.raises(
        ShardError, match=f"expected the index of a shard of {size + 512} bytes, got one of {size} bytes; make it again with `rinr index`"
    ):
        load_index(raw, name="x", shard_bytes=size + 512)


@pytest.mark.parametrize(
    "metadata", [{"shard_bytes": 1.5}, {"shard_bytes": None}, {"shard_bytes": True}, {"shard_bytes": -1}, {"shard_bytes": 10**30}]
)
def test_a_hostile_size_in_an_index(raw: bytes, metadata: dict[str, Any]) -> None:
    with pytest.raises(ShardError):
        load_index(altered(raw, **metadata), name="x")


@pytest.mark.parametrize("groups", [None, {}, "groups", 3, [], [None] * 9, [[]] * 9, [["background", 2, 3, "int8", 30.0]]], ids=str)
def test_hostile_lists_of_groups(raw: bytes, groups: Any) -> None:
    with pytest.raises(ShardError):
        load_index(altered(raw, groups=groups), name="x")


BAD_GROUPS = (
    ["background", 2, 3, "int8"],
    ["background", 2, 3, "int8", 30.0, 1],
    ["foreground", 2, 3, "int8", 30.0],
    [["background"], 2, 3, "int8", 30.0],
    ["background", 0, 3, "int8", 30.0],
    ["background", 2.0, 3, "int8", 30.0],
    ["background", True, 3, "int8", 30.0],
    ["background", 65, 3, "int8", 30.0],
    ["background", 2, 257, "int8", 30.0],
    ["background", 2, -3, "int8", 30.0],
    ["background", 2, 3, "int4", 30.0],
    ["background", 2, 3, "int8", float("nan")],
    ["background", 2, 3, "int8", float("inf")],
    ["background", 2, 3, "int8", 0.0],
    ["background", 2, 3, "int8", "30"],
    ["background", 2, 4, "int8", 30.0],  # of another size than the weights
)


@pytest.mark.parametrize("group", BAD_GROUPS, ids=str)
def test_hostile_groups(raw: bytes, group: Any) -> None:
    groups = about(raw)["groups"]
    place = groups.index(["background", 2, 3, "int8", 30.0])
    with pytest.raises(ShardError):
        load_index(altered(raw, groups=[*groups[:place], group, *groups[place + 1 :]]), name="x")


# --- damage to the columns ---


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_another_type_or_shape(raw: bytes, name: str) -> None:
    def other_dtype(columns: Columns) -> None:
        columns[name] = np.nan_to_num(columns[name]).astype(np.int16)

    def as_float(columns: Columns) -> None:
        columns[name] = columns[name].astype(np.float64)

    def deeper(columns: Columns) -> None:
        columns[name] = columns[name][..., None]

    def flat(columns: Columns) -> None:
        columns[name] = columns[name].reshape(-1)[: len(columns[name])] if columns[name].ndim == 2 else np.array(columns[name][0])

    def longer(columns: Columns) -> None:
        columns[name] = np.concatenate([columns[name], columns[name][-1:]])

    def shorter(columns: Columns) -> None:
        columns[name] = columns[name][:-1]

    def empty(columns: Columns) -> None:
        columns[name] = columns[name][:0]

    def missing(columns: Columns) -> None:
        del columns[name]

    def renamed(columns: Columns) -> None:
        columns[name + "s"] = columns.pop(name)

    for change in (other_dtype, as_float, deeper, flat, longer, shorter, empty, missing, renamed):
        with pytest.raises(ShardError, match="make it again with `rinr index`"):
            load_index(altered(raw, change), name="x")


def put(name: str, place: Any, value: Any) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[name][place] = value

    return change


def add(name: str, value: int) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[name] += columns[name].dtype.type(value)

    return change


def move(sample: int, by: int) -> Callable[[Columns], None]:
    """A sample with all its weights somewhere else."""

    def change(columns: Columns) -> None:
        columns["offset"][sample] += by
        networks = slice(*columns["network_start"][sample : sample + 2])
        columns["network_offset"][networks] += by

    return change


def swap(name: str, a: int, b: int) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[name][[a, b]] = columns[name][[b, a]]

    return change


LOW, HIGH = np.iinfo(np.int64).min, np.iinfo(np.int64).max
HOSTILE: dict[str, Callable[[Columns], None]] = {
    "keys begin elsewhere": put("key_start", 0, 1),
    "keys end elsewhere": put("key_start", -1, 3),
    "keys fall": swap("key_start", 1, 2),
    "key negative": put("key_start", 1, -5),
    "key not UTF-8": put("key", 0, 0xFF),
    "key twice": lambda c: c["key"].put(-1, c["key"][0]),
    "offset negative": put("offset", 0, -512),
    "offset lowest": put("offset", 0, LOW),
    "offset highest": put("offset", -1, HIGH),
    "offset not of a tar": add("offset", 16),
    "sample before the shard": move(0, -1024),
    "sample behind the shard": move(3, 10_240),
    "sample so far behind the shard that its end wraps round": lambda c: move(3, HIGH - 511 - int(c["offset"][3]))(c),
    "sample not where a tar has it": move(3, 16),
    "sample over its neighbour": move(1, -1024),
    "offset beyond": put("offset", -1, 512 * 10_000),
    "offsets swapped": swap("offset", 0, 2),
    "offsets equal": lambda c: c["offset"].put(1, c["offset"][0]),
    "size negative": put("size", 0, -1),
    "size 0": put("size", 1, 0),
    "size highest": put("size", -1, HIGH),
    "size into the next": put("size", 0, 5000),
    "size one more": add("size", 1),
    "stored 0": put("stored_size", (0, 1), 0),
    "stored above source": put("stored_size", (0, 0), 41),
    "source below stored": put("source_size", 1, 1),
    "label": put("label", 0, -2),
    "objects fall": put("object_start", 1, 7),
    "objects negative": put("object_start", 1, -1),
    "objects begin elsewhere": put("object_start", 0, 1),
    "objects of a neighbour": put("object_start", 1, 2),
    "box NaN": put("box", (0, 0), np.nan),
    "box infinite": put("box", (5, 2), np.inf),
    "box below 0": put("box", (0, 0), -1),
    "box outside": put("box", (0, 3), 40.5),
    "box turned round": put("box", (1, 2), 0),
    "class": put("class_id", 0, -1),
    "crowd": put("crowd", 0, 2),
    "networks fall": put("network_start", 1, 100),
    "sample without a network": put("network_start", 1, 0),
    "last sample without a network": put("network_start", -2, 8),
    "networks of a neighbour": put("network_start", 1, 2),
    "group": put("network_group", 0, 60_000),
    "groups swapped": swap("network_group", 0, 1),
    "owner": put("network_object", 1, 3),
    "owner below -1": put("network_object", 1, -2),
    "owner of another sample": put("network_object", 3, 0),
    "weights negative": put("network_offset", 0, -16),
    "weights lowest": put("network_offset", 0, LOW),
    "weights highest": put("network_offset", -1, HIGH),
    "weights beyond": put("network_offset", -1, 10**9),
    "weights not aligned": add("network_offset", 8),
    "weights elsewhere": add("network_offset", 16),
    "weights of a neighbour": swap("network_offset", 0, 1),
    "rectangle outside": put("rect", (1, 2), 60_000),
    "rectangle below": put("rect", (1, 3), 21),
    "rectangle empty": put("rect", (1, 0), 18),
    "rectangle turned round": put("rect", (1, 1), 20),
    "background of a part": put("rect", (0, 2), 30),
    "scale NaN": put("scale", 0, np.nan),
    "scale infinite": put("scale", 1, np.inf),
    "scale 0": put("scale", 1, 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_columns(raw: bytes, name: str) -> None:
    with pytest.raises(ShardError, match=r"^index: expected .*, got .*; make it again with `rinr index`$"):
        load_index(altered(raw, HOSTILE[name]), name="index")


# --- families side by side ---

MIXED = (
    ("a", pack(small_bundle())),
    ("b", pack(tile_bundle())),
    ("c", jpeg_bundle(0, boxes=[(1, 2, 9, 12)])),
    ("d", jpeg_bundle(1, stored=(9, 7))),
    ("e", pack(replace(tile_bundle(), networks=tile_bundle().networks[:1], shared=b"another!"))),
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "mixed.tar"
    write_tar(path, [(f"{key}.rinr", data) for key, data in MIXED])
    return path


@pytest.fixture(scope="module")
def mixed_raw(mixed: Path) -> bytes:
    return dump_index(index_shard(mixed), shard_bytes=mixed.stat().st_size)


def test_an_index_of_several_families(mixed: Path, mixed_raw: bytes) -> None:
    index, data = load_index(mixed_raw, name="x", shard_bytes=mixed.stat().st_size), mixed.read_bytes()
    row, sizes = 0, [0, 0]
    for i, (_, raw) in enumerate(MIXED):
        parsed = parse(raw)
        for k, network in enumerate(parsed.networks):
            assert index.groups[index.network_group[row]] == network.spec
            start, size = int(index.network_offset[row]), int(index.network_bytes[row])
            assert data[start : start + size] == network.weights
            assert (tuple(index.rect[row]), index.scale[row], index.feather[row]) == (network.rect, network.scale, network.feather)
            sizes[k > 0] += len(network.weights)
            row += 1
        assert index.network_start[i + 1] == row
    assert [index.background_bytes, index.residual_bytes] == sizes
    assert about(mixed_raw)["groups"] == [
        ["background", 2, 3, "int8", 30.0],
        ["residual", 1, 4, "float16", 30.0],
        ["direct", 1, 2, "int8", 30.0],
        ["background", 2, 16, "latents", 0.0],
        ["residual", 0, 0, "latents", 0.0],
        ["background", 0, 0, "jpeg", 0.0],
    ]
    assert dump_index(index, shard_bytes=mixed.stat().st_size) == mixed_raw


def test_a_buffer_of_several_families(mixed: Path) -> None:
    index = index_shard(mixed)
    order = np.array([4, 2, 0, 2, 1, 0])
    buffer = read_samples([(mixed, index)] * 2, np.array([1, 0, 1, 1, 0, 0]), order, {b"a": "parameters"})
    assert buffer.shared == {b"a": "parameters"}
    assert buffer.shared_hash == tuple(parse(MIXED[i][1]).shared for i in order)
    row = 0
    for i in order:
        for network in parse(MIXED[i][1]).networks:
            start, size = int(buffer.network_offset[row]), int(buffer.network_bytes[row])
            assert buffer.data[start : start + size].numpy().tobytes() == network.weights
            assert int(buffer.network_object[row]) == network.object
            row += 1
    assert row == len(buffer.network_bytes)
    # JPEGs are decoded from host memory wherever the buffer is.
    assert buffer.host is None
    assert buffer.to("meta").host is buffer.data
    assert buffer.to("meta").shared == buffer.shared


BAD_OTHERS = (
    ["background", 2, 16, "jpeg", 0.0],
    ["background", 0, 0, "jpeg", 30.0],
    ["background", 0, 0, "jpeg", -0.0],
    ["residual", 0, 0, "jpeg", 0.0],
    ["background", 0, 0, "latents", 0.0],
    ["background", 1, 3, "latents", 0.0],
    ["background", 3, 4, "latents", 0.0],
    ["background", 1, 2048, "latents", 0.0],
    ["background", 1, 16, "latents", 30.0],
    ["direct", 0, 0, "latents", 0.0],
    ["residual", 0, 1, "latents", 0.0],
    ["background", 0, 0, "webp", 0.0],
)


@pytest.mark.parametrize("group", BAD_OTHERS, ids=str)
def test_hostile_groups_of_other_families(mixed_raw: bytes, group: Any) -> None:
    groups = about(mixed_raw)["groups"]
    for place in (3, 4, 5):
        with pytest.raises(ShardError):
            load_index(altered(mixed_raw, groups=[*groups[:place], group, *groups[place + 1 :]]), name="x")


def exchange(row: int, group: int) -> Callable[[Columns], None]:
    return put("network_group", row, group)


HOSTILE_OTHERS: dict[str, Callable[[Columns], None]] = {
    "a sine network called a JPEG": exchange(0, 5),
    "a residual tile called a sine network": exchange(4, 1),
    "a residual called a tile": exchange(1, 4),
    "a JPEG of another scale": put("scale", 6, 2.0),
    "a JPEG elsewhere": put("network_offset", 6, 0),
    "a JPEG of no bytes": lambda c: c["network_offset"].put(6, c["offset"][2] + c["size"][2]),
    "a JPEG 16 bytes later": lambda c: c["network_offset"].put(6, c["network_offset"][6] + 16),
    "a residual tile elsewhere": lambda c: c["network_offset"].put(4, c["network_offset"][4] - 1),
    "a residual tile at a multiple of 16": lambda c: c["network_offset"].put(5, -(-c["network_offset"][5] // 16) * 16),
    "a stream highest": put("network_offset", 3, HIGH),
    "a stream lowest": put("network_offset", 3, LOW),
}


@pytest.mark.parametrize("name", HOSTILE_OTHERS)
def test_hostile_columns_of_other_families(mixed_raw: bytes, name: str) -> None:
    with pytest.raises(ShardError, match=r"^index: expected .*, got .*; make it again with `rinr index`$"):
        load_index(altered(mixed_raw, HOSTILE_OTHERS[name]), name="index")


def test_one_family_in_a_sample() -> None:
    """Nothing in its offsets would tell: a residual tile has no bytes."""
    jpeg, tile = parse(MIXED[2][1]), tile_bundle().networks[1]
    both = replace(jpeg, networks=(*jpeg.networks, replace(tile, object=0)))
    size = -(-(48 + 24 + 2 * 32) // 16) * 16 + len(jpeg.networks[0].weights)
    raw = dump_index(build_index([Row("a", 512, size, 0, both)]), shard_bytes=10240)
    with pytest.raises(ShardError, match="expected networks of one family in a sample"):
        load_index(raw, name="x")


def test_flipped_bits_of_an_index_of_jpegs(tmp_path: Path) -> None:
    path = tmp_path / "jpegs.tar"
    write_tar(path, [("c.rinr", MIXED[2][1]), ("d.rinr", MIXED[3][1])])
    raw = dump_index(index_shard(path), shard_bytes=path.stat().st_size)
    header, read = 8 + int.from_bytes(raw[:8], "little"), 0
    for bit in range(8 * header, 8 * len(raw)):
        data = bytearray(raw)
        data[bit // 8] ^= 1 << bit % 8
        try:
            index = load_index(bytes(data), name="x", shard_bytes=path.stat().st_size)
        except ShardError:
            continue
        read += 1
        safe_to_read(path, index)
    assert read > 100


# --- damage to the shard ---


def test_a_shard_cut_off_anywhere_is_noticed(shard: Path, tmp_path: Path) -> None:
    data, index = shard.read_bytes(), index_shard(shard)
    needed = int(index.offset[-1]) + -(-int(index.size[-1]) // 512) * 512 + 1024  # with the two empty blocks that end a tar
    cut = tmp_path / "cut.tar"
    for length in [*range(0, needed, 97), needed - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"^cut\.tar.*convert it again"):
            index_shard(cut)


def test_a_truncated_shard_names_the_sample(shard: Path, tmp_path: Path) -> None:
    index = index_shard(shard)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: int(index.offset[2]) + 100])
    with pytest.raises(
        ShardError, match=rf"^cut\.tar:e\.rinr: expected {index.size[2]} bytes, got 100; the shard is truncated, fetch or convert it again"
    ):
        index_shard(cut)


def test_a_damaged_header_does_not_end_a_shard_early(shard: Path, tmp_path: Path) -> None:
    """`tarfile` takes a header with a wrong checksum for the end of the archive: samples would be lost without a word."""
    index = index_shard(shard)
    broken = tmp_path / "broken.tar"
    for i in range(len(index)):
        data = bytearray(shard.read_bytes())
        data[int(index.offset[i]) - 512] ^= 1
        broken.write_bytes(data)
        with pytest.raises(ShardError, match=r"broken\.tar: expected a tar of bundles"):
            index_shard(broken)


def test_damaged_bundles_are_raised_or_told(shard: Path, tmp_path: Path) -> None:
    broken, index = tmp_path / "broken.tar", index_shard(shard)
    data = bytearray(shard.read_bytes())
    data[int(index.offset[1]) + 60] ^= 1
    broken.write_bytes(data)
    with pytest.raises(BundleError, match=r"broken\.tar:b%2Ec/d\.rinr: expected checksum"):
        index_shard(broken)
    told: list[BundleError] = []
    assert index_shard(broken, on_damage=told.append).keys == ["a", "e", "f"]
    assert [str(error).split(": ")[0] for error in told] == ["broken.tar:b%2Ec/d.rinr"]


def test_a_key_twice_in_a_shard(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="expected each key once, got 'a' twice"):
        index_shard(write_shard(tmp_path / "twice.tar", (MEMBERS[0], MEMBERS[1], MEMBERS[0])))


@pytest.mark.parametrize("content", [b"", b"no tar" * 300, bytes(range(256)) * 40], ids=["empty", "text", "binary"])
def test_what_is_no_tar_is_a_shard_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"x\.tar: expected a tar of bundles"):
        index_shard(path)


def test_odd_members_of_a_tar_are_errors_of_ours(tmp_path: Path) -> None:
    """Links, folders, sparse files and names that are not UTF-8 instead of bundles."""
    for kind, name in ((tarfile.SYMTYPE, "a.rinr"), (tarfile.LNKTYPE, "a.rinr"), (tarfile.DIRTYPE, "a.rinr"), (tarfile.REGTYPE, "\udcff.rinr")):
        path = tmp_path / "odd.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "b"
            data = pack(plain_bundle()) if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        with pytest.raises(ShardError if name.startswith("\udcff") else BundleError):
            index_shard(path)


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = pack(plain_bundle())
    write_tar(path, [("a.json", b"{}"), ("a.rinr", data), ("a.txt", b"hello"), ("b.rinr", data), ("b.mask.png", b"")])
    assert shard_members(path) == [("a", 1536, len(data)), ("b", 1536 + 512 * (4 + -(-(len(data)) // 512) - 1), len(data))]


# --- an index and a shard that do not belong together ---


def read_all(shard: Path, index: ShardIndex) -> None:
    everything = np.arange(len(index))
    read_samples([(shard, index)], np.zeros_like(everything), everything)


def test_the_index_of_another_shard_of_the_same_layout(shard: Path, tmp_path: Path) -> None:
    """Same sizes, same offsets: only the samples' checksums tell. Labels of one picture over the pixels of another would be silent."""
    other = write_shard(tmp_path / "other.tar", tuple((key, replace(bundle, source_hash=b"twin")) for key, bundle in MEMBERS))
    assert other.stat().st_size == shard.stat().st_size
    index = load_index(dump_index(index_shard(other), shard_bytes=other.stat().st_size), name="x", shard_bytes=shard.stat().st_size)
    with pytest.raises(ShardError, match=r"train-000000\.tar:a\.rinr: expected checksum .* as in the index.*make it again with `rinr index`"):
        read_all(shard, index)


def test_the_index_of_another_shard_of_another_layout(shard: Path, tmp_path: Path) -> None:
    other = write_shard(tmp_path / "other.tar", MEMBERS[1:])
    with pytest.raises(RinrError):
        read_all(shard, index_shard(other))
    with pytest.raises(RinrError):
        read_all(other, index_shard(shard))


@pytest.mark.parametrize("sample", range(4))
def test_a_damaged_sample_is_noticed_when_it_is_read_and_only_then(shard: Path, tmp_path: Path, sample: int) -> None:
    index, broken = index_shard(shard), tmp_path / "broken.tar"
    data = bytearray(shard.read_bytes())
    data[int(index.offset[sample] + index.size[sample]) - 1] ^= 0x10
    broken.write_bytes(data)
    for i in range(4):
        if i == sample:
            with pytest.raises(BundleError, match=rf"broken\.tar:{index.keys[i]}\.rinr: expected checksum"):
                read_samples([(broken, index)], np.zeros(1, np.int64), np.array([i]))
        else:
            read_samples([(broken, index)], np.zeros(1, np.int64), np.array([i]))


def test_a_shard_that_became_shorter_or_went_away(shard: Path, tmp_path: Path) -> None:
    index, cut = index_shard(shard), tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: int(index.offset[3]) + 5])
    read_samples([(cut, index)], np.zeros(2, np.int64), np.arange(2))
    with pytest.raises(ShardError, match=r"cut\.tar: expected bytes .*; the shard is truncated, fetch or convert it again"):
        read_all(cut, index)
    cut.unlink()
    with pytest.raises(StorageError, match=r"cut\.tar: expected a readable shard, got No such file"):
        read_all(cut, index)


# --- a dataset with such a shard ---


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of two shards of the same layout."""
    rows = []
    for number, source_hash in enumerate((b"one!", b"two!")):
        path = tmp_path / "data" / "train" / f"train-{number:06d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, tuple((f"{key}{number}", replace(bundle, source_hash=source_hash)) for key, bundle in MEMBERS))
        index = write_index(path)
        rows.append((describe_shard(tmp_path / "data", path, index), index))
    described = describe_dataset({"train": rows}, names=(), codec={}, source={})
    write_bytes(tmp_path / "data" / DATASET, dump_json(described))
    return tmp_path / "data"


def shard_and_index(dataset: Path, number: int) -> tuple[Path, Path]:
    tar = dataset / "train" / f"train-{number:06d}.tar"
    return tar, tar.with_suffix(".safetensors")


def test_a_sound_dataset_opens(dataset: Path) -> None:
    found = RinrDataset(dataset)
    assert len(found) == 8
    assert len(found.read(range(8))) == 8


def test_indexes_swapped(dataset: Path) -> None:
    (_, a), (_, b) = shard_and_index(dataset, 0), shard_and_index(dataset, 1)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    with pytest.raises(ShardError, match=r"train-000000\.safetensors: expected SHA-256 .*make it again with `rinr index`"):
        RinrDataset(dataset)


def test_shards_swapped(dataset: Path) -> None:
    (a, _), (b, _) = shard_and_index(dataset, 0), shard_and_index(dataset, 1)
    first, second = a.read_bytes(), b.read_bytes()
    assert len(first) == len(second)
    a.write_bytes(second), b.write_bytes(first)
    with pytest.raises(ShardError, match="the index is of another shard"):
        RinrDataset(dataset).read([5])


def test_indexes_swapped_and_dataset_json_with_them(dataset: Path) -> None:
    (_, a), (_, b) = shard_and_index(dataset, 0), shard_and_index(dataset, 1)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    described = json.loads((dataset / DATASET).read_bytes())
    for row in described["splits"]["train"]["shards"]:
        row["index_sha256"] = hash_file(dataset / row["index"])
    (dataset / DATASET).write_bytes(dump_json(described))
    with pytest.raises(ShardError, match="the index is of another shard"):
        RinrDataset(dataset).read([0])


def test_a_shard_cut_off(dataset: Path) -> None:
    tar, _ = shard_and_index(dataset, 1)
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"train-000001\.tar: expected 10240 bytes, got 10239; .*fetch or convert it again"):
        RinrDataset(dataset)


@pytest.mark.parametrize("which", [0, 1], ids=["shard", "index"])
def test_a_file_gone(dataset: Path, which: int) -> None:
    shard_and_index(dataset, 1)[which].unlink()
    with pytest.raises(ShardError, match=r"train-000001\.\w+: expected a file of the dataset, got No such file"):
        RinrDataset(dataset)


def test_an_index_damaged(dataset: Path) -> None:
    _, index = shard_and_index(dataset, 0)
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000000\.safetensors: expected SHA-256"):
        RinrDataset(dataset)


def test_a_sample_damaged(dataset: Path) -> None:
    tar, _ = shard_and_index(dataset, 1)
    index = index_shard(tar)
    data = bytearray(tar.read_bytes())
    data[int(index.offset[2]) + 100] ^= 1
    tar.write_bytes(data)
    found = RinrDataset(dataset)
    found.read([0, 1, 2, 3, 4, 5, 7])
    with pytest.raises(BundleError, match=r"train-000001\.tar:e1\.rinr: expected checksum"):
        found.read([6])
    with pytest.raises(BundleError):
        list(found)


def test_an_index_made_again_mends_it(dataset: Path) -> None:
    """The advice of the messages: `rinr index` writes what was there."""
    tar, index = shard_and_index(dataset, 0)
    before = index.read_bytes()
    index.write_bytes(b"broken")
    write_index(tar)
    assert index.read_bytes() == before
    assert len(RinrDataset(dataset)) == 8


def test_a_dataset_moved_is_the_same(dataset: Path, tmp_path: Path) -> None:
    identity = RinrDataset(dataset).identity
    shutil.move(dataset, tmp_path / "elsewhere")
    assert RinrDataset(tmp_path / "elsewhere").identity == identity


def test_group_order_does_not_depend_on_the_order_of_samples() -> None:
    specs = [NetworkSpec("background", 2, width, "int8") for width in (3, 5, 4)]
    made = [Bundle((4, 4), (4, 4), (random_network("background", "int8", (0, 0, 4, 4), width=spec.width),)) for spec in specs]
    rows = [row_of(str(i), 512 * i, pack(bundle), "x") for i, bundle in enumerate(made)]
    assert build_index(rows).groups == build_index(rows[::-1]).groups
