"""An evaluation from top to bottom: files, scores, what is partial, what is gone on with and what is refused."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path

import pytest
import torch

from tests.evaluate.asked import NAMES, rows, same, settings, start, toys_in
from tests.made import stage0
from vistune import asking, generate
from vistune.evaluate.items import Question, limited, spread
from vistune.evaluate.run import evaluate, shares
from vistune.evaluate.subject import default_out
from vistune.models.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stage0(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toys_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def once(model, data, tmp_path_factory):
    """An evaluation in batches of eight, and where it lies."""
    out = tmp_path_factory.mktemp("once")
    return evaluate(model, NAMES, data, out, settings()), out


def test_what_is_written(model, data, tmp_path):
    found = evaluate(model, [*NAMES, "mm-vet", "POPE"], data, tmp_path, settings(max_new_tokens=4, batch=32))
    assert list(found["benchmarks"]) == [*NAMES, "mmvet"]
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert (tmp_path / "index.html").is_file() and (tmp_path / "mmvet" / "mmvet-results.json").is_file()
    for name, one in found["benchmarks"].items():
        assert one["answered"] == one["questions"] == len(rows(tmp_path, name)) and not one["partial"]
        items = [json.loads(line) for line in (tmp_path / name / "items.jsonl").read_text().splitlines()]
        assert [one["answer"] for one in items] == [row["text"] for row in rows(tmp_path, name)]
        assert items[0].keys() >= {"question_id", "question", "correct"}
        assert json.loads((tmp_path / name / "scores.json").read_text()) == one
        assert not list((tmp_path / name).glob("answers.*.jsonl"))


def asked_in(data):
    """The ids of POPE's questions, in order."""
    lines = (data / "pope" / "llava_pope_test.jsonl").read_text().splitlines()
    return [json.loads(line)["question_id"] for line in lines]


def test_rows_are_llavas(once, data):
    for row, number in zip(rows(once[1], "pope"), asked_in(data), strict=True):
        assert list(row)[:6] == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert row["question_id"] == number and row["model_id"] == "stage0" and len(row["answer_id"]) == 22
        assert row["metadata"]["tokens"] > 0 and row["metadata"]["margin"] >= 0


@pytest.mark.parametrize("batch", [1, 32])
def test_answers_do_not_depend_on_the_batch(once, model, data, tmp_path, batch):
    found = evaluate(model, NAMES, data, tmp_path, settings(batch=batch))
    for name in NAMES:
        ties = same(rows(tmp_path, name), rows(once[1], name))
        assert found["benchmarks"][name]["near_ties"] <= ties <= 1
    assert found["near_ties"] == sum(one["near_ties"] for one in found["benchmarks"].values())


def test_killed_and_gone_on_with(once, model, data, tmp_path, capsys):
    words = [str(model), "--benchmark", ",".join(NAMES), "--data", str(data), "--out", str(tmp_path)]
    words += ["--device", "cpu", "--max-new-tokens", "12", "--batch", "8"]
    process = start(words, tmp_path, killed_after=15)  # all of POPE's 12, and three of MME's
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = (tmp_path / "mme" / "answers.0.jsonl").read_text()
    assert left.count("\n") == 3 and left.endswith("torn") and len(rows(tmp_path, "pope")) == 12
    found = evaluate(model, NAMES, data, tmp_path, settings())
    assert "3 of 28 are answered; going on" in capsys.readouterr().out
    assert found["answers"] == 28 - 3 + 6
    for name in NAMES:
        assert same(rows(tmp_path, name), rows(once[1], name)) <= 1
        ours, theirs = found["benchmarks"][name], once[0]["benchmarks"][name]
        assert ours["scores"] == theirs["scores"] and ours["tables"] == theirs["tables"]


def test_what_is_answered_is_scored_without_opening_the_model(once, model, data, monkeypatch):
    monkeypatch.setattr(generate, "open_model", None)
    again = evaluate(model, NAMES, data, once[1], settings())
    assert again["answers"] == 0 and again["answers_per_s"] == 0
    assert {name: one["scores"] for name, one in again["benchmarks"].items()} == {
        name: one["scores"] for name, one in once[0]["benchmarks"].items()
    }


def test_answers_of_something_else_are_not_gone_on_with(once, model, data, tmp_path):
    out = once[1]
    other = stage0(tmp_path)
    embedding = load(other)
    with torch.no_grad():
        embedding.model.lm_head.weight[0, 0] += 1
    from vistune.models.load import save

    save(embedding, tmp_path / "trained", card="")
    with pytest.raises(ValueError, match=r"weights was .*another --out") as told:
        evaluate(tmp_path / "trained", NAMES, data, out, settings())
    assert "stage0" in str(told.value) and "trained" in str(told.value)
    with pytest.raises(ValueError, match="max_new_tokens was 12, now 128"):
        evaluate(model, ["pope"], data, out, settings(max_new_tokens=0))
    with pytest.raises(ValueError, match="precision was 'fp32', now 'bf16'"):
        evaluate(model, ["pope"], data, out, settings(precision="bf16"))
    with pytest.raises(ValueError, match="template was"):
        evaluate(model, ["pope"], data, out, settings(template="vicuna_v1"))
    changed = toys_in(tmp_path / "data", "pope")
    file = changed / "pope" / "llava_pope_test.jsonl"
    file.write_text(file.read_text().replace("Is there a", "Is there any"))
    with pytest.raises(ValueError, match="questions was"):
        evaluate(model, ["pope"], changed, out, settings())
    moved = model.rename(model.with_name("moved"))
    try:
        evaluate(moved, ["pope"], data, out, settings())  # the same model, wherever it lies
    finally:
        moved.rename(model)


def test_what_was_scored_before_stays_on_the_page(model, data, tmp_path):
    first = evaluate(model, ["pope"], data, tmp_path, settings(max_new_tokens=4))
    both = evaluate(model, ["custom"], data, tmp_path, settings(max_new_tokens=4))
    assert list(both["benchmarks"]) == ["custom", "pope"] and both["answers"] == 6
    assert both["benchmarks"]["pope"] == first["benchmarks"]["pope"]
    assert json.loads((tmp_path / "scores.json").read_text()) == both
    other = evaluate(model, ["mme"], data, tmp_path, settings(max_new_tokens=4, precision="bf16"))
    assert list(other["benchmarks"]) == ["mme"]  # asked in another way: not to be shown side by side


def test_one_evaluation_at_a_time_in_a_folder(once, model, data):
    with (once[1] / "pope" / "asked.json").open() as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another evaluation is at work there"):
            evaluate(model, ["pope"], data, once[1], settings())
    assert evaluate(model, ["pope"], data, once[1], settings())["answers"] == 0


def test_a_limit_is_spread_and_marks_the_score_partial(model, data, tmp_path):
    found = evaluate(model, ["pope"], data, tmp_path, settings(limit=4))["benchmarks"]["pope"]
    assert [row["question_id"] for row in rows(tmp_path, "pope")] == asked_in(data)[::3]
    assert found["partial"] and found["score"] is None and found["answered"] == 4 and found["questions"] == 12
    assert found["protocol"] == "llava-official, max_new_tokens 12, 4 questions spread over it"
    whole = evaluate(model, ["pope"], data, tmp_path, settings())  # a limited one is extended
    assert whole["answers"] == 8 and not whole["benchmarks"]["pope"]["partial"]


def test_an_unreadable_picture_is_named_and_the_others_go_on(model, tmp_path, capsys):
    data = toys_in(tmp_path / "data", "pope")
    bad = data / "pope" / "val2014" / "COCO_val2014_000000000001.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    found = evaluate(model, ["pope"], data, tmp_path / "out", settings())["benchmarks"]["pope"]
    named = found["remarks"]["unreadable"]
    assert len(named) == 6 and all(bad.name in one for one in named) and named[0].startswith("2: ")
    assert found["partial"] and found["answered"] == 6 and found["score"] is None
    assert [row["question_id"] for row in rows(tmp_path / "out", "pope")] == asked_in(data)[::2]
    said = capsys.readouterr()
    assert "PARTIAL, 6 of 12" in said.out and bad.name in said.err
    (data / "pope" / "val2014" / "COCO_val2014_000000000000.jpg").unlink()
    with pytest.raises(ValueError, match=r"not one question could be asked; the first: 1: .*no such file"):
        evaluate(model, ["pope"], data, tmp_path / "other", settings())


def test_what_cannot_be_begun_is_said_before_a_model_is_opened(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "open_model", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not there"):
        evaluate(model, ["pope"], tmp_path / "empty", tmp_path / "out", settings())
    with pytest.raises(ValueError, match="Did you mean pope"):
        evaluate(model, ["popes"], data, tmp_path / "out", settings())
    with pytest.raises(ValueError, match="--benchmark"):
        evaluate(model, [], data, tmp_path / "out", settings())
    with pytest.raises(ValueError, match="--batch 0"):
        evaluate(model, ["pope"], data, tmp_path / "out", settings(batch=0))
    with pytest.raises(ValueError, match="--precision fp8"):
        evaluate(model, ["pope"], data, tmp_path / "out", settings(precision="fp8"))
    with pytest.raises(ValueError, match="no such folder"):
        evaluate(tmp_path / "no" / "model", ["pope"], data, tmp_path / "out", settings())


def test_precision_that_batches_can_change_is_measured(model, data, tmp_path, capsys):
    found = evaluate(model, ["pope"], data, tmp_path, settings(precision="bf16", max_new_tokens=6))
    alone = found["benchmarks"]["pope"]["alone"]
    assert alone["questions"] == 12 and 0 <= alone["same"] <= 12 and found["precision"] == "bf16"
    assert f"bf16: {alone['same']} of 12 answers are the same when asked alone" in capsys.readouterr().out


def test_where_memory_does_not_hold_a_batch_smaller_ones_are_asked(model, data, tmp_path, monkeypatch, once):
    decode, sizes = asking.decode, []

    def tight(loaded, prompts, given):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("made up")
        return decode(loaded, prompts, given)

    monkeypatch.setattr(asking, "decode", tight)
    evaluate(model, ["pope"], data, tmp_path, settings())
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 4, 2, 2]
    assert same(rows(tmp_path, "pope"), rows(once[1], "pope")) <= 1


def test_questions_are_spread_and_dealt_in_equal_lengths():
    assert spread(12, 4) == [0, 3, 6, 9] and spread(3, 0) == spread(3, 5) == [0, 1, 2]
    questions = [Question(id=i, text="x" * (i * 7 % 50)) for i in range(101)]
    for world in (1, 2, 3, 4):
        dealt = shares(questions, range(101), world)
        assert sorted(at for share in dealt for at in share) == list(range(101))
        lengths = [sum(len(questions[at].text) for at in share) for share in dealt]
        assert max(lengths) - min(lengths) <= 50 and max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_results_of_a_run_go_into_it(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.toml").touch()
    assert default_out(str(run)) == default_out(str(run / "model")) == run / "evaluation"
    assert default_out("models/llava") == Path("evaluation/llava")
    assert default_out("http://localhost:8000/v1") == Path("evaluation/localhost-8000-v1")


def test_questions_of_one_id_stay_together_under_a_limit():
    pairs = [Question(id=f"{i // 2}.png", text=f"{i}") for i in range(12)]
    assert limited(pairs, 4) == [0, 1, 6, 7] and limited(pairs, 1) == [0, 1]
    alone = [Question(id=i, text="") for i in range(12)]
    assert limited(alone, 4) == [0, 3, 6, 9] and limited(alone, 0) == limited(alone, 99) == list(range(12))
