"""The `siren` family: evaluation, gradients, initialisation and quantization, each against a plain reading of its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import assert_close
from networks import BACKGROUNDS, DIRECT, RESIDUALS, evaluate, random_weights

from rinr_loader.bundle import NetworkSpec
from rinr_loader.codecs import siren

SPECS = [*BACKGROUNDS, *RESIDUALS, DIRECT]
INT8 = [spec for spec in SPECS if spec.dtype == "int8"]
ids = pytest.mark.parametrize("spec", SPECS, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points_for(spec: NetworkSpec, count: int, pixels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(count, 2, pixels, generator=generator(spec.rows), dtype=dtype) * 2 - 1


@ids
def test_forward_of_a_stack_is_each_network_at_its_own_points(spec: NetworkSpec) -> None:
    rng = np.random.default_rng(0)
    stored = [random_weights(spec, rng) for _ in range(4)]
    points = points_for(spec, 4, 33)
    expected = np.stack([evaluate(data, spec, p.double().numpy().T).T for data, p in zip(stored, points, strict=True)])
    assert_close(siren.forward(siren.parameters_of(stored, spec), spec, points), expected.astype(np.float32), "float16")
    assert_close(siren.forward(siren.parameters_of(stored, spec).double(), spec, points.double()), expected)


@ids
def test_forward_leaves_its_arguments_alone(spec: NetworkSpec) -> None:
    flat, points = siren.initialise(spec, generator(), 2), points_for(spec, 2, 5)
    before = flat.clone(), points.clone()
    siren.forward(flat, spec, points)
    assert torch.equal(flat, before[0])
    assert torch.equal(points, before[1])


def gradients(spec: NetworkSpec, dtype: torch.dtype, *, half: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradient and loss, written out and by autograd, of three networks with weighted targets."""
    flat = siren.initialise(spec, generator(), 3).to(dtype)
    points = points_for(spec, 3, 40, dtype)
    target = torch.randn(3, 3, 40, generator=generator(1), dtype=dtype)
    weight = torch.rand(3, 1, 40, generator=generator(2), dtype=dtype)
    weight[:, :, :5] = 0
    ours = torch.zeros_like(flat)
    loss = siren.forward_backward(flat, spec, points, target, weight, ours, half=half)
    leaf = flat.clone().requires_grad_()
    hidden = points
    *sine, (w, b) = siren.layers(leaf, spec)
    for layer, bias in sine:
        hidden = torch.sin(spec.w0 * (layer @ hidden + bias))
    expected = ((w @ hidden + b) * weight - target).square().sum((1, 2))
    expected.sum().backward()
    assert leaf.grad is not None
    return [ours, loss], [leaf.grad, expected.detach()]


@ids
def test_gradient_is_autograds(spec: NetworkSpec) -> None:
    for ours, expected in zip(*gradients(spec, torch.float64), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-9)
    for ours, expected in zip(*gradients(spec, torch.float32), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_half_products_keep_the_gradients_direction() -> None:
    spec = BACKGROUNDS[0]
    (ours, loss), (expected, exact) = gradients(spec, torch.float32, half=True)
    assert float(torch.nn.functional.cosine_similarity(ours, expected).min()) > 0.99
    assert_close(loss / exact, torch.ones_like(exact), "bfloat16")


def test_gradient_is_added_to_what_is_there() -> None:
    spec = RESIDUALS[0]
    flat, points = siren.initialise(spec, generator(), 2), points_for(spec, 2, 9)
    target, weight = torch.zeros(2, 3, 9), torch.ones(2, 1, 9)
    once, whole = torch.zeros_like(flat), torch.zeros_like(flat)
    siren.forward_backward(flat, spec, points, target, weight, whole)
    losses = [siren.forward_backward(flat, spec, points[..., part], target[..., part], weight[..., part], once) for part in (slice(4), slice(4, 9))]
    assert_close(once, whole)
    assert_close(losses[0] + losses[1], siren.forward_backward(flat, spec, points, target, weight, torch.zeros_like(flat)))


def test_gradient_of_one_network_does_not_reach_another() -> None:
    spec = RESIDUALS[0]
    flat, points = siren.initialise(spec, generator(), 2), points_for(spec, 2, 9)
    weight = torch.ones(2, 1, 9)
    weight[1] = 0
    grad = torch.zeros_like(flat)
    siren.forward_backward(flat, spec, points, torch.zeros(2, 3, 9), weight, grad)
    assert float(grad[0].abs().max()) > 0
    assert float(grad[1].abs().max()) == 0


@pytest.mark.parametrize("spec", [NetworkSpec("background", 10, 28, "int8"), NetworkSpec("residual", 3, 10, "float16", 10.0)], ids=str)
def test_initialisation_is_sirens(spec: NetworkSpec) -> None:
    flat = siren.initialise(spec, generator(), 200)
    assert flat.shape == (200, spec.rows + spec.weights)
    assert flat.dtype == torch.float32
    for i, (weight, bias) in enumerate(siren.layers(flat, spec)):
        fan_in = weight.shape[2]
        bound = 1 / fan_in if i == 0 else np.sqrt(6 / fan_in) / spec.w0
        for values, limit in ((weight, bound), (bias, 1 / np.sqrt(fan_in))):  # uniform in [-limit, limit]
            assert 0.97 * limit < float(values.abs().max()) <= limit * 1.0001
            assert float(values.std()) == pytest.approx(limit / np.sqrt(3), rel=0.05)
            assert abs(float(values.mean())) < 0.05 * limit
    # That is what it is for: phases keep their spread through the layers, so a deep network is as lively as a shallow one.
    hidden, spreads = points_for(spec, 200, 64), []
    for weight, bias in siren.layers(flat, spec)[:-1]:
        phase = spec.w0 * (weight @ hidden + bias)
        spreads.append(float((phase - phase.mean(2, keepdim=True)).std()))
        hidden = phase.sin()
    assert min(spreads[1:]) > 0.3
    assert max(spreads[1:]) < 2


def test_initialisation_is_a_function_of_the_generator() -> None:
    spec = BACKGROUNDS[0]
    assert torch.equal(siren.initialise(spec, generator(), 2), siren.initialise(spec, generator(), 2))
    first, second = siren.initialise(spec, generator(), 2)
    assert not torch.equal(first, second)
    assert not torch.equal(first, siren.initialise(spec, generator(1), 1)[0])


def test_layers_are_views_in_the_order_of_the_format() -> None:
    spec = NetworkSpec("residual", 2, 3, "float16")
    flat = torch.arange(spec.rows + spec.weights, dtype=torch.float32)[None]
    (w0, b0), (w1, b1), (w2, b2) = siren.layers(flat, spec)
    assert torch.cat([b[0, :, 0] for b in (b0, b1, b2)] + [w[0].flatten() for w in (w0, w1, w2)]).tolist() == flat[0].tolist()
    w1.zero_()
    assert int((flat == 0).sum()) == 9 + 1


@ids
def test_what_is_stored_is_what_was_measured(spec: NetworkSpec) -> None:
    flat = siren.initialise(spec, generator(), 3) * torch.tensor([1.0, 1e-3, 40.0])[:, None]
    scales = siren.row_scales(flat, spec) if spec.dtype == "int8" else None
    steps = None if scales is None else siren.expand_rows(scales, spec)
    measured = siren.round_as_stored(flat, spec, steps)
    stored = siren.to_bytes(flat, spec, scales)
    assert [len(data) for data in stored] == [spec.nbytes] * 3
    assert torch.equal(siren.parameters_of(stored, spec), measured)
    # Storing what was stored changes nothing.
    assert siren.to_bytes(measured, spec, scales) == stored
    assert torch.equal(siren.round_as_stored(measured, spec, steps), measured)


@pytest.mark.parametrize("spec", INT8, ids=str)
def test_int8_is_within_half_a_step_of_every_weight(spec: NetworkSpec) -> None:
    flat = siren.initialise(spec, generator(), 4)
    scales = siren.row_scales(flat, spec)
    steps = siren.expand_rows(scales, spec)
    wrong = (siren.round_as_stored(flat, spec, steps)[:, spec.rows :] - flat[:, spec.rows :]).abs()
    # The scale was rounded to float16 after the largest weight of its row chose it: that weight may be cut by a little more.
    assert bool((wrong <= steps * (0.5 + 127 * 2**-11)).all())
    for weight, scale in zip([w for w, _ in siren.layers(flat, spec)], scales.split([rows for rows, _ in spec.shapes], 1), strict=True):
        assert_close(weight.abs().amax(2) / scale, torch.full_like(scale, 127), "float16")


@pytest.mark.parametrize("spec", INT8, ids=str)
def test_row_scales_are_never_zero_nor_infinite_and_float16_holds_them(spec: NetworkSpec) -> None:
    for factor in (0.0, 1e-30, 1e-12, 1e-7, 1e-4, 1.0, 1e6, 1e12, 3e38):
        flat = siren.initialise(spec, generator(), 2).sign() * factor
        scales = siren.row_scales(flat, spec)
        assert bool((scales > 0).all())
        assert bool(scales.isfinite().all())
        assert torch.equal(scales.half().float(), scales)
        assert scales.shape == (2, spec.rows)
        stored = siren.parameters_of(siren.to_bytes(flat.clamp(-1e4, 1e4), spec, scales), spec)
        assert bool(stored.isfinite().all())


def test_expand_rows_repeats_a_rows_value_for_its_weights() -> None:
    spec = NetworkSpec("background", 2, 3, "int8")
    values = torch.arange(2 * spec.rows, dtype=torch.float32).view(2, -1)
    expected = [[float(k * spec.rows + row) for row, columns in enumerate([2] * 3 + [3] * 3 + [3] * 3) for _ in range(columns)] for k in range(2)]
    assert siren.expand_rows(values, spec).tolist() == expected
