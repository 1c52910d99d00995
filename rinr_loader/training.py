"""Training a dictionary for the family `tile`: analysis, basis, filter and a prior, from pictures.

The loss is bits + lambda * squared error at steps drawn anew for every crop, so that one model serves a range of rates. Training
is a pure function of the pictures, the settings and the torch build: step n draws its crops from (seed, n), so a run that was stopped goes on
as if it had not been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rinr_loader.analysis import Analysis, principal_lapped_basis
from rinr_loader.codecs.rans import PROBABILITY_BITS
from rinr_loader.codecs.tile import FILTER_WIDTH, TILE, TYPICAL_STEP, UNIT, smooth, synthesise
from rinr_loader.dictionary import CONTEXTS, Dictionary
from rinr_loader.errors import ConfigError
from rinr_loader.latents import STRENGTH
from rinr_loader.train_state import Row, load_state, save_state

LAGRANGE = STRENGTH  # lambda = LAGRANGE / step**2, in bits for a squared grey level: as the encoder will choose its integers
FILTERED = 0.7  # share of the filtered picture in the loss; the linear one has the rest
STEPS = (18.0, 260.0)  # grey levels: the range of quantization steps
VALIDATION_STEPS = (25.0, 50.0, 100.0, 200.0)
PREDICTED = 3  # channels, the first, that are stored as differences to the tile on their left: the means of the three colours
SAVE_EVERY, VALIDATE_EVERY = 500, 2000
WARM_UP = 500  # steps, a quarter of the training at most
LIKE = 16  # channels whose scales those that a dictionary lacks begin with: its last ones
START_BATCHES = 80  # that the components are taken from


@dataclass(frozen=True)
class TrainSettings:
    """What a trained dictionary is a function of, besides its pictures.

    Args:
        steps: Gradient steps.
        seed: Of all randomness.
        channels: Latents of a tile.
        classes: Classes of each channel group; the first codes nothing but zeros.
        groups: Where each group of channels ends.
        crop: Side of a crop in pixels, a multiple of 16.
        batch: Crops of a step.
        lr: Learning rate of the transforms; the filter's is 3, the prior's 10 times as high.
    """

    steps: int = 30_000
    seed: int = 0
    channels: int = 256
    classes: int = 24
    groups: tuple[int, ...] = (12, 48, 112, 256)
    crop: int = 192
    batch: int = 6
    lr: float = 4e-4

    @classmethod
    def like(cls, dictionary: Dictionary, *, steps: int, seed: int, crop: int) -> TrainSettings:
        """Settings that fit a dictionary to pictures: its shape, and steps a third as large."""
        return replace(cls().grown(dictionary), steps=steps, seed=seed, crop=crop, lr=cls.lr / 3)

    def grown(self, dictionary: Dictionary, channels: int = 0) -> TrainSettings:
        """These settings, for a model that begins with a dictionary: its classes and groups, the last one with the channels that it lacks.

        Args:
            dictionary: Where training begins.
            channels: How many there shall be; as many as the dictionary has without.

        Raises:
            ConfigError: The dictionary has more.
        """
        if channels and channels < dictionary.channels:
            raise ConfigError(f"dictionary: expected at least its {dictionary.channels} channels, got {channels}; ask for no fewer")
        prior, count = dictionary.background, channels or dictionary.channels
        return replace(self, channels=count, classes=len(prior.tables), groups=(*prior.ends[:-1], count))


class Prior(nn.Module):
    """What training takes for the rate: for each channel group, classes of Laplacian scales; a tile takes the class that codes it cheapest."""

    log_share: Tensor

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__()
        self.bounds = list(zip((0, *settings.groups[:-1]), settings.groups, strict=True))
        self.log_scale = nn.ParameterList([nn.Parameter(torch.zeros(settings.classes, end - start)) for start, end in self.bounds])
        self.register_buffer("log_share", torch.full((len(self.bounds), settings.classes, settings.classes), -math.log(settings.classes)))

    @torch.no_grad()
    def start(self, symbols: Tensor) -> None:
        """Scales from the mean magnitudes of some symbols `(tiles, C)`, spread over the classes."""
        mean = symbols.abs().mean(0).clamp_min(0.02).log()
        for (a, b), table in zip(self.bounds, self.log_scale, strict=True):
            spread = torch.linspace(-5, 3, len(table))[:, None]
            table.copy_(mean[a:b] + spread)

    @torch.no_grad()
    def start_from(self, dictionary: Dictionary) -> None:
        """Scales and shares that say what a dictionary's tables for the background say."""
        prior, radius = dictionary.background, dictionary.radius
        frequency = dictionary.tables.frequencies[: len(radius)].astype(np.float64)
        size = np.abs(np.arange(frequency.shape[1]) - radius[:, None])  # of the escape radius + 1, the least that it can mean
        mean = torch.from_numpy((frequency * size).sum(1) / frequency.sum(1))[torch.from_numpy(prior.tables)]
        # The rounded magnitudes of a Laplacian variable of scale b have the mean 1 / (2 sinh(1 / 2b)).
        scale = 1 / (2 * torch.asinh(1 / (2 * mean.clamp_min(1e-9))))
        for (a, b), table in zip(self.bounds, self.log_scale, strict=True):
            known = scale[:, a:b].clamp(0.02, 200).log()
            table[:, : known.shape[1]] = known
            table[:, known.shape[1] :] = known[:, -LIKE:].mean(1, keepdim=True)
        share = torch.from_numpy(prior.classes / (1 << PROBABILITY_BITS)).view(len(self.bounds), CONTEXTS, CONTEXTS, -1).mean(1)
        buckets = torch.from_numpy(prior.buckets.astype(np.int64))
        for g in range(len(self.bounds)):
            before = buckets[g - 1] if g else torch.full_like(buckets[0], CONTEXTS - 1)
            self.log_share[g] = share[g, before].log()

    def classes(self, symbols: Tensor) -> list[Tensor]:
        """The cheapest class of each tile, int64 `(tiles,)` for each group, for integers `(tiles, C)`.

        The cost of a Laplacian is linear in magnitude and in what is zero.
        """
        chosen: list[Tensor] = []
        for g, ((a, b), table) in enumerate(zip(self.bounds, self.log_scale, strict=True)):
            magnitude = symbols[:, a:b].abs()
            scale = table.exp().clamp(0.02, 200)
            ones = torch.ones(1)
            zero, slope = laplace_bits(0 * ones, scale), 1 / (scale * math.log(2))
            first = laplace_bits(ones, scale) - slope
            cost = magnitude @ slope.T + (magnitude > 0.5).float() @ (first - zero).T + zero.sum(1)
            cost[:, 0] = torch.where((magnitude < 0.5).all(1), 0.0, torch.inf)
            share = self.log_share[g, chosen[-1]] if chosen else self.log_share[0, :1]
            chosen.append((cost - share / math.log(2)).argmin(1))
        return chosen

    @torch.no_grad()
    def worth(self, values: Tensor, symbols: Tensor, energy: Tensor, exact: int) -> Tensor:
        """Latents in steps `(tiles, C)` to integers that are worth their bits, as the encoder will choose them: see `latents.quantise`.

        Args:
            values: Not rounded.
            symbols: Rounded, as they are coded; they choose the classes.
            energy: Of each channel's basis function, `(C,)`.
            exact: Channels, the first, that are only rounded.
        """
        nearest = values.round()
        weight = LAGRANGE * energy
        classes = self.classes(symbols)
        for g, ((a, b), table) in enumerate(zip(self.bounds, self.log_scale, strict=True)):
            scale, size, most = table.exp().clamp(0.02, 200)[classes[g]], values[:, a:b].abs(), nearest[:, a:b].abs()
            best, found = torch.full_like(size, torch.inf), most
            for candidate in (most, (most - 1).clamp_min(0), torch.zeros_like(most)):
                cost = laplace_bits(candidate, scale) + weight[a:b] * (size - candidate).square()
                best, found = torch.minimum(best, cost), torch.where(cost < best, candidate, found)
            share = self.log_share[g, classes[g - 1]] if g else self.log_share[0, :1].expand(len(size), -1)
            spent = best.sum(1) - share.gather(1, classes[g][:, None])[:, 0] / math.log(2)
            saved = (weight[a:b] * size.square()).sum(1) - share[:, 0] / math.log(2)
            found = torch.where((spent < saved)[:, None], found, 0.0) * values[:, a:b].sign()
            keep = max(0, min(exact - a, b - a))
            nearest[:, a + keep : b] = found[:, keep:]
        return nearest

    def bits(self, values: Tensor, integers: Tensor) -> Tensor:
        """Bits of each tile `(tiles,)`: of `values` (integers, or with noise), in the classes of `integers`; counts how often each was chosen."""
        with torch.no_grad():
            classes = self.classes(integers)
        total = values.new_zeros(len(values))
        for g, ((a, b), table) in enumerate(zip(self.bounds, self.log_scale, strict=True)):
            k = classes[g]
            bits = laplace_bits(values[:, a:b], table.exp().clamp(0.02, 200)[k]).sum(1)
            before = classes[g - 1] if g else torch.zeros_like(k)
            share = self.log_share[g, before, k] / math.log(2)
            total = total + torch.where(k > 0, bits, 0.0) - share
            if self.training:
                with torch.no_grad():
                    now = torch.bincount(before * len(table) + k, minlength=len(table) ** 2).view(len(table), -1).float() + 1e-3
                    weight = 0.01 * now.sum(1, keepdim=True) / now.sum(1).max()  # a class that is rare is learned slowly
                    self.log_share[g] = ((1 - weight) * self.log_share[g].exp() + weight * now / now.sum(1, keepdim=True)).log()
        return total


def laplace_bits(values: Tensor, scale: Tensor) -> Tensor:
    """Bits of a Laplacian variable's unit interval around each value."""
    size = values.abs()
    inside = torch.exp(-(0.5 - size).clamp_min(0) / scale) + torch.exp(-(0.5 + size) / scale)
    near = -torch.log2((1 - 0.5 * inside).clamp_min(1e-6))
    far = ((size - 0.5) / scale - torch.log1p(-torch.exp(-1 / scale)) + math.log(2)) / math.log(2)
    return torch.where(size < 0.5, near, far)


class Model(nn.Module):
    """Everything that is trained."""

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__()
        self.analysis = Analysis(settings.channels)
        self.basis = nn.Parameter(torch.zeros(settings.channels, 3, 24, 24))
        self.log_gain = nn.Parameter(torch.zeros(settings.channels))  # a channel's own factor to the step
        width = FILTER_WIDTH
        self.filter = nn.ParameterDict()
        for i, (out, into) in enumerate(((width, 12), (width, width), (12, width))):
            weight = torch.zeros(out, into, 3, 3)
            if i < 2:
                nn.init.kaiming_normal_(weight, a=0.1)
                self.filter[f"filter_{i}_step"] = torch.zeros(out)
            self.filter[f"filter_{i}_weight"], self.filter[f"filter_{i}_bias"] = weight, torch.zeros(out)
        self.prior = Prior(settings)

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Begin with the principal components of crops, in grey levels around 0, `(N, 3, H, W)`."""
        basis = principal_lapped_basis(images, len(self.basis))
        means = basis.sum((2, 3)).square().sum(1).argsort(descending=True)[:PREDICTED].sort().values
        rest = torch.tensor([i for i in range(len(basis)) if i not in means.tolist()])
        basis = basis[torch.cat([means, rest])]
        self.basis.copy_(basis)
        self.analysis.linear.weight.copy_(basis)
        last = self.analysis.last
        last.weight.mul_(0.01)
        if last.bias is not None:
            last.bias.zero_()
        latents = self.analysis(images)
        steps = torch.exp(torch.linspace(math.log(STEPS[0]), math.log(STEPS[1]), len(images)))
        self.prior.start(symbols_of((latents / steps[:, None, None, None]).round()))

    @classmethod
    def from_dictionary(cls, dictionary: Dictionary, analysis: Analysis, settings: TrainSettings) -> Model:
        """A model that begins where a dictionary and its analysis stand.

        Args:
            dictionary: Whose basis, filter and tables are taken over.
            analysis: That was trained with it.
            settings: As `TrainSettings.grown` gives them. Channels that the dictionary lacks are zero: `grow` makes something of them.

        Raises:
            ConfigError: The dictionary predicts other channels than this training.
        """
        if dictionary.predicted != PREDICTED:
            raise ConfigError(f"dictionary: expected {PREDICTED} predicted channels, got {dictionary.predicted}; train a new one")
        model = cls(settings)
        with torch.no_grad():
            for name, value in analysis.state_dict().items():
                own = model.analysis.state_dict()[name].zero_()
                own[: len(value)] = value
            model.basis[: dictionary.channels] = dictionary.basis
            for name, value in dictionary.filter.items():
                model.filter[name.replace(".", "_")].copy_(value)
            model.prior.start_from(dictionary)
        return model

    @torch.no_grad()
    def grow(self, images: Tensor, known: int) -> None:
        """Give the channels from `known` on the principal components of what the others leave of crops `(N, 3, H, W)` at the finest step."""
        if known == len(self.basis):
            return
        steps = torch.full((len(images),), STEPS[0])
        left = images - self.synthesis(self.quantised(self.analysis(images), steps).round(), steps)[1]
        basis = principal_lapped_basis(left, len(self.basis) - known)
        self.basis[known:] = basis
        self.analysis.linear.weight[known:] = basis

    def quantised(self, latents: Tensor, steps: Tensor) -> Tensor:
        """Latents in units of their steps `(N,)`, not rounded."""
        return latents * torch.exp(self.log_gain)[:, None, None] / steps[:, None, None, None]

    def synthesis(self, values: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Both pictures that latents give, linear and filtered: grey levels around 0, float32 `(N, 3, 16h, 16w)`.

        Args:
            values: Latents in units of their steps, `(N, C, h, w)`.
            steps: In grey levels, `(N,)`.
        """
        scaled = values * (steps[:, None, None, None] * torch.exp(-self.log_gain)[:, None, None])
        linear = synthesise(scaled, self.basis)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            weights = {name.replace("_", "."): value for name, value in self.filter.items()}
            change = smooth(linear / UNIT, weights, steps / TYPICAL_STEP) - linear / UNIT
        return linear, linear + UNIT * change.float()

    def groups(self, settings: TrainSettings) -> list[dict[str, Any]]:
        """Parameters by learning rate, as an optimizer takes them."""
        own = {"filter": 3.0, "prior": 10.0, "log_gain": 10.0}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault(own.get(name.split(".")[0], 1.0), []).append(parameter)
        return [{"params": parameters, "lr": settings.lr * factor, "base": settings.lr * factor} for factor, parameters in groups.items()]


def symbols_of(latents: Tensor) -> Tensor:
    """What is coded for each tile, `(tiles, C)`: the first channels as differences to the tile on the left, in the first column to the one above."""
    means = latents[:, :PREDICTED]
    left = means[..., :-1]
    above = F.pad(means[:, :, :-1, :1], (0, 0, 1, 0))
    means = means - torch.cat([above, left], 3)
    return torch.cat([means, latents[:, PREDICTED:]], 1).permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


@dataclass(frozen=True)
class Pictures:
    """What is trained on: pictures in memory, by source.

    Args:
        train: For each source, pictures as uint8 `(3, H, W)`.
        validation: Pictures that are held out.
        weights: How often each source is drawn from.
    """

    train: Sequence[Sequence[Tensor]]
    validation: Sequence[Tensor]
    weights: Sequence[float]

    def batch(self, settings: TrainSettings, step: int) -> tuple[Tensor, Tensor]:
        """Crops in grey levels around 0, and the quantization step of each."""
        rng = random.Random(f"{settings.seed}/{step}")
        crops, side = [], settings.crop
        for _ in range(settings.batch):
            image = rng.choice(rng.choices(self.train, self.weights)[0])
            largest = min(image.shape[1:]) / side
            zoom = 1.0 if rng.random() < 0.5 else math.exp(rng.uniform(0, math.log(max(1.0, min(2.5, largest)))))
            taken = max(1, min(round(side * zoom), *image.shape[1:]))
            i, j = rng.randint(0, image.shape[1] - taken), rng.randint(0, image.shape[2] - taken)
            crop = image[:, i : i + taken, j : j + taken].float()
            if taken != side:  # downscaling removes the traces of an earlier JPEG
                crop = F.interpolate(crop[None], (side, side), mode="bilinear", antialias=True)[0]
            if rng.random() < 0.5:
                crop = crop.flip(2)
            if rng.random() < 0.2:
                gain = torch.tensor([rng.uniform(0.9, 1.1) for _ in range(3)])[:, None, None]
                crop = (crop * gain).clamp(0, 255)
            crops.append(crop)
        steps = torch.tensor([math.exp(rng.uniform(*map(math.log, STEPS))) for _ in crops])
        return torch.stack(crops) - 127.5, steps


def train(
    pictures: Pictures,
    settings: TrainSettings,
    state: Path | None = None,
    report: Callable[[Row], None] = lambda row: None,
    *,
    model: Model | None = None,
    known: int | None = None,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[Model, list[Row]]:
    """Train, from where `state` left off if it is there.

    Args:
        pictures: What is trained on.
        settings: Steps, seed and shapes.
        state: File that holds an unfinished training; written as training goes on, and left when it ends.
        report: Called with each row of the validation curve as it is made.
        model: Where to begin; with the principal components of crops without it.
        known: Its channels that are trained already; all without.
        origin: What else a state must agree in to be of the same training, as JSON.
        progress: Called with the number of steps that are done, first with those found done.

    Returns:
        The model and the validation curve.

    Raises:
        ConfigError: `state` is damaged, or of another training.
        StorageError: `state` cannot be written.
    """
    about = {**asdict(settings), **(origin or {})}
    found = state is not None and state.exists()
    begun = model
    if begun is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            begun = Model(settings)
    optimizer = torch.optim.Adam(begun.groups(settings))
    curve: list[Row] = []
    begin = 0
    if state is not None and found:
        begin, curve = load_state(state, begun, optimizer, about)
    else:
        if model is None or known is not None:
            crops = torch.cat([pictures.batch(settings, -1 - i)[0] for i in range(START_BATCHES)])
            begun.start(crops) if model is None else begun.grow(crops, known or 0)
        curve.append({"step": 0, "rates": validate(begun, pictures.validation)})
        report(curve[-1])
        if state is not None:  # a place that cannot be written is told now, and not after the first hundreds of steps
            save_state(state, begun, optimizer, 0, curve, about)
    progress(begin)
    _run(begun, optimizer, pictures, settings, begin, curve, state, about, report, progress)
    return begun.eval(), curve


def _run(
    model: Model,
    optimizer: torch.optim.Optimizer,
    pictures: Pictures,
    settings: TrainSettings,
    begin: int,
    curve: list[Row],
    state: Path | None,
    about: Mapping[str, Any],
    report: Callable[[Row], None],
    progress: Callable[[int], None],
) -> None:
    """Take the steps from `begin` on."""
    warm_up = min(WARM_UP, max(1, settings.steps // 4))
    model.train()
    for step in range(begin, settings.steps):
        rate = min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        loss = loss_of(model, *pictures.batch(settings, step), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % VALIDATE_EVERY == 0 or done == settings.steps:
            curve.append({"step": done, "rates": validate(model, pictures.validation)})
            report(curve[-1])
        if state is not None and (done % SAVE_EVERY == 0 or done == settings.steps):
            save_state(state, model, optimizer, done, curve, about)
        progress(done)


def loss_of(model: Model, images: Tensor, steps: Tensor, step: int) -> Tensor:
    """Bits a pixel + lambda * squared error of both pictures, weighted so that each rate counts alike."""
    latents = model.quantised(model.analysis(images), steps)
    with torch.no_grad():
        energy = model.basis.square().sum((1, 2, 3)) * torch.exp(-2 * model.log_gain)
        listed = latents.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = model.prior.worth(listed, symbols_of(latents.round()), energy, PREDICTED)
        integers = chosen.view(len(images), *latents.shape[2:], -1).permute(0, 3, 1, 2)
    rounded = latents + (integers - latents).detach()
    rated = rounded
    if step % 2:  # noise has gradients where rounding has none; differences of noisy means would count its variance twice
        noise = torch.rand(latents.shape, generator=torch.Generator().manual_seed(step)) - 0.5
        rated = torch.cat([rounded[:, :PREDICTED], (latents + noise)[:, PREDICTED:]], 1)
    bits = model.prior.bits(symbols_of(rated), symbols_of(integers))
    rate = bits.view(len(images), -1).sum(1) / images[0, 0].numel()
    linear, filtered = model.synthesis(rounded, steps)
    error = (1 - FILTERED) * (linear - images).square().mean((1, 2, 3)) + FILTERED * (filtered - images).square().mean((1, 2, 3))
    return ((rate + LAGRANGE / steps**2 * error) * (steps / TYPICAL_STEP)).mean()


@torch.no_grad()
def validate(model: Model, images: Sequence[Tensor]) -> list[dict[str, float]]:
    """Ideal rate and PSNR, of plain rounding, at a few steps."""
    training = model.training
    model.eval()
    rows = []
    for step in VALIDATION_STEPS:
        total = torch.zeros(3, dtype=torch.float64)
        for image in images:
            height, width = (side // TILE * TILE for side in image.shape[1:])
            target = image[None, :, :height, :width].float() - 127.5
            steps = torch.tensor([step])
            integers = model.quantised(model.analysis(target), steps).round()
            bits = model.prior.bits(symbols_of(integers), symbols_of(integers)).sum()
            shown = [(part + 127.5).clamp(0, 255).round() - 127.5 for part in model.synthesis(integers, steps)]
            total += torch.tensor([bits / (height * width), *(10 * math.log10(255**2 / float((part - target).square().mean())) for part in shown)])
        bpp, linear, filtered = (total / len(images)).tolist()
        rows.append({"step": step, "bpp": bpp, "linear_psnr": linear, "filtered_psnr": filtered})
    model.train(training)
    return rows
