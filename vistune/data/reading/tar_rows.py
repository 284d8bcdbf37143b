"""The rows of a dataset of tar shards: for every row its shard and bytes, found once, kept in a file that is mapped.

24 bytes a row, whatever is in it; shards are looked at in parallel, one at a time in each process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vistune import files
from vistune.console import progress, warn
from vistune.data.processes import context, leave_with_parent
from vistune.data.reading.nv_meta import Kind
from vistune.data.reading.tar import Files, TarError, members, read_index, scan, split_name
from vistune.data.reading.tar_samples import Misread, Raw, count, is_picture, recognise

ROW = np.dtype([("shard", "<u4"), ("sub", "<u4"), ("start", "<u8"), ("stop", "<u8")])
"""Number of the shard, of the sub-sample, and the bytes of the sample in the tar."""

_FORMAT = 1
_AT_ONCE = 64 << 20  # bytes of a sample that are fetched in one request
_FEW = 8  # shards that are looked at here, without starting processes


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of the dataset. `count`: how many samples the dataset says it has; `excluded`: keys left out."""

    name: str
    path: str
    count: int | None = None
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rows:
    """All rows, mapped when they lie in `file`; `samples[i]` and `of_shard[i]`: samples and rows of shard i."""

    table: np.ndarray
    samples: np.ndarray
    of_shard: np.ndarray
    file: Path | None

    def at(self, sample: int) -> int:
        """The row where a sample begins, counted over all shards; one past the last row for one past the last."""
        ends = np.cumsum(self.samples)
        shard = int(np.searchsorted(ends, sample, side="right"))
        if shard == len(ends):
            return len(self.table)
        first = int(self.of_shard[:shard].sum())
        subs = self.table["sub"][first : first + int(self.of_shard[shard])]
        return first + int(np.flatnonzero(subs == 0)[sample - int(ends[shard] - self.samples[shard])])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            return Rows, (self.table, self.samples, self.of_shard, None)
        return _remapped, (self.samples, self.of_shard, self.file)  # another process maps the file itself


@dataclass(frozen=True, slots=True)
class _Found:
    table: np.ndarray
    samples: int
    scanned: bool
    open_end: bool


def open_rows(shards: Sequence[Shard], kind: Kind, look: Kind | None, facts: Sequence[str], cache: Path | None) -> Rows:
    """The rows of `shards`, as `cache` keeps them or found anew.

    `look`: what a sample of each looks like, where that can be told; `facts`: what changes when a shard does. Raises
    ValueError naming the shard: torn, index and tar apart, other number of samples than told, other look.
    """
    if cache is None:
        found = list(_each(shards, kind, look))
        table = np.concatenate([one.table for one in found])
        return _rows(table, [one.samples for one in found], [len(one.table) for one in found], None)
    told = json.dumps([_FORMAT, kind, look, list(facts), [(s.name, s.count, sorted(s.excluded)) for s in shards]])
    file = Path(cache) / f"tar-rows-{hashlib.sha256(told.encode()).hexdigest()[:16]}.bin"
    about = file.with_suffix(".json")
    if not about.exists():
        _write(file, about, _each(shards, kind, look))
    meta = json.loads(about.read_text())
    return _rows(_mapped(file), meta["samples"], meta["rows"], file)


def raw_sample(shard: str, opened: Files, start: int, stop: int) -> Raw:
    """The sample that begins at byte `start` of the tar `shard`. Raises TarError, OSError.

    From afar it comes in one piece, of which all but the pictures is kept: a request costs more than bytes.
    """
    whole = opened.read(shard, start, stop - start) if files.is_remote(shard) and stop - start <= _AT_ONCE else None

    def piece(first: int, count: int) -> bytes:
        return opened.read(shard, first, count) if whole is None else whole[first - start : first - start + count]

    parts, key = {}, ""
    for member in members(shard, piece, start, stop):
        named = split_name(member.name)
        if named is None:
            continue
        if key and named[0] != key:
            break  # an index may leave out a sample
        key, part = named
        if part in parts:
            raise TarError(f"{shard}: byte {member.header}: two members {member.name!r} in one sample")
        parts[part] = member
    if not key:
        raise TarError(f"{shard}: byte {start}: no sample begins there. Fetch the shard and its .idx again")
    if whole is None:
        return Raw(shard, key, parts, lambda member: opened.read(shard, member.start, member.size))
    kept = {member: piece(member.start, member.size) for part, member in parts.items() if not is_picture(part)}
    return Raw(shard, key, parts, lambda member: kept.get(member) or opened.read(shard, member.start, member.size))


def _rows(table: np.ndarray, samples: Iterable[int], rows: Iterable[int], file: Path | None) -> Rows:
    return Rows(table, np.array(list(samples), np.int64), np.array(list(rows), np.int64), file)


def _remapped(samples: np.ndarray, of_shard: np.ndarray, file: Path) -> Rows:
    return Rows(_mapped(file), samples, of_shard, file)


def _mapped(file: Path) -> np.ndarray:
    return np.memmap(file, ROW, "r") if file.stat().st_size else np.zeros(0, ROW)


def _write(file: Path, about: Path, found: Iterable[_Found]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside, samples, rows = file.with_suffix(f".{os.getpid()}"), [], []
    try:
        with open(beside, "wb") as out:
            for one in found:
                one.table.tofile(out)
                samples.append(one.samples)
                rows.append(len(one.table))
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    beside.write_text(json.dumps({"samples": samples, "rows": rows}))
    os.replace(beside, about)


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    shard: Shard
    kind: Kind
    look: Kind | None


def _each(shards: Sequence[Shard], kind: Kind, look: Kind | None) -> Iterator[_Found]:
    """What is found in each shard, in order."""
    jobs = [_Job(i, shard, kind, look) for i, shard in enumerate(shards)]
    scanned, open_end = [], []
    with progress() as bar:
        task = bar.add_task("shards", total=len(shards))
        for shard, one in zip(shards, _run(jobs), strict=True):
            scanned += [shard.path] if one.scanned else []
            open_end += [shard.path] if one.open_end else []
            bar.update(task, advance=1)
            yield one
    if scanned:
        warn(f"{len(scanned)} shard(s) have no .idx, such as {scanned[0]}: their samples were found by scanning. "
             "`energon prepare --tar-index-only DIR` writes the files")  # fmt: skip
    if open_end:
        warn(f"{len(open_end)} shard(s) end without the empty blocks that close a tar, such as {open_end[0]}: "
             "samples may be missing at the end")  # fmt: skip


def _run(jobs: Sequence[_Job]) -> Iterator[_Found]:
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if len(jobs) < _FEW:
        yield from map(_find, jobs)
        return
    # Reading afar is waiting, for which threads do; here it is parsing.
    remote = files.is_remote(jobs[0].shard.path)
    pool: Executor = ThreadPoolExecutor(16) if remote else ProcessPoolExecutor(workers, context(), leave_with_parent)
    with pool:
        try:
            yield from pool.map(_find, jobs)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _find(job: _Job) -> _Found:
    """The rows of one shard."""
    shard, opened = job.shard, Files()
    try:
        size = files.size(shard.path)
        offsets = read_index(shard.path, size)
        scanned = offsets is None
        if offsets is None:
            offsets = scan(shard.path, size)
    except FileNotFoundError:
        raise ValueError(f"{shard.path}: the dataset names this shard, and it is not there") from None
    _check_count(shard, len(offsets) - 1)
    _check_look(job, offsets, opened)
    places = [(int(start), int(stop)) for start, stop in pairwise(offsets)]
    if shard.excluded:
        places = [place for place in places if raw_sample(shard.path, opened, *place).key not in shard.excluded]
    packed = job.kind == "packed"
    counts = [count(job.kind, raw_sample(shard.path, opened, *place)) if packed else 1 for place in places]
    return _Found(_table(job.number, places, counts), len(places), scanned, scanned and bool(offsets[-1] == size))


def _table(number: int, places: Sequence[tuple[int, int]], counts: Sequence[int]) -> np.ndarray:
    rows = np.array(counts, np.int64)
    starts_stops = np.array(places, np.uint64).reshape(-1, 2)
    table = np.empty(int(rows.sum()), ROW)
    table["shard"] = number
    table["start"], table["stop"] = (np.repeat(starts_stops[:, side], rows) for side in (0, 1))
    table["sub"] = np.arange(len(table)) - np.repeat(np.cumsum(rows) - rows, rows)
    return table


def _check_count(shard: Shard, found: int) -> None:
    if shard.count is not None and shard.count != found:
        raise ValueError(
            f"{shard.path}: {found} samples by its .idx, {shard.count} by the dataset's info file. One of them is not "
            "of this tar: fetch the shard again, or write both anew with `energon prepare`"
        )


def _check_look(job: _Job, offsets: np.ndarray, opened: Files) -> None:
    """The first sample of a shard must look like those of the others, its last must be where the index says."""
    if len(offsets) < 2:
        return
    path = job.shard.path
    first = raw_sample(path, opened, int(offsets[0]), int(offsets[1]))
    raw_sample(path, opened, int(offsets[-2]), int(offsets[-1]))
    seen = look_of(first)
    if None not in (seen, job.look) and seen != job.look:
        raise ValueError(
            f"{path}: its samples look like {seen!r}, those of the dataset's other shards like {job.look!r}. Take the "
            "shard out of split.yaml, or read it as a source of its own"
        )


def look_of(raw: Raw) -> Kind | None:
    """The kind that a sample looks like; None when that cannot be told, or it is broken: a fault of its row alone."""
    try:
        return recognise(raw)
    except Misread:
        return None
