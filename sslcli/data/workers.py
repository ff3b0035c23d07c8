"""Work on many images in several processes, in order, with a bounded number under way."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sslcli.errors import SslError

T = TypeVar("T")
R = TypeVar("R")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1


def each(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of every task, in order: here (`workers` 0), or in so many processes that start afresh.

    Raises:
        SslError: a process died.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    waiting: deque[Future[R]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(work,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_held, task))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise SslError("a process died: out of memory?", hint="try fewer, e.g. `--workers 1`") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_work: Callable[[Any], Any] = repr


def _hold(work: Callable[[Any], Any]) -> None:
    """Keep what a process does, so that it travels there once and not with every task."""
    global _work
    _work = work


def _held(task: Any) -> Any:
    return _work(task)
