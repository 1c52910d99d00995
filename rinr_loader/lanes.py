"""The threads that fit a unit. What each does is decided before it runs, so results do not depend on how many there are.

Fits are dealt to a fixed number of lanes; each lane runs on one thread, one thread an operation, with a generator of its own.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from rinr_loader.bundle import NetworkSpec
from rinr_loader.decode import full_precision
from rinr_loader.errors import ConfigError
from rinr_loader.fit import CHUNK, Fitted, Schedule, Task, fit

LANES = {"cpu": 8, "cuda": 1}
SLOTS_CUDA = 64

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """Where a unit is fitted.

    Args:
        seed, unit: What all randomness is a function of.
        device: Where to fit.
        threads: Threads that share the work on a CPU.
        half: Fit with float16 matrix products.
    """

    def __init__(self, seed: int, unit: str, device: torch.device, threads: int, half: bool) -> None:
        self.seed, self.unit, self.device, self.half = seed, unit, device, half
        self.cancelled = threading.Event()
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator that is a function of the seed, the unit and a purpose alone."""
        digest = hashlib.sha256(repr((self.seed, self.unit, *purpose)).encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        futures = [self.pool.submit(function, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # an error ends all of them at once, not when those before it have finished
        return [future.result() for future in futures]

    def fit(
        self, tasks: Sequence[Callable[[], Task]], spec: NetworkSpec, schedule: Schedule, stage: str, on_done: Callable[[], None] | None = None
    ) -> list[Fitted]:
        """Fit tasks of one shape, dealt to the lanes one by one."""
        lanes = min(LANES[self.device.type], len(tasks))
        slots = SLOTS_CUDA if self.device.type == "cuda" else max(1, CHUNK["cpu"] // schedule.pixels)

        def lane(number: int) -> list[Fitted]:
            return fit(
                tasks[number::lanes],
                spec,
                schedule,
                generator=self.generator(stage, str(spec), number),
                slots=slots,
                half=self.half,
                on_done=on_done,
                cancelled=self.cancelled,
            )

        results: list[Fitted | None] = [None] * len(tasks)
        for number, fitted in enumerate(self.map(lane, range(lanes))):
            results[number::lanes] = fitted
        return [result for result in results if result is not None]


def check_device(device: torch.device | str) -> torch.device:
    """The device to encode on.

    Raises:
        ConfigError: It is neither a CPU nor CUDA, or not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: expected cpu or cuda, got {device!r}") from None
    if found.type not in LANES:
        raise ConfigError(f"device: expected cpu or cuda, got {found.type}; encode on the CPU")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one that is here, got {found}, of {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return found


@contextmanager
def running(lanes: Lanes) -> Iterator[None]:
    """Run a unit: one thread an operation, no gradients, and no fit left running when something goes wrong, Ctrl-C included."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with lanes.pool, torch.no_grad(), full_precision(lanes.device):
            try:
                yield
            except BaseException:
                lanes.cancelled.set()
                lanes.pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
