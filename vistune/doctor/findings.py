"""A finding: what was looked at, how it stands, the value, and the one-line cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fix` is one line to type or to do; empty where nothing is wrong."""

    level: Level
    title: str
    found: str
    fix: str = ""


def ok(title: str, found: str) -> Finding:
    return Finding("ok", title, found)


def warning(title: str, found: str, fix: str) -> Finding:
    """Something works less well than it could, or will not do for a bigger run."""
    return Finding("warning", title, found, fix)


def problem(title: str, found: str, fix: str) -> Finding:
    """Training does not work, or not as it was asked for."""
    return Finding("problem", title, found, fix)


def size(count: float) -> str:
    """Bytes in the binary units that memory is sold in."""
    for unit, worth in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= worth:
            return f"{count / worth:.3g} {unit}" if count < 999.5 * worth else f"{count / worth:.0f} {unit}"
    return f"{count:.0f} B"
