"""Evaluation inside training: right figures, the same training with it and without, the best checkpoint kept."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.made import made_data, made_recipe
from tests.train.asked import evaluate_section, made_questions
from vistune import decoding, generate
from vistune.data.batch import read_planned
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.images import normalize
from vistune.models.load import load
from vistune.train import evaluating, loop, metrics, stage
from vistune.train.keeping import best, checkpoint
from vistune.train.measuring import held_out
from vistune.train.measuring.unchanged import unchanged
from vistune.train.spreading import precision as precisions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("held"), rows=9, seed=7)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return made_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def whole(start, data, held, questions, tmp_path_factory):
    """Six steps, evaluated after the second, fourth and sixth."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipe = made_recipe(start, data, folder, evaluate=evaluate_section(held, questions))
    return recipe, stage.run(recipe)


def rows_of(recipe):
    return evaluating.read_rows(Path(recipe.run))


def weights(run: str) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(run, "model").glob("*.safetensors")) for k, v in load_file(file).items()}


def losses(run: str) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


def stock_loss(model_folder, one: held_out.HeldOut, positions) -> tuple[float, int]:
    """Summed loss and its tokens by the stock class, one sample at a time."""
    loaded, total, count = load(model_folder), 0.0, 0
    for position in positions:
        item = read_planned(one.data.index, one.data.readers, position, one.data.language)
        ids = torch.from_numpy(item.tokens.ids.astype("int64"))[None]
        pixels = {}
        if item.pixels:
            shown = torch.stack([torch.from_numpy(picture) for picture in item.pixels])
            pixels = {"pixel_values": normalize(shown, loaded.layout, torch.float32)}
        with torch.no_grad():
            logits = loaded.model(input_ids=ids, **pixels).logits[0]
        learned = torch.from_numpy(item.tokens.loss_mask)[1:]
        each = nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="none")
        total, count = total + float(each[learned].sum()), count + int(learned.sum())
    return total, count


def test_held_out_loss_is_the_stock_models(whole):
    recipe, summary = whole
    sources = held_out.read(recipe, stage.load_model(recipe), Path(recipe.run))
    first, second = sources
    taken = sorted({at for k in range(second.data.plan.steps) for pack in second.data.plan.step(k) for at in pack})
    assert len(taken) == 5
    sums = {"a": stock_loss(summary["model"], first, range(9)), "b": stock_loss(summary["model"], second, taken)}
    row = rows_of(recipe)[6]
    assert row["held_out"] == pytest.approx({name: loss / count for name, (loss, count) in sums.items()}, abs=1e-5)
    total, count = (sum(each[i] for each in sums.values()) for i in (0, 1))
    assert row["held_out_loss"] == pytest.approx(total / count, abs=1e-5)


def test_answers_are_those_of_the_model_folder(whole, questions):
    recipe, summary = whole
    asked = named("custom").questions(official.place(questions, ["custom"]))
    said = generate.answer_batch(load(summary["model"]), [(one.text, one.images) for one in asked], max_new_tokens=6)
    row = rows_of(recipe)[6]
    found = {sample["question_id"]: sample for sample in row["samples"]}
    assert len(found) == len(asked) == 8 and len({sample["answer"] for sample in found.values()}) > 1
    for question, answer in zip(asked, said, strict=True):
        if question.id in found:
            sample = found[question.id]
            assert (sample["answer"], sample["truth"]) == (answer, "red")
            assert sample["correct"] == ("red" in answer.lower())
            assert sample["image"] == (question.images[0].path if question.images else "")
    right = sum("red" in answer.lower() for answer in said)
    assert row["headline"]["custom"] == pytest.approx(100 * right / len(asked))


def test_rows_and_what_the_run_says(whole):
    recipe, summary = whole
    rows = rows_of(recipe)
    assert list(rows) == [2, 4, 6] and not any(row["warnings"] for row in rows.values())
    assert rows[6]["partial"] == {} and rows[6]["seconds"] > 0
    assert summary["evaluation"]["held_out_loss"] == rows[6]["held_out_loss"]
    lowest = min(rows.values(), key=lambda row: row["held_out_loss"])
    assert summary["best"]["by"] == "held_out_loss" and summary["best"]["step"] == lowest["step"]
    assert "held-out loss" in (Path(recipe.run) / "model" / "README.md").read_text()


def test_training_is_the_same_without(whole, start, data, tmp_path):
    recipe = made_recipe(start, data, tmp_path / "run")
    stage.run(recipe)
    assert losses(recipe.run) == losses(whole[0].run)
    assert_same(weights(recipe.run), weights(whole[0].run))


def assert_same(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


HALF = {
    "adapters": {"lora": {"r": 4, "dropout": 0.3}, "train": {"precision": "bf16"}},
    "again": {"train": {"checkpointing": "full", "precision": "bf16_true"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_training_in_half_precision_is_the_same_without(case, start, data, held, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)
    found = []
    for asked in ({}, evaluate_section(held, questions, every=1, limit=2)):
        train = {"steps": 2, "batch": 2, **HALF[case]["train"]}
        recipe = made_recipe(start, data, tmp_path / str(len(found)), evaluate=asked, **{**HALF[case], "train": train})
        stage.run(recipe)
        found.append((losses(recipe.run), weights(recipe.run)))
    assert list(rows_of(recipe)) == [1, 2] and not any(row["warnings"] for row in rows_of(recipe).values())
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_no_layer_is_compiled_for_what_is_only_looked_at():
    compiled = []

    def backend(graph, given):
        compiled.append(graph)
        return graph.forward

    module = nn.Linear(2, 2)
    module.forward = torch.compile(module.forward, backend=backend, dynamic=False)
    module(torch.ones(3, 2))
    with unchanged(module, torch.device("cpu")):
        module(torch.ones(5, 2))
    module(torch.ones(3, 2))
    assert len(compiled) == 1


def test_nothing_is_left_behind():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].eval()  # what was in evaluation mode stays there
    before = torch.get_rng_state()
    with unchanged(module, torch.device("cpu")):
        assert not any(one.training for one in module.modules()) and not torch.is_grad_enabled()
        module(torch.rand(4, 2))
    assert [one.training for one in module] == [True, False, True]
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


@pytest.mark.slow
def test_a_run_that_stopped_before_its_evaluation_makes_it_up(
    whole, start, data, held, questions, tmp_path, monkeypatch
):
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=evaluate_section(held, questions))
    real = evaluating.Evaluator._row

    def lost(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(evaluating.Evaluator, "_row", lost)
        with pytest.raises(KeyboardInterrupt):
            stage.run(recipe)
    assert list(rows_of(recipe)) == [2]
    summary = stage.run(recipe)
    apart = ("seconds",)
    for step, row in rows_of(whole[0]).items():
        again = rows_of(recipe)[step]
        assert {k: v for k, v in again.items() if k not in apart} == {k: v for k, v in row.items() if k not in apart}
    assert summary["best"]["step"] == whole[1]["best"]["step"]


@pytest.mark.slow
def test_the_best_checkpoint_stays(start, data, held, tmp_path, monkeypatch, capsys):
    """Also off the steps of [checkpoint], beside the newest, and after a run was taken up again."""
    values = iter([3.0, 1.0, 2.0, float("nan"), 1.5, 0.5])
    monkeypatch.setattr(held_out, "losses", lambda held, rounds: {"a": (next(values), 1)})
    asked = evaluate_section(held, tmp_path, every=1, benchmarks=[], data="")
    sections = {"checkpoint": {"every": 4, "keep": 1}, "optimizer": {"schedule": "constant"}}
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=asked, train={"steps": 4}, **sections)
    folder = Path(recipe.run)
    summary = stage.run(recipe)
    assert [checkpoint.step_of(one) for one in checkpoint.folders(folder)] == [2, 4]
    known = json.loads((folder / "best.json").read_text())
    assert known == {"step": 2, "by": "held_out_loss", "value": 1.0, "checkpoint": summary["best"]["checkpoint"]}
    assert "vistune merge" in capsys.readouterr().out
    assert load(known["checkpoint"]).model is not None
    for steps, known, kept in ((5, 2, [2, 5]), (6, 6, [6])):
        stage.run(made_recipe(start, data, folder, evaluate=asked, train={"steps": steps}, **sections))
        assert [checkpoint.step_of(one) for one in checkpoint.folders(folder)] == kept
        assert best.read(folder).step == known


@pytest.mark.slow
def test_a_run_that_stopped_before_it_named_the_best_names_it(start, data, held, tmp_path, monkeypatch):
    values = iter([1.0, 2.0])
    monkeypatch.setattr(held_out, "losses", lambda held, rounds: {"a": (next(values), 1)})
    asked = evaluate_section(held, tmp_path, every=1, benchmarks=[], data="")
    sections = {"train": {"steps": 2}, "checkpoint": {"every": 1}}
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=asked, **sections)

    def lost(run, *what):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(best, "write", lost)
        with pytest.raises(KeyboardInterrupt):
            stage.run(recipe)
    assert list(rows_of(recipe)) == [1]
    stage.run(recipe)
    assert (best.read(Path(recipe.run)).step, list(rows_of(recipe))) == (1, [1, 2])


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_leaves_its_evaluation(start, data, held, questions, tmp_path, monkeypatch):
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=evaluate_section(held, questions))
    real = held_out.losses

    def stopping(held, rounds):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(held, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "losses", stopping)
        with pytest.raises(loop.Interrupted, match="after step 3"):
            stage.run(recipe)
    assert not rows_of(recipe) and checkpoint.step_of(checkpoint.folders(Path(recipe.run))[-1]) == 3
    less = made_recipe(start, data, tmp_path / "run", evaluate=evaluate_section(held, questions, every=5, batch=2))
    stage.run(less)  # what is asked may be another
    assert list(rows_of(recipe)) == [5, 6]


@dataclass
class Hears:
    """A tracker that keeps what it is told."""

    heard: list

    def start(self, run, recipe): ...

    def step(self, row):
        self.heard.append(metrics.numbers(row))

    def stop(self): ...


@pytest.mark.slow
def test_limit_is_partial_and_best_by_a_score(start, data, held, questions, tmp_path, monkeypatch):
    asked = evaluate_section(held, questions, every=0, held_out=[], limit=5, samples=2, best="custom.contains")
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=asked, train={"steps": 2}, log={"trackers": ["wandb"]})
    heard = []
    monkeypatch.setitem(metrics.TRACKERS, "wandb", lambda: Hears(heard))
    stage.run(recipe)
    row = rows_of(recipe)[2]
    assert [one["evaluate/custom"] for one in heard if "evaluate/custom" in one] == [row["headline"]["custom"]]
    assert len(heard) == 3
    assert row["partial"]["custom"] == pytest.approx(5 / 8) and len(row["samples"]) == 2
    assert row["held_out_loss"] is None
    assert best.read(Path(recipe.run)).by == "custom.contains"


WRONG = {
    "no such folder": {"data": "nowhere"},
    "there is none of that name": {"benchmarks": ["cusstom"]},
    "does not give|do not give": {"best": "pope"},
    "there is held_out_loss, custom, custom.contains": {"best": "custom.f1"},
    "is there twice": {"benchmarks": ["custom", "custom"]},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_done_is_said_before_the_first_step(words, start, data, held, questions, tmp_path):
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=evaluate_section(held, questions, **WRONG[words]))
    with pytest.raises(ValueError, match=words):
        stage.run(recipe)
    assert not checkpoint.folders(Path(recipe.run))


def test_a_broken_question_file_is_found_before_the_first_step(start, data, held, tmp_path):
    questions = made_questions(tmp_path)
    with (questions / "custom" / "questions.jsonl").open("a") as file:
        file.write("{broken\n")
    recipe = made_recipe(start, data, tmp_path / "run", evaluate=evaluate_section(held, questions))
    with pytest.raises(ValueError, match=r"questions\.jsonl:9"):
        stage.run(recipe)
    assert not checkpoint.folders(Path(recipe.run))


@pytest.mark.slow
def test_what_fails_on_the_way_is_a_warning(start, data, held, tmp_path, monkeypatch):
    questions = made_questions(tmp_path)
    sections = {"evaluate": evaluate_section(held, questions), "train": {"steps": 4}}
    recipe = made_recipe(start, data, tmp_path / "run", **sections)
    next((questions / "custom" / "images").iterdir()).write_bytes(b"no picture")
    real, calls = decoding.decode, []

    def full(*given, **named):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(*given, **named)

    monkeypatch.setattr("vistune.asking.decode", full)
    stage.run(recipe)
    rows = rows_of(recipe)
    assert "1 question(s) without an answer" in rows[2]["warnings"][0]
    assert rows[2]["partial"]["custom"] == pytest.approx(7 / 8)
    assert any("out of memory" in warning for warning in rows[4]["warnings"])
    assert rows[4]["held_out_loss"] < 10 and rows[4]["headline"] == {}


def test_trackers_hear_it(whole):
    row = rows_of(whole[0])[6]
    told = metrics.numbers(evaluating.figures(row))
    assert told["evaluate/held_out_loss"] == row["held_out_loss"]
    assert told["evaluate/custom"] == row["headline"]["custom"]
    assert told["evaluate/held_out_loss/a"] == row["held_out"]["a"]
