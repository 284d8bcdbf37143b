"""8-bit moments and stochastic rounding over two ranks that hold halves of the weights: one rank's checkpoint goes on as
it would have on one rank."""

import shutil

import pytest

from tests.made import made_recipe
from tests.runs import finish_run, run_both, start_run
from tests.train.test_optimizer_runs import losses
from vistune.train import moments
from vistune.train import precision as precisions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("precision", "shard", "near"), [("fp32", "zero2", 1e-5), ("bf16_stochastic", "zero3", 2e-3)])
def test_two_ranks_go_on_as_one(start, data, tmp_path, precision, shard, near, monkeypatch):
    """Sums over ranks add in another order, and in bf16 gradients of several micro-batches round otherwise; codes,
    scales and noise are the same by themselves, as the tests of single updates show to the bit."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)
    monkeypatch.setattr(moments, "SMALL", 64)
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = made_recipe(
        start,
        data,
        one,
        optimizer={"name": "adamw8bit", "schedule": "constant"},
        train={"precision": precision, "batch": 4, "steps": 3},
        checkpoint={"every": 1, "keep": 9},
    )
    finish_run(start_run(recipe, tmp_path), tmp_path)
    later = ("model", "summary.json", "metrics.jsonl", "step-00000002", "step-00000003")
    shutil.copytree(one, two, ignore=shutil.ignore_patterns(*later))
    assert "step 1 of 3" in run_both(recipe, tmp_path, f"run={two}", f"parallel.shard={shard}")
    assert losses(two) == pytest.approx(losses(one)[1:], abs=near)
