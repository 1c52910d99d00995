"""The shared parameters of the family `tile`: basis, filter and entropy tables, in one file that is named by its hash.

A dataset carries its dictionary as `shared/<sha256>.bin`; the package ships a generic one. docs/FORMAT.md lists the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from torch import Tensor

from rinr_loader.codecs.rans import PROBABILITY_BITS, Tables
from rinr_loader.codecs.tile import FILTER_WIDTH, RESIDUAL_CHANNELS, RESIDUAL_TILE, SUPPORT
from rinr_loader.errors import BundleError, ConfigError
from rinr_loader.metadata import metadata_of

VERSION = 1
SHIPPED = Path(__file__).parent / "dictionaries"
GENERIC = "generic"
HASH_BYTES = 8  # of the file's SHA-256: what a bundle remembers
BUCKETS = 6  # kinds of classes that a class's context tells apart
CONTEXTS = BUCKETS + 1  # and one for none
MAX_CHANNELS, MAX_CLASSES, MAX_GROUPS, MAX_TABLES = 768, 64, 8, 256


@dataclass(frozen=True)
class Prior:
    """How the latents of one kind of lattice are coded.

    A tile states a class for each group of channels. The class names a symbol table for each channel of the group; class 0 says that all
    of them are zero. A class is itself coded by a table that its context names: see `rans.decode_classes`.

    Args:
        ends: Where each group of channels ends.
        tables: Row of `Dictionary.tables` for each class and channel, int64 `(K, C)`; row 0 is not used.
        buckets: What a class counts as when it is context, uint8 `(groups, K)`, below `BUCKETS`.
        classes: Frequencies of the classes in each context, int64 `(groups * CONTEXTS**2, K)`.
        first_table: Row of `Dictionary.tables` where `classes` begin.
    """

    ends: tuple[int, ...]
    tables: NDArray[np.int64]
    buckets: NDArray[np.uint8]
    classes: NDArray[np.int64]
    first_table: int

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """First and last (exclusive) channel of each group."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @property
    def group_of(self) -> NDArray[np.int64]:
        """Group of each channel, `(C,)`."""
        return np.repeat(np.arange(len(self.ends)), [b - a for a, b in self.bounds])


@dataclass(frozen=True)
class Dictionary:
    """Everything that decoding a `tile` bundle needs besides the bundle.

    Args:
        basis: Grey levels that one unit of each background channel gives at step 1, float32 `(C, 3, 24, 24)`.
        filter: Weights for `codecs.tile.smooth`.
        residual_basis: The same for residuals, orthonormal, `(192, 3, 8, 8)`.
        tables: Integer probabilities of all symbols and classes.
        radius: Of each symbol table: symbol s means s - radius; 2 * radius + 1 is the escape. int64 `(T,)`.
        background, residual: How the two kinds of lattices are coded.
        predicted: How many channels of the background, the first, are stored as differences to the tile on their left.
        sha256: Hex digest of the file.
        about: Where it comes from: data, steps, seed, curve.
        data: The file's bytes.
    """

    basis: Tensor
    filter: Mapping[str, Tensor]
    residual_basis: Tensor
    tables: Tables
    radius: NDArray[np.int64]
    background: Prior
    residual: Prior
    predicted: int
    sha256: str
    about: Mapping[str, Any]
    data: bytes

    @property
    def key(self) -> bytes:
        """What a bundle names it by."""
        return bytes.fromhex(self.sha256)[:HASH_BYTES]

    @property
    def channels(self) -> int:
        return len(self.basis)


def dump(columns: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> bytes:
    """Serialize a dictionary; equal content gives equal bytes.

    Args:
        columns: The tensors that docs/FORMAT.md lists.
        about: Where it comes from, as JSON.
    """
    return safetensors.save(
        {name: np.ascontiguousarray(columns[name]) for name in sorted(columns)}, {"rinr": json.dumps({"version": VERSION, **about})}
    )


def load(data: bytes, name: str) -> Dictionary:
    """Read a dictionary and check that its tensors fit each other.

    Args:
        data: The file's bytes.
        name: What an error calls it.

    Raises:
        ConfigError: It is damaged, or of another version.
    """

    def check(good: bool | np.bool_, what: str, expected: object, found: object) -> None:
        if not good:
            raise ConfigError(f"{name}: expected {what} {expected}, got {found}; fetch the dictionary again or train a new one")

    try:
        columns = safetensors.load(data)
        about = json.loads(metadata_of(data)["rinr"])
        version = about.pop("version")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name}: expected a dictionary, got {type(error).__name__}: {error}; fetch it again") from None
    if version != VERSION:
        raise ConfigError(f"{name}: expected a dictionary of version {VERSION}, got {version}; upgrade rinr_loader to read it")
    missing = _NAMES - columns.keys()
    check(not missing, "tensors", sorted(_NAMES), f"a file without {sorted(missing)}")
    for column in columns.values():
        check(
            column.dtype.kind == "u" or (column.dtype == np.float16 and bool(np.isfinite(column).all())),
            "values",
            "finite float16 or unsigned",
            column.dtype,
        )

    basis, residual_basis = columns["basis"], columns["residual.basis"]
    check(
        basis.ndim == 4 and basis.shape[1:] == (3, SUPPORT, SUPPORT) and 0 < len(basis) <= MAX_CHANNELS,
        "a basis",
        f"(C, 3, {SUPPORT}, {SUPPORT})",
        basis.shape,
    )
    shape = (RESIDUAL_CHANNELS, 3, RESIDUAL_TILE, RESIDUAL_TILE)
    check(residual_basis.shape == shape, "a residual basis", shape, residual_basis.shape)
    for i, (out, into) in enumerate(((FILTER_WIDTH, 12), (FILTER_WIDTH, FILTER_WIDTH), (12, FILTER_WIDTH))):
        check(columns[f"filter.{i}.weight"].shape == (out, into, 3, 3), f"filter {i}", (out, into, 3, 3), columns[f"filter.{i}.weight"].shape)
        check(columns[f"filter.{i}.bias"].shape == (out,), f"bias {i}", (out,), columns[f"filter.{i}.bias"].shape)
        check(i == 2 or columns[f"filter.{i}.step"].shape == (out,), f"step {i}", (out,), columns.get(f"filter.{i}.step", basis).shape)

    symbols, radius = columns["symbols"].astype(np.int64), columns["radius"].astype(np.int64)
    check(
        symbols.ndim == 2 and 0 < len(symbols) <= MAX_TABLES and symbols.shape[1] == 256, "symbol tables", f"(1 to {MAX_TABLES}, 256)", symbols.shape
    )
    check(radius.shape == (len(symbols),) and (radius <= 127).all(), "radii", f"{len(symbols)}, at most 127", radius.shape)
    used = np.arange(256) < 2 * radius[:, None] + 2
    check(
        (symbols.sum(1) == 1 << PROBABILITY_BITS).all() and ((symbols > 0) == used).all(), "symbol tables", "that sum to 4096, without gaps", "others"
    )
    rows = [symbols]
    priors = []
    for kind, channels in (("background", len(basis)), ("residual", RESIDUAL_CHANNELS)):
        ends = tuple(columns[f"{kind}.ends"].astype(np.int64).tolist())
        tables, buckets = columns[f"{kind}.tables"].astype(np.int64), columns[f"{kind}.buckets"].astype(np.uint8)
        classes = columns[f"{kind}.classes"].astype(np.int64)
        check(
            0 < len(ends) <= MAX_GROUPS and list(ends) == sorted(set(ends)) and ends[0] > 0 and ends[-1] == channels, f"{kind} groups", channels, ends
        )
        check(
            tables.ndim == 2 and 1 < len(tables) <= MAX_CLASSES and tables.shape[1] == channels,
            f"{kind} tables",
            f"(2 to {MAX_CLASSES}, {channels})",
            tables.shape,
        )
        check((tables < len(symbols)).all(), f"{kind} tables", f"below {len(symbols)}", tables.max(initial=0))
        check(buckets.shape == (len(ends), len(tables)) and (buckets < BUCKETS).all(), f"{kind} buckets", (len(ends), len(tables)), buckets.shape)
        contexts = len(ends) * CONTEXTS**2
        check(classes.shape == (contexts, len(tables)), f"{kind} class tables", (contexts, len(tables)), classes.shape)
        check(
            (classes.sum(1) == 1 << PROBABILITY_BITS).all() and (classes > 0).all(),
            f"{kind} class tables",
            "that sum to 4096, without zeros",
            "others",
        )
        priors.append(Prior(ends, tables, buckets, classes, sum(map(len, rows))))
        rows.append(np.pad(classes, ((0, 0), (0, 256 - len(tables)))))
    check(
        columns["predicted"].shape == (1,) and columns["predicted"][0] <= len(basis),
        "predicted channels",
        f"at most {len(basis)}",
        columns["predicted"],
    )
    return Dictionary(
        basis=torch.from_numpy(basis.astype(np.float32)),
        filter={name: torch.from_numpy(columns[name].astype(np.float32)) for name in _FILTER},
        residual_basis=torch.from_numpy(residual_basis.astype(np.float32)),
        tables=Tables(np.concatenate(rows).astype(np.uint16)),
        radius=radius,
        background=priors[0],
        residual=priors[1],
        predicted=int(columns["predicted"][0]),
        sha256=hashlib.sha256(data).hexdigest(),
        about=about,
        data=data,
    )


_FILTER = frozenset({*(f"filter.{i}.{name}" for i in range(3) for name in ("weight", "bias")), "filter.0.step", "filter.1.step"})
_NAMES = _FILTER | {
    "basis",
    "residual.basis",
    "symbols",
    "radius",
    "predicted",
    *(f"{kind}.{name}" for kind in ("background", "residual") for name in ("ends", "tables", "buckets", "classes")),
}


@cache
def shipped(name: str = GENERIC) -> Dictionary:
    """A dictionary that comes with the package."""
    path = SHIPPED / f"{name}.bin"
    return load(path.read_bytes(), path.name)


def find(key: bytes, name: str) -> Dictionary:
    """The shipped dictionary that a bundle names.

    Args:
        key: First 8 bytes of the file's SHA-256.
        name: What an error calls the bundle.

    Raises:
        BundleError: None of the shipped ones.
    """
    for path in sorted(SHIPPED.glob("*.bin")):
        if shipped(path.stem).key == key:
            return shipped(path.stem)
    raise BundleError(
        f"{name}: expected the shared parameters {key.hex()}..., which its dataset keeps as shared/{key.hex()}*.bin, got none; "
        f"open the dataset itself, or pass shared=rinr_loader.open_shared(FILE)"
    )
