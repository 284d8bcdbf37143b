"""The benchmark of answers a second: all contenders say the same, and the table says what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_all_contenders_say_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    speed = importlib.import_module("evaluate")
    out = tmp_path / "evaluate.json"
    assert speed.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found["contenders"]) == ["one at a time, as LLaVA asks", "vistune, one at a time", "vistune, 4 at once"]
    assert {one["same_texts"] for one in found["contenders"].values()} == {6} and found["near_ties"] == 0
    assert "| vistune, 4 at once |" in out.with_suffix(".md").read_text() and found["tokens"] >= 1
    assert "times as fast" in capsys.readouterr().out
