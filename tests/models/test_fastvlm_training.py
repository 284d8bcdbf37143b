"""A FastVLM in training: three rates, and a tower whose batch normalization follows the data."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.made import made_data, made_recipe
from tests.tiny_fastvlm import tiny_fastvlm
from vistune.models.load import load
from vistune.train import stage


@pytest.mark.slow
def test_a_stage_trains_all_three_parts_at_their_own_rates_and_its_folder_opens(tmp_path):
    start = tiny_fastvlm(tmp_path / "start")
    recipe = made_recipe(
        start,
        made_data(tmp_path / "data"),
        tmp_path / "run",
        learn={"connector": 1e-3, "vision": 2e-4, "language": 1e-4},
        train={"steps": 3, "batch": 4, "checkpointing": "full"},
        data={"length": 512},
    )
    summary = stage.run(recipe)
    before, after = load(start), load(tmp_path / "run" / "model")
    assert summary["steps"] == 3
    stored = dict(before.model.state_dict())
    moved = {name for name, value in after.model.state_dict().items() if not torch.equal(value, stored[name])}
    for mark in ("timm_model.stem.0", "stages.4.blocks.0.mlp.conv.bn.running_mean", "linear_1", "q_proj", "lm_head"):
        assert any(mark in name for name in moved), mark
    assert after.model.state_dict()["model.vision_tower.timm_model.stages.0.blocks.0.mlp.conv.bn.num_batches_tracked"]
    rates = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["lr"]
    assert rates.keys() == {"connector", "vision", "language"} and len(set(rates.values())) == 3


@pytest.mark.slow
def test_a_run_goes_on_with_the_statistics_it_had(tmp_path):
    start, file, weights = tiny_fastvlm(tmp_path / "start"), made_data(tmp_path / "data", rows=8), []
    for name, stops in (("whole", (4,)), ("twice", (2, 4))):
        for steps in stops:
            recipe = made_recipe(
                start,
                file,
                tmp_path / name,
                learn={"vision.layers.3:": 2e-4},
                optimizer={"schedule": "constant", "warmup": 0.0},
                train={"steps": steps, "batch": 2},
                data={"length": 512},
            )
            stage.run(recipe)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    first = load_file(start / "model.safetensors")
    moved = {name.split(".")[4] for name in first if not torch.equal(first[name], weights[0][name])}
    assert moved == {"3", "4"}
