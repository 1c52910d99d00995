"""Work ahead of the consumer: jobs run on threads, results come in order, and nothing is left behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(jobs: Iterator[Callable[[], T]], *, threads: int, depth: int) -> Generator[T, None, None]:
    """Run jobs on threads, at most `depth` ahead of the consumer, and yield their results in order.

    Args:
        jobs: What to run; taken one by one as places become free.
        threads: Threads that run them; with 0 each job runs when its result is asked for.
        depth: Results that may wait.

    Yields:
        The jobs' results. An error of a job is raised when its turn comes.
    """
    if threads <= 0:
        for job in jobs:
            yield job()
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rinr-read")
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also where the consumer stops early and closes the generator
        pool.shutdown(wait=True, cancel_futures=True)
