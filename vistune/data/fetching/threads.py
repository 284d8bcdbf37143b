"""Many waits at once: work that mostly waits for a network or a disk, spread over threads, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 4  # items handed out per thread, so that an endless iterator of items costs no memory
FAREWELL = 1.0  # seconds that threads get to notice the end


class Stopped(Exception):
    """The caller does not want it any more; what has arrived stays for the next call."""


def spread(work: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Event) -> Iterator[Result]:
    """`work(item)` of every item, in the order of finishing. What `work` raises is raised here.

    `stop` is set as soon as one of them fails, or the caller leaves early (Ctrl-C, an error, a closed iterator): `work`
    looks at it before it writes and where it waits, and raises Stopped; nothing new is begun. A thread that hangs in a
    silent connection is left behind: it dies with the process, and can do no more than notice.
    """
    crew = _Crew(work, max(1, workers), stop)
    try:
        for item in items:
            crew.hand_out(item)
            if crew.in_flight >= IN_FLIGHT * len(crew.threads):
                yield from crew.take()
            if stop.is_set():
                break
        while crew.in_flight:
            yield from crew.take()
    finally:
        crew.leave()
    if stop.is_set():
        raise Stopped


class _Crew:
    """Threads, what they are to do, and what they have done."""

    def __init__(self, work: Callable[[Item], Result], workers: int, stop: Event):
        self.work, self.stop, self.in_flight = work, stop, 0
        self.todo: SimpleQueue = SimpleQueue()
        self.done: SimpleQueue = SimpleQueue()
        self.threads = [Thread(target=self._run, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def hand_out(self, item: object) -> None:
        self.in_flight += 1
        self.todo.put((item,))

    def take(self) -> Iterator:
        """The next result. What only stopped because another failed is passed over: that error is raised."""
        result, error = self.done.get()
        self.in_flight -= 1
        if error is None:
            yield result
        elif not isinstance(error, Stopped):
            raise error

    def leave(self) -> None:
        if self.in_flight:
            self.stop.set()
        for _ in self.threads:
            self.todo.put(None)
        until = monotonic() + FAREWELL
        for thread in self.threads:
            thread.join(max(0.0, until - monotonic()))

    def _run(self) -> None:
        while (handed := self.todo.get()) is not None:
            try:
                if self.stop.is_set():
                    raise Stopped
                self.done.put((self.work(handed[0]), None))
            except BaseException as error:  # noqa: BLE001 - raised again by `take`
                self.stop.set()
                self.done.put((None, error))
