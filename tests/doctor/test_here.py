"""The whole examination, on the machine that runs the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_machine_that_runs_the_tests_can_train(tmp_path: Path):
    command = [sys.executable, "-m", "vistune", "doctor", str(tmp_path / "runs"), "--json"]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**kept, "PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    said = json.loads(done.stdout)
    problems = [one for one in said["findings"] if one["level"] == "problem"]
    assert not problems and done.returncode == 0 and said["ok"]
    titles = {one["title"] for one in said["findings"]}
    assert {
        "Python",
        "imports",
        "torch",
        "attention",
        "run folder",
        "memory",
        "Hugging Face cache",
        "open files",
    } <= titles
    assert "right" in next(one["found"] for one in said["findings"] if one["title"] == "attention")


def test_groups_that_import_nothing_are_quick(tmp_path: Path):
    command = [sys.executable, "-m", "vistune", "doctor", str(tmp_path), "--only", "storage", "--only", "processes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and "This machine can train: 0 problem(s)" in done.stdout and not done.stderr
