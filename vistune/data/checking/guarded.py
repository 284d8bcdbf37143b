"""Work in processes that may hang or die: the task that did it is named, and all the others are done.

Knows nothing of what the work is.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from vistune.data.processes import context

START = 60.0
"""Seconds in which a new process says that it is up, twice as many at each further try: one that is forked beside other
threads may, rarely, never come up."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Stands for the result of a task whose process had to be stopped, or died."""

    slow: bool
    reason: str


def run(
    work: Callable[[Any], Any],
    batches: Iterable[tuple[Any, Sequence[Any]]],
    *,
    workers: int,
    seconds: float | None = None,
) -> Iterator[tuple[Any, list[Any]]]:
    """(key, results in order) of every (key, tasks), in the order in which they get ready.

    A task that takes more than `seconds` is stopped and its result is `Lost`, as for one whose process dies. An error
    that `work` raises ends everything and is raised here. At least one process is started: this one must not die.
    """
    source = iter(batches)
    pool = [_Worker(work) for _ in range(max(1, workers))]
    try:
        for worker in pool:
            worker.take(source)
        while busy := [worker for worker in pool if worker.busy]:
            watched: list[Any] = [worker.pipe for worker in busy]
            patient = seconds is None and all(worker.began is not None for worker in busy)
            wait(watched + [worker.process.sentinel for worker in busy], timeout=None if patient else 0.1)
            for worker in busy:
                worker.collect(seconds)
                if worker.done:
                    yield worker.key, worker.results
                    worker.take(source)
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """One process and what it has been given."""

    def __init__(self, work: Callable[[Any], Any]):
        self.work = work
        self.key: Any = None
        self.tasks: Sequence[Any] = ()
        self.results: list[Any] = []
        self.busy = False
        self.patience = START
        self.start()

    def start(self) -> None:
        self.pipe, theirs = context().Pipe()
        self.process: Any = context().Process(  # type: ignore[attr-defined]  # only its subclasses have it
            target=_serve, args=(theirs, self.pipe, self.work), daemon=True
        )
        self.process.start()
        theirs.close()
        self.born = time.monotonic()
        self.began: float | None = None  # until it says that it is up, its time does not count

    def take(self, source: Iterator[tuple[Any, Sequence[Any]]]) -> None:
        """The next batch of `source`, if there is one."""
        self.busy = False
        for self.key, self.tasks in source:
            self.results, self.busy = [], True
            self.give()
            return

    def give(self) -> None:
        """Send the tasks that are left; the time of the first begins now, if the process is up."""
        if self.began is not None:
            self.began = time.monotonic()
        if not self.done:
            self.pipe.send(self.tasks[len(self.results) :])

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.tasks)

    def collect(self, seconds: float | None) -> None:
        """Whatever has come; puts `Lost` for the task in work when its process is dead or too slow."""
        if not self._drain() and not self.done:
            self.process.join(5)
            self._lose(Lost(False, f"the process that worked on it died (exit code {self.process.exitcode})"))
        elif self.began is None and time.monotonic() - self.born > self.patience:
            self.patience *= 2
            self._renew()
        elif seconds is not None and self.began is not None and time.monotonic() - self.began > seconds:
            self._lose(Lost(True, f"not done after {seconds:g} s"))

    def _drain(self) -> bool:
        """Take what is in the pipe; False when its other end is gone."""
        while not self.done:
            try:
                if not self.pipe.poll():
                    return self.process.is_alive()
                kind, value = self.pipe.recv()
            except (EOFError, OSError):
                return False
            self.began = time.monotonic()
            if kind == "error":
                raise value
            if kind == "result":
                self.results.append(value)
        return True

    def _lose(self, lost: Lost) -> None:
        self.results.append(lost)
        self._renew()

    def _renew(self) -> None:
        self.stop()
        self.start()
        self.give()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, parents: Connection, work: Callable[[Any], Any]) -> None:
    """The process's life: tasks in, results out, until the parent is gone."""
    parents.close()  # else this process would hold open what tells it that the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        pipe.send(("up", None))
        while True:
            for task in pipe.recv():
                try:
                    result = ("result", work(task))
                except Exception as error:  # noqa: BLE001 - raised again in the parent
                    result = ("error", error)
                pipe.send(result)
    except (EOFError, ConnectionError):
        return  # the parent is gone
