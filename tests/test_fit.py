"""Fitting many networks at once: what a caller gets for each task, whatever its neighbours and the number of slots."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_close

from rinr_loader import fit as fitting
from rinr_loader.bundle import NetworkSpec
from rinr_loader.codecs import siren
from rinr_loader.fit import Fitted, Schedule, Task, fit, psnr_of

FLOAT = NetworkSpec("residual", 2, 8, "float16", 10.0)
INT8 = NetworkSpec("background", 2, 8, "int8", 10.0)
SHORT = Schedule(steps=60, lr=1e-2, pixels=64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task(seed: int, count: int = 64, *, stop: float | None = None, scale: float = 0.5, smooth: bool = True) -> Task:
    """A task over scattered points; its colours are a smooth function of the place, or noise."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (2, count))
    target = (
        np.sin(points[0] * rng.uniform(1, 3) + points[1] * rng.uniform(1, 3) + rng.uniform(0, 6, (3, 1))) if smooth else rng.normal(size=(3, count))
    )
    to_torch = partial(torch.tensor, dtype=torch.float32)
    return Task(to_torch(points), to_torch(target), torch.ones(count), torch.ones(count, dtype=torch.bool), scale, stop)


def lazily(tasks: list[Task]) -> list[Callable[[], Task]]:
    def make(one: Task) -> Callable[[], Task]:
        return lambda: one

    return [make(one) for one in tasks]


def run(tasks: list[Task], spec: NetworkSpec = FLOAT, schedule: Schedule = SHORT, *, slots: int = 8, seed: int = 0) -> list[Fitted]:
    return fit(lazily(tasks), spec, schedule, generator=generator(seed), slots=slots)


def measure(fitted: Fitted, spec: NetworkSpec, of: Task) -> float:
    """PSNR of stored bytes at the task's measured points."""
    value = siren.forward(siren.parameters_of([fitted.weights], spec), spec, of.points[None])[0] * of.weight
    return psnr_of(float((value - of.target)[:, of.measured].double().square().mean()) * of.scale**2)


def given_starts(patch: pytest.MonkeyPatch) -> None:
    """Make the k-th network that is started begin in state k, whatever else is drawn from the generator."""
    drawn: list[int] = []
    genuine = siren.initialise

    def initialise(spec: NetworkSpec, _: torch.Generator, count: int) -> torch.Tensor:
        drawn.append(count)
        return genuine(spec, generator(len(drawn)), count)

    patch.setattr(siren, "initialise", initialise)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """Every PSNR that the fit measures, by the number of the task's points."""
    seen: dict[int, list[float]] = {}
    genuine = fitting._psnr

    def spy(flat: torch.Tensor, spec: NetworkSpec, table: torch.Tensor, scale: float) -> float:
        psnr = genuine(flat, spec, table, scale)
        seen.setdefault(int(table[:, 6].sum()), []).append(psnr)
        return psnr

    monkeypatch.setattr(fitting, "_psnr", spy)
    return seen


# --- results ---


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
def test_a_network_does_not_feel_its_neighbours(spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    # Areas no larger than a step's pixels: every step sees all of them, so the generator decides the initial state alone.
    tasks = [task(seed, count) for seed, count in enumerate((64, 40, 1, 33, 64))]
    results = {}
    for slots in (8, 2, 1):
        with monkeypatch.context() as patch:
            given_starts(patch)
            results[slots] = run(tasks, spec, slots=slots)
    for slots in (2, 1):
        for together, alone in zip(results[8], results[slots], strict=True):
            assert together.steps == alone.steps
            assert together.psnr == pytest.approx(alone.psnr, abs=0.3 if spec is INT8 else 0.05)
    flat = [siren.parameters_of([r.weights for r in results[slots]], FLOAT) for slots in (8, 1)] if spec is FLOAT else []
    if flat:
        assert_close(*flat, "bfloat16")


def test_wide_steps_are_cut_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task(seed, 64) for seed in range(3)]
    whole = run(tasks)
    monkeypatch.setitem(fitting.CHUNK, "cpu", 24)
    for cut, expected in zip(run(tasks), whole, strict=True):
        assert cut.psnr == pytest.approx(expected.psnr, abs=0.05)


def test_results_are_in_the_order_of_the_tasks_and_slots_are_refilled() -> None:
    # Each task is one colour, and stops at another time.
    colours = [0.8, -0.5, 0.3, -0.9, 0.1, 0.6, -0.2]
    tasks = [replace(task(0, 32, stop=stop), target=torch.full((3, 32), c)) for c, stop in zip(colours, (15, 40, 20, 99, 15, 30, 10), strict=True)]
    done: list[int] = []
    results = fit(lazily(tasks), FLOAT, SHORT, generator=generator(), slots=3, on_done=lambda: done.append(1))
    assert len(done) == len(results) == len(tasks)
    for fitted, of, colour in zip(results, tasks, colours, strict=True):
        value = siren.forward(siren.parameters_of([fitted.weights], FLOAT), FLOAT, of.points[None])
        assert float(value.mean()) == pytest.approx(colour, abs=0.35)
        assert measure(fitted, FLOAT, of) == pytest.approx(fitted.psnr, abs=0.01)
    assert len({fitted.steps for fitted in results}) > 1


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("count", [1, 7, 64, 65, 200])
def test_the_psnr_told_is_that_of_the_stored_bytes(spec: NetworkSpec, count: int) -> None:
    of = task(3, count, scale=0.3)
    (fitted,) = run([of], spec)
    assert len(fitted.weights) == spec.nbytes
    assert measure(fitted, spec, of) == pytest.approx(fitted.psnr, abs=0.01)


def test_only_measured_points_and_weighted_output_count() -> None:
    of = task(1, 60)
    chosen = torch.arange(60) < 20
    # Elsewhere: a weight of 0 and a target that nothing can reach.
    of = replace(of, measured=chosen, weight=chosen.float(), target=torch.where(chosen, of.target, 1e3))
    (fitted,) = run([of])
    assert fitted.psnr > 20
    assert measure(fitted, FLOAT, of) == pytest.approx(fitted.psnr, abs=0.01)


def test_more_pixels_than_are_ever_drawn() -> None:
    of = task(1, 5000)
    (fitted,) = run([of], schedule=Schedule(10, 1e-2, 16))
    assert fitted.steps == 10
    assert math.isfinite(fitted.psnr)


def test_no_tasks_give_no_results() -> None:
    assert run([]) == []


# --- the best state ---


def disturbed(patch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """Spoil the parameters at one step, as an optimizer does that runs away."""
    calls: list[int] = []
    genuine = siren.forward_backward

    def spoil(flat: torch.Tensor, *args: torch.Tensor, **kwargs: bool) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at:
            flat.add_(value)
        return genuine(flat, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(siren, "forward_backward", spoil)


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
def test_the_best_state_is_kept(spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch, checks: dict[int, list[float]]) -> None:
    monkeypatch.setattr(fitting, "COLLAPSE", math.inf)
    disturbed(monkeypatch, 58, 0.7)
    tasks = [task(seed, 40 + seed) for seed in range(4)]
    results = run(tasks, spec, replace(SHORT, quantize_from=1.0))
    for seed, fitted in enumerate(results):
        seen = checks[40 + seed]
        assert seen[-1] < max(seen) - 3
        assert fitted.psnr == max(seen)
        assert measure(fitted, spec, tasks[seed]) == pytest.approx(fitted.psnr, abs=0.01)


@pytest.mark.parametrize("value", [0.7, math.nan, math.inf])
def test_a_collapsed_fit_goes_back_to_its_best_state(value: float, monkeypatch: pytest.MonkeyPatch, checks: dict[int, list[float]]) -> None:
    schedule = Schedule(100, 1e-2, 64)
    of = task(2)
    (calm,) = run([of], schedule=schedule)
    checks.clear()
    disturbed(monkeypatch, 71, value)
    (fitted,) = run([of], schedule=schedule)
    seen = checks[64]  # one every 5 steps
    best = max(seen[:14])
    assert not seen[14] >= best - fitting.COLLAPSE
    assert seen[15] > best - fitting.COLLAPSE
    assert fitted.psnr >= best
    assert fitted.psnr < calm.psnr + 3
    assert measure(fitted, FLOAT, of) == pytest.approx(fitted.psnr, abs=0.01)


def test_after_a_collapse_the_learning_rate_is_halved_and_rises_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []
    genuine = fitting._adam

    def spy(stack: fitting._Stack, schedule: Schedule) -> None:
        seen.append((stack.rate[0], stack.since[0]))
        genuine(stack, schedule)

    monkeypatch.setattr(fitting, "_adam", spy)
    disturbed(monkeypatch, 31, 0.7)
    run([task(2)], schedule=Schedule(100, 1e-2, 64))
    assert seen[:35] == [(1.0, step) for step in range(35)]  # noticed at the check after step 35
    assert seen[35:55] == [(0.5, step) for step in range(20)]


def test_the_learning_rate_rises_and_falls_along_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[float] = []
    genuine = fitting._adam

    def spy(stack: fitting._Stack, schedule: Schedule) -> None:
        stack.grad.fill_(1.0)  # Adam's step is then the learning rate itself
        before = stack.flat.double().clone()
        genuine(stack, schedule)
        moved.append(float((before - stack.flat).mean()))

    monkeypatch.setattr(fitting, "_adam", spy)
    monkeypatch.setattr(fitting, "COLLAPSE", math.inf)
    run([task(2)], schedule=Schedule(200, 1e-2, 64, patience=1000))
    expected = [1e-2 * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / 200)) for step in range(200)]
    np.testing.assert_allclose(moved, expected, rtol=1e-2, atol=1e-6)


# --- stopping ---


def test_a_fit_stops_at_its_target_and_not_before() -> None:
    tasks = [task(4, stop=stop) for stop in (12.0, 22.0, None)]
    low, high, whole = run(tasks, schedule=replace(SHORT, patience=100))
    assert low.psnr >= 12
    assert high.psnr >= 22
    assert low.steps < high.steps < whole.steps == SHORT.steps
    assert low.steps % (SHORT.steps // SHORT.checks) == 0


def test_steps_that_the_checks_do_not_divide_are_all_made() -> None:
    (fitted,) = run([task(4)], schedule=Schedule(50, 1e-2, 64, checks=7, patience=100))
    assert fitted.steps == 50
    (fitted,) = run([task(4)], schedule=Schedule(3, 1e-2, 64, checks=20))
    assert fitted.steps == 3


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
def test_patience_ends_a_fit_that_stands_still_in_its_second_half(spec: NetworkSpec) -> None:
    (still,) = run([task(4)], spec, Schedule(100, 0.0, 64, checks=20, patience=6))
    assert still.steps == 80  # the sixth check beyond step 50
    (patient,) = run([task(4)], spec, Schedule(100, 0.0, 64, checks=20, patience=11))
    assert patient.steps == 100


def test_int8_is_fitted_as_it_is_stored_in_the_last_part() -> None:
    of = task(6, 64)
    schedule = Schedule(400, 1e-2, 64, quantize_from=0.6, patience=100)
    (trained,) = run([of], INT8, schedule)
    (afterwards,) = run([of], INT8, replace(schedule, quantize_from=1.0))
    (exact,) = run([of], replace(INT8, dtype="float16"), schedule)
    assert trained.psnr > afterwards.psnr + 0.5
    assert trained.psnr > exact.psnr - 4


# --- laziness, randomness, cancelling ---


def test_tasks_are_made_when_their_turn_comes() -> None:
    events: list[str] = []

    def make(number: int) -> Callable[[], Task]:
        def build() -> Task:
            events.append("made")
            return task(number, 16, stop=5.0 * number)

        return build

    fit([make(i) for i in range(6)], FLOAT, SHORT, generator=generator(), slots=2, on_done=lambda: events.append("done"))
    for i in range(len(events)):
        assert events[: i + 1].count("made") - events[: i + 1].count("done") <= 2, events
    assert events.count("made") == events.count("done") == 6


def test_the_result_is_a_function_of_the_arguments() -> None:
    tasks = [task(seed, 200) for seed in range(5)]
    assert run(tasks, slots=2) == run(tasks, slots=2)
    assert run(tasks, slots=2, seed=1) != run(tasks, slots=2)
    torch.manual_seed(5)  # the global generator has no say
    first = run(tasks)
    torch.manual_seed(6)
    assert run(tasks) == first


def test_cancelling_ends_a_long_fit_at_once() -> None:
    cancelled = threading.Event()
    timer = threading.Timer(0.3, cancelled.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fit(lazily([task(0)]), FLOAT, Schedule(10**7, 1e-3, 64), generator=generator(), slots=1, cancelled=cancelled)
    assert time.monotonic() - started < 10
    timer.join()


def test_an_error_while_a_task_is_made_reaches_the_caller() -> None:
    def broken() -> Task:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        fit([*lazily([task(0)]), broken], FLOAT, SHORT, generator=generator(), slots=1)


def test_psnr_of_an_error() -> None:
    assert psnr_of(1.0) == 0
    assert psnr_of(0.01) == pytest.approx(20)
    assert psnr_of(0.0) == pytest.approx(99)
