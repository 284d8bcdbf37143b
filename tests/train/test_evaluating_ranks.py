"""Evaluation on several ranks: the figures and answers of one process, however the weights lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.made import made_data, made_recipe
from tests.runs import run_both
from tests.train.asked import evaluate_section, made_questions
from vistune.train import evaluating, metrics, stage
from vistune.train.keeping import best

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

CASES = {
    "none": {},
    "zero3": {"parallel": {"shard": "zero3"}},
    "zero2": {"parallel": {"shard": "zero2"}, "train": {"checkpointing": "full"}},
    "adapters": {"parallel": {"shard": "zero3"}, "lora": {"r": 4}},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Five with pictures, of which a rank answers three while the other looks on; one picture cannot be read."""
    found = made_questions(tmp_path_factory.mktemp("questions"), rows=7)
    (found / "custom" / "images" / "3_0.png").write_bytes(b"no picture")
    return found


@pytest.fixture(scope="module")
def sections(questions, tmp_path_factory):
    held = made_data(tmp_path_factory.mktemp("held"), rows=9, seed=7)
    return {"evaluate": evaluate_section(held, questions, batch=2, samples=7)}


@pytest.fixture(scope="module")
def one(start, data, sections, tmp_path_factory):
    """Both kinds of learning on one process."""
    found = {}
    for case in ("none", "adapters"):
        recipe = made_recipe(start, data, tmp_path_factory.mktemp(case), **{**sections, **_of(case), "parallel": {}})
        stage.run(recipe)
        found[case] = evaluating.read_rows(Path(recipe.run))
    return found


def _of(case):
    return {**CASES[case], "train": {"steps": 4, **CASES[case].get("train", {})}}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case, start, data, sections, one, tmp_path):
    run = tmp_path / "run"
    recipe = made_recipe(start, data, run, **{**sections, **_of(case)})
    run_both(recipe, tmp_path)
    rows, wanted = evaluating.read_rows(run), one["adapters" if case == "adapters" else "none"]
    assert list(rows) == list(wanted) == [2, 4]
    for step, row in rows.items():
        assert row["warnings"] == wanted[step]["warnings"] and "3: " in row["warnings"][0]
        assert row["held_out_loss"] == pytest.approx(wanted[step]["held_out_loss"], abs=1e-6)
        assert row["held_out"] == pytest.approx(wanted[step]["held_out"], abs=1e-6)
        assert row["samples"] == wanted[step]["samples"] and row["headline"] == wanted[step]["headline"]
    assert best.read(run) is not None


def test_shards_learn_the_same_without(start, data, sections, tmp_path):
    found = []
    for name, given in (("with", sections), ("without", {})):
        (tmp_path / name).mkdir()
        recipe = made_recipe(start, data, tmp_path / name / "run", **{**given, **_of("zero3")})
        run_both(recipe, tmp_path / name)
        found.append(([row["loss"] for row in metrics.read(recipe.run)], weights(recipe.run)))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 4
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def weights(run):
    return {k: v for file in Path(run, "model").glob("*.safetensors") for k, v in load_file(file).items()}
