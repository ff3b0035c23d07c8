"""Work on many images in several processes, in order, with a bounded number under way."""

import multiprocessing
import os
import signal
import threading
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
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_held, task))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise SslError("a process died: out of memory?", hint="try fewer, e.g. `--workers 1`") from error
        except BaseException:  # whoever leaves does not want what is under way
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


_work: Callable[[Any], Any] = repr


def _begin(work: Callable[[Any], Any]) -> None:
    """Keep what a process does, so that it travels there once and not with every task; leave Ctrl-C to the parent."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only spawned processes come here"
    parent.join()
    os._exit(1)


def _held(task: Any) -> Any:
    return _work(task)
