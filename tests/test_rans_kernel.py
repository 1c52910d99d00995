"""The Triton kernels of the entropy coder against numpy: in Triton's interpreter, and on a GPU where there is one.

Triton decides when it is imported whether it interprets, so the interpreter runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from numpy.typing import NDArray
from rans_streams import CONTEXTS, Coded, arena_of, coded, decode_all, decoder_of, versions

from rinr_loader.codecs.rans import Tables

needs("triton")

from rinr_loader.kernels import rans as kernels

Results = dict[str, NDArray[Any]]
Run = Callable[..., Results]


def run(data: Coded, streams: list[bytes], guard: int = 0xAA, device: str = "cpu") -> Results:
    """Decode everything with the kernels."""

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(device, dtype)

    arena, starts, ends = arena_of(streams, guard)
    decoder = kernels.Decoder(
        tensor(arena, torch.uint8),
        tensor(starts, torch.int64),
        tensor(ends, torch.int64),
        tensor(data.lanes, torch.int32),
        width=max(data.lanes),
        lookup=kernels.upload(Tables(data.frequencies), device),
    )
    classes = [
        kernels.decode_classes(
            decoder,
            tensor(data.counts(i), torch.int32),
            tensor(data.has_left[i], torch.bool),
            tensor(data.extra[i], torch.uint8),
            base=data.bases[i],
            buckets=tensor(data.buckets[i], torch.uint8),
            contexts=CONTEXTS,
        )
        for i in (0, 1)
    ]
    tables = tensor(np.concatenate(data.symbol_tables), torch.int32)
    symbols = kernels.decode_symbols(decoder, tables, tensor([len(mine) for mine in data.symbol_tables], torch.int64))
    results = {
        "background": classes[0],
        "residual": classes[1],
        "symbols": symbols,
        "position": 4 * decoder.lanes + 2 * decoder.position,
        "intact": decoder.intact(),
        "states": decoder.state[:, : max(data.lanes)],
    }
    return {name: values.cpu().numpy() for name, values in results.items()}


def expected(data: Coded, streams: list[bytes]) -> Results:
    decoder = decoder_of(streams, data.lanes, Tables(data.frequencies))
    (background, residual), symbols = decode_all(data, decoder)
    position, states = decoder.position.astype(np.int32), decoder._stand.state.astype(np.int32)
    return {"background": background, "residual": residual, "symbols": symbols, "position": position, "intact": decoder.intact(), "states": states}


def compare(found: Results, wanted: Results) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values), name


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        assert pool.submit(interpreted).result()
        yield pool


def interpreted() -> bool:
    """Whether this process interprets."""
    return type(kernels._symbols).__name__ == "InterpretedFunction"


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def decode(request: pytest.FixtureRequest) -> Run:
    if request.param == "cuda":
        return lambda *arguments: run(*arguments, device="cuda")
    pool: ProcessPoolExecutor = request.getfixturevalue("interpreter")
    return lambda *arguments: pool.submit(run, *arguments).result()


@pytest.mark.parametrize(
    "images",
    [
        [(4, 22, 3, 50), (7, 25, 4, 33), (16, 40, 0, 0), (1, 0, 2, 5)],
        [(64, 70, 64, 130), (2, 1, 1, 1)],
        [(1, 5, 2, 12), (1, 0, 1, 0)],
        [(8, 0, 0, 0)],
        [(32, 33, 5, 64), (32, 64, 1, 65)],
    ],
    ids=["mixed", "64 lanes", "1 lane", "nothing", "32 lanes"],
)
def test_what_was_encoded_is_decoded(decode: Run, images: list[tuple[int, int, int, int]]) -> None:
    data = coded(11, images)
    found = decode(data, data.streams)
    compare(found, expected(data, data.streams))
    assert found["intact"].all()
    assert np.array_equal(found["symbols"], np.concatenate(data.symbols))
    for i, name in enumerate(("background", "residual")):
        for mine, classes in zip(found[name], data.classes[i], strict=True):
            assert np.array_equal(mine[: len(classes)], classes)


def test_damaged_streams_decode_as_in_numpy(decode: Run) -> None:
    data = coded(2, [(4, 6, 1, 12)])
    [stream] = data.streams
    rng = np.random.default_rng(0)
    damaged = [
        stream,
        b"",
        stream[:3],
        stream[:15],
        stream[:16],
        stream[:-1],
        stream[:-2],
        stream[: len(stream) // 2],
        stream + b"\0",
        stream + b"\0\0",
    ]
    damaged += [b"\xff" * len(stream), bytes(len(stream)), rng.bytes(len(stream)), rng.bytes(len(stream)), rng.bytes(17)]
    for bit in rng.choice(8 * len(stream), 5, replace=False).tolist():
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    many = versions(data, len(damaged))
    found = decode(many, damaged, 0x55)
    compare(found, expected(many, damaged))  # which has other bytes around the streams: none of them is read
    assert found["intact"].tolist()[:15] == [True] + [False] * 14


def test_states_that_no_encoder_writes_are_reported(decode: Run) -> None:
    data = coded(2, [(2, 0, 0, 0)])
    streams = [struct.pack("<2I", 2**15, state) for state in (2**15, 2**15 - 1, 0, 2**15 + 2**31, 2**31, 2**32 - 1)]
    many = versions(data, len(streams))
    found = decode(many, streams)
    compare(found, expected(many, streams))
    assert found["intact"].tolist() == [True] + [False] * 5


def test_tables_that_do_not_exist_are_taken_for_the_nearest(decode: Run) -> None:
    data = coded(2, [(4, 0, 0, 24)])
    last = len(data.frequencies) - 1
    wrong = replace(data, symbol_tables=[np.where(np.arange(24) % 2, 10**9, -(10**9))])
    near = replace(data, symbol_tables=[np.where(np.arange(24) % 2, last, -1)])
    compare(decode(wrong, data.streams), expected(near, data.streams))


TYPES = {
    **dict.fromkeys(("data", "has_left", "extra", "buckets", "classes", "symbols"), "*u8"),
    **dict.fromkeys(("starts", "ends", "first_symbol", "last_symbol"), "*i64"),
    **dict.fromkeys(("lanes", "lookup", "state", "position", "sound", "tiles", "tables"), "*i32"),
    **dict.fromkeys(("rows", "most", "kinds", "base", "contexts"), "i32"),
}


@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu(capability: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, constants in ((kernels._start, {}), (kernels._classes, {"GROUPS": 3, "COLUMNS": 4}), (kernels._symbols, {})):
        signature = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={**constants, "WIDTH": width})
        assert triton_compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
