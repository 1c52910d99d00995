"""What a part of a bundle is: its family, and the numbers that two of one shape share. docs/FORMAT.md says how they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

Kind = Literal["background", "residual", "direct"]
Dtype = Literal["int8", "float16"]
Code = Literal["int8", "float16", "latents", "jpeg"]
Family = Literal["siren", "tile", "jpeg"]
Check = Callable[[bool, str, object, object], None]

KINDS: tuple[Kind, ...] = ("background", "residual", "direct")
DTYPES: tuple[Dtype, ...] = ("int8", "float16")
CODES: tuple[Code, ...] = ("int8", "float16", "latents", "jpeg")  # as numbered in a bundle
FAMILIES: tuple[Family, ...] = ("siren", "tile", "jpeg")  # as numbered in a bundle, from 1
CODES_OF: dict[Family, tuple[Code, ...]] = {"siren": DTYPES, "tile": ("latents",), "jpeg": ("jpeg",)}
MAX_DEPTH, MAX_WIDTH, MAX_W0 = 64, 256, 1000.0
MAX_LAYERS, MAX_LANES = 2, 1024


@dataclass(frozen=True, order=True)
class NetworkSpec:
    """The shape of a sine network: everything that two networks must share to be decoded in one launch.

    Args:
        kind: What its output means: `background` and `direct` give colour, `residual` what is missing to it.
        depth: Number of sine layers; one linear layer to 3 channels follows.
        width: Units of each sine layer.
        dtype: How the weights are stored: `int8` with a float16 scale a row, or `float16`. Biases are float16.
        w0: Activation frequency of every sine layer.
    """

    family: ClassVar[Family] = "siren"

    kind: Kind
    depth: int
    width: int
    dtype: Dtype
    w0: float = 30.0

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each layer's weight matrix."""
        return ((self.width, 2), *((self.width, self.width),) * (self.depth - 1), (3, self.width))

    @property
    def rows(self) -> int:
        return self.depth * self.width + 3

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: scales (int8 only), biases, weights."""
        return 4 * self.rows + self.weights if self.dtype == "int8" else 2 * self.rows + 2 * self.weights

    def __str__(self) -> str:
        return f"{self.kind} {self.depth}x{self.width} {self.dtype}" + ("" if self.w0 == 30.0 else f" w0={self.w0:g}")


@dataclass(frozen=True, order=True)
class TileSpec:
    """Latents on a lattice of tiles. The background's stream holds those of its residuals too.

    Args:
        kind: `background` or `residual`.
        layers: Layers of the synthesis, 1 or 2; 0 for a residual.
        lanes: Lanes of the entropy coder, a power of two; 0 for a residual.
    """

    family: ClassVar[Family] = "tile"

    kind: Kind
    layers: int = 0
    lanes: int = 0

    @property
    def nbytes(self) -> int | None:
        """Bytes as stored: none of its own for a residual, None for what differs from bundle to bundle."""
        return None if self.kind == "background" else 0

    def __str__(self) -> str:
        return f"{self.kind} tile-{self.layers} {self.lanes} lanes" if self.kind == "background" else f"{self.kind} tile"


@dataclass(frozen=True, order=True)
class JpegSpec:
    """A picture as a JPEG file.

    Args:
        kind: `background`: it is the whole picture.
    """

    family: ClassVar[Family] = "jpeg"

    kind: Kind = "background"

    @property
    def nbytes(self) -> None:
        """Differs from bundle to bundle."""
        return

    def __str__(self) -> str:
        return f"{self.kind} jpeg"


Spec = NetworkSpec | TileSpec | JpegSpec
Record = tuple[Kind, int, int, Code, float]


def record_of(spec: Spec) -> Record:
    """A spec as bundles and indexes write it: kind, depth, width, dtype, w0; numbers without a meaning are 0."""
    if isinstance(spec, NetworkSpec):
        return (spec.kind, spec.depth, spec.width, spec.dtype, spec.w0)
    if isinstance(spec, TileSpec):
        return (spec.kind, spec.layers, spec.lanes, "latents", 0.0)
    return (spec.kind, 0, 0, "jpeg", 0.0)


def spec_of(record: Record, check: Check) -> Spec:
    """The spec that a record says; `check(good, name, expected, found)` raises where a number is outside its limits."""
    kind, depth, width, dtype, w0 = record
    if dtype == "int8" or dtype == "float16":
        check(1 <= depth <= MAX_DEPTH and 1 <= width <= MAX_WIDTH, "depth x width", f"1x1 to {MAX_DEPTH}x{MAX_WIDTH}", f"{depth}x{width}")
        check(math.isfinite(w0) and 0 < w0 <= MAX_W0, "w0", f"above 0, at most {MAX_W0:g}", w0)
        return NetworkSpec(kind, depth, width, dtype, w0)
    check(w0 == 0 and math.copysign(1, w0) > 0, "w0", 0, w0)
    check(kind == "background" or (dtype == "latents" and kind == "residual"), "kind", f"one of {dtype}", kind)
    if dtype == "latents" and kind == "background":
        good = 1 <= depth <= MAX_LAYERS and 1 <= width <= MAX_LANES and width & (width - 1) == 0
        check(good, "layers x lanes", f"1 or {MAX_LAYERS} x a power of two up to {MAX_LANES}", f"{depth}x{width}")
        return TileSpec(kind, depth, width)
    check(depth == 0 and width == 0, "depth x width", "0x0", f"{depth}x{width}")
    return TileSpec(kind) if dtype == "latents" else JpegSpec(kind)


def rank(spec: Spec) -> tuple[object, ...]:
    """What specs are sorted by, those of different families too: backgrounds first, large ones first."""
    kind, depth, width, *_ = record = record_of(spec)
    return (FAMILIES.index(spec.family), KINDS.index(kind), -depth * width, record)
