"""Fit many networks of one shape at once: one optimizer over stacked parameters, a step count and a stop of its own for each.

A `Task` is one network to fit. `fit` keeps `slots` of them in work; when one reaches its target or stops improving, the next task takes
its slot. Everything is counted in steps and drawn from the given generator, so the result is a function of the arguments alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rinr_loader.bundle import NetworkSpec
from rinr_loader.codecs import siren

# Points of one forward and backward pass. On a CPU the phases of all layers should stay in the cache of one core.
CHUNK = {"cpu": 2048, "cuda": 1 << 20}
CHECKED = 8192  # pixels at which a fit is judged between steps; smaller areas are judged whole
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-15
WARM_UP = 0.05  # share of the steps in which the learning rate rises; deep sine networks fall apart without it
COLLAPSE = 3.0  # dB below its best at which a fit goes back to its best state, at half the learning rate


@dataclass(frozen=True)
class Schedule:
    """How one network is fitted.

    Args:
        steps: Optimizer steps at most.
        lr: Adam's highest learning rate; it rises in the first twentieth of the steps and falls to 0 along a cosine.
        pixels: Random pixels of each network in a step.
        quantize_from: Share of the steps after which int8 networks are fitted as they will be stored (straight-through).
        checks: How often a fit is judged, in the course of all steps.
        patience: Checks without an improvement of 0.01 dB after which a fit ends, in the second half of the steps: a network can idle at first.
    """

    steps: int
    lr: float
    pixels: int
    quantize_from: float = 0.9
    checks: int = 20
    patience: int = 6


@dataclass(frozen=True)
class Task:
    """One network to fit: what `weight * network(point)` should be, in the network's own scale.

    Args:
        points: x and y in [-1, 1], float32, `(2, N)`.
        target: Float32, `(3, N)`.
        weight: Factor on the network's output, float32, `(N,)`.
        measured: Pixels that count for the PSNR, bool, `(N,)`.
        scale: From the network's output to colour, where 1 is 255.
        stop_psnr: Stop when the measured pixels reach this many dB; None to run all steps.
        psnr_without: What the measured pixels have without this network.
    """

    points: Tensor
    target: Tensor
    weight: Tensor
    measured: Tensor
    scale: float
    stop_psnr: float | None = None
    psnr_without: float = -math.inf


@dataclass(frozen=True)
class Fitted:
    """A fitted network: its bytes as stored, the PSNR in dB that the fit saw, and the steps it took."""

    weights: bytes
    psnr: float
    steps: int


class _Stack:
    """The networks in work: parameters, optimizer state and best state of each slot."""

    def __init__(self, spec: NetworkSpec, slots: int, device: torch.device) -> None:
        size = spec.rows + spec.weights
        self.flat, self.mean, self.square, self.best, self.grad = (torch.zeros(slots, size, device=device) for _ in range(5))
        self.scales = torch.ones(slots, spec.rows, device=device)  # of the best state
        self.steps = torch.ones(slots, spec.weights, device=device)  # int8 step of every weight, once they are fixed
        self.tables: list[Tensor] = []
        self.tasks: list[int] = []  # which task each slot works on, and what is left to know of it
        self.scale: list[float] = []
        self.stop: list[float] = []
        self.step = [0] * slots
        self.since = [0] * slots  # steps since the optimizer's state was last cleared
        self.rate = [1.0] * slots  # factor on the learning rate
        self.psnr = [-math.inf] * slots  # best so far
        self.mark = [-math.inf] * slots  # the PSNR that patience compares with
        self.waited = [0] * slots

    def start(self, slot: int, number: int, task: Task, table: Tensor, flat: Tensor) -> None:
        for state in (self.mean, self.square):
            state[slot].zero_()
        self.flat[slot], self.best[slot] = flat, flat
        self.since[slot], self.rate[slot] = 0, 1.0
        self.step[slot], self.psnr[slot], self.mark[slot], self.waited[slot] = 0, -math.inf, -math.inf, 0
        self.tables[slot : slot + 1], self.tasks[slot : slot + 1] = [table], [number]
        self.scale[slot : slot + 1], self.stop[slot : slot + 1] = [task.scale], [math.inf if task.stop_psnr is None else task.stop_psnr]

    def keep(self, rows: list[int]) -> None:
        """Go on with these slots only."""
        for name in ("flat", "mean", "square", "best", "grad", "scales", "steps"):
            setattr(self, name, getattr(self, name)[rows].clone())
        for name in ("tables", "tasks", "scale", "stop", "step", "since", "rate", "psnr", "mark", "waited"):
            setattr(self, name, [getattr(self, name)[i] for i in rows])


def fit(
    tasks: Sequence[Callable[[], Task]],
    spec: NetworkSpec,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    slots: int,
    half: bool = False,
    on_done: Callable[[], None] | None = None,
    cancelled: threading.Event | None = None,
) -> list[Fitted]:
    """Fit one network for each task.

    Args:
        tasks: What to fit, each made when its turn comes, so that memory holds those in work only; sizes may differ. Their tensors are
            on the generator's device.
        spec: Shape of all of them.
        schedule: Steps, learning rate and pixels.
        generator: Source of all randomness.
        slots: Networks in work at a time.
        half: Run the square matrix products in float16.
        on_done: Called after each network.
        cancelled: Set by another thread, it ends the fit with a KeyboardInterrupt.

    Returns:
        The best state of each, in the order of the tasks.
    """
    waiting = list(range(len(tasks)))
    results: dict[int, Fitted] = {}
    stack = _Stack(spec, min(slots, len(tasks)), generator.device)
    for slot in range(min(slots, len(tasks))):
        _start(stack, slot, slot, tasks[waiting.pop(0)](), spec, schedule, generator)
    every = max(1, schedule.steps // schedule.checks)
    quantize_at = int(schedule.steps * schedule.quantize_from) if spec.dtype == "int8" else schedule.steps + 1
    with torch.no_grad():
        while stack.tasks:
            if cancelled is not None and cancelled.is_set():
                raise KeyboardInterrupt
            for slot, step in enumerate(stack.step):
                if step == quantize_at:
                    fixed = siren.row_scales(stack.flat[slot : slot + 1], spec)
                    stack.steps[slot] = siren.expand_rows(fixed, spec)[0]
            _step(stack, spec, schedule, quantize_at, half)
            due = [slot for slot, step in enumerate(stack.step) if step % every == 0 or step == schedule.steps]
            if due:
                _check(stack, due, spec, quantize_at)
                for number, fitted, slot in _finished(stack, due, spec, schedule):
                    results[number] = fitted
                    if on_done is not None:
                        on_done()
                    if waiting:
                        _start(stack, slot, waiting[0], tasks[waiting.pop(0)](), spec, schedule, generator)
                    else:
                        stack.tasks[slot] = -1
                if -1 in stack.tasks:
                    stack.keep([slot for slot, task in enumerate(stack.tasks) if task >= 0])
    return [results[i] for i in range(len(tasks))]


def _start(stack: _Stack, slot: int, number: int, task: Task, spec: NetworkSpec, schedule: Schedule, generator: torch.Generator) -> None:
    stack.start(slot, number, task, _table(task, schedule, generator), siren.initialise(spec, generator, 1)[0])


def _table(task: Task, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """A task's pixels in random order, one row a step: `(rows, 7, pixels)` of x, y, r, g, b, weight, measured.

    No more rows than there are steps; the last row is filled up with pixels from the beginning, which are not measured twice.
    """
    count = task.points.shape[1]
    order = torch.randperm(count, generator=generator, device=generator.device)[: schedule.steps * schedule.pixels]
    pixels = min(schedule.pixels, count)
    rows = -(-len(order) // pixels)
    filled = order.repeat(2)[: rows * pixels] if rows > 1 else order
    measured = task.measured[filled].float()
    measured[len(order) :] = 0
    columns = torch.cat([task.points[:, filled], task.target[:, filled], task.weight[None, filled], measured[None]])
    if pixels < schedule.pixels:  # an area smaller than a step's pixels: every step sees all of it, padded with weight 0
        columns = torch.nn.functional.pad(columns, (0, schedule.pixels - pixels))
    return columns.view(7, rows, schedule.pixels).transpose(0, 1).contiguous()


def _step(stack: _Stack, spec: NetworkSpec, schedule: Schedule, quantize_at: int, half: bool) -> None:
    """One optimizer step of every slot."""
    rows = torch.stack([table[step % len(table)] for table, step in zip(stack.tables, stack.step, strict=True)])  # [S, 7, P]
    points, target, weight = rows[:, :2], rows[:, 2:5], rows[:, 5:6]
    quantized = [step >= quantize_at for step in stack.step]
    flat = stack.flat
    if any(quantized):
        stored = siren.round_as_stored(flat, spec, stack.steps)
        flat = stored if all(quantized) else torch.where(torch.tensor(quantized, device=flat.device)[:, None], stored, flat)
    stack.grad.zero_()
    slots, pixels = len(stack.tasks), schedule.pixels
    budget = CHUNK["cuda" if flat.is_cuda else "cpu"]
    many, wide = max(1, budget // pixels), min(pixels, budget)
    for i in range(0, slots, many):
        for j in range(0, pixels, wide):
            part = (slice(i, i + many), slice(None), slice(j, j + wide))
            siren.forward_backward(flat[i : i + many], spec, points[part], target[part], weight[part], stack.grad[i : i + many], half=half)
    _adam(stack, schedule)
    stack.step, stack.since = [step + 1 for step in stack.step], [since + 1 for since in stack.since]


def _adam(stack: _Stack, schedule: Schedule) -> None:
    """Adam with a step count and a cosine for each slot."""
    device = stack.flat.device
    rate, debias = [], []
    warm = max(1, round(WARM_UP * schedule.steps))
    for step, since, factor in zip(stack.step, stack.since, stack.rate, strict=True):
        lr = schedule.lr * factor * min(1.0, (since + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        rate.append(lr / (1 - BETA1 ** (since + 1)))
        debias.append(1 / (1 - BETA2 ** (since + 1)))
    size, correction = torch.tensor(rate, device=device)[:, None], torch.tensor(debias, device=device)[:, None]
    stack.mean.lerp_(stack.grad, 1 - BETA1)
    stack.square.mul_(BETA2).addcmul_(stack.grad, stack.grad, value=1 - BETA2)
    stack.flat.sub_(stack.mean * size / (stack.square * correction).sqrt_().add_(EPSILON))


def _check(stack: _Stack, due: list[int], spec: NetworkSpec, quantize_at: int) -> None:
    """Measure the PSNR of some slots as they would be stored, and keep what is better than before."""
    flat, scales = stack.flat[due], None
    if spec.dtype == "int8":
        # The largest weight of a row gives its step until the steps are fixed.
        fixed = torch.tensor([stack.step[slot] > quantize_at for slot in due], device=flat.device)[:, None]
        first_column = torch.tensor([0, *[c for r, c in spec.shapes for _ in range(r)][:-1]], device=flat.device).cumsum(0)
        scales = torch.where(fixed, stack.steps[due][:, first_column], siren.row_scales(flat, spec))
    stored = siren.round_as_stored(flat, spec, None if scales is None else siren.expand_rows(scales, spec))
    for k, slot in enumerate(due):
        psnr = _psnr(stored[k : k + 1], spec, stack.tables[slot], stack.scale[slot])
        if psnr > stack.psnr[slot]:
            stack.psnr[slot], stack.best[slot] = psnr, flat[k]
            if scales is not None:
                stack.scales[slot] = scales[k]
        elif not psnr >= stack.psnr[slot] - COLLAPSE:  # NaN too: nothing comes back from it
            stack.flat[slot], stack.since[slot], stack.rate[slot] = stack.best[slot], 0, stack.rate[slot] / 2
            stack.mean[slot].zero_(), stack.square[slot].zero_()


def _psnr(flat: Tensor, spec: NetworkSpec, table: Tensor, scale: float) -> float:
    pixels = table.shape[2]
    rows = table[: max(1, -(-CHECKED // pixels))]
    error, count = 0.0, 0.0
    budget = max(1, CHUNK["cuda" if flat.is_cuda else "cpu"] // pixels)
    for i in range(0, len(rows), budget):
        part = rows[i : i + budget].transpose(0, 1).reshape(1, 7, -1)
        wrong = (siren.forward(flat, spec, part[:, :2]) * part[:, 5:6] - part[:, 2:5]).square_() * part[:, 6:7]
        error, count = error + float(wrong.sum()), count + 3 * float(part[:, 6].sum())
    return psnr_of(error / count * scale**2) if count else -math.inf


def psnr_of(mean_squared_error: float) -> float:
    """PSNR in dB of an error where 1 is the full range; 99 for none at all."""
    return -10 * math.log10(max(mean_squared_error, 10**-9.9))


def _finished(stack: _Stack, due: list[int], spec: NetworkSpec, schedule: Schedule) -> list[tuple[int, Fitted, int]]:
    """The fits that are done: task, result and slot of each."""
    done = []
    for slot in due:
        if stack.psnr[slot] > stack.mark[slot] + 0.01:
            stack.mark[slot], stack.waited[slot] = stack.psnr[slot], 0
        else:
            stack.waited[slot] += stack.step[slot] > schedule.steps // 2
        if stack.psnr[slot] >= stack.stop[slot] or stack.step[slot] >= schedule.steps or stack.waited[slot] >= schedule.patience:
            scales = stack.scales[slot : slot + 1] if spec.dtype == "int8" else None
            weights = siren.to_bytes(stack.best[slot : slot + 1], spec, scales)[0]
            done.append((stack.tasks[slot], Fitted(weights, stack.psnr[slot], stack.step[slot]), slot))
    return done
