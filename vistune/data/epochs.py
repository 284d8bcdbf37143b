"""What is worked out once for a whole epoch and kept beside the index, so that all ranks and later starts map it.

Knows files and processes; what is worked out is up to the plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from vistune import console
from vistune.data.processes import context, leave_with_parent

Measure = Callable[[int], Sequence[int]]

_WORTH_PROCESSES = 16  # pieces of work, of a tenth of a second or two each


def kept(folder: Path | None, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array `name` of `folder`, mapped; made and written there first if need be. Without a folder it is held.

    `name` has to say everything that the array depends on. Written beside and renamed, so several may try at once.
    """
    if folder is None:
        return make()
    file = folder / f"{name}.npy"
    found = _mapped(file)
    if found is not None:
        return found
    made = make()
    try:
        _write(file, made)
    except OSError as error:
        console.warn(f"{file}: cannot be written ({error.strerror or error}); it will be worked out at every start")
        return made
    return made if (found := _mapped(file)) is None else found


def measured(measure: Measure, pieces: Sequence[int], width: int, title: str, workers: int) -> np.ndarray:
    """int64 [pieces, width]: `measure(piece)` of each, with a progress bar, in processes where that is worth it."""
    rows = np.zeros((len(pieces), width), np.int64)
    workers = min(workers, os.cpu_count() or 1) if len(pieces) >= _WORTH_PROCESSES else 0
    with console.progress() as bar:
        task = bar.add_task(title, total=len(pieces))
        for at, row in enumerate(_each(measure, pieces, workers)):
            rows[at] = row
            bar.update(task, advance=1)
    return rows


def _each(measure: Measure, pieces: Sequence[int], workers: int) -> Iterator[Sequence[int]]:
    if workers < 2:
        yield from map(measure, pieces)
        return
    with ProcessPoolExecutor(workers, context(), _start_worker, (measure,)) as pool:
        try:
            yield from pool.map(_in_worker, pieces, chunksize=max(1, min(8, len(pieces) // (4 * workers))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_measure_here: Measure | None = None  # a worker's own


def _start_worker(measure: Measure) -> None:
    global _measure_here
    leave_with_parent()
    _measure_here = measure


def _in_worker(piece: int) -> Sequence[int]:
    assert _measure_here is not None
    return _measure_here(piece)


def _mapped(file: Path) -> np.ndarray | None:
    """None for a file that is not there or not whole."""
    try:
        found: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found


def _write(file: Path, array: np.ndarray) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(new, "wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
