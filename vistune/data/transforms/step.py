"""A transform at work: a step with its options, the table of rows it makes, and the reader that both make.

Knows where a derived row comes from; what is done to it only the step knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from vistune import console
from vistune.data.formats import Reader
from vistune.data.reading.json_members import mapped
from vistune.data.transforms.scan import Scan
from vistune.recipe import Section
from vistune.samples import Fault, FaultCode, Sample, SampleError

_FORMAT = 1  # of a table and of what the steps do; raised when either changes


class Unfit(ValueError):
    """A sample that a step cannot work on; the reader knows where it stands."""

    def __init__(self, reason: str, code: FaultCode = "row_unreadable"):
        self.reason, self.code = reason, code
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Table:
    """Derived row -> parent rows. Row r comes from `parents[starts[r] : starts[r + 1]]`, or from `parents[r]` alone
    without `starts`; `parts[r]` is which piece of its parent it is. `left_out`: reason -> rows of the parent."""

    parents: np.ndarray  # int64 [n]
    starts: np.ndarray | None = None  # int64 [rows + 1]
    parts: np.ndarray | None = None  # int32 [rows]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parents) if self.starts is None else len(self.starts) - 1

    def of(self, row: int) -> list[int]:
        if self.starts is None:
            return [int(self.parents[row])]
        found: list[int] = self.parents[int(self.starts[row]) : int(self.starts[row + 1])].tolist()
        return found

    def part(self, row: int) -> int:
        return 0 if self.parts is None else int(self.parts[row])


class Step(Section):
    """One transform with its options, which are its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
    do: ClassVar[str] = ""

    def table(self, scan: Scan) -> Table | None:
        """Which rows come of those that `scan` sees; None: each from the one of its number, nothing is looked at."""
        return None

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        """Derived row `row` from its parents. Raises Unfit."""
        return samples[0]


class Transformed:
    """A reader seen through one step. A row whose parent cannot be used cannot be used; its fault names the row of the
    file. A sample's `notes["rows"]` are the rows of the file it is made of."""

    def __init__(self, parent: Reader, step: Step, cache: Path | None = None, workers: int = 0):
        self.parent, self.step, self.name = parent, step, parent.name
        told = json.dumps([_FORMAT, step.do, step.model_dump()], sort_keys=True)
        self._fingerprint = hashlib.sha256(f"{parent.fingerprint()}\n{told}".encode()).hexdigest()[:16]
        self._folder = cache / f"transform-{self._fingerprint}" if cache else None
        if self._folder is None:
            self._table = self._made(workers)
            return
        if not (self._folder / "meta.json").exists():
            _write(self._made(workers), self._folder)
        self._table = _read(self._folder)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Reason -> how many rows of the parent come in no row of this one."""
        return self._table.left_out if self._table else {}

    def __len__(self) -> int:
        return len(self.parent) if self._table is None else len(self._table)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name}: row {row} of {len(self)} after {self.step.do}")
        parents = [row] if self._table is None else self._table.of(row)
        samples = [self._parent(parent, row) for parent in parents]
        try:
            made = self.step.make(samples, row, self._table.part(row) if self._table else 0)
        except Unfit as error:
            reason = f"{self.step.do}: {error.reason} (row {self._rows(samples[0])[0]} of the file)"
            fault = Fault(source=self.name, row=row, id=samples[0].id, code=error.code, reason=reason)
            raise SampleError(fault) from None
        rows = tuple(file_row for sample in samples for file_row in self._rows(sample))
        return replace(made, row=row, notes={**made.notes, "rows": rows})

    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the table where it is on disk.
        return self.__dict__ | ({"_table": None} if self._folder else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._folder:
            self._table = _read(self._folder)

    def _parent(self, parent: int, row: int) -> Sample:
        try:
            return self.parent[parent]
        except SampleError as error:
            told = "" if isinstance(self.parent, Transformed) else f" (row {parent} of the file)"
            fault = replace(error.fault, row=row, reason=error.fault.reason + told)
            raise SampleError(fault) from None

    def _rows(self, sample: Sample) -> tuple[int, ...]:
        rows: tuple[int, ...] = sample.notes["rows"] if isinstance(self.parent, Transformed) else (sample.row,)
        return rows

    def _made(self, workers: int) -> Table | None:
        table = self.step.table(Scan(self.parent, self.step.do, workers))
        if table is not None and len(self.parent) and not len(table):
            raise ValueError(f"{self.name}: {self.step.do} leaves out every one of its {len(self.parent):,} rows")
        if table is not None and table.left_out:
            reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in table.left_out.items())
            total = f"{sum(table.left_out.values()):,} of {len(self.parent):,}"
            console.say(f"{self.name}: {self.step.do} leaves out {total} rows: {reasons}")
        return table


def _write(table: Table | None, folder: Path) -> None:
    """A folder of mapped columns, written beside and then named, so that it is there whole or not at all."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    columns = {"parents": table.parents, "starts": table.starts, "parts": table.parts} if table else {}
    for name, column in columns.items():
        if column is not None:
            np.save(new / f"{name}.npy", column)
    meta = {"table": table is not None, "left_out": dict(table.left_out) if table else {}}
    (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    try:
        os.replace(new, folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise
        shutil.rmtree(new)  # another process was first, with the same table


def _read(folder: Path) -> Table | None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if not meta["table"]:
        return None
    columns = {
        name: mapped(folder / f"{name}.npy") if (folder / f"{name}.npy").exists() else None
        for name in ("parents", "starts", "parts")
    }
    assert columns["parents"] is not None
    return Table(columns["parents"], columns["starts"], columns["parts"], meta["left_out"])
