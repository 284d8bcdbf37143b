"""Every family, and quantised matrices, answer in the midst of training as the model folder does afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.each_family import each_family, folders_in
from tests.made import made_recipe
from tests.train.asked import evaluate_section, made_questions
from vistune import generate
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.models.load import load
from vistune.train import evaluating, stage

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return made_questions(tmp_path_factory.mktemp("questions"), rows=5)


@each_family
def test_answers_are_those_of_the_model_folder(name, folder, data, questions, tmp_path):
    sections = {
        "data": {"length": 1200},
        "train": {"batch": 3, "steps": 2},
        "evaluate": evaluate_section(data, questions),
    }
    learn = {"connector": 1e-3, "language.layers.0": 1e-4}
    recipe = made_recipe(folder(name), data, tmp_path / "run", learn=learn, **sections)
    summary = stage.run(recipe)
    row = evaluating.read_rows(Path(recipe.run))[2]
    assert not row["warnings"] and row["held_out_loss"] > 0
    asked = named("custom").questions(official.place(questions, ["custom"]))
    said = generate.answer_batch(load(summary["model"]), [(one.text, one.images) for one in asked], max_new_tokens=6)
    assert [sample["answer"] for sample in row["samples"]] == said and any(said)
