"""Worker processes: a function over many things, and an end that follows the parent's."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """`function` of each item, in order.

    Whatever ends it early (an error, Ctrl-C, a caller that takes no more) ends the workers at once,
    in the middle of an item.

    Args:
      function: pickled, once for each process.
      items: read only a little ahead of the results.
      workers: processes; with 0 or 1 all happens in this one.

    Raises:
      ChildProcessError: a process was killed, by want of memory for instance.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # A fork of a process that has threads (JAX has) may hang.
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: a worker ends when the other end is closed, here or with this process.
    stop, running = context.Pipe(duplex=False)
    pending: collections.deque[Future[Result]] = collections.deque()
    with (
        stop,
        running,
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=_keep, initargs=(function, stop)
        ) as pool,
    ):
        try:
            for item in items:
                pending.append(pool.submit(_call, item))
                if len(pending) >= 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps for want of memory; "
                "use fewer workers and start again"
            ) from error
        except BaseException:
            running.close()
            raise


_function: list[Callable[[Any], Any]] = []


def _keep(function: Callable[[Any], Any], stop: Connection) -> None:
    # Ctrl-C reaches every process of a terminal; it is for the parent to answer it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _exit_when_ready(stop)
    _function[:] = [function]


def _call(item: Any) -> Any:
    return _function[0](item)


def end_with_parent() -> None:
    """Called in a worker process: lets it end with its parent, even when that is killed.

    Otherwise the worker would wait for ever for somebody to read its results.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        _exit_when_ready(parent.sentinel)


def _exit_when_ready(end: Connection | int) -> None:
    def watch() -> None:
        wait([end])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
