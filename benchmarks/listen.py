"""Listening to a stage of vistune from outside: when a step begins and ends, and what it is given.

Two methods of its loop are wrapped and nothing else, so what is timed is what users run. Knows no contender.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vistune.data.batch import Batch
from vistune.train.loop import Loop


class Listener:
    """Hears a run of the loop. Steps are counted from 0, from the first one of this process."""

    def run_begins(self, loop: Loop) -> None: ...
    def given(self, batches: list[Batch]) -> None: ...
    def step_begins(self, number: int) -> None: ...
    def step_ends(self, number: int) -> None: ...
    def run_ends(self) -> None: ...

    def passing(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same steps, each heard when it is taken."""
        for batches in steps:
            self.given(batches)
            yield batches


@contextmanager
def attached(listener: Listener) -> Iterator[None]:
    """Every loop that runs inside is heard by `listener`; an error that it raises ends the run."""
    run, step, count = Loop.run, Loop.step, iter(range(1 << 62))

    def heard_run(self: Loop, steps: Iterator[list[Batch]], *given: Any, **named: Any) -> Any:
        listener.run_begins(self)
        got = run(self, listener.passing(steps), *given, **named)
        listener.run_ends()
        return got

    def heard_step(self: Loop, *given: Any, **named: Any) -> Any:
        number = next(count)
        listener.step_begins(number)
        got = step(self, *given, **named)
        listener.step_ends(number)
        return got

    Loop.run, Loop.step = heard_run, heard_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop.run, Loop.step = run, step  # type: ignore[method-assign]
