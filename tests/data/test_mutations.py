"""Rows and pictures broken in every way: the check neither crashes nor hangs, names each, and stays small."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from tests.data.small import make_language
from tests.mutated import PICTURES, ROWS, Mutated, mutated
from vistune.data.checking.check import check
from vistune.data.checking.fix import fix
from vistune.data.formats import open_source

LENGTH = 200


@pytest.fixture(autouse=True)
def no_hanging():
    """A hang is a failure, not a night."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def resident() -> int:
    """Bytes of this process now."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def judge(report, made: Mutated) -> None:
    errors: dict[int, set[str]] = {}
    for one in report.findings():
        assert one.source == "mutated.jsonl" and one.message
        if one.severity == "error":
            errors.setdefault(one.row, set()).add(one.code)
    missed = [(row, name) for row, (name, fate) in enumerate(made.rows) if fate == "error" and row not in errors]
    wrong = [(row, name, errors[row]) for row, (name, fate) in enumerate(made.rows) if fate == "ok" and row in errors]
    assert not missed and not wrong
    assert report.summary["rows"] == len(made.rows) and report.summary["set_aside"] == len(errors)


@pytest.mark.slow
def test_five_hundred_through_the_check(tmp_path):
    made = mutated(tmp_path, 500)
    assert {name for name, _ in made.rows} >= {name for name, _, _ in PICTURES + ROWS} and len(made.rows) == 500
    source = open_source(str(made.path), images=str(made.images))
    before = resident()
    report = check([source], make_language(), LENGTH, out=tmp_path / "out", workers=2, seconds=20)
    judge(report, made)
    assert not report.ok
    assert resident() - before < 150 << 20
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 << 30


def test_another_draw_in_a_list_and_its_corrected_copy(tmp_path):
    """The rows that are JSON at all, as a list; what --fix makes of them has no error left."""
    made = mutated(tmp_path, 140, seed=1)
    kept, rows = [], []
    for line, fate in zip(made.path.read_bytes().split(b"\n"), made.rows, strict=False):
        try:
            json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        kept.append(line)
        rows.append(fate)
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"[" + b",\n".join(kept) + b"]")
    source = open_source(str(path), images=str(made.images))
    report = check([source], make_language(), LENGTH, out=tmp_path / "out", workers=1, seconds=20)
    judge(report, Mutated(path, made.images, rows))
    done = fix([source], report, tmp_path / "fixed")
    (copy,) = done["sources"]
    again = open_source(copy["path"], images=copy["images"])
    clean = check([again], make_language(), LENGTH, out=tmp_path / "again", workers=1, seconds=20)
    assert clean.ok and clean.summary["set_aside"] == 0
    assert len(again) == report.summary["usable"] + sum(name == "other extension" for name, _ in rows)
