"""Choosing integers and classes: costs against what the coder writes, and choices against trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from dictionaries import random_lattice, tiny_dictionary
from torch import Tensor

from rinr_loader import latents
from rinr_loader.codecs.tile import TILE, lattice_of
from rinr_loader.dictionary import CONTEXTS, Prior
from rinr_loader.latents import ESCAPE_BITS, Costs, choose_classes, costs_of, differences, left_context, psnr_of, quantise, recode
from rinr_loader.stream import Lattice, write_stream

NONE = CONTEXTS - 1


def costs(kind: str = "background") -> Costs:
    dictionary = tiny_dictionary()
    symbols = dictionary.tables.frequencies[: len(dictionary.radius)].astype(np.int64)
    prior: Prior = getattr(dictionary, kind)
    return costs_of(symbols, dictionary.radius, prior)


def bits_of(costs: Costs, symbols: Tensor, classes: Tensor, columns: int, extra: Tensor) -> float:
    """Bits of a lattice, one symbol after the other."""
    dictionary, prior = tiny_dictionary(), costs.prior
    frequencies = dictionary.tables.frequencies
    total = 0.0
    for t, mine in enumerate(classes.tolist()):
        for g, k in enumerate(mine):
            a = int(prior.buckets[g, int(classes[t - 1, g])]) if t % columns else NONE
            b = int(extra[t]) if g == 0 else int(prior.buckets[g - 1, mine[g - 1]])
            total += 12 - math.log2(prior.classes[(g * CONTEXTS + a) * CONTEXTS + b, k])
            for c in range(*prior.bounds[g]):
                value = int(symbols[t, c])
                if k == 0:
                    assert value == 0
                    continue
                table = int(prior.tables[k, c])
                radius = int(dictionary.radius[table])
                fits = abs(value) <= radius
                total += 12 - math.log2(frequencies[table, value + radius if fits else 2 * radius + 1]) + (0 if fits else ESCAPE_BITS)
    return total


def random_values(seed: int, tiles: int, spread: float = 1.5) -> Tensor:
    """Latents in steps: large in the first channels, small in the last, with quiet tiles."""
    generator = torch.Generator().manual_seed(seed)
    profile = spread * 4 / (1 + torch.arange(16)) ** 0.8
    busy = torch.rand(tiles, 1, generator=generator) ** 2 * 2
    return torch.randn(tiles, 16, generator=generator) * profile * busy


# --- bits ---


@pytest.mark.parametrize("size", [(90, 130), (160, 160)])
def test_bits_are_what_the_coder_writes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rinr_loader.stream.MOST_LANES", 1)
    dictionary = tiny_dictionary()
    rect = (0, 0, size[1], size[0])
    lattice = random_lattice(np.random.default_rng(0), dictionary.background, rect, TILE, escapes=0.01)
    data, _ = write_stream(dictionary, lattice, [])
    columns = lattice_of(rect, TILE)[1]
    none = torch.full((len(lattice.classes),), NONE)
    expected = bits_of(costs(), torch.from_numpy(lattice.symbols), torch.from_numpy(lattice.classes), columns, none)
    assert abs(8 * len(data) - expected) < 40 + 0.005 * expected


def test_the_costs_of_classes_and_magnitudes_are_their_bits() -> None:
    mine = costs("residual")
    frequencies = tiny_dictionary().tables.frequencies
    for table, radius in enumerate(tiny_dictionary().radius.tolist()):
        for magnitude in (0, 1, radius, radius + 1, 256):
            share = frequencies[table, radius + magnitude] if magnitude <= radius else frequencies[table, 2 * radius + 1]
            assert float(mine.magnitude[table, magnitude]) == pytest.approx(
                12 - math.log2(share) + (ESCAPE_BITS if magnitude > radius else 0), abs=1e-4
            )
    assert torch.exp2(-mine.classes).sum(-1).allclose(torch.ones(1), atol=1e-5)


# --- classes ---


def test_the_class_that_is_chosen_is_the_cheapest() -> None:
    mine = costs()
    symbols = random_values(1, 40).round().clamp(-6, 6)  # magnitudes that the choice does not approximate
    symbols[3] = 0
    left = torch.randint(0, CONTEXTS, (40, 3), generator=torch.Generator().manual_seed(0))
    extra = torch.randint(0, CONTEXTS, (40,), generator=torch.Generator().manual_seed(1))
    symbols[symbols.abs() == 5] = 4
    classes, bits = choose_classes(mine, symbols, left, extra)
    for t in range(40):
        above = int(extra[t])
        for g, (a, b) in enumerate(mine.prior.bounds):
            candidates = []
            for k in range(8):
                zeros = not symbols[t, a:b].any()
                inside = sum(float(mine.magnitude[mine.table[k, c], int(symbols[t, c].abs())]) for c in range(a, b)) if k else 0.0
                candidates.append(math.inf if k == 0 and not zeros else inside + float(mine.classes[g, left[t, g], above, k]))
            assert float(bits[t, g]) == pytest.approx(min(candidates), abs=1e-2)
            assert candidates[int(classes[t, g])] == pytest.approx(min(candidates), abs=1e-2)
            above = int(mine.buckets[g, classes[t, g]])


def test_a_group_with_a_value_is_never_of_class_zero() -> None:
    symbols = torch.zeros(5, 16)
    symbols[0, 4], symbols[2, 15], symbols[4, 0] = 1, -200, 3000
    classes, _ = choose_classes(costs(), symbols, torch.full((5, 3), NONE), torch.full((5,), NONE))
    for t, g in ((0, 1), (2, 2), (4, 0)):
        assert classes[t, g] > 0


# --- integers ---


@pytest.mark.parametrize("exact", [0, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_integers_are_worth_more_than_rounding(seed: int, exact: int) -> None:
    """Bits plus weighted error: no more than that of the nearest integers, nor than that of nothing at all."""
    mine, columns, strength = costs(), 10, 10.0
    values = random_values(seed, 60)
    energy = torch.linspace(0.5, 1.5, 16)
    none = torch.full((60,), NONE)

    def loss(integers: Tensor, classes: Tensor) -> float:
        coded = differences(integers, columns, exact)
        return bits_of(mine, coded, classes, columns, none) + float(((integers - values).square() * energy).sum()) * strength

    found, classes = quantise(mine, values, energy, strength, columns, none, exact)
    assert torch.equal(found, found.round())
    nearest = values.round()
    zeros = torch.zeros_like(values)
    for others in (nearest, zeros):
        chosen, _ = choose_classes(mine, differences(others, columns, exact), torch.full((60, 3), NONE), none)
        assert loss(found, classes) <= loss(others, chosen)
    assert (found.abs() <= nearest.abs()).all()
    assert not torch.equal(found, nearest)
    if exact:
        assert torch.equal(found[:, :exact], nearest[:, :exact])


def test_what_error_costs_decides_how_much_is_kept() -> None:
    values, energy, none = random_values(5, 80), torch.ones(16), torch.full((80,), NONE)
    kept = [int((quantise(costs(), values, energy, strength, 10, none)[0] != 0).sum()) for strength in (0.1, 3.0, 30.0)]
    assert kept[0] < kept[1] < kept[2]


def test_classes_fit_their_integers_and_can_be_written() -> None:
    dictionary = tiny_dictionary()
    values = random_values(3, 30) * 20
    integers, classes = quantise(costs(), values, torch.ones(16), 10.0, 6, torch.full((30,), NONE), dictionary.predicted)
    symbols = differences(integers, 6, dictionary.predicted).long().numpy()
    assert not symbols[classes.numpy()[:, dictionary.background.group_of] == 0].any()
    write_stream(dictionary, Lattice(symbols, classes.numpy(), (0, 0, 96, 80)), [])


@pytest.mark.parametrize("exact", [0, 2])
def test_bands_of_tiles_change_nothing(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, values, extra = 5, random_values(3, 60), torch.arange(60) % NONE
    arguments = costs(), values, torch.ones(16), 8.0, columns, extra, exact
    integers, classes = quantise(*arguments)
    other = classes.roll(1, 0)  # what they were before, as context
    recoded = recode(costs(), integers, other, columns, exact)
    symbols = differences(integers, columns, exact)
    left = left_context(costs(), other, columns)
    assert torch.equal(recoded, choose_classes(costs(), symbols, left, torch.full((60,), NONE))[0])
    for band in (1, 5, 14, 15, 59):
        monkeypatch.setattr(latents, "BAND", band)
        found = quantise(*arguments)
        assert torch.equal(found[0], integers)
        assert torch.equal(found[1], classes)
        assert torch.equal(recode(costs(), integers, other, columns, exact), recoded)


def test_differences_are_to_the_left_and_in_the_first_column_to_above() -> None:
    latents = torch.tensor([[[1.0, 5], [4, 5], [2, 5]], [[10, 5], [11, 5], [9, 5]]]).flatten(0, 1)  # 2 rows, 3 columns, 2 channels
    assert differences(latents, 3, 1).tolist() == [[1, 5], [3, 5], [-2, 5], [9, 5], [1, 5], [-2, 5]]
    assert torch.equal(differences(latents, 3, 0), latents)


def test_the_context_on_the_left_is_the_bucket_of_the_tile_there() -> None:
    mine = costs()
    classes = torch.tensor(list(itertools.islice(itertools.cycle([[0, 7, 3], [5, 1, 2]]), 6)))
    found = left_context(mine, classes, 3)
    assert found[0].tolist() == found[3].tolist() == [NONE] * 3
    for t in (1, 2, 4, 5):
        assert found[t].tolist() == [int(mine.buckets[g, classes[t - 1, g]]) for g in range(3)]


def test_psnr_of_nothing_wrong_is_finite() -> None:
    assert psnr_of(255.0**2) == 0
    assert psnr_of(1.0) == pytest.approx(48.13, abs=0.01)
    assert math.isfinite(psnr_of(0.0))
