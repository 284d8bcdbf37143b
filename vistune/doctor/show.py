"""The findings as people read them, in plain text with colours on a terminal only; and as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from vistune.doctor.findings import Finding

MARKS = {"ok": "ok", "warning": "warn", "problem": "BAD"}
COLOURS = {"ok": "32", "warning": "33", "problem": "1;31"}
TITLE, MARK = 20, 5
Groups = Mapping[str, Sequence[Finding]]


def counts(groups: Groups) -> dict[str, int]:
    """Findings of each level."""
    every: list[str] = [one.level for found in groups.values() for one in found]
    return {level: every.count(level) for level in MARKS}


def code(groups: Groups) -> int:
    """1 where there is a problem, else 0."""
    return 1 if counts(groups)["problem"] else 0


def as_json(groups: Groups) -> dict[str, Any]:
    every = [{"group": group} | asdict(one) for group, found in groups.items() for one in found]
    return {"ok": not code(groups), "counts": counts(groups), "findings": every}


def print_json(groups: Groups, out: TextIO) -> None:
    json.dump(as_json(groups), out, ensure_ascii=False, indent=2)
    out.write("\n")


def print_group(name: str, found: Sequence[Finding], out: TextIO) -> None:
    """A heading and its findings, folded to the terminal; a cure on a line of its own, never folded."""
    if not found:
        return
    colour, width = out.isatty(), max(60, min(140, shutil.get_terminal_size((100, 24)).columns))
    print(f"\n{_painted(name, '1', colour)}", file=out)
    indent = " " * (2 + MARK + 1 + TITLE + 1)
    for one in found:
        mark = _painted(MARKS[one.level].ljust(MARK), COLOURS[one.level], colour)
        lines = textwrap.wrap(one.found, width - len(indent), break_on_hyphens=False, break_long_words=False) or [""]
        title = one.title.ljust(TITLE)
        if len(one.title) > TITLE:
            title, lines = one.title, ["", *lines]
        print(f"  {mark} {title} {lines[0]}".rstrip(), file=out)
        for line in lines[1:]:
            print(indent + line, file=out)
        if one.fix:
            print(f"{indent}{_painted('->', COLOURS[one.level], colour)} {one.fix}", file=out)


def print_end(groups: Groups, out: TextIO) -> None:
    said = counts(groups)
    text = f"{said['problem']} problem(s), {said['warning']} warning(s)"
    ready = "This machine cannot train yet" if said["problem"] else "This machine can train"
    level = "problem" if said["problem"] else "warning" if said["warning"] else "ok"
    print(f"\n{_painted(f'{ready}: {text}.', COLOURS[level], out.isatty())}", file=out)


def print_wait(text: str) -> None:
    """A line that the next one replaces, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _painted(text: str, colour: str, on: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if on else text
