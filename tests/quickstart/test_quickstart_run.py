"""The whole quickstart, very small: everything it promises is written, the same twice, and nothing else is touched."""

import json
from pathlib import Path

import pytest

from vistune.evaluate import official
from vistune.evaluate.answering import Local
from vistune.evaluate.benchmarks import named
from vistune.evaluate.items import Answer
from vistune.models.load import load
from vistune.quickstart import run as quickstart
from vistune.quickstart import scenes

TINY = scenes.Sizes(align=64, instruct=48, captions=4, questions=4, turns=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(quickstart, "QUICK", TINY)
    folders = [tmp_path_factory.mktemp("quickstart") / name for name in ("a", "b")]
    yield [(folder, quickstart.run(folder, quick=True, seed=1)) for folder in folders]
    patch.undo()


@pytest.mark.slow
def test_two_runs_are_the_same(runs):
    (_, a), (_, b) = runs
    assert a["losses"] == b["losses"]
    assert len(a["losses"]["align"]) >= 4 and len(a["losses"]["instruct"]) >= 3
    for key in ("held_out_exact_match", "shuffled_exact_match", "align_caption_gain", "kinds"):
        assert a[key] == b[key], key


def test_summary_and_scores(runs):
    folder, summary = runs[0]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["align_left_the_rest_untouched"] is True
    asked = json.loads((folder / "data" / "heldout_questions.json").read_text())
    assert sum(kind["questions"] for kind in summary["kinds"].values()) == len(asked)
    right = sum(kind["questions"] * kind["exact_match"] for kind in summary["kinds"].values())
    assert summary["held_out_exact_match"] == pytest.approx(right / len(asked), abs=1e-3)
    assert summary["losses"]["instruct"][-1] < summary["losses"]["align"][0]


def test_the_stock_classes_answer_as_we_do(runs):
    """The exported folder, opened without vistune, answered the first question as `generate` did."""
    folder, summary = runs[0]
    first = json.loads((folder / "data" / "heldout_questions.json").read_text())[0]
    from vistune.generate import answer_batch
    from vistune.samples import Image

    picture = Image(path=str(folder / "data" / "images" / first["image"]))
    ours = answer_batch(load(summary["model"]), [(first["conversations"][0]["value"], [picture])], max_new_tokens=16)
    assert summary["asked"]["answer"] == ours[0]


def test_the_held_out_questions_are_a_benchmark(runs):
    """Asked through it, the exported folder scores what the quickstart says, kind by kind."""
    folder, summary = runs[0]
    benchmark = named("custom")
    place = official.place(folder / "data" / "heldout", benchmark.folders)
    questions = benchmark.questions(place)
    said = Local(load(summary["model"]), batch=5).answer(questions, benchmark.tokens(place))
    answers = [Answer(id=questions[at].id, prompt=questions[at].text, text=one.text) for at, one in said]
    result = benchmark.score(place, answers)
    assert not result.partial and not result.remarks
    assert result.scores["exact"] == pytest.approx(100 * summary["held_out_exact_match"], abs=0.01)
    (rows,) = result.tables.values()
    assert {row["category"]: row["answered"] for row in rows} == {
        kind: one["questions"] for kind, one in summary["kinds"].items()
    }


def test_report_is_drawn(runs):
    pytest.importorskip("matplotlib")
    assert (runs[0][0] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("ten years")
    with pytest.raises(ValueError, match="no earlier quickstart"):
        quickstart.run(tmp_path, quick=True)
    assert precious.read_text() == "ten years" and len(list(tmp_path.iterdir())) == 1


def test_examples_show_mistakes_last_and_no_picture_twice():
    asked = [
        quickstart.Asked(f"kind{i % 3}", Path(f"{i // 3}.png"), "?", "one", "two" if i in (4, 5, 40, 41) else "one", "")
        for i in range(60)
    ]
    shown = quickstart.examples(asked)
    assert [one.answer for one in shown] == ["one"] * 6 + ["two"] * 2
    assert len({one.image for one in shown}) == 8
    assert [one.kind for one in shown[:6]] == ["kind0", "kind1", "kind2"] * 2
