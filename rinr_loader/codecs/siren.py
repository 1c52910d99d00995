"""The `siren` family: sine networks, many at once with stacked parameters.

Source: Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions" (2020), for the activation and the
initialisation; COIN (2021), Rapid-INR (2023) and Residual-INR (2024) for a picture as the weights of one.

The parameters of K networks of one shape are one float32 tensor `(K, rows + weights)`: every row's bias, then every layer's weights
row by row. That is also their order in a bundle, so quantizing and dequantizing are operations on whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rinr_loader.bundle import NetworkSpec

INT8_MAX = 127


def layers(flat: Tensor, spec: NetworkSpec) -> list[tuple[Tensor, Tensor]]:
    """Views of each layer's weights `(K, out, in)` and biases `(K, out, 1)`."""
    views, row, weight = [], 0, spec.rows
    for out, columns in spec.shapes:
        views.append((flat[:, weight : weight + out * columns].unflatten(1, (out, columns)), flat[:, row : row + out, None]))
        row, weight = row + out, weight + out * columns
    return views


def initialise(spec: NetworkSpec, generator: torch.Generator, count: int) -> Tensor:
    """Fresh parameters for `count` networks, `(count, rows + weights)`, as SIREN prescribes for its activation frequency."""
    flat = torch.rand(count, spec.rows + spec.weights, generator=generator, device=generator.device).mul_(2).sub_(1)
    for i, (weight, bias) in enumerate(layers(flat, spec)):
        fan_in = weight.shape[2]
        weight.mul_(1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / spec.w0)
        bias.mul_(1 / math.sqrt(fan_in))
    return flat


def forward(flat: Tensor, spec: NetworkSpec, points: Tensor) -> Tensor:
    """Evaluate K networks, each at its own points: the reference that every kernel is compared with.

    Args:
        flat: Parameters, float32, `(K, rows + weights)`.
        spec: Their shape.
        points: x and y in [-1, 1], float32, `(K, 2, P)`.

    Returns:
        Outputs before the network's scale, float32, `(K, 3, P)`.
    """
    *sine, (weight, bias) = _scaled_layers(flat, spec)
    hidden = points
    for w, b in sine:
        hidden = torch.baddbmm(b, w, hidden).sin_()  # [K, width, P]
    return torch.baddbmm(bias, weight, hidden)


def _scaled_layers(flat: Tensor, spec: NetworkSpec) -> list[tuple[Tensor, Tensor]]:
    """Layers with the activation frequency multiplied into the weights: once a network instead of once a pixel."""
    return [*layers(flat * spec.w0, spec)[:-1], layers(flat, spec)[-1]]


def forward_backward(flat: Tensor, spec: NetworkSpec, points: Tensor, target: Tensor, weight: Tensor, grad: Tensor, *, half: bool = False) -> Tensor:
    """Add the gradient of the squared error to `grad`; return the squared error of each network.

    The backward pass is written out: autograd's bookkeeping costs more than the arithmetic of networks this small
    (tests/test_siren.py compares the two).

    Args:
        flat, spec, points: As for `forward`.
        target: What `weight * forward(...)` should be, `(K, 3, P)`.
        weight: Factor on the network's output, `(K, 1, P)`: the feather of a residual.
        grad: Where the gradient of `sum((weight * forward - target)**2)` is added, shaped as `flat`.
        half: Run the square matrix products in float16 (for a GPU); the first layer and the phases stay float32.

    Returns:
        Sum of squared errors, `(K,)`.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a.half(), b.half()).float() if half else torch.bmm(a, b)

    parameters, gradients = _scaled_layers(flat, spec), layers(grad, spec)
    phases, hidden = [], [points]
    for i, (w, b) in enumerate(parameters[:-1]):
        phases.append(product(w, hidden[-1]).add_(b) if half and i > 0 else torch.baddbmm(b, w, hidden[-1]))
        hidden.append(torch.sin(phases[-1]))
    w, b = parameters[-1]
    error = torch.baddbmm(b, w, hidden[-1]).mul_(weight).sub_(target)  # [K, 3, P]
    loss = error.square().sum((1, 2))
    delta = error.mul_(weight).mul_(2)
    for i in range(len(parameters) - 1, -1, -1):
        grad_w, grad_b = gradients[i]
        factor = 1.0 if i == len(parameters) - 1 else spec.w0
        if half and 0 < i < len(parameters) - 1:
            grad_w.add_(product(delta, hidden[i].transpose(1, 2)), alpha=factor)
        else:
            grad_w.baddbmm_(delta, hidden[i].transpose(1, 2), alpha=factor)
        grad_b.add_(delta.sum(2, keepdim=True), alpha=factor)
        if i > 0:
            delta = product(parameters[i][0].transpose(1, 2), delta).mul_(phases[i - 1].cos_())
    return loss


def row_scales(flat: Tensor, spec: NetworkSpec) -> Tensor:
    """The int8 step of every row, float32 values that float16 holds, `(K, rows)`."""
    largest = torch.cat([weight.abs().amax(2) for weight, _ in layers(flat, spec)], 1)
    # Never 0 (a row of zeros divides by it), rounded to what is stored before anything is divided by it.
    return (largest / INT8_MAX).clamp(2.0**-24, 60000.0).half().clamp_min(2.0**-24).float()


def expand_rows(values: Tensor, spec: NetworkSpec) -> Tensor:
    """A value for each row as a value for each weight: `(K, rows)` to `(K, weights)`."""
    columns = torch.tensor([columns for rows, columns in spec.shapes for _ in range(rows)], device=values.device)
    return values.repeat_interleave(columns, 1, output_size=spec.weights)


def round_as_stored(flat: Tensor, spec: NetworkSpec, steps: Tensor | None) -> Tensor:
    """The parameters that a decoder will see.

    Args:
        flat: Parameters, `(K, rows + weights)`.
        spec: Their shape and how they are stored.
        steps: For int8, the step of every weight, `(K, weights)`: `expand_rows(row_scales(...))`; None for float16.
    """
    if steps is None:
        return flat.half().float()
    bias, weight = flat[:, : spec.rows].half().float(), flat[:, spec.rows :]
    return torch.cat([bias, (weight / steps).round_().clamp_(-INT8_MAX, INT8_MAX).mul_(steps)], 1)


def to_bytes(flat: Tensor, spec: NetworkSpec, scales: Tensor | None) -> list[bytes]:
    """Serialize each network: for int8 the row scales first, then biases, then weights (docs/FORMAT.md)."""
    bias = flat[:, : spec.rows].half().cpu()
    if scales is None:
        return [row.numpy().tobytes() for row in flat.half().cpu()]
    weight = (flat[:, spec.rows :] / expand_rows(scales, spec)).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8).cpu()
    halves = torch.cat([scales.half().cpu(), bias], 1)
    return [h.numpy().tobytes() + w.numpy().tobytes() for h, w in zip(halves, weight, strict=True)]


def from_bytes(data: Tensor, spec: NetworkSpec) -> Tensor:
    """Parameters of K networks from their stored bytes, uint8 `(K, spec.nbytes)`, as float32 `(K, rows + weights)`."""
    if spec.dtype == "float16":
        return data.view(torch.float16).float()
    # Flattened, not made contiguous: one row of an odd number of bytes counts as contiguous, but cannot be viewed as float16.
    halves = data[:, : 4 * spec.rows].flatten().view(torch.float16).view(len(data), 2 * spec.rows).float()
    weight = data[:, 4 * spec.rows :].contiguous().view(torch.int8).float()
    return torch.cat([halves[:, spec.rows :], weight * expand_rows(halves[:, : spec.rows], spec)], 1)


def parameters_of(weights: Sequence[bytes], spec: NetworkSpec, device: torch.device | str = "cpu") -> Tensor:
    """Parameters of a few networks held as bytes, `(K, rows + weights)`."""
    raw = torch.frombuffer(bytearray(b"".join(weights)), dtype=torch.uint8).view(-1, spec.nbytes)
    return from_bytes(raw.to(device), spec)
