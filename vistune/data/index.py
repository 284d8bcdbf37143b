"""The index: for every row of every source its tokens, images and faults, measured once and kept on disk.

Knows how long a sample is, never what is in it; the plan needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vistune.console import progress
from vistune.data.formats import Reader
from vistune.data.growing import COLUMNS, FORMAT, Faults, Growing, Measured, claimed, version_of
from vistune.data.processes import context, leave_with_parent
from vistune.data.tokenize import Language, tokenize
from vistune.samples import Fault, FaultCode, SampleError

CODES: tuple[FaultCode, ...] = get_args(FaultCode)
_MANY = 10_000
"""Faults that are read or looked at again at every start; a run with more of them hardly gets past the cap."""
_CHUNK = 1024  # rows of one piece of work: part of the hash, so it never depends on the machine


@dataclass(frozen=True, slots=True)
class Index:
    """Columns of equal length, one entry per row of every source (mapped from disk when the index is kept there)."""

    columns: dict[str, np.ndarray]
    faults: Sequence[Fault]
    hash: str  # of everything measured and of every token seen; a file that only moved has the same
    length: int
    folder: Path | None = field(default=None)

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __getattr__(self, name: str) -> np.ndarray:
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    def tokens(self, positions: np.ndarray) -> np.ndarray:
        """int32: length of the samples at these positions of the index."""
        return self.columns["text"][positions] + self.columns["image"][positions]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:  # another process maps the columns itself
            return open_index, (self.folder,)
        return Index, (self.columns, self.faults, self.hash, self.length)


def build_index(
    readers: Sequence[Reader], language: Language, length: int, cache: Path | None = None, *, workers: int = 0
) -> Index:
    """Measure every row of `readers`, or take what `cache` holds of the same files, tokenizer, template and layout.

    Rows that were set aside for their image are looked at again each time, since pictures get mended. A build that was
    killed is gone on with. With several ranks one builds and the others come after it.

    Raises ValueError for more sources than 65,535.
    """
    if len(readers) > np.iinfo(np.uint16).max:
        raise ValueError(f"data.sources: {len(readers)} sources, at most {np.iinfo(np.uint16).max} are possible")
    measure = _Measure(tuple(readers), language, length)
    if cache is None:
        growing = Growing(None, measure.rows, str(length))
        _fill(growing, measure, workers)
        return Index(growing.columns, growing.faults, growing.hash(), length)
    folder = Path(cache) / f"index-{_key(readers, language, length)[:16]}"
    checked = False
    while (version := version_of(folder)) is None or not (checked or not _mended(open_index(folder), measure)):
        with claimed(folder, version) as part:
            checked = part is not None and not _build(part, measure, workers)
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """The index kept in `folder`, its columns mapped and not read."""
    meta = json.loads((folder / "meta.json").read_text())
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    faults: Sequence[Fault] = Faults(folder / "faults.jsonl", meta["faults"])
    if len(faults) <= _MANY:
        faults = list(faults)
    return Index(columns, faults, meta["hash"], meta["length"], folder)


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures rows, here or in a worker."""

    readers: tuple[Reader, ...]
    language: Language
    length: int

    @property
    def rows(self) -> int:
        return sum(len(reader) for reader in self.readers)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(source, first row, one past the last), in index order."""
        for source, reader in enumerate(self.readers):
            for start in range(0, len(reader), _CHUNK):
                yield source, start, min(start + _CHUNK, len(reader))

    def __call__(self, chunk: tuple[int, int, int]) -> Measured:
        source, start, stop = chunk
        columns: dict[str, Any] = {name: np.zeros(stop - start, kind) for name, kind in COLUMNS.items()}
        columns["source"][:] = source
        columns["row"][:] = np.arange(start, stop)
        faults: list[Fault] = []
        seen = hashlib.sha256()
        for i, row in enumerate(range(start, stop)):
            try:
                tokens = tokenize(self.readers[source][row], self.language, self.length)
            except SampleError as error:
                faults.append(error.fault)
                columns["fault"][i] = 1 + CODES.index(error.fault.code)
                continue
            seen.update(tokens.ids.tobytes())
            seen.update(tokens.loss_mask.tobytes())
            image = sum(count for _, count in tokens.images)
            columns["text"][i] = len(tokens.ids) - image
            columns["image"][i] = image
            columns["supervised"][i] = tokens.supervised
            columns["images"][i] = len(tokens.images)
            columns["shortened"][i] = tokens.shortened
        return Measured(columns, faults, seen.digest())


def _fill(growing: Growing, measure: _Measure, workers: int) -> None:
    """Measure what is not measured yet, chunk by chunk; what is held is a few chunks a worker."""
    with progress() as bar:
        task = bar.add_task("index", total=measure.rows, completed=growing.rows)
        try:
            for part in _map(measure, islice(measure.chunks(), growing.chunks, None), workers):
                growing.add(part)
                bar.update(task, completed=growing.rows)
        finally:
            growing.close()


def _build(folder: Path, measure: _Measure, workers: int) -> bool:
    """Whether some of it was measured by an earlier build."""
    growing = Growing(folder, measure.rows, str(measure.length))
    resumed = growing.chunks > 0
    _fill(growing, measure, workers)
    faults = int(np.count_nonzero(growing.columns["fault"]))
    meta = {"format": FORMAT, "hash": growing.hash(), "length": measure.length, "rows": growing.rows, "faults": faults}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return resumed


_measure_here: _Measure | None = None  # a worker's own


def _start_worker(measure: _Measure) -> None:
    global _measure_here
    _measure_here = measure
    leave_with_parent()


def _in_worker(chunk: tuple[int, int, int]) -> Measured:
    assert _measure_here is not None
    return _measure_here(chunk)


def _map(measure: _Measure, chunks: Iterable[tuple[int, int, int]], workers: int) -> Iterator[Measured]:
    """`measure` of every chunk in order; a few chunks are in flight, never all."""
    if not workers:
        yield from map(measure, chunks)
        return
    measure.language.encoder.make_ready(whole=measure.language.template.own)
    with ProcessPoolExecutor(workers, context(), _start_worker, (measure,)) as pool:
        flying: deque[Future[Measured]] = deque()
        try:
            for chunk in chunks:
                flying.append(pool.submit(_in_worker, chunk))
                if len(flying) > 4 * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _key(readers: Sequence[Reader], language: Language, length: int) -> str:
    parts = [str(FORMAT), str(length), language.fingerprint(), *(reader.fingerprint() for reader in readers)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _mended(index: Index, measure: _Measure) -> bool:
    """Whether any row set aside for its image would now be taken; of very many, some from all over are looked at."""
    codes = [1 + CODES.index(code) for code in ("image_missing", "image_broken")]
    found = np.flatnonzero(np.isin(index.columns["fault"], codes))
    for position in found[:: len(found) // _MANY + 1]:
        source, row = int(index.columns["source"][position]), int(index.columns["row"][position])
        if not measure((source, row, row + 1)).faults:
            return True
    return False
