"""Work ahead: order, errors, how far ahead, and that nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from rinr_loader.pipeline import ahead


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_order(threads: int) -> None:
    pause = threading.Event()

    def job(number: int) -> int:
        if number == 0 and threads > 1:
            assert pause.wait(10), "a later job runs while the first one waits"
        pause.set()
        return number

    jobs = iter([partial(job, number) for number in range(20)])
    assert list(ahead(jobs, threads=threads, depth=3)) == list(range(20))


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_when_its_turn_comes(threads: int) -> None:
    def fail() -> int:
        raise KeyError("third")

    results = ahead(iter([lambda: 1, lambda: 2, fail, lambda: 4]), threads=threads, depth=4)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(results)


@pytest.mark.parametrize(("threads", "depth", "most"), [(0, 5, 1), (1, 1, 2), (2, 3, 4)])
def test_no_more_than_depth_jobs_are_ahead(threads: int, depth: int, most: int) -> None:
    taken = 0

    def jobs() -> Iterator[Callable[[], int]]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield partial(int, number)

    results = ahead(jobs(), threads=threads, depth=depth)
    for given in range(5):
        next(results)
        assert taken <= given + most


def test_closing_early_ends_the_threads_and_runs_nothing_more() -> None:
    before = threading.active_count()
    ran: list[int] = []
    results = ahead(iter([partial(ran.append, number) for number in range(100)]), threads=2, depth=4)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(ran) <= 6
