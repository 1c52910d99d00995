"""Work ahead of the consumer: order, depth, errors, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rinr_loader.pipeline import ahead


def numbered(count: int, log: list[int] | None = None, *, delay: float = 0.0) -> Iterator[Callable[[], int]]:
    """Jobs that return their number; `log` collects those that were taken."""

    def job(i: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep(delay * (i % 3))
            return i

        return run

    for i in range(count):
        if log is not None:
            log.append(i)
        yield job(i)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("depth", [0, 1, 4, 100])
def test_results_are_in_order(threads: int, depth: int) -> None:
    assert list(ahead(numbered(12, delay=0.004), threads=threads, depth=depth)) == list(range(12))
    assert list(ahead(numbered(0), threads=threads, depth=depth)) == []


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (2, 3), (4, 2), (2, 0)])
def test_no_more_than_depth_results_wait(threads: int, depth: int) -> None:
    taken: list[int] = []
    results = ahead(numbered(20, taken), threads=threads, depth=depth)
    assert not taken  # nothing runs before the first result is asked for
    for i, result in enumerate(results):
        assert result == i
        assert len(taken) == min(20, i + 1 + depth)


def test_without_threads_a_job_runs_when_its_result_is_asked_for() -> None:
    taken: list[int] = []
    results = ahead(numbered(5, taken), threads=0, depth=9)
    for i in range(5):
        assert next(results) == i
        assert taken == list(range(i + 1))


def test_jobs_run_side_by_side() -> None:
    barrier = threading.Barrier(3)
    jobs = [lambda: barrier.wait(timeout=10)] * 3
    assert sorted(ahead(iter(jobs), threads=3, depth=3)) == [0, 1, 2]


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_when_it_is_its_turn(threads: int) -> None:
    def broken() -> int:
        raise OSError("gone")

    jobs = [*numbered(3), broken, *numbered(3)]
    results = ahead(iter(jobs), threads=threads, depth=6)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(results)
    assert list(results) == []  # and it is the end


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_the_source_of_jobs_reaches_the_consumer(threads: int) -> None:
    def jobs() -> Iterator[Callable[[], int]]:
        yield from numbered(2)
        raise ValueError("no more")

    results = ahead(jobs(), threads=threads, depth=0)
    assert next(results) == 0
    with pytest.raises(ValueError, match="no more"):
        list(results)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_closing_early_stops_the_threads(threads: int, after: int) -> None:
    ran: list[int] = []

    def job(i: int) -> Callable[[], int]:
        return lambda: ran.append(i) or i  # type: ignore[func-returns-value]

    results = ahead((job(i) for i in range(1000)), threads=threads, depth=4)
    for _ in range(after):
        next(results)
    results.close()  # type: ignore[attr-defined]
    count = len(ran)
    assert count <= after + 5
    time.sleep(0.02)
    assert len(ran) == count
