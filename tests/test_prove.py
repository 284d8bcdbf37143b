"""The proof says yes to a tiny model on made-up data, and no when attention or the plan is broken."""

from __future__ import annotations

import json

import pytest
import torch

from tests.made import made_recipe
from vistune import inputs, prove
from vistune.data.plan import Plan
from vistune.models import attention

pytestmark = pytest.mark.usefixtures("one_thread")

LEARN = {"connector": 1e-3, "language": 2e-4}


def test_packing_and_ranks_change_nothing(start, data, tmp_path, capsys):
    recipe = made_recipe(start, data, tmp_path / "run", learn=LEARN, data={"pad": "length", "length": 512})
    result = prove.prove(recipe, packs=4)
    assert result["ok"] and result["packs"] == 4 and result["samples"] >= 8 and not result["faults"]
    assert result["loss_packed"] == pytest.approx(result["loss_unpacked"], rel=1e-5)
    assert result["gradient_difference"] < 1e-5 and result["gradients_compared"] > 10_000
    assert result["crossing_difference"] > 100 * result["loss_tolerance"]
    assert result["steps"] == result["steps_equal"] == [0, 1, 2, 4, 5] and result["ranks"] == [1, 2, 4, 8]
    json.dumps(result)
    prove.show(result)
    assert "packing changes nothing" in capsys.readouterr().out
    # A run in the same folder comes after; only the index was written.
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["index"]


@pytest.mark.parametrize("more", [{"pack": False}, {"pack": False, "group": "modality"}])
def test_a_recipe_without_packs_is_proved_as_if_it_had_them(start, data, tmp_path, more):
    recipe = made_recipe(start, data, tmp_path / "run", data=more, train={"unit": "samples", "micro_batch": 2})
    assert prove.prove(recipe, packs=2)["ok"]


def test_attention_across_samples_is_found(start, data, tmp_path, monkeypatch, capsys):
    honest = attention.segments
    monkeypatch.setattr(attention, "segments", lambda lengths, device: honest([sum(lengths)], device))
    result = prove.prove(made_recipe(start, data, tmp_path / "run", data={"length": 256}), packs=2)
    assert not result["ok"] and result["loss_difference"] > 1e-3 and result["gradient_difference"] > 1e-2
    prove.show(result)
    assert "NO: what is computed depends on packing" in capsys.readouterr().out


def test_positions_that_run_on_are_found(start, data, tmp_path, monkeypatch):
    """Rotary positions are relative, so that a shift alone would not show; a pack whose positions stand still does."""
    honest = prove.collate

    def standing(items, pad_to=1):
        batch = honest(items, pad_to)
        if len(items) > 1:
            batch.positions = torch.zeros_like(batch.positions)
        return batch

    monkeypatch.setattr(prove, "collate", standing)
    assert not prove.prove(made_recipe(start, data, tmp_path / "run"), packs=2)["ok"]


def test_a_plan_that_looks_at_the_ranks_is_found(start, data, tmp_path, monkeypatch):
    honest = Plan.micro_batches

    def by_rank(self, k, rank, world, per_micro):
        return honest(self, k if world < 4 else k + 1, rank, world, per_micro)

    monkeypatch.setattr(Plan, "micro_batches", by_rank)
    result = prove.prove(made_recipe(start, data, tmp_path / "run"), packs=1)
    assert not result["ok"] and not result["steps_equal"]


def test_nothing_to_prove(start, data, tmp_path):
    recipe = made_recipe(start, data, tmp_path / "run", train={"batch": 1})
    with pytest.raises(ValueError, match=r"no pack of steps 0, .* has two samples"):
        prove.prove(recipe, packs=3)
    with pytest.raises(ValueError, match="packs = 0"):
        prove.prove(recipe, packs=0)


def test_spread():
    assert prove.spread(100, 5) == [0, 25, 50, 74, 99]
    assert prove.spread(2, 5) == [0, 1] and prove.spread(1, 5) == [0] and prove.spread(9, 1) == [0]


def test_mixtures_of_a_recipe_reach_the_plan(start, data, tmp_path):
    source = {"path": str(data), "images": str(data.parent / "images")}
    recipe = made_recipe(
        start,
        data,
        tmp_path / "run",
        data={"sources": [{**source, "weight": 3}, {**source, "weight": 1, "cap": 5}], "images_per_pack": 3},
    )
    read = inputs.read(recipe, inputs.describe_model(recipe), tmp_path / "index")
    assert read.plan.order.taken == [36, 5]
    images = read.index.images
    assert max(sum(int(images[i]) for i in pack) for k in range(3) for pack in read.plan.step(k)) <= 3
