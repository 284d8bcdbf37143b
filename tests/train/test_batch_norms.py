"""Statistics that move with the data (FastViTHD's batch norms): the same on every rank."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.made import made_data, made_recipe
from tests.runs import run_both
from tests.tiny_fastvlm import tiny_fastvlm
from vistune.train import stage
from vistune.train.spreading import parallel

LEARN = {"connector": 1e-3, "vision": 2e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fastvlm")
    return tiny_fastvlm(folder / "start"), made_data(folder / "data")


def recipe(made, run, learn=LEARN):
    return made_recipe(*made, run, learn=learn, train={"steps": 4, "batch": 4}, data={"length": 512})


def statistics(run):
    held = load_file(run / "model" / "model.safetensors")
    return {name: value for name, value in held.items() if "running" in name or "num_batches" in name}


def test_a_frozen_tower_keeps_its_statistics(made, tmp_path):
    stage.run(recipe(made, tmp_path / "run", {"connector": 1e-3}))
    before = load_file(made[0] / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in statistics(tmp_path / "run").items())


@pytest.mark.slow
def test_two_ranks_train_it(made, tmp_path):
    run_both(recipe(made, tmp_path / "run"), tmp_path)
    before = load_file(made[0] / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in statistics(tmp_path / "run").items())


def test_the_mean_over_ranks(monkeypatch):
    """Counts stay, floats become the mean."""
    monkeypatch.setattr(parallel.ranks, "world", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat: flat.mul_(3))  # the other rank holds twice ours
    mean, count = torch.tensor([2.0, 4.0]), torch.tensor(7)
    parallel.average([mean, count])
    assert mean.tolist() == [3.0, 6.0] and count.item() == 7
