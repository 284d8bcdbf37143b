"""The report of a run: its figures, thousands of steps without losing a spike, runs cut short, runs side by side."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures

from tests.parsed import Page
from vistune import recipe as recipes
from vistune.data.growing import COLUMNS
from vistune.report import page
from vistune.report.run import ALIVE, open_run
from vistune.samples import Fault
from vistune.train.guarding import lock

EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"


def row(step: int, steps: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as the loop writes it."""
    return {
        "step": step,
        "loss": 2.0 / math.sqrt(step),
        "grad_norm": 1.0 + 0.1 * (step % 7),
        "lr": {"connector": 1e-3 * step / steps, "language": 2e-4},
        "tokens": 1000,
        "supervised": 200,
        "samples": 8,
        "padding": 0.25,
        "tokens_per_s": 5000.0,
        "supervised_per_s": 1000.0,
        "samples_per_s": 40.0,
        "mfu": 0.4,
        "ms": 200.0,
        "skipped": 0,
        "nonfinite": 0,
        "loss_scale": 1.0,
        "consumed_samples": 8 * step,
        "global_batch": 8,
        "memory": {"allocated": 10.0, "reserved": 12.0, "peak": 11.5},
        "eta_s": 0.2 * (steps - step),
        "seconds": 0.2 * step,
        "stop": False,
    } | more


def made_run(folder: Path, steps: int = 40, done: int | None = None, **sections: dict[str, Any]) -> Path:
    """A run folder as training leaves it: `done` of `steps` steps, a mixture of two sources, what `sections` say."""
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {
        "name": sections.pop("name", folder.name),
        "run": str(folder),
        "model": {"start": "stage0"},
        "data": {"sources": [{"path": "a.json", "epochs": 2.0}, {"path": "b.json", "cap": 10}], "length": 256},
        "learn": {"connector": 1e-3, "language": 2e-4},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    (folder / "recipe.toml").write_text(recipes.dump(recipes.build(tree, "made")))
    done = steps if done is None else done
    lines(folder / "metrics.jsonl", [row(step, steps) for step in range(1, done + 1)])
    index(folder / "index" / "index-1")
    (folder / "environment.json").write_text(json.dumps({"vistune": "0", "device": "cpu", "data_index": "ab" * 32}))
    if done == steps:
        (folder / "summary.json").write_text(json.dumps({"steps": steps, "model": str(folder / "model")}))
    saved = folder / "checkpoints" / f"step-{done - done % 10:08d}"
    saved.mkdir(parents=True)
    (saved / "run.json").write_text(json.dumps({"state": {"consumed": 8 * done, "tokens": 1000 * done}}))
    return folder


def index(folder: Path, longest: int = 255) -> None:
    """Twenty rows of one source, two of them faulty, and thirty of another, all text."""
    folder.mkdir(parents=True)
    columns = {name: np.zeros(50, kind) for name, kind in COLUMNS.items()}
    columns["source"][20:] = 1
    columns["text"][:] = 40
    columns["text"][49] = longest
    columns["image"][:20] = 60
    columns["images"][:20] = 1
    columns["supervised"][:] = 20
    columns["fault"][:2] = 3
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "meta.json").write_text(json.dumps({"hash": "ab" * 32, "length": 256, "rows": 50, "faults": 2}))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def evaluation(step: int, loss: float, score: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "held_out_loss": loss,
        "held_out": {"a": loss, "b": 2 * loss},
        "scores": {"pope": {"f1": score, "accuracy": score / 2}},
        "headline": {"pope": score},
        "partial": {},
        "samples": [],
    } | more


def written(*runs: Path, out: Path | None = None) -> tuple[Page, dict[str, Any]]:
    found = page.write(list(runs), out)
    path = Path(found["page"])
    text = path.read_text()
    read = Page(text)
    for tag, known in read.tags:
        assert known.get("src", "data:image/").startswith("data:image/") and "href" not in known, (tag, known)
        assert not [key for key in known if key.startswith("on")] or tag == "button"
    assert len(read.of("script")) == 2
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", "".join(read.of("style") + read.of("script")))
    return read, found


def drawn(read: Page, title: str) -> list[dict[str, Any]]:
    """The numbers behind the chart of that title."""
    charts = [
        known
        for tag, known, text in read.texts
        if tag == "figure" and text.strip().lstrip("log").strip().startswith(title)
    ]
    return json.loads(charts[0]["data-lines"])


def test_a_finished_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine")
    lines(run / "evaluations.jsonl", [evaluation(20, 1.5, 40.0), evaluation(40, 1.25, 60.5)])
    (run / "best.json").write_text(json.dumps({"step": 40, "by": "pope", "value": 60.5, "checkpoint": "step-40"}))
    read, found = written(run)
    assert found["page"] == str(run / "report.html")
    (figures,) = found["runs"]
    assert figures["state"] == "finished" and not figures["partial"] and figures["steps"] == 40
    assert figures["loss"] == pytest.approx(np.mean([2 / math.sqrt(i) for i in range(31, 41)]))
    assert figures["headline"] == {"pope": 60.5} and figures["held_out_loss"] == 1.25 and figures["best"]["step"] == 40
    assert read.of("verdict")[0].strip() == "Finished: 40 steps."
    assert "60.5" in read.of("evaluations")[0] and "best by pope" in read.of("tag")
    titles = ["Loss", "Gradient norm", "Learning rate", "Throughput", "MFU", "Time of a step", "Padding", "Memory"]
    for title in titles:
        assert drawn(read, title), title
    assert [line["name"] for line in drawn(read, "Loss")] == ["loss", "held out"]
    assert drawn(read, "Loss")[1]["y"] == [1.5, 1.25]
    assert drawn(read, "Memory")[0]["y"] == [11.5] * 40


def test_the_mixture_is_the_index_under_the_recipe_s_shares(tmp_path: Path) -> None:
    """18 usable rows twice, of 100 tokens; 10 of 30 rows of text, of 40 tokens but one."""
    read, found = written(made_run(tmp_path / "mine"))
    data = found["runs"][0]["data"]
    assert data["rows"] == 50 and data["usable"] == 48 and data["samples"] == 46
    second = (29 * 40 + 255) / 3
    assert data["tokens"] == pytest.approx(3600 + second) and data["supervised"] == pytest.approx(36 * 20 + 200)
    (table,) = read.of("mixture")
    assert f"{100 * 3600 / (3600 + second):.1f}%" in table and "a.json" in table and "20.0%" in table
    titles = [known["title"] for tag, known in read.tags if tag == "i" and known.get("title")]
    assert "1 picture: 18 samples" in titles and "0 pictures: 30 samples" in titles
    assert sum(int(one.split(": ")[1].split()[0]) for one in titles if "tokens" in one) == 48


def test_an_index_that_is_of_other_data_is_not_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine")
    (run / "environment.json").write_text(json.dumps({"data_index": "cd" * 32}))
    read, found = written(run)
    assert found["runs"][0]["data"] is None and not read.of("mixture") and "index of its data" in read.of("remarks")[0]


@pytest.mark.slow
def test_spikes_and_gaps_survive_thinning(tmp_path: Path) -> None:
    run = made_run(tmp_path / "long", steps=2)
    rows = [row(step, 12_000) for step in range(1, 12_001)]
    rows[7_654]["loss"], rows[9_100]["loss"], rows[5_000]["grad_norm"] = 77.0, float("nan"), 400.0
    lines(run / "metrics.jsonl", rows)
    read, found = written(run)
    loss = drawn(read, "Loss")[0]
    assert len(loss["x"]) < 2000 and loss["x"][0] == 1 and loss["x"][-1] == 12_000
    assert dict(zip(loss["x"], loss["y"], strict=True))[7655] == 77.0
    assert dict(zip(loss["x"], loss["y"], strict=True))[9101] is None and max(loss["mean"]) < 3
    norm = drawn(read, "Gradient norm")[0]
    assert dict(zip(norm["x"], norm["y"], strict=True))[5001] == 400.0
    assert [known for tag, known in read.tags if tag == "input" and "checked" in known]  # opens logarithmic
    assert [known for tag, known in read.tags if known.get("class") == "break"]
    assert Path(found["page"]).stat().st_size < 1_000_000


def test_a_killed_run_is_partial(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine", steps=40, done=23)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "lo')
    read, found = written(run)
    assert found["runs"][0]["partial"] and found["runs"][0]["steps"] == 40 and found["runs"][0]["state"] == "stopped"
    assert (
        "Partial: stopped after step 23 of 40" in read.of("verdict")[0]
        and "checkpoint of step 20" in read.of("verdict")[0]
    )
    assert "cut short" in read.of("remarks")[0] and "It was not evaluated" in read.of("remarks")[0]


def test_a_run_at_work_and_one_not_begun(tmp_path: Path) -> None:
    assert ALIVE > lock.STALE and lock.SIGN < ALIVE
    run = made_run(tmp_path / "mine", steps=40, done=23)
    (run / lock.NAME).write_text("{}")
    read, found = written(run)
    assert found["runs"][0]["state"] == "going" and "at work" in read.of("verdict")[0]
    (run / lock.NAME).unlink()
    (run / "metrics.jsonl").unlink()
    read, found = written(run)
    assert found["runs"][0]["state"] == "not begun" and not read.of("chart") and found["runs"][0]["loss"] is None


def test_steps_done_twice_count_once(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine", steps=40)
    lines(run / "metrics.jsonl", [row(i, 40) for i in range(1, 21)] + [row(i, 40, loss=9.0) for i in range(11, 41)])
    assert open_run(run).series("loss")[10:].tolist() == [9.0] * 30 and open_run(run).done == 40


@pytest.mark.parametrize(("made", "said"), [(False, "no such run folder"), (True, "Below it lie runs: ")])
def test_no_run(tmp_path: Path, made: bool, said: str) -> None:
    if made:
        made_run(tmp_path / "all" / "mine")
    with pytest.raises(ValueError, match=said):
        page.write([tmp_path / "all"])


def test_everything_of_the_run_is_text(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine", name=EVIL, data={"sources": [{"path": "a", "name": EVIL}, {"path": "b"}]})
    faults = [Fault(source=EVIL, row=i, id=EVIL, code="image_broken", reason=EVIL, path=EVIL) for i in range(7)]
    lines(run / "quarantine.jsonl", [{name: getattr(one, name) for name in Fault.__slots__} for one in faults])
    sample = {"benchmark": EVIL, "question_id": EVIL, "image": EVIL, "question": EVIL, "answer": EVIL, "truth": EVIL}
    lines(
        run / "evaluations.jsonl",
        [evaluation(9, 1.0, 3.0, headline={EVIL: 3.0}, samples=[sample | {"correct": False}])],
    )
    other = made_run(tmp_path / "other", name="other")
    read, found = written(run)
    assert read.of("h1") == [EVIL] and read.of("question") == [EVIL] and EVIL in read.of("mixture")[0]
    assert found["runs"][0]["quarantined"] == 7 and len(re.findall("image_broken", " ".join(read.of("tag")))) == 1
    assert len(read.of("faults")) == 1 and read.of("faults")[0].count(EVIL) > page.FAULTS
    both, _ = written(run, other, out=tmp_path / "both.html")
    assert EVIL in " ".join(both.of("th")) and EVIL in both.of("differs")[0]


def test_sampled_answers_over_the_steps(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine")
    picture = tmp_path / "cup.png"
    Pictures.new("L", (700, 300), 128).save(picture)
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"nothing")
    asked = {"benchmark": "pope", "truth": "2", "question": "How many?"}
    told = [(10, "3", False), (20, "3", False), (30, "2", True), (40, "2", True)]
    rows = [
        evaluation(
            step,
            1.0,
            50.0,
            samples=[
                asked | {"question_id": 1, "image": str(picture), "answer": answer, "correct": correct},
                asked | {"question_id": 2, "image": str(torn), "answer": "", "correct": None},
            ],
        )
        for step, answer, correct in told
    ]
    lines(run / "evaluations.jsonl", rows)
    read, _ = written(run)
    first, second = read.of("ask")
    assert [text.strip() for text in read.of("li") if text.strip()[:2] in ("10", "30")] == [
        "30✓ 2",
        "10✗ 3",
        "10(nothing)",
    ]
    assert "How many?" in first and "torn.png" in second and "cannot be opened" in second
    assert len([known for tag, known in read.tags if tag == "img"]) == 1


def test_a_score_of_a_part_is_called_one(tmp_path: Path) -> None:
    run = made_run(tmp_path / "mine")
    lines(run / "evaluations.jsonl", [evaluation(20, 1.5, 40.0, partial={"pope": 0.05})])
    read, found = written(run)
    assert found["runs"][0]["evaluated_partly"] == {"pope": 0.05}
    assert "5.0% of its questions: not its score" in read.of("part-of")[0]
    assert any("pope, on a part" in one for one in read.of("tile"))


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    """Only what differs is listed; a run keeps its colour in every chart."""
    first = made_run(tmp_path / "first", steps=40)
    second = made_run(tmp_path / "second", steps=40, done=20, learn={"connector": 2e-3}, optimizer={"clip": 0.5})
    (second / "environment.json").write_text(json.dumps({"vistune": "1", "device": "cpu", "data_index": "ab" * 32}))
    lines(first / "evaluations.jsonl", [evaluation(40, 1.0, 60.0)])
    lines(second / "evaluations.jsonl", [evaluation(20, 1.2, 55.0, partial={"pope": 0.5})])
    read, found = written(first, second)
    assert found["page"] == str(first / "report.html") and [one["partial"] for one in found["runs"]] == [False, True]
    recipe, environment = read.of("differs")
    keys = [text for tag, known, text in read.texts if tag == "td" and known.get("class") == "key"]
    assert sorted(keys) == ["learn.connector.lr", "name", "optimizer.clip", "vistune"]
    assert "0.002" in recipe and "vistune" in environment
    assert any("The same index everywhere" in one for one in read.of("muted"))
    assert "partial: step 20 of 40" in read.of("figures")[0] and "on 50.0% of its questions" in read.of("scores")[0]
    for title in ("Loss", "Held-out loss", "Throughput", "Memory", "pope"):
        assert [(line["name"], line["colour"]) for line in drawn(read, title)] == [("first", 0), ("second", 1)], title


def test_other_data_is_told_by_its_sources(tmp_path: Path) -> None:
    first, second = (
        made_run(tmp_path / "first"),
        made_run(tmp_path / "second", data={"sources": [{"path": "a.json"}, {"path": "c.json"}]}),
    )
    read, _ = written(first, second)
    text = " ".join(read.of("differs"))
    assert "a.json: samples an epoch" in text and "c.json: usable" in text and "a.json: usable" not in text
    assert "data.sources.0.epochs" in text


def test_runs_of_one_name_are_told_apart_and_none_comes_twice(tmp_path: Path) -> None:
    first, second = made_run(tmp_path / "x" / "run"), made_run(tmp_path / "y" / "run")
    _, found = written(first, second)
    assert [one["name"] for one in found["runs"]] == [str(first), str(second)]
    with pytest.raises(ValueError, match="the same run twice"):
        page.write([first, first])


def test_a_run_of_another_version_and_rows_with_less_in_them(tmp_path: Path) -> None:
    """What this version does not know is shown as it stands; what is not there is left out."""
    run = made_run(tmp_path / "mine", steps=3)
    (run / "recipe.toml").write_text(
        'name = "newer"\nfuture = 1\n[learn]\nconnector = 1e-3\n[[data.sources]]\npath = "a"\n'
    )
    lines(run / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": "nan"}])
    nothing = dict.fromkeys(("held_out_loss", "held_out", "scores", "headline", "partial", "samples"))
    lines(run / "evaluations.jsonl", [{"step": 2, **nothing}, {"step": 3}])
    (run / "environment.json").write_text('{"vistune": "9"')
    read, found = written(run)
    assert read.of("h1") == ["newer"] and found["runs"][0]["first_loss"] == 2.0 and found["runs"][0]["step"] == 3
    assert drawn(read, "Loss")[0]["y"] == [2.0, None, None] and "connector" in read.of("key")
    written(run, made_run(tmp_path / "other"), out=tmp_path / "both.html")
