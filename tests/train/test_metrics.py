"""metrics.jsonl survives a kill, and a tracker that fails does not end a run."""

import json

import pytest
import torch

from vistune import recipe as recipes
from vistune.train import metrics


def a_recipe(**log):
    return recipes.build(
        {"model": {"start": "m"}, "data": {"sources": [{"path": "d"}]}, "learn": {"connector": 1e-3}, "log": log},
        "test",
    )


def test_half_a_line_is_left_out_and_a_repeated_step_counts_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    report = metrics.Report(tmp_path, a_recipe())
    report.step({"step": 2, "loss": 2.5})
    report.stop()
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_a_failing_tracker_is_let_go(tmp_path, monkeypatch, capsys):
    class Failing:
        calls = 0

        def start(self, run, recipe): ...
        def step(self, row):
            Failing.calls += 1
            raise ConnectionError("no route to host")

        def stop(self): ...

    monkeypatch.setitem(metrics.TRACKERS, "wandb", Failing)
    report = metrics.Report(tmp_path, a_recipe(trackers=["wandb"]))
    report.step({"step": 1, "loss": 1.0})
    report.step({"step": 2, "loss": 1.0})
    report.stop()
    assert Failing.calls == 1 and len(metrics.read(tmp_path)) == 2
    assert "no route to host" in capsys.readouterr().err


def test_tensorboard_hears_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    report = metrics.Report(tmp_path, a_recipe(trackers=["tensorboard"]))
    report.step({"step": 1, "loss": 1.5, "lr": {"connector": 1e-3}})
    report.stop()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss")[0].value == 1.5 and events.Scalars("lr/connector")[0].value == pytest.approx(1e-3)


def test_numbers_are_flat_and_leave_flags_out():
    assert metrics.numbers({"a": 1, "b": {"c": 2.5}, "d": True, "e": "x"}) == {"a": 1.0, "b/c": 2.5}


def test_memory_and_peak_are_real():
    held = metrics.memory(torch.device("cpu"))
    assert 0 < held["allocated"] <= held["peak"]
    assert metrics.measure_peak(torch.device("cpu"), torch.float32) > 1e8
    json.dumps(held)
