"""Training: a pure function of pictures and settings, wherever it was stopped; and the transforms that it begins with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close
from tiny_training import TINY, scene, small, tiny_files, tiny_pictures
from torch import Tensor
from torch.nn import functional as F

from rinr_loader import dictionary as dictionaries
from rinr_loader.analysis import load_analysis, mirrored, principal_lapped_basis
from rinr_loader.assemble import trained_analysis
from rinr_loader.codecs.tile import synthesise
from rinr_loader.errors import ConfigError
from rinr_loader.training import Model, Pictures, TrainSettings, laplace_bits, loss_of, symbols_of, train, validate


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small():
        yield


class StoppedError(Exception):
    """What a training is stopped with."""


# --- resuming ---


def stop_after(step: int, state: Path, settings: TrainSettings) -> None:
    def progress(done: int) -> None:
        if done == step:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(tiny_pictures(), settings, state, progress=progress)


@pytest.mark.parametrize("stopped", [2, 3, 5, 6])
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(stopped: int, tmp_path: Path) -> None:
    settings = replace(TINY, steps=6)
    _, curve = train(tiny_pictures(), settings, tmp_path / "whole")
    stop_after(stopped, tmp_path / "parts", settings)
    done: list[int] = []
    torch.manual_seed(99)  # nothing may depend on the global generator
    _, resumed = train(tiny_pictures(), settings, tmp_path / "parts", progress=done.append)
    assert done == list(range(stopped // 2 * 2, 7)), "it goes on after the last step that was saved"
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [row["step"] for row in resumed] == [0, 2, 4, 6]
    assert resumed == curve


def test_the_seed_decides(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (train(tiny_pictures(), replace(TINY, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)
    assert torch.equal(before, torch.random.get_rng_state()), "training leaves the global generator alone"


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    train(tiny_pictures(), TINY, state, origin={"sources": ["a"], "base": "x"})
    with pytest.raises(ConfigError, match=r"got that of another \(channels 16 instead of 20, other groups, seed 0 instead of 3\); repeat what"):
        train(tiny_pictures(), replace(TINY, channels=20, groups=(4, 20), seed=3), state, origin={"sources": ["a"], "base": "x"})
    with pytest.raises(ConfigError, match=r"got that of another \(base x instead of y, other sources\)"):
        train(tiny_pictures(), TINY, state, origin={"sources": ["b"], "base": "y"})


@pytest.mark.parametrize("damage", ["cut off", "a bit flipped", "text", "empty", "another file"])
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    train(tiny_pictures(), TINY, state)
    data = bytearray(state.read_bytes())
    data[-1000] ^= 1
    broken = {"cut off": data[: len(data) // 2], "a bit flipped": data, "text": b"hello", "empty": b"", "another file": tiny_files()[0]}[damage]
    state.write_bytes(broken)
    with pytest.raises(ConfigError, match=r"state: expected the state of a training, got .*; remove it to begin anew"):
        train(tiny_pictures(), TINY, state)


# --- learning ---


def test_the_loss_falls() -> None:
    settings = replace(TINY, steps=60, batch=4)
    pictures = Pictures([[scene(k) for k in range(4)]], [scene(8)], [1.0])
    held = [pictures.batch(replace(settings, seed=7), i) for i in range(4)]

    def loss(model: Model) -> float:
        with torch.no_grad():
            return sum(float(loss_of(model.eval(), images, steps, 0)) for images, steps in held)

    begun = loss(train(pictures, replace(settings, steps=1, lr=0.0))[0])
    trained = loss(train(pictures, settings)[0])
    assert trained < 0.97 * begun


def test_finer_steps_cost_more_and_show_more() -> None:
    model, curve = train(tiny_pictures(), TINY)
    assert curve[-1]["rates"] == validate(model, tiny_pictures().validation)
    rates = curve[-1]["rates"]
    for finer, coarser in itertools.pairwise(rates):
        assert finer["step"] < coarser["step"]
        assert finer["bpp"] > coarser["bpp"] > 0
        assert finer["linear_psnr"] > coarser["linear_psnr"] > 10


def test_validation_leaves_the_model_as_it_is() -> None:
    model, _ = train(tiny_pictures(), TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    validate(model, tiny_pictures().validation)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_are_those_of_a_distribution() -> None:
    values = torch.arange(-3000.0, 3001)
    for scale in (0.05, 0.3, 1.0, 7.0, 150.0):
        assert float(torch.exp2(-laplace_bits(values, torch.tensor(scale)).double()).sum()) == pytest.approx(1, abs=1e-3)


def test_what_is_coded_gives_back_the_latents() -> None:
    latents = torch.randint(-9, 10, (2, 16, 3, 4)).float()
    coded = symbols_of(latents).view(2, 3, 4, 16).permute(0, 3, 1, 2)
    assert torch.equal(coded[:, 3:], latents[:, 3:])
    means = coded[:, :3].clone()
    means[..., 0] = means[..., 0].cumsum(2)
    assert torch.equal(means.cumsum(3), latents[:, :3])


def test_crops_are_of_the_pictures_and_depend_on_the_step_alone() -> None:
    pictures = tiny_pictures()
    images, steps = pictures.batch(TINY, 3)
    assert images.shape == (2, 3, 32, 32)
    assert float(images.abs().max()) <= 127.5
    again, _ = pictures.batch(TINY, 3)
    other, _ = pictures.batch(TINY, 4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert bool(((steps >= 18) & (steps <= 260)).all())


# --- what is stored of a model ---


def test_the_analysis_as_stored_gives_latents_in_units_of_the_step() -> None:
    model, _ = train(tiny_pictures(), TINY)
    with torch.no_grad():
        model.log_gain.copy_(torch.linspace(-0.5, 0.5, 16))
        model.analysis.last.bias.add_(0.3)  # type: ignore[union-attr]
        image = scene(3)[None].float() - 127.5
        wanted = model.quantised(model.analysis(image), torch.ones(1))
        torch.testing.assert_close(trained_analysis(model)(image), wanted, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(model.analysis(image), wanted)


def test_a_model_begins_where_a_dictionary_stands() -> None:
    data, network = tiny_files()
    found = dictionaries.load(data, "tiny.bin")
    analysis, sha256 = load_analysis(network, "tiny.analysis")
    assert sha256 == found.sha256 == hashlib.sha256(data).hexdigest()
    settings = TrainSettings.like(found, steps=3, seed=4, crop=32)
    assert (settings.channels, settings.classes, settings.groups) == (16, 4, (4, 8, 12, 16))
    assert settings.lr == pytest.approx(TrainSettings.lr / 3)
    model = Model.from_dictionary(found, analysis, settings).eval()
    image = scene(3)[None].float() - 127.5
    with torch.no_grad():
        latents = model.quantised(model.analysis(image), torch.tensor([40.0]))
        assert_close(latents, analysis(image) / 40)
        assert_close(model.synthesis(latents.round(), torch.tensor([40.0]))[0], synthesise(latents.round() * 40, found.basis))
    assert {name.replace("_", "."): value for name, value in model.filter.items()}.keys() == found.filter.keys()
    assert all(torch.equal(model.filter[name.replace(".", "_")], value) for name, value in found.filter.items())
    assert_close(model.prior.log_share.exp().sum(-1), torch.ones(4, 4))


def test_a_prior_begins_with_what_the_tables_say() -> None:
    found = dictionaries.load(tiny_files()[0], "tiny.bin")
    settings = TrainSettings.like(found, steps=1, seed=0, crop=32)
    prior = Model.from_dictionary(found, load_analysis(tiny_files()[1], "a")[0], settings).prior
    sizes = torch.arange(0.0, 200)
    for k in range(1, 4):
        for c in range(16):
            group = int(found.background.group_of[c])
            scale = prior.log_scale[group][k, c - prior.bounds[group][0]].exp().detach()
            share = torch.exp2(-laplace_bits(sizes, scale)) * torch.where(sizes > 0, 2, 1)
            row, radius = found.background.tables[k, c], int(found.radius[found.background.tables[k, c]])
            frequency = found.tables.frequencies[row].astype(float)
            mean = float((frequency[: 2 * radius + 2] * np.abs(np.arange(2 * radius + 2) - radius)).sum() / 4096)
            assert float((share * sizes).sum()) == pytest.approx(mean, rel=0.02, abs=2e-3)


def test_a_dictionary_that_predicts_other_channels_is_refused() -> None:
    found = replace(dictionaries.load(tiny_files()[0], "tiny.bin"), predicted=1)
    analysis, _ = load_analysis(tiny_files()[1], "tiny.analysis")
    with pytest.raises(ConfigError, match="dictionary: expected 3 predicted channels, got 1"):
        Model.from_dictionary(found, analysis, TrainSettings.like(found, steps=1, seed=0, crop=32))


def test_a_model_grows_by_what_its_channels_leave() -> None:
    found, (analysis, _) = dictionaries.load(tiny_files()[0], "tiny.bin"), load_analysis(tiny_files()[1], "tiny.analysis")
    settings = TINY.grown(found, 24)
    assert (settings.channels, settings.groups, settings.steps, settings.lr) == (24, (4, 8, 12, 24), TINY.steps, TINY.lr)
    model, crops = Model.from_dictionary(found, analysis, settings).eval(), torch.stack([scene(k).float() - 127.5 for k in range(6)])
    with torch.no_grad():
        before = model.analysis(crops)
        assert not before[:, 16:].any(), "what the dictionary lacks is nothing"
        model.grow(crops, 16)
        assert_close(model.analysis(crops)[:, :16], before[:, :16])
        assert_close(model.basis[:16], found.basis)
        added = model.basis[16:].flatten(1)
        torch.testing.assert_close(added @ added.T, torch.eye(8), atol=1e-5, rtol=0)
        step = torch.full((6,), 18.0)
        errors = []
        for channels in (16, 24):
            latents = model.quantised(model.analysis(crops), step).round()
            latents[:, channels:] = 0
            errors.append(float((model.synthesis(latents, step)[1] - crops).square().mean()))
        assert errors[1] < errors[0]
    assert_close(model.prior.log_scale[3][:, 4:], model.prior.log_scale[3][:, :4].mean(1, keepdim=True).expand(-1, 8))
    with pytest.raises(ConfigError, match="expected at least its 16 channels, got 12"):
        TINY.grown(found, 12)


def test_integers_are_worth_their_bits() -> None:
    model, _ = train(tiny_pictures(), TINY)
    prior, energy = model.prior, torch.linspace(0.5, 1.5, 16)
    values = 3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    values[:10] *= 0.1
    with torch.no_grad():
        symbols = values.round()
        classes = prior.classes(symbols)
        found = prior.worth(values, symbols, energy, 3)
        assert torch.equal(found[:, :3], symbols[:, :3]), "the first are only rounded"
        assert not torch.equal(found, symbols)

        def cost(integers: Tensor, g: int) -> Tensor:
            """Bits and error of one group, in the class that was chosen; the class's own bits where it is not all zeros."""
            a, b = prior.bounds[g]
            bits = laplace_bits(integers[:, a:b].abs(), prior.log_scale[g].exp().clamp(0.02, 200)[classes[g]])
            return (bits + 24 * energy[a:b] * (integers[:, a:b] - values[:, a:b]).square()).sum(1)

        for g in range(1, 4):
            kept = found[:, slice(*prior.bounds[g])].any(1)
            assert bool((cost(found, g) <= cost(symbols, g) + 1e-3)[kept].all())
            a, b = prior.bounds[g]
            share = (prior.log_share[g, classes[g - 1]] / -np.log(2))[torch.arange(40)]
            with_class = cost(found, g) + share.gather(1, classes[g][:, None])[:, 0]
            nothing = (24 * energy[a:b] * values[:, a:b].square()).sum(1) + share[:, 0]
            assert bool((with_class < nothing)[kept].all()), "what is not zero pays for its class"
        assert bool((found.abs() <= symbols.abs()).all())


# --- the transforms ---


def folded(latents: Tensor, basis: Tensor) -> Tensor:
    """Synthesis as it is defined: add every tile's basis, then mirror every pixel outside the picture to the inside."""
    canvas = F.conv_transpose2d(latents, basis, stride=16)
    for axis in (2, 3):
        size = canvas.shape[axis] - 8
        place = [-1 - p if p < 0 else 2 * size - 1 - p if p >= size else p for p in range(-4, size + 4)]
        shape = [*canvas.shape]
        shape[axis] = size
        canvas = torch.zeros(shape).index_add(axis, torch.tensor(place), canvas)
    return canvas


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1), (3, 5)])
def test_synthesis_is_an_overlapping_transposed_convolution(shape: tuple[int, int]) -> None:
    latents, basis = torch.randn(2, 7, *shape), torch.randn(7, 3, 24, 24)
    assert_close(synthesise(latents, basis), folded(latents, basis), "float16")
    found, wanted = synthesise(latents.double(), basis.double()).float(), folded(latents, basis)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def complete() -> Tensor:
    """All 768 components of some noise."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 96, generator=generator).cumsum(2).cumsum(3)
    return principal_lapped_basis(images, 768)


def test_the_first_basis_is_orthonormal(complete: Tensor) -> None:
    flat = complete.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(768), rtol=0, atol=1e-4)


@pytest.mark.parametrize("picture", ["constant", "noise", "scene"])
def test_the_first_basis_reconstructs_exactly(complete: Tensor, picture: str) -> None:
    image = {"constant": torch.full((1, 3, 48, 64), 90.0), "noise": 50 * torch.randn(1, 3, 48, 64), "scene": scene(1)[None].float() - 127.5}[picture]
    latents = F.conv2d(mirrored(image, 4), complete, stride=16)
    torch.testing.assert_close(synthesise(latents, complete), image, rtol=0, atol=2e-2)
    assert float(latents.square().sum()) == pytest.approx(float(image.square().sum()), rel=1e-3)


def test_components_come_by_their_variance() -> None:
    images = torch.stack([scene(k, width=96, height=64).float() - 127.5 for k in range(4)])
    basis = principal_lapped_basis(images, 32)
    latents = F.conv2d(mirrored(images, 4), basis, stride=16)
    energy = latents.square().mean((0, 2, 3))
    assert float(energy[:4].sum()) > 0.5 * float(images.square().mean()) * 768
    assert float(energy[:8].sum()) > 4 * float(energy[8:].sum())
