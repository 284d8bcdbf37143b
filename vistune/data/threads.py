"""Many waits at once: work that mostly waits for a network or a disk, spread over threads, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 4  # items handed out per thread, so that an endless iterator of items costs no memory


def spread(work: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Event) -> Iterator[Result]:
    """`work(item)` of every item, in the order of finishing. What `work` raises is raised here.

    `stop` is set as soon as the caller leaves early (Ctrl-C, an error, a closed iterator): `work` looks at it where it
    waits, and nothing new is begun.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: set[Future[Result]] = set()
        try:
            for item in items:
                waiting.add(pool.submit(work, item))
                if len(waiting) >= IN_FLIGHT * max(1, workers):
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from [future.result() for future in done]
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done]
        finally:
            if waiting:
                stop.set()
            for future in waiting:
                future.cancel()
