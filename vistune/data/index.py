"""The index: for every row of every source its tokens, images and faults, measured once and kept on disk.

Knows how long a sample is, never what is in it; the plan needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vistune.console import progress
from vistune.data.formats import Reader
from vistune.data.processes import context
from vistune.data.tokenize import Language, tokenize
from vistune.samples import Fault, FaultCode, SampleError

COLUMNS: dict[str, type] = {
    "source": np.uint16,  # number of the source, in the order of the recipe
    "row": np.int64,  # within the source
    "text": np.int32,  # tokens, images apart
    "image": np.int32,  # placeholders
    "supervised": np.int32,  # targets
    "images": np.uint16,
    "fault": np.uint8,  # 0: none, else 1 + the code's place in CODES
    "shortened": np.bool_,
}
CODES: tuple[FaultCode, ...] = get_args(FaultCode)
_FORMAT = 1  # of the folder; raised when the columns or what is measured change
_CHUNK = 1024  # rows of one piece of work: part of the hash, so it never depends on the machine


@dataclass(frozen=True, slots=True)
class Index:
    """Columns of equal length, one entry per row of every source (mapped from disk when the index is kept there)."""

    columns: dict[str, np.ndarray]
    faults: list[Fault]
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

    Rows that were set aside for their image are looked at again each time, since pictures get mended. With several
    ranks one builds and the others come after it. Raises ValueError for more sources than 65,535.
    """
    if len(readers) > np.iinfo(np.uint16).max:
        raise ValueError(f"data.sources: {len(readers)} sources, at most {np.iinfo(np.uint16).max} are possible")
    measure = _Measure(tuple(readers), language, length)
    if cache is None:
        return _measured(measure, None, workers)
    folder = Path(cache) / f"index-{_key(readers, language, length)[:16]}"
    if _is_whole(folder):
        index = open_index(folder)
        if not _mended(index, measure):
            return index
    with _beside(folder) as new:
        _measured(measure, new, workers)
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """The index kept in `folder`, its columns mapped and not read."""
    meta = json.loads((folder / "meta.json").read_text())
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    with open(folder / "faults.jsonl", encoding="utf-8") as lines:
        faults = [Fault(**json.loads(line)) for line in lines]
    return Index(columns, faults, meta["hash"], meta["length"], folder)


@dataclass(frozen=True, slots=True)
class _Measured:
    columns: dict[str, np.ndarray]
    faults: list[Fault]
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures rows, here or in a worker."""

    readers: tuple[Reader, ...]
    language: Language
    length: int

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(source, first row, one past the last), in index order."""
        for source, reader in enumerate(self.readers):
            for start in range(0, len(reader), _CHUNK):
                yield source, start, min(start + _CHUNK, len(reader))

    def __call__(self, chunk: tuple[int, int, int]) -> _Measured:
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
        return _Measured(columns, faults, seen.digest())


def _measured(measure: _Measure, folder: Path | None, workers: int) -> Index:
    """Fill the columns chunk by chunk, on disk when there is a folder: what is held is one chunk a worker."""
    total = sum(len(reader) for reader in measure.readers)
    columns: dict[str, Any] = {name: _column(folder, name, total) for name in COLUMNS}
    faults: list[Fault] = []
    seen = hashlib.sha256(f"{_FORMAT} {measure.length}".encode())
    at = 0
    with progress() as bar:
        task = bar.add_task("index", total=total)
        for part in _map(measure, measure.chunks(), workers):
            rows = len(part.columns["row"])
            for name, column in columns.items():
                column[at : at + rows] = part.columns[name]
                seen.update(part.columns[name].tobytes())
            seen.update(part.digest)
            faults += part.faults
            at += rows
            bar.update(task, advance=rows)
    if folder is not None:
        for column in columns.values():
            column.flush()
        lines = "".join(json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults)
        (folder / "faults.jsonl").write_text(lines, encoding="utf-8")
        meta = {"format": _FORMAT, "hash": seen.hexdigest(), "length": measure.length, "rows": total}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return Index(columns, faults, seen.hexdigest(), measure.length)


def _column(folder: Path | None, name: str, rows: int) -> np.ndarray:
    if folder is None:
        return np.zeros(rows, COLUMNS[name])
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=COLUMNS[name], shape=(rows,))


_measure_here: _Measure | None = None  # a worker's own


def _start_worker(measure: _Measure) -> None:
    global _measure_here
    _measure_here = measure


def _in_worker(chunk: tuple[int, int, int]) -> _Measured:
    assert _measure_here is not None
    return _measure_here(chunk)


def _map(measure: _Measure, chunks: Iterable[tuple[int, int, int]], workers: int) -> Iterator[_Measured]:
    """`measure` of every chunk in order; a few chunks are in flight, never all."""
    if not workers:
        yield from map(measure, chunks)
        return
    with ProcessPoolExecutor(workers, context(), _start_worker, (measure,)) as pool:
        flying: deque[Future[_Measured]] = deque()
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
    parts = [str(_FORMAT), str(length), language.fingerprint(), *(reader.fingerprint() for reader in readers)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / "meta.json").read_text())["format"] == _FORMAT
    except (OSError, ValueError, KeyError):
        return False


def _mended(index: Index, measure: _Measure) -> bool:
    """Whether any row set aside for its image would now be taken."""
    codes = [1 + CODES.index(code) for code in ("image_missing", "image_broken")]
    for position in np.flatnonzero(np.isin(index.columns["fault"], codes)):
        source, row = int(index.columns["source"][position]), int(index.columns["row"][position])
        if not measure((source, row, row + 1)).faults:
            return True
    return False


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the name `folder` when everything went well, and is gone when not."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old := folder.with_name(f".{folder.name}.old.{os.getpid()}"))
            os.replace(new, folder)
            shutil.rmtree(old)
        else:
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
