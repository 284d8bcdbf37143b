"""Check sources before a run: every row and every distinct picture once, in processes, resumable, summed up on disk.

What a finding is stands in `findings`, how rows and pictures are judged in `rows` and `pictures`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistune.console import progress
from vistune.data.checking import guarded, page, pictures
from vistune.data.checking.findings import Report
from vistune.data.checking.pictures import Verdict
from vistune.data.checking.rows import RowJudge
from vistune.data.checking.summary import sum_up
from vistune.data.checking.work import keep_pictures, keep_rows, pictures_file, rows_file
from vistune.data.formats import Reader
from vistune.data.tokenize import Language
from vistune.images import Layout
from vistune.samples import faults_allowed

_FORMAT = 1  # of what is kept of a check that was killed
_PICTURES = 128  # of one piece of work


def check(
    readers: Sequence[Reader],
    language: Language | None,
    length: int,
    *,
    out: Path,
    workers: int = 2,
    decode: bool = True,
    expect: Sequence[int] = (),
    cap: float = 0.001,
    strict: bool = False,
    seconds: float = 60.0,
) -> Report:
    """Find everything that is wrong with the rows of `readers` and write it to `out`.

    `length`: room of a sample in tokens. Without a language nothing is tokenized, and everything else is looked at.
    `decode`: every distinct picture is decoded whole, else only its header is read. `expect`: how many rows each source
    should have, 0: any number. `cap`: share of faulty rows that a run allows (at least 10 rows), with `strict` none.
    `seconds`: how long one picture may take. What is done is kept in `out` until all is, so a check that was killed
    goes on.

    Writes findings.jsonl, summary.json and index.html, each whole or not at all.
    """
    began = time.monotonic()
    out = Path(out)
    judge = RowJudge(tuple(readers), language, length)
    work = out / f".work-{_key(judge, decode)}"
    work.mkdir(parents=True, exist_ok=True)
    _judge_rows(judge, work, workers)
    where = _distinct(judge, work)
    _judge_pictures(judge, work, where, decode, workers, seconds)
    summary = sum_up(judge, work, out, list(expect), partial(faults_allowed, cap=cap, strict=strict), decode)
    summary["seconds"] = round(time.monotonic() - began, 1)
    beside = out / ".summary.json"
    beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, out / "summary.json")
    report = Report(out, summary)
    page.check_page(report, readers, out / "index.html", workers=workers)
    for old in out.glob(".work-*"):  # also of a check of data that have changed since
        shutil.rmtree(old)
    return report


def _key(judge: RowJudge, decode: bool) -> str:
    language = judge.language.fingerprint() if judge.language else ""
    parts = [str(_FORMAT), str(judge.length), str(decode), language, *(one.fingerprint() for one in judge.readers)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _judge_rows(judge: RowJudge, work: Path, workers: int) -> None:
    """Judge the chunks that no earlier try has judged."""
    chunks = list(enumerate(judge.chunks()))
    left = [(number, [chunk]) for number, chunk in chunks if not rows_file(work, number).exists()]
    with progress() as bar:
        sizes = {number: stop - start for number, (_, start, stop) in chunks}
        done = sum(sizes.values()) - sum(sizes[number] for number, _ in left)
        task = bar.add_task("rows", total=sum(sizes.values()), completed=done)
        for number, results in guarded.run(judge, left, workers=workers):
            if isinstance(results[0], guarded.Lost):
                source, start, stop = chunks[number][1]
                raise ValueError(
                    f"{judge.readers[source].name}: rows {start} to {stop - 1}: {results[0].reason}. "
                    "Give the check more memory, or fewer workers, and start it again: it goes on where it was."
                )
            keep_rows(work, number, results[0])
            bar.update(task, advance=sizes[number])


def _distinct(judge: RowJudge, work: Path) -> np.ndarray:
    """int64 [distinct pictures, 4]: key (as int64), source, row and which picture of it, where each comes first."""
    keys, where = [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int32)]
    for number, (source, start, _) in enumerate(judge.chunks()):
        with np.load(rows_file(work, number)) as arrays:
            keys.append(arrays["keys"])
            at = arrays["at"]
        where.append(np.stack([np.full(len(at), source), at[:, 0] + start, at[:, 1]], axis=1).astype(np.int32))
    every = np.concatenate(keys)
    _, first = np.unique(every, return_index=True)
    first.sort()  # in the order of the rows, so that containers are read from front to back
    return np.column_stack([every[first].view(np.int64), np.concatenate(where)[first]]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _PictureJudge:
    """Judges the picture at (source, row, which), here or in another process."""

    readers: tuple[Reader, ...]
    decode: bool
    layout: Layout | None

    def __call__(self, place: tuple[int, int, int]) -> Verdict:
        source, row, nth = place
        reader = self.readers[source]
        located = pictures.locate(reader[row].images[nth], pictures.folders_of(reader))
        if located.image is None:
            return Verdict(found=((located.code, located.message),))
        return pictures.judge(located.image, decode=self.decode, layout=self.layout)


def _judge_pictures(judge: RowJudge, work: Path, where: np.ndarray, decode: bool, workers: int, seconds: float) -> None:
    """Judge every distinct picture that no earlier try has judged."""
    parts = {start: where[start : start + _PICTURES] for start in range(0, len(where), _PICTURES)}
    left = {start: part for start, part in parts.items() if not pictures_file(work, start).exists()}
    layout = judge.language.layout if judge.language else None
    look = _PictureJudge(judge.readers, decode, layout)
    batches = ((start, [tuple(place) for place in part[:, 1:].tolist()]) for start, part in left.items())
    with progress() as bar:
        done = len(where) - sum(map(len, left.values()))
        task = bar.add_task("pictures", total=len(where), completed=done)
        for start, verdicts in guarded.run(look, batches, workers=workers, seconds=seconds):
            keep_pictures(work, start, parts[start][:, 0].tolist(), [_verdict(one) for one in verdicts])
            bar.update(task, advance=len(verdicts))


def _verdict(one: Any) -> Verdict:
    if isinstance(one, guarded.Lost):
        return Verdict(found=(("image_slow" if one.slow else "image_broken", one.reason),))
    return one
