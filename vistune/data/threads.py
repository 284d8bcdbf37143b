"""Many waits at once: work that mostly waits for a network or a disk, spread over threads, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 4  # items handed out per thread, so that an endless iterator of items costs no memory


class Stopped(Exception):
    """The caller does not want it any more; what has arrived stays for the next call."""


def spread(work: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Event) -> Iterator[Result]:
    """`work(item)` of every item, in the order of finishing. What `work` raises is raised here.

    `stop` is set as soon as one of them fails, or the caller leaves early (Ctrl-C, an error, a closed iterator): `work`
    looks at it where it waits and raises Stopped, and nothing new is begun.
    """

    def alarmed(item: Item) -> Result:
        try:
            return work(item)
        except BaseException:
            stop.set()
            raise

    waiting: set[Future[Result]] = set()
    stopped = False
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for item in items:
                waiting.add(pool.submit(alarmed, item))
                if len(waiting) >= IN_FLIGHT * max(1, workers):
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from _results(done)
                    stopped = stop.is_set()
                if stopped:
                    break
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _results(done)
        finally:
            if waiting:
                stop.set()
            for future in waiting:
                future.cancel()
    if stop.is_set():
        raise Stopped


def _results(done: set[Future[Result]]) -> Iterator[Result]:
    """Those that only stopped because another failed are passed over: the other's error is the one to hear."""
    for future in done:
        if not isinstance(future.exception(), Stopped):
            yield future.result()
