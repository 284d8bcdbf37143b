"""One pass over the rows of a reader: a few numbers of every row, measured in parallel, in the order of the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from vistune.console import progress
from vistune.data.formats import Reader
from vistune.data.processes import context, leave_with_parent
from vistune.samples import Sample, SampleError

_CHUNK = 4096

Measure = Callable[[Sample], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a step may ask of the rows it works on. `label` is the progress bar's."""

    reader: Reader
    label: str
    workers: int = 0

    def __len__(self) -> int:
        return len(self.reader)

    def __call__(self, measure: Measure, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [rows, width], bool [rows]): what `measure` says of every sample, and which rows cannot be used.

        `measure` gives `width` numbers that fit 64 bits with a sign, and must be fit to be sent to another process.
        """
        values = np.zeros((len(self), width), np.int64)
        unusable = np.zeros(len(self), np.bool_)
        look = _Look(self.reader, measure, width)
        with progress() as bar:
            task = bar.add_task(f"{self.reader.name}: {self.label}", total=len(self))
            for start, (numbers, bad) in zip(range(0, len(self), _CHUNK), self._chunks(look), strict=True):
                values[start : start + len(bad)] = numbers
                unusable[start : start + len(bad)] = bad
                bar.update(task, advance=len(bad))
        return values, unusable

    def _chunks(self, look: _Look) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunk after chunk in order; a few are in flight, never all."""
        starts = range(0, len(self), _CHUNK)
        if not self.workers or len(self) <= _CHUNK:
            yield from map(look, starts)
            return
        with ProcessPoolExecutor(self.workers, context(), _start_worker, (look,)) as pool:
            flying: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
            try:
                for start in starts:
                    flying.append(pool.submit(_in_worker, start))
                    if len(flying) > 4 * self.workers:
                        yield flying.popleft().result()
                while flying:
                    yield flying.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Look:
    """Measures the chunk that begins at a row, here or in a worker."""

    reader: Reader
    measure: Measure
    width: int

    def __call__(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = range(start, min(start + _CHUNK, len(self.reader)))
        values = np.zeros((len(rows), self.width), np.int64)
        unusable = np.zeros(len(rows), np.bool_)
        for i, row in enumerate(rows):
            try:
                values[i] = self.measure(self.reader[row])
            except SampleError:
                unusable[i] = True
        return values, unusable


_look_here: _Look | None = None  # a worker's own


def _start_worker(look: _Look) -> None:
    global _look_here
    leave_with_parent()
    _look_here = look


def _in_worker(start: int) -> tuple[np.ndarray, np.ndarray]:
    assert _look_here is not None
    return _look_here(start)
