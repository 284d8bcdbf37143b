"""All pieces of a check become findings.jsonl, in order, and a summary.

Judges what only the whole can tell: duplicates, counts, lengths, and whether a run would go through."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vistune.data.checking.findings import WHAT, Finding, as_line, finding
from vistune.data.checking.rows import COLUMNS, WITHOUT_ID, RowJudge, Rows
from vistune.data.checking.work import KeptPictures, kept_pictures, kept_rows, rows_file

PERCENTILES = {"min": 0, "p5": 5, "median": 50, "mean": -1, "p95": 95, "p99": 99, "max": 100}
_BINS = 60


@dataclass
class _Whole:
    """The columns of all rows, and where each source begins in them."""

    columns: dict[str, np.ndarray]
    starts: list[int]
    first: np.ndarray  # int64: the first row with the same content
    first_id: np.ndarray  # int64: the first row of the source with the same id
    counts: list[Counter[str]] = field(default_factory=list)  # of findings by code, of each source

    def of(self, source: int) -> dict[str, np.ndarray]:
        here = slice(self.starts[source], self.starts[source + 1])
        return {name: column[here] for name, column in self.columns.items()}


def sum_up(
    judge: RowJudge, work: Path, out: Path, expect: Sequence[int], allow: Callable[[int], int], decode: bool
) -> dict[str, Any]:
    """Write findings.jsonl and return the summary. `allow`: of so many rows, how many may be faulty in a run."""
    whole = _gather(judge, work)
    kept = kept_pictures(work)
    beside = out / ".findings.jsonl"
    with open(beside, "w", encoding="ascii") as lines:
        for found in _findings(judge, work, whole, kept, expect):
            whole.counts[found.number][found.code] += 1
            lines.write(as_line(found))
    os.replace(beside, out / "findings.jsonl")
    return _summary(judge, whole, kept, expect, allow, decode)


def _gather(judge: RowJudge, work: Path) -> _Whole:
    sizes = [len(reader) for reader in judge.readers]
    columns: dict[str, Any] = {name: np.zeros(sum(sizes), kind) for name, kind in COLUMNS.items()}
    at = 0
    for number, (_, start, stop) in enumerate(judge.chunks()):
        with np.load(rows_file(work, number)) as arrays:
            for name, column in columns.items():
                column[at : at + stop - start] = arrays[name]
        at += stop - start
    starts = [0, *np.cumsum(sizes).tolist()]
    content = columns.pop("content")
    ids = columns.pop("id")
    first_id = np.arange(len(ids))
    for begin, end in pairwise(starts):
        known = (ids[begin:end] != 0) & ~columns["nameless"][begin:end]
        first_id[begin:end] = begin + _first(ids[begin:end], known)
    return _Whole(columns, starts, _first(content, content != 0), first_id, [Counter() for _ in sizes])


def _first(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """int64: for each place the first that has the same value; its own where the value is not `known`."""
    places = np.flatnonzero(known)
    order = places[np.argsort(values[places], kind="stable")]
    begins = np.append(True, values[order][1:] != values[order][:-1])[: len(order)]
    first = np.arange(len(values))
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return first


def _findings(
    judge: RowJudge, work: Path, whole: _Whole, kept: KeptPictures, expect: Sequence[int]
) -> Iterator[Finding]:
    """All findings by source and row; what is said of a source comes before its rows."""
    for number, (source, start, stop) in enumerate(judge.chunks()):
        if not start:
            yield from _of_source(judge, whole, source, expect)
        rows = kept_rows(work, number)
        of_rows: dict[int, list[Finding]] = {}
        for found in rows.findings:
            of_rows.setdefault(found.row, []).append(found)
        _add_pictures(judge, source, start, rows, kept, whole, of_rows)
        _add_duplicates(judge, whole, source, start, stop, of_rows)
        for row in sorted(of_rows):
            yield from of_rows[row]


def _of_source(judge: RowJudge, whole: _Whole, source: int, expect: Sequence[int]) -> Iterator[Finding]:
    reader = judge.readers[source]
    wanted = expect[source] if source < len(expect) else 0
    if wanted and wanted != len(reader):
        yield finding(reader.name, source, -1, "", "row_count", f"{len(reader):,} rows, {wanted:,} are expected")
    if not hasattr(reader, "raw") and (count := int(whole.of(source)["nameless"].sum())):
        yield finding(reader.name, source, -1, "", "id_missing", f"{WITHOUT_ID} ({count:,} rows)")


def _add_pictures(
    judge: RowJudge,
    source: int,
    start: int,
    rows: Rows,
    kept: KeptPictures,
    whole: _Whole,
    of_rows: dict[int, list[Finding]],
) -> None:
    """What is wrong with a picture is said of every row that has it."""
    reader = judge.readers[source]
    for key, (i, nth) in zip(rows.keys.tolist(), rows.at.tolist(), strict=True):
        for code, message in kept.bad.get(key, ()):
            sample = reader[start + i]
            image = sample.images[nth]
            path = image.path if image.size is None else f"{image.path}:{image.name}"
            found = finding(reader.name, source, start + i, sample.id, code, message, path)
            of_rows.setdefault(start + i, []).append(found)
            if found.severity == "error":
                whole.columns["faulty"][whole.starts[source] + start + i] = True


def _add_duplicates(
    judge: RowJudge, whole: _Whole, source: int, start: int, stop: int, of_rows: dict[int, list[Finding]]
) -> None:
    reader, begin = judge.readers[source], whole.starts[source]
    for code, first in (("id_duplicate", whole.first_id), ("row_duplicate", whole.first)):
        here = np.arange(begin + start, begin + stop)
        for place in here[first[here] != here].tolist():
            row, sample = place - begin, reader[place - begin]
            message = f"the same as {_name_of(judge, whole, int(first[place]))}"
            found = finding(reader.name, source, row, sample.id, code, message)
            of_rows.setdefault(row, []).append(found)


def _name_of(judge: RowJudge, whole: _Whole, place: int) -> str:
    source = int(np.searchsorted(whole.starts, place, side="right")) - 1
    return f"{judge.readers[source].name}:{place - whole.starts[source]}"


def _summary(
    judge: RowJudge, whole: _Whole, kept: KeptPictures, expect: Sequence[int], allow: Callable[[int], int], decode: bool
) -> dict[str, Any]:
    rows, faulty = len(whole.columns["faulty"]), int(whole.columns["faulty"].sum())
    total: Counter[str] = sum(whole.counts, Counter())
    limit = allow(rows)
    verdict = _verdict(rows, faulty, limit, total["source_unreadable"])
    return {
        "ok": not verdict,
        "verdict": verdict or f"a run would go through: {faulty:,} of {rows:,} rows set aside, {limit:,} are allowed",
        "rows": rows,
        "usable": rows - faulty,
        "set_aside": faulty,
        "allowed": limit,
        "shortened": int(whole.columns["shortened"].sum()),
        "room": judge.length,
        "decoded": decode,
        "codes": {
            code: {"severity": severity, "findings": total[code], "what": what}
            for code, (severity, what) in WHAT.items()
            if total[code]
        },
        "sources": [_source(judge, whole, source, expect) for source in range(len(judge.readers))],
        "pictures": {
            "distinct": sum(kept.formats.values()),
            "formats": dict(sorted(kept.formats.items(), key=lambda pair: -pair[1])),
            "most_pixels": kept.most_pixels,
        },
        "lengths": _lengths(judge, whole),
    }


def _verdict(rows: int, faulty: int, limit: int, unreadable: int) -> str:
    """Why a run would fail; empty when it would not."""
    if unreadable:
        return f"a run would stop: {unreadable:,} row(s) lie in a container that cannot be read (source_unreadable)"
    if faulty == rows:
        return f"a run would stop: none of {rows:,} rows can be used"
    if faulty > limit:
        return f"a run would stop: {faulty:,} of {rows:,} rows are faulty, {limit:,} are allowed"
    return ""


def _source(judge: RowJudge, whole: _Whole, source: int, expect: Sequence[int]) -> dict[str, Any]:
    columns = whole.of(source)
    usable = ~columns["faulty"]
    known = usable & (columns["tokens"] > 0)
    kept = int(columns["kept"][known].sum())
    return {
        "name": judge.readers[source].name,
        "rows": len(usable),
        "expect": expect[source] if source < len(expect) else 0,
        "usable": int(usable.sum()),
        "set_aside": int((~usable).sum()),
        "shortened": int((columns["shortened"] & usable).sum()),
        "pictures": int(columns["images"].sum(dtype=np.int64)),
        "without_pictures": int((columns["images"] == 0).sum()),
        "tokens": _percentiles(columns["tokens"][known]) | {"total": kept} if known.any() else {},
        "supervised_share": float(columns["supervised"][known].sum() / kept) if kept else 0.0,
        "codes": dict(whole.counts[source]),
    }


def _percentiles(tokens: np.ndarray) -> dict[str, int]:
    return {
        name: round(float(tokens.mean() if share < 0 else np.percentile(tokens, share)))
        for name, share in PERCENTILES.items()
    }


def _steps() -> Iterator[int]:
    """1, 2, 4, 5, 8, 10, 20, ...: widths of bins that can be read off."""
    for power in count():
        yield from (digit * 10**power for digit in (1, 2, 4, 5, 8))


def _lengths(judge: RowJudge, whole: _Whole) -> dict[str, Any]:
    """Histogram of the rows' tokens before anything is shortened; the last bin takes whatever is longer."""
    tokens = whole.columns["tokens"]
    known = tokens[tokens > 0]
    if not len(known):
        return {}
    longest = min(int(known.max()), max(2 * judge.length, int(np.percentile(known, 99))))
    step = next(wide for wide in _steps() if wide * _BINS >= longest)
    edges = np.arange(0, longest + step + 1, step)

    def bins(values: np.ndarray) -> list[int]:
        return np.histogram(np.minimum(values[values > 0], edges[-1]), edges)[0].tolist()

    return {
        "room": judge.length,
        "percentiles": _percentiles(known),
        "too_long": int((known > judge.length).sum()),
        "edges": edges.tolist(),
        "counts": bins(tokens),
        "sources": [bins(whole.of(source)["tokens"]) for source in range(len(judge.readers))],
    }
