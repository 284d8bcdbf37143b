"""Packs that are made before a run: every row measured in tokens, shuffled, and packed window by window.

Knows which rows go together, not where they are written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from vistune.console import progress
from vistune.data.formats import Reader
from vistune.data.order import Permutation
from vistune.data.packing import pack
from vistune.data.processes import context, leave_with_parent
from vistune.data.tokenize import Language, tokenize
from vistune.data.writers.energon import Layout, not_packed
from vistune.samples import Fault, SampleError

_CHUNK = 256  # rows of one piece of work
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Measured:
    """Of every row: its tokens, 0 for a faulty one, and which packed layouts cannot hold it."""

    tokens: np.ndarray  # int32
    loose: np.ndarray  # bool: not for layout "packed"
    odd: np.ndarray  # bool: for no packed layout
    faults: dict[int, Fault]

    @property
    def good(self) -> np.ndarray:
        return (self.tokens > 0) & ~self.odd


@dataclass(frozen=True)
class _Measure:
    reader: Reader
    language: Language

    def __call__(self, rows: range) -> tuple[range, list[tuple[int, bool, bool]], dict[int, Fault]]:
        found, faults = [], {}
        for row in rows:
            try:
                sample = self.reader[row]
                tokens = len(tokenize(sample, self.language, _NO_LIMIT).ids)
            except SampleError as error:
                faults[row] = error.fault
                found.append((0, False, False))
                continue
            found.append((tokens, bool(not_packed(sample, "packed")), bool(not_packed(sample, "packed_turns"))))
        return rows, found, faults


_measure_here: _Measure | None = None  # a worker's own


def _start_worker(measure: _Measure) -> None:
    global _measure_here
    leave_with_parent()
    _measure_here = measure


def _in_worker(rows: range) -> Any:
    assert _measure_here is not None
    return _measure_here(rows)


def measure(reader: Reader, language: Language, workers: int) -> Measured:
    """Every row measured; what is held is six bytes a row, and the faults."""
    tokens = np.zeros(len(reader), np.int32)
    loose, odd = np.zeros(len(reader), np.bool_), np.zeros(len(reader), np.bool_)
    faults: dict[int, Fault] = {}
    each = _Measure(reader, language)
    with progress() as bar, closing(_map(each, len(reader), workers)) as pieces:
        task = bar.add_task("measure", total=len(reader))
        for rows, found, faulty in pieces:
            at = slice(rows.start, rows.stop)
            tokens[at], loose[at], odd[at] = zip(*found, strict=True)
            faults |= faulty
            bar.update(task, advance=len(rows))
    return Measured(tokens, loose, odd, faults)


def _map(measure: _Measure, total: int, workers: int) -> Generator[Any, None, None]:
    chunks = (range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK))
    if not workers:
        yield from map(measure, chunks)
        return
    with ProcessPoolExecutor(workers, context(), _start_worker, (measure,)) as pool:
        try:
            for batch in _batches(chunks, 8 * workers):
                yield from pool.map(_in_worker, batch)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(chunks: Iterator[range], size: int) -> Iterator[list[range]]:
    """A few chunks at a time, so that never all are in flight."""
    held: list[range] = []
    for chunk in chunks:
        held.append(chunk)
        if len(held) == size:
            yield held
            held = []
    yield held


def packs(measured: Measured, layout: Layout, room: int, seed: int, window: int) -> Iterator[list[int]]:
    """Rows of each pack: shuffled, cut into windows, packed within each."""
    total = len(measured.tokens)
    fits = measured.good & (measured.tokens <= room)
    if layout == "packed":
        fits &= ~measured.loose
    shuffled = Permutation(total, seed, "convert")
    for start in range(0, total, window):
        rows = shuffled(np.arange(start, min(start + window, total)))
        rows = rows[fits[rows]]
        for places in pack(measured.tokens[rows], room):
            yield [int(rows[place]) for place in places]
