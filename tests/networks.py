"""Bundles for tests of what comes after the fit: networks with random weights, and a float64 reading of the format in plain numpy.

Nothing here uses the code it helps to test, besides `pack` and `NetworkSpec`: the bytes are laid out as docs/FORMAT.md says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rinr_loader.bundle import Bundle, Network, NetworkSpec, pack

Floats = NDArray[np.float64]
Rect = tuple[int, int, int, int]

BACKGROUNDS = (NetworkSpec("background", 3, 12, "int8"), NetworkSpec("background", 4, 10, "float16"), NetworkSpec("background", 1, 5, "int8", 7.0))
RESIDUALS = (NetworkSpec("residual", 3, 7, "float16"), NetworkSpec("residual", 2, 9, "int8", 15.0))
DIRECT = NetworkSpec("direct", 2, 8, "float16")


def random_weights(spec: NetworkSpec, rng: np.random.Generator) -> bytes:
    """Weights as stored, drawn as SIREN prescribes, with a livelier last layer."""
    layers = [rng.uniform(-1, 1, shape) * (0.5 if shape[1] == 2 else np.sqrt(6 / shape[1]) / spec.w0) for shape in spec.shapes]
    layers[-1] *= spec.w0 / 4
    bias = rng.uniform(-0.3, 0.3, spec.rows).astype("<f2")
    if spec.dtype == "float16":
        return bias.tobytes() + b"".join(layer.astype("<f2").tobytes() for layer in layers)
    scales = np.concatenate([np.abs(layer).max(1) / 127 for layer in layers]).astype("<f2")
    split = np.split(scales.astype(np.float64), np.cumsum([rows for rows, _ in spec.shapes])[:-1])
    steps = [np.clip(np.rint(layer / scale[:, None]), -127, 127).astype(np.int8) for layer, scale in zip(layers, split, strict=True)]
    return scales.tobytes() + bias.tobytes() + b"".join(step.tobytes() for step in steps)


def read_weights(data: bytes, spec: NetworkSpec) -> list[tuple[Floats, Floats]]:
    """Weights (out, in) and biases (out,) of each layer, from the bytes."""
    halves = np.frombuffer(data, "<f2", spec.rows if spec.dtype == "float16" else 2 * spec.rows).astype(np.float64)
    bias, scales = halves[-spec.rows :], halves[: spec.rows]
    values = np.frombuffer(data, "<f2" if spec.dtype == "float16" else np.int8, spec.weights, len(halves) * 2).astype(np.float64)
    layers, row, value = [], 0, 0
    for rows, columns in spec.shapes:
        weight = values[value : value + rows * columns].reshape(rows, columns)
        if spec.dtype == "int8":
            weight = weight * scales[row : row + rows, None]
        layers.append((weight, bias[row : row + rows]))
        row, value = row + rows, value + rows * columns
    return layers


def evaluate(data: bytes, spec: NetworkSpec, points: Floats) -> Floats:
    """One network at points (P, 2) in [-1, 1]: (P, 3), before its scale."""
    hidden = points
    *sine, (last, offset) = read_weights(data, spec)
    for weight, bias in sine:
        hidden = np.sin(spec.w0 * (hidden @ weight.T + bias))
    return hidden @ last.T + offset


def random_bundle(
    seed: int,
    *,
    stored: tuple[int, int] = (24, 40),
    source: tuple[int, int] | None = None,
    background: NetworkSpec = BACKGROUNDS[0],
    residuals: Sequence[tuple[NetworkSpec, Rect]] = (),
    feather: int = 3,
    boxes: Sequence[Sequence[float]] = (),
    classes: Sequence[int] | None = None,
    label: int = -1,
) -> bytes:
    """A bundle of random networks; sizes are height and width, rectangles x0 y0 x1 y1 in stored pixels."""
    rng = np.random.default_rng([seed, *stored])
    networks = [Network(background, (0, 0, stored[1], stored[0]), 0.5, random_weights(background, rng))]
    for spec, rect in residuals:
        networks.append(Network(spec, rect, float(np.float32(rng.uniform(0.2, 0.5))), random_weights(spec, rng), feather))
    return pack(
        Bundle(
            stored_size=stored,
            source_size=source or stored,
            networks=tuple(networks),
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            classes=np.asarray(classes if classes is not None else [0] * len(boxes), np.int64),
            crowd=np.zeros(len(boxes), np.bool_),
            label=label,
        )
    )
