"""Calls of a function in several processes or threads at the same time."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.shared.processes import end_with

Result = TypeVar("Result")


@dataclass(frozen=True)
class Writers:
    """How many files one worker writes at the same time. One is enough for a runner that has many workers."""

    processes: int = 1
    threads: int = 1
    """Threads in the worker's own process. Used only if `processes` is 1."""


def local_writers(processes: int) -> Writers:
    """Returns writers that use all of this machine. Threads suffice: hashing, reading and writing release Python's lock."""
    return Writers(processes, min(os.cpu_count() or 1, 8))


def make_pool(writers: Writers) -> Executor | None:
    """Returns what makes as many calls at the same time as there are writers; None if there is one, in this thread."""
    if writers.processes > 1:
        # Forked processes start at once and share memory. Forking is safe on Linux only.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        return ProcessPoolExecutor(writers.processes, context, _begin_worker, (os.getpid(),))
    return ThreadPoolExecutor(writers.threads) if writers.threads > 1 else None


def in_parallel(writers: Writers, function: Callable[..., Result], calls: Iterable[tuple]) -> Iterator[Result]:
    """Yields the result of `function` for the arguments of each call, in order. Takes few calls in advance.

    After a failure or an interrupt, the calls that have not begun are cancelled.
    """
    pool = make_pool(writers)
    if pool is None:
        for arguments in calls:
            yield function(*arguments)
        return
    pending: deque[Future[Any]] = deque()
    try:
        for arguments in calls:
            pending.append(pool.submit(function, *arguments))
            if len(pending) > 2 * max(writers.processes, writers.threads):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Prepares a worker process: it ends with `parent`, which alone answers what a terminal sends to both."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent, lambda: os._exit(1))
