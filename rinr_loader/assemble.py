"""From a trained model to a dictionary: bases as float16, and integer tables fitted to what the quantizer really gives."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rinr_loader.analysis import Analysis
from rinr_loader.codecs.tile import RESIDUAL_CHANNELS, RESIDUAL_TILE, TILE, TYPICAL_STEP, UNIT, blocks_of, smooth, synthesise
from rinr_loader.dictionary import CONTEXTS, Prior, dump
from rinr_loader.latents import RESIDUAL_STRENGTH, STRENGTH, Costs, costs_of, differences, quantise
from rinr_loader.priors import Observed, fit_tables
from rinr_loader.stream import context_below
from rinr_loader.training import PREDICTED, Model, Pictures, TrainSettings, symbols_of

CROPS, SIDE = 72, 320  # what tables are fitted to
STEPS = (20.0, 35.0, 60.0, 100.0, 160.0, 250.0)
ITERATIONS = 3
RESIDUAL_STEPS = (8.0, 12.0, 18.0, 27.0)
RESIDUAL_ENDS, RESIDUAL_CLASSES = (6, 24, 72, RESIDUAL_CHANNELS), 16
RECTANGLES = 4  # a crop


def assemble(model: Model, pictures: Pictures, settings: TrainSettings, about: Mapping[str, Any]) -> bytes:
    """Serialize a dictionary.

    Args:
        model: As trained.
        pictures: What the tables are fitted to: crops of the training pictures.
        settings: Of the training.
        about: Where it comes from.
    """
    with torch.no_grad():
        columns = transforms(model)
        crops = list(_crops(pictures, settings))
        background, backgrounds = _fit_background(model, columns, crops, settings)
        residual_basis, residual = _fit_residual(columns, backgrounds, settings)
    first = len(background["symbols"])
    columns |= background | {name: value for name, value in residual.items() if name not in ("symbols", "radius")}
    columns["symbols"] = np.concatenate([background["symbols"], residual["symbols"]])
    columns["radius"] = np.concatenate([background["radius"], residual["radius"]])
    columns["residual.tables"] = residual["residual.tables"] + np.uint8(first)
    columns["residual.basis"] = residual_basis.numpy().astype(np.float16)
    columns["predicted"] = np.array([PREDICTED], np.uint8)
    return dump(columns, about)


def transforms(model: Model) -> dict[str, NDArray[Any]]:
    """Basis and filter as stored."""
    basis = model.basis * torch.exp(-model.log_gain)[:, None, None, None]
    columns = {"basis": basis.numpy().astype(np.float16)}
    for name, value in model.filter.items():
        columns[name.replace("_", ".")] = value.detach().numpy().astype(np.float16)
    return columns


@torch.no_grad()
def trained_analysis(model: Model) -> Analysis:
    """The analysis as stored: with each channel's own factor in its weights, so that its latents need only be divided by the step."""
    analysis = Analysis(len(model.basis))
    analysis.load_state_dict(model.analysis.state_dict())
    gain = torch.exp(model.log_gain)
    analysis.linear.weight.mul_(gain[:, None, None, None])
    analysis.last.weight.mul_(gain[:, None, None, None])
    bias = analysis.last.bias
    if bias is not None:
        bias.mul_(gain)
    return analysis.eval()


def _crops(pictures: Pictures, settings: TrainSettings) -> Iterator[Tensor]:
    """Crops in grey levels around 0, `(1, 3, SIDE, SIDE)` or smaller, sides multiples of 16."""
    rng = random.Random(f"{settings.seed}/tables")
    for _ in range(CROPS):
        image = rng.choice(rng.choices(pictures.train, pictures.weights)[0])
        height, width = (min(SIDE, side // TILE * TILE) for side in image.shape[1:])
        y, x = rng.randint(0, image.shape[1] - height), rng.randint(0, image.shape[2] - width)
        yield image[None, :, y : y + height, x : x + width].float() - 127.5


def _fit_background(
    model: Model, columns: Mapping[str, NDArray[Any]], crops: Sequence[Tensor], settings: TrainSettings
) -> tuple[dict[str, NDArray[Any]], list[tuple[Tensor, Tensor, Costs, Tensor, int]]]:
    """Tables of the background, and for each crop and step: crop, decoded crop, costs, classes, columns."""
    energy = energies(torch.from_numpy(columns["basis"]).float())
    latents = [model.quantised(model.analysis(crop), torch.ones(1)) for crop in crops]
    observed = []
    for z in latents:
        for step in STEPS:
            integers = (z / step).round()
            symbols = symbols_of(integers)
            classes = torch.stack(model.prior.classes(symbols), 1)
            observed.append(Observed(symbols, classes, z.shape[3], torch.full((len(symbols),), CONTEXTS - 1)))
    tables = fit_tables(observed, settings.groups, settings.classes, "background")
    for iteration in range(ITERATIONS):
        costs = costs_from(tables, "background")
        observed, decoded = [], []
        for crop, z in zip(crops, latents, strict=True):
            for step in STEPS:
                values = (z[0] / step).flatten(1).T
                none = torch.full((len(values),), CONTEXTS - 1)
                integers, classes = quantise(costs, values, energy, STRENGTH, z.shape[3], none, PREDICTED)
                observed.append(Observed(differences(integers, z.shape[3], PREDICTED), classes, z.shape[3], none))
                if iteration == ITERATIONS - 1:
                    decoded.append((crop, integers.T.unflatten(1, z.shape[2:])[None] * step, torch.tensor([step]), classes, z.shape[3]))
        tables = fit_tables(observed, settings.groups, settings.classes, "background")
    costs = costs_from(tables, "background")
    basis, weights = (
        torch.from_numpy(columns["basis"]).float(),
        {name: torch.from_numpy(value).float() for name, value in columns.items() if "filter" in name},
    )
    shown = []
    for crop, values, steps, classes, width in decoded:
        if 60 < steps < 200:  # what residuals usually correct
            image = smooth(synthesise(values, basis) / UNIT, weights, steps / TYPICAL_STEP) * UNIT
            shown.append((crop, image, costs, classes, width))
    return tables, shown


def _fit_residual(
    columns: Mapping[str, NDArray[Any]], backgrounds: Sequence[tuple[Tensor, Tensor, Costs, Tensor, int]], settings: TrainSettings
) -> tuple[Tensor, dict[str, NDArray[Any]]]:
    """Principal components of residuals as float16 holds them, and their tables."""
    rng = random.Random(f"{settings.seed}/residuals")
    lattices = []
    for crop, image, costs, classes, columns_of in backgrounds:
        for _ in range(RECTANGLES):
            height, width = (min(RESIDUAL_TILE * rng.randint(2, 12), side) for side in crop.shape[2:])
            y, x = rng.randint(0, crop.shape[2] - height), rng.randint(0, crop.shape[3] - width)
            rect = (x, y, x + width, y + height)
            blocks = blocks_of((crop - image)[0, :, y : y + height, x : x + width])
            context = torch.from_numpy(context_below(costs.prior, classes.numpy(), columns_of, rect))
            lattices.append((blocks.flatten(1), context, width // RESIDUAL_TILE))
    covariance = sum(
        (blocks.T.double() @ blocks.double() for blocks, _, _ in lattices), torch.zeros(RESIDUAL_CHANNELS, RESIDUAL_CHANNELS, dtype=torch.float64)
    )
    basis = torch.linalg.eigh(covariance)[1].flip(1).T.float().half().float()  # [192, 192], rows are components
    observed = []
    for blocks, context, width in lattices:
        for step in RESIDUAL_STEPS:
            symbols = (blocks @ basis.T / step).round()
            observed.append(Observed(symbols, _by_energy(symbols), width, context))
    tables = fit_tables(observed, RESIDUAL_ENDS, RESIDUAL_CLASSES, "residual")
    for _ in range(ITERATIONS):
        costs = costs_from(tables, "residual")
        observed = []
        for blocks, context, width in lattices:
            for step in RESIDUAL_STEPS:
                symbols, classes = quantise(costs, blocks @ basis.T / step, torch.ones(RESIDUAL_CHANNELS), RESIDUAL_STRENGTH, width, context)
                observed.append(Observed(symbols, classes, width, context))
        tables = fit_tables(observed, RESIDUAL_ENDS, RESIDUAL_CLASSES, "residual")
    return basis.view(RESIDUAL_CHANNELS, 3, RESIDUAL_TILE, RESIDUAL_TILE), tables


def _by_energy(symbols: Tensor) -> Tensor:
    """A first guess of classes: by the logarithm of the mean magnitude of each group."""
    chosen = []
    for a, b in zip((0, *RESIDUAL_ENDS[:-1]), RESIDUAL_ENDS, strict=True):
        size = symbols[:, a:b].abs().sum(1)
        level = ((size / (b - a)).clamp_min(1e-3).log() + 5) * 2
        chosen.append(torch.where(size > 0, level.long().clamp(1, RESIDUAL_CLASSES - 1), 0))
    return torch.stack(chosen, 1)


def costs_from(tables: Mapping[str, NDArray[Any]], kind: str) -> Costs:
    """Costs under tables that are being fitted."""
    ends = tuple(tables[f"{kind}.ends"].tolist())
    prior = Prior(ends, tables[f"{kind}.tables"].astype(np.int64), tables[f"{kind}.buckets"], tables[f"{kind}.classes"].astype(np.int64), 0)
    return costs_of(tables["symbols"].astype(np.int64), tables["radius"].astype(np.int64), prior)


def energies(basis: Tensor) -> Tensor:
    """Squared norm of each basis function, `(C,)`."""
    return basis.square().sum((1, 2, 3))
