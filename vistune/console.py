"""What people see in the terminal: log lines, tables, progress bars. Only rank 0 speaks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

QUIET = int(os.environ.get("RANK", "0")) != 0
out = Console(quiet=QUIET, highlight=False, soft_wrap=True)
err = Console(stderr=True, quiet=QUIET, highlight=False, soft_wrap=True)


def only_json() -> None:
    """From here on stdout is for one JSON document; what people read goes to stderr."""
    out.stderr = True


def say(text: str) -> None:
    """One plain line on stdout."""
    out.print(text, markup=False)


def warn(text: str) -> None:
    """One line on stderr that does not stop anything."""
    err.print(f"warning: {text}", style="yellow", markup=False)


def warn_at_once(text: str) -> None:
    """A warning from a signal's handler, which may stand in the midst of another line's printing."""
    if not QUIET:
        os.write(2, f"\nwarning: {text}\n".encode())


def fail(text: str) -> None:
    """An error on stderr, from whichever rank it happened on."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", style="red", markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; numbers are right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    shown = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(row[i][:1] in "0123456789-+." or row[i] == "" for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    out.print(shown, markup=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for programs."""
    if not QUIET:
        json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
        sys.stdout.write("\n")


def progress(*extra: str) -> Progress:
    """A progress bar with count, share and ETA on stderr; `extra` are more text columns (rich markup)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in extra),
        console=err,
        transient=True,
        disable=QUIET or not err.is_terminal,
    )
