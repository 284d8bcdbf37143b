"""A run of one process goes on as two, as four and as one again, its weights in shards where there are several."""

import json

import pytest

from tests.made import made_data, made_recipe
from tests.runs import finish_run, start_ranks
from vistune.train import metrics
from vistune.train.keeping import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = ("step", "tokens", "supervised", "samples", "consumed_samples")


@pytest.mark.slow
def test_one_two_four_one(start, tmp_path):
    """Every step has the same samples and, but for the order of sums, the same loss; what was set aside stays so."""
    data = made_data(tmp_path / "data")
    for row in (0, 4, 16):
        picture = data.parent / "images" / f"{row}_0.png"
        picture.write_bytes(picture.read_bytes()[:60])  # a header and no pixels: only decoding shows it
    whole, passed = tmp_path / "whole", tmp_path / "passed"
    recipe = made_recipe(
        start,
        data,
        whole,
        optimizer={"schedule": "constant", "warmup": 0},
        train={"steps": 4},
        parallel={"shard": "zero3", "timeout": 120},
        checkpoint={"every": 1, "keep": 9},
    )
    for process in start_ranks(recipe, tmp_path, world=1):
        finish_run(process, tmp_path)
    for world, steps in ((1, 1), (2, 2), (4, 3), (1, 4)):
        processes = start_ranks(recipe, tmp_path, f"run={passed}", f"train.steps={steps}", world=world)
        outputs = [finish_run(process, tmp_path) for process in processes]
        assert steps == 1 or f"step {steps - 1} of {steps}" in outputs[0]
        environment = json.loads((passed / "environment.json").read_text())
        assert (environment["world"], environment["shards"]) == (world, world)
    one, other = metrics.read(whole), metrics.read(passed)
    assert [[row[key] for key in SAME] for row in one] == [[row[key] for key in SAME] for row in other]
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    states = [[checkpoint.read_state(p)["quarantine"] for p in checkpoint.folders(run)] for run in (whole, passed)]
    assert states[0] == states[1] and len(states[0]) == 5
    assert {fault["row"] for fault in states[0][-1]} == {0, 4, 16} and not states[0][0]
