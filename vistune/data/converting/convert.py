"""Any format to any other, row by row; or packed offline into tar shards. What the target cannot hold is named.

Knows no format: rows come from a reader and go to a writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vistune.console import progress
from vistune.data.converting.left_out import LeftOut
from vistune.data.converting.offline import Measured, measure, packs
from vistune.data.formats import Reader
from vistune.data.reading.picture_bytes import read_picture
from vistune.data.tokenize import Language
from vistune.data.writers import NotHeld, Writer, open_writer
from vistune.data.writers.energon import Energon, Layout, not_packed
from vistune.images import ImageError
from vistune.samples import Sample, SampleError

WINDOW = 16_384
"""Rows that are packed among themselves, as in the plan of a run."""


def convert(
    reader: Reader,
    out: str | Path,
    format: str,
    *,
    pack: int = 0,
    language: Language | None = None,
    layout: Literal["auto", "packed", "packed_turns"] = "auto",
    seed: int = 0,
    window: int = WINDOW,
    workers: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write every row of `reader` to `out` in `format`; counts are returned. `options` are the writer's.

    With `pack`, rows are shuffled by `seed` and packed, best fit over windows of `window` rows, into packs of at most
    `pack` tokens as `language` counts them, and written as energon's packed samples. `layout` "auto": "packed" (one
    picture, one question each) when all rows are so, else "packed_turns". `workers` measure rows beside this process.

    Rows that are faulty, too long for a pack, or more than the target can hold are lines of `left_out.jsonl` (row, id,
    code, reason): in `out` when that is a folder, else `OUT.left_out.jsonl` beside it. Raises ValueError for an `out`
    that is there, and when no row at all can be held; then nothing is written.
    """
    options = dict(options or {})
    if not pack:
        return _write(open_writer(format, out, **options), reader, Path(out))
    if format != "energon":
        raise ValueError(f"{out}: packs are written as format 'energon', not {format!r}")
    if language is None:
        raise ValueError(f"{out}: packing measures rows in tokens; say whose tokenizer")
    if Path(out).exists():
        raise ValueError(f"{out}: is there already; choose another name, or remove it")
    measured = measure(reader, language, workers)
    if layout == "auto":
        layout = "packed" if not (measured.loose & measured.good).any() else "packed_turns"
    writer = open_writer(format, out, **{**options, "layout": layout})
    assert isinstance(writer, Energon)
    return _write_packs(writer, reader, measured, packs(measured, layout, pack, seed, window), pack, Path(out))


def _write(writer: Writer, reader: Reader, out: Path) -> dict[str, Any]:
    with LeftOut(out) as left:
        with writer, progress() as bar:
            task = bar.add_task("convert", total=len(reader))
            for row in range(len(reader)):
                id = ""
                try:
                    sample = reader[row]
                    id = sample.id
                    writer.add(sample)
                except (SampleError, NotHeld, ImageError) as error:
                    left.add(row, *_why(error, id))
                bar.update(task, advance=1)
            _check_any(writer, left, out)
        place = left.place()
    return {"rows": len(reader), **writer.report, **left.report(), "left_out_file": place}


def _why(error: SampleError | NotHeld | ImageError, id: str) -> tuple[str, str, str]:
    if isinstance(error, SampleError):
        return error.fault.id, error.fault.code, error.fault.reason
    return id, error.code, str(error)


def _check_any(writer: Writer, left: LeftOut, out: Path) -> None:
    if not writer.report["samples"]:
        raise ValueError(f"{out}: no row can be written so, such as {left.first or 'none at all: the source is empty'}")


def _write_packs(
    writer: Energon, reader: Reader, measured: Measured, made: Iterator[list[int]], room: int, out: Path
) -> dict[str, Any]:
    filled = 0
    with LeftOut(out) as left:
        with writer, progress() as bar:
            task = bar.add_task("convert", total=len(reader))
            _leave_out(left, reader, measured, room, writer.layout)
            bar.update(task, advance=left.reasons.total())
            for rows in made:
                whole = _whole(reader, rows, left)
                filled += sum(int(measured.tokens[row]) for row, _ in whole)
                if whole:
                    writer.add_pack([sample for _, sample in whole])
                bar.update(task, advance=len(rows))
            _check_any(writer, left, out)
        place = left.place()
    share = round(filled / (writer.report["samples"] * room), 4)
    counts = {"rows": len(reader), **writer.report, "layout": writer.layout, "filled": share}
    return {**counts, **left.report(), "left_out_file": place}


def _leave_out(left: LeftOut, reader: Reader, measured: Measured, room: int, layout: Layout) -> None:
    """Names the rows that are in no pack."""
    for row, fault in sorted(measured.faults.items()):
        left.add(row, fault.id, fault.code, fault.reason)
    unfit = measured.odd | (measured.loose if layout == "packed" else False)
    for row in np.flatnonzero((measured.tokens > 0) & (unfit | (measured.tokens > room))).tolist():
        try:
            sample = reader[row]
        except SampleError as error:  # it broke since it was measured
            left.add(row, *_why(error, ""))
            continue
        if reason := not_packed(sample, layout):
            left.add(row, sample.id, "not_held", reason)
        else:
            left.add(row, sample.id, "too_long", f"{measured.tokens[row]} tokens, a pack has room for {room}")


def _whole(reader: Reader, rows: Sequence[int], left: LeftOut) -> list[tuple[int, Sample]]:
    """The samples of a pack, their pictures' bytes in hand; a row that broke since it was measured is left out."""
    whole = []
    for row in rows:
        id = ""
        try:
            sample = reader[row]
            id = sample.id
            images = tuple(replace(image, data=read_picture(image)) for image in sample.images)
        except (SampleError, ImageError) as error:
            left.add(row, *_why(error, id))
            continue
        whole.append((row, replace(sample, images=images)))
    return whole
