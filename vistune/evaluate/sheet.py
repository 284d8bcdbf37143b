"""Tables as pandas reads and writes them, without pandas: tab-separated values in, a workbook of Excel out.

Knows nothing of benchmarks.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vistune import console

Cell = int | float | bool | str | None

MISSING = frozenset(
    (
        *("", "None", "NULL", "null", "NaN", "nan", "-NaN", "-nan", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A"),
        *("#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    )
)
"""What `pandas.read_table` takes for an empty cell, quoted or not (pandas 3.1: `keep_default_na`)."""

_WHOLE = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
_REAL = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity)\s*", re.ASCII | re.IGNORECASE)
_BOOLEAN = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}

LONGEST = 32_767
"""Characters in a cell of Excel; openpyxl cuts there too."""

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


def rows(path: Path, *needed: str) -> Iterator[dict[str, str]]:
    """The rows of a table with a header, one at a time, since a cell may be a picture; cells that a short row lacks
    are empty. ValueError that names the file and the column or line for a column that is missing or a row too long.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        header = next(reader, [])
        if absent := [name for name in needed if name not in header]:
            raise ValueError(f"{path}: column {absent[0]} is missing; it has {', '.join(header) or 'nothing'}")
        for cells in reader:
            if len(cells) > len(header):
                said = f"{len(cells)} cells under {len(header)} names; fetch the file again"
                raise ValueError(f"{path}:{reader.line_num}: {said}")
            if cells:
                yield dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))


def typed(column: Sequence[str]) -> list[Cell]:
    """A column as pandas reads it: `MISSING` is None; numbers or booleans only where all that is there are such.

    Whole numbers beyond 64 bits are real ones; pandas has rules of its own for them.
    """
    there = [cell for cell in column if cell not in MISSING]
    if there and all(_is_whole(cell) for cell in there):
        return [None if cell in MISSING else int(cell) for cell in column]
    if there and all(_REAL.fullmatch(cell) for cell in there):
        return [None if cell in MISSING else float(cell) for cell in column]
    if there and all(cell in _BOOLEAN for cell in there):
        return [None if cell in MISSING else _BOOLEAN[cell] for cell in column]
    return [None if cell in MISSING else cell for cell in column]


def _is_whole(cell: str) -> bool:
    return _WHOLE.fullmatch(cell) is not None and -(2**63) <= int(cell) < 2**64


def write(path: Path, header: Sequence[str], lines: Sequence[Sequence[Cell]]) -> Path:
    """A workbook of one sheet, as `DataFrame.to_excel(index=False)` writes it. A text is a text, also where it begins
    with = as a formula does. ValueError without openpyxl."""
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(f"{path}: writing it needs the openpyxl package; pip install 'vistune[eval]'") from error
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for row, line in enumerate([header, *lines], 1):
        for column, value in enumerate(line, 1):
            if isinstance(value, str) and value:
                sheet.cell(row, column, _text(value, f"{path}, row {row}")).data_type = "s"
            elif value is not None and value != "":
                sheet.cell(row, column, _number(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    book.save(beside)
    beside.replace(path)
    return path


def _text(value: str, where: str) -> str:
    plain = _NOT_IN_XML.sub("", value)
    if plain != value:
        console.warn(f"{where}: control characters are left out, a workbook cannot hold them")
    return plain[:LONGEST]


def _number(value: Cell) -> Cell:
    """Infinity is a word in a workbook."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value
