"""Golden answers scored twice: by the benchmark itself, and by `vistune score` as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import GOLDEN as ALL_GOLDEN
from vistune import cli
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.items import Answer, Result

GOLDEN = ALL_GOLDEN / "eval"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(name: str, data: Path, answers: Path) -> Result:
    benchmark = named(name)
    given, broken = official.answers(answers)
    assert not broken
    return benchmark.score(official.place(data, benchmark.folders), given)


def said(name: str, data: Path, answers: Path, capsys: Any, *more: object) -> dict[str, Any]:
    """What `vistune score ... --json` prints."""
    words = ["score", name, "--data", data, "--answers", answers, "--json", *more]
    assert cli._run([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def refused(name: str, data: Path, answers: Path, capsys: Any, *more: object) -> str:
    """What it says when it does not score."""
    words = ["score", name, "--data", data, "--answers", answers, "--json", *more]
    assert cli._run([str(word) for word in words]) != 0
    return capsys.readouterr().err


def answer(id: int | str, text: str, prompt: str = "") -> Answer:
    return Answer(id=id, prompt=prompt, text=text)


def write_answers(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
