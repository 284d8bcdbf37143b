"""Two processes share the questions: the same answers and scores as one, also where both were killed."""

from __future__ import annotations

import json
import signal

import pytest

from tests.evaluate.asked import rows, same, settings, start_both, toys_in
from tests.made import stage0
from vistune.evaluate.run import evaluate

NAMES = ["pope", "custom"]


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path, capsys):
    model, data = stage0(tmp_path), toys_in(tmp_path / "data", *NAMES)
    alone = evaluate(model, NAMES, data, tmp_path / "alone", settings())
    words = [str(model), "--benchmark", ",".join(NAMES), "--data", str(data), "--out", str(tmp_path / "out")]
    words += ["--device", "cpu", "--max-new-tokens", "12", "--batch", "4"]

    killed = start_both(words, tmp_path, killed_after=4)  # of POPE's twelve questions each has six
    for process in killed:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    parts = sorted((tmp_path / "out" / "pope").glob("answers.*.jsonl"))
    assert [path.name for path in parts] == ["answers.0.jsonl", "answers.1.jsonl"]

    both = start_both(words, tmp_path)
    for process in both:
        process.join(120)
    output = (tmp_path / "output-0.txt").read_text()
    assert [process.exitcode for process in both] == [0, 0], output[-3000:]
    assert "8 of 12 are answered; going on" in output
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["processes"] == 2 and found["answers"] == alone["answers"] - 8
    for name in NAMES:
        assert same(rows(tmp_path / "out", name), rows(tmp_path / "alone", name)) == 0
        for key in ("scores", "tables", "partial", "remarks", "near_ties"):
            assert found["benchmarks"][name][key] == alone["benchmarks"][name][key]
