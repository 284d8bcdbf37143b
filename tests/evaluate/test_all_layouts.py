"""Every benchmark end to end, offline: official layout in small, the quickstart's model, `evaluate`, then `score`."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluate import toys
from tests.evaluate.openai_server import serving
from vistune import cli, console
from vistune.evaluate import official
from vistune.evaluate.benchmarks import benchmarks, named
from vistune.models.assemble import assemble
from vistune.quickstart.run import PARTS

JUDGED = ["llava_bench", "mmvet"]
SCORED = [name for name in toys.LAYOUTS if name not in JUDGED]
FULL = dict.fromkeys(SCORED, 100.0) | {"mme": 2000.0}
"""What the right answers earn: percent, and MME's ten categories of perception at 200 each."""


def grades(messages: list[dict[str, Any]]) -> str:
    """LLaVA-Bench's judge gives two grades, MM-Vet's gives one."""
    return "8 4\nBecause." if messages[0]["role"] == "system" else "0.5"


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing but this machine is connected to."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost"):
            raise OSError(f"a test wanted {address}")
        real(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "stage0"
    assemble(PARTS / "vision", PARTS / "language", folder, template="v1", image="pad", dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def judge():
    with serving(reply=grades) as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict[str, toys.Toy]]:
    folder = tmp_path_factory.mktemp("eval")
    return folder, {name: write(folder) for name, write in toys.LAYOUTS.items()}


@pytest.fixture(scope="module")
def evaluated(model, data, judge, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """All benchmarks in one call; the folder it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    names = ",".join(data[1])
    given = ["--judge", judge.url, "--judge-model", "tiny", "--batch", 8, "--max-new-tokens", 8, "--device", "cpu"]
    code, found, _ = spoken("evaluate", model, "--benchmark", names, "--data", data[0], "--out", out, *given)
    assert code == 0
    return out, found


def spoken(*words: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout, and stderr, of a command with --json."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli._run([*map(str, words), "--json"])
    console.out.stderr = False
    return code, json.loads(out.getvalue()) if out.getvalue() else {}, err.getvalue()


def scored(name: str, data: Path, answers: Path, *words: object) -> dict[str, Any]:
    code, found, said = spoken("score", name, "--data", data, "--answers", answers, *words)
    assert code == 0, said
    return found


def write_answers(path: Path, rows: list[dict[str, Any]]) -> Path:
    toys.write_lines(path, rows)
    return path


def test_there_is_a_toy_of_every_benchmark() -> None:
    assert set(toys.LAYOUTS) == set(benchmarks())


@pytest.mark.parametrize("name", toys.LAYOUTS)
def test_each_is_evaluated(name: str, data, evaluated) -> None:
    out, found = evaluated
    toy, one = data[1][name], found["benchmarks"][name]
    assert (one["questions"], one["answered"], one["share"], one["partial"]) == (toy.questions, toy.questions, 1, False)
    assert one["subset"] is (named(name).published is not None)
    assert one["scores"] and one["headline"] in one["scores"] and one["score"] == one["scores"][one["headline"]]
    assert not {"missing", "foreign", "duplicate", "broken", "failed", "unreadable"} & set(one["remarks"])
    rows = [json.loads(line) for line in (out / name / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == toy.questions
    assert all({"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= set(row) for row in rows)
    items = [json.loads(line) for line in (out / name / "items.jsonl").read_text("utf-8").splitlines()]
    assert items and all({"question_id", "category", "question", "answer", "truth", "correct"} <= set(i) for i in items)


def test_what_is_asked_is_what_llava_asks(data, evaluated) -> None:
    """The prompts of the answers file are those of the right answers, which spell them out."""
    for name, toy in data[1].items():
        rows = (evaluated[0] / name / "answers.jsonl").read_text("utf-8").splitlines()
        asked = [(str(row["question_id"]), row["prompt"]) for row in map(json.loads, rows)]
        assert asked == [(str(row["question_id"]), row["prompt"]) for row in toy.right], name


def test_the_pages_and_files_of_an_evaluation(evaluated) -> None:
    out, found = evaluated
    assert json.loads((out / "scores.json").read_text("utf-8")) == found
    page = (out / "index.html").read_text("utf-8")
    assert all(one["title"] in page for one in found["benchmarks"].values())
    assert found["answers"] == sum(one["questions"] for one in found["benchmarks"].values())
    assert found["precision"] == "fp32" and found["answers_per_s"] > 0


@pytest.mark.parametrize("name", toys.LAYOUTS)
def test_scoring_the_answers_again_gives_the_same(name: str, data, evaluated, judge, tmp_path) -> None:
    out, found = evaluated
    shutil.copytree(out / name, tmp_path / name)  # with the judge's replies
    before = judge.completions
    words = ["--judge", judge.url, "--judge-model", "tiny"] if name in JUDGED else []
    again = scored(name, data[0], tmp_path / name / "answers.jsonl", *words)
    assert judge.completions == before
    keys = ("score", "scores", "tables", "headline", "questions", "answered", "partial", "remarks")
    assert {key: again[key] for key in keys} == {key: found["benchmarks"][name][key] for key in keys}


@pytest.mark.parametrize("name", SCORED)
def test_the_right_answers_earn_full_marks(name: str, data, tmp_path) -> None:
    found = scored(name, data[0], write_answers(tmp_path / "right.jsonl", data[1][name].right))
    assert found["score"] == pytest.approx(FULL[name])
    assert all(one["correct"] for one in found["items"])


@pytest.mark.parametrize("name", SCORED)
def test_strange_answers_are_named(name: str, data, tmp_path) -> None:
    """A duplicate, an answer to no question, half a line, and one that is missing."""
    right = data[1][name].right
    _, line, rest = right[0]["prompt"].partition("\n")
    foreign = right[0] | {"question_id": "424242", "prompt": f"Who asked?{line}{rest}"}
    path = write_answers(tmp_path / "answers.jsonl", [*right[1:], right[1], foreign])
    with path.open("a") as file:
        file.write('{"question_id": 1, "te')
    found = scored(name, data[0], path)
    remarks = found["remarks"]
    assert found["partial"] and found["score"] is None
    assert (found["questions"], found["answered"]) == (len(right), len(right) - 1)
    assert found["share"] == pytest.approx((len(right) - 1) / len(right))
    assert len(remarks["missing"]) == 1 and len(remarks["duplicate"]) == 1
    assert any("424242" in said for said in remarks["foreign"])
    assert remarks["broken"] == [f"{path}:{len(right) + 2}"]


def test_without_a_judge_nothing_is_scored(data, evaluated) -> None:
    for name in JUDGED:
        found = scored(name, data[0], evaluated[0] / name / "answers.jsonl", "--out", evaluated[0] / "unjudged")
        assert found["score"] is None and not found["scores"]


def test_judgements_that_fail_are_counted_and_score_nothing(data, evaluated, tmp_path) -> None:
    with serving(reply=lambda messages: "No idea.") as server:
        for name in JUDGED:
            answers = shutil.copy(evaluated[0] / name / "answers.jsonl", tmp_path / f"{name}.jsonl")
            words = ["--judge", server.url, "--judge-model", "tiny", "--out", tmp_path / name]
            found = scored(name, data[0], answers, *words)
            assert len(found["remarks"]["failed"]) == data[1][name].questions
            assert found["score"] is None


def test_hidden_test_sets_give_what_their_servers_take(model, tmp_path) -> None:
    toys.vqav2_test(tmp_path)
    toys.vizwiz_test(tmp_path)
    out = tmp_path / "out"
    words = ["--benchmark", "vqav2,vizwiz", "--data", tmp_path, "--out", out, "--max-new-tokens", 4, "--device", "cpu"]
    code, found, said = spoken("evaluate", model, *words)
    assert code == 0, said
    vqav2, vizwiz = (found["benchmarks"][name] for name in ("vqav2", "vizwiz"))
    assert not vqav2["scores"] and not vizwiz["scores"] and vqav2["score"] is None
    (upload,), (other,) = (map(Path, one["submission"]) for one in (vqav2, vizwiz))
    rows = json.loads(upload.read_text("utf-8"))
    assert [row["question_id"] for row in rows] == [0, 1, 2] and rows[2]["answer"] == ""
    assert [row["image"] for row in json.loads(other.read_text("utf-8"))] == [
        f"VizWiz_test_{i:08}.jpg" for i in range(3)
    ]
    assert "EvalAI" in vqav2["scored_elsewhere"] and "EvalAI" in vizwiz["scored_elsewhere"]


EVAL_ZIP = {
    "gqa": "llava_gqa_testdev_balanced.jsonl",
    "scienceqa": "llava_test_CQM-A.json",
    "textvqa": "llava_textvqa_val_v051_ocr.jsonl",
    "pope": "llava_pope_test.jsonl",
    "mme": "llava_mme.jsonl",
    "seed": "llava-seed-bench.jsonl",
    "mmvet": "llava-mm-vet.jsonl",
}
"""What LLaVA's archive adds to the benchmarks' own files."""


@pytest.mark.parametrize("name", EVAL_ZIP)
def test_without_llavas_archive_the_same_is_asked_and_scored(name: str, data, tmp_path) -> None:
    toy = data[1][name]
    copy = shutil.copytree(toy.folder, tmp_path / toy.folder.name)
    asked = questions(name, copy)
    (copy / EVAL_ZIP[name]).unlink()
    again = questions(name, copy)
    if name == "textvqa":  # its own file has no OCR tokens
        asked = {(id, re.sub("\nReference OCR token: .*", "", text)): seen for (id, text), seen in asked.items()}
    assert again == asked
    if name in SCORED:
        found = scored(name, tmp_path, write_answers(tmp_path / "right.jsonl", toy.right))
        assert found["score"] == pytest.approx(FULL[name])


def test_folders_that_llava_calls_differently_are_one(data, tmp_path) -> None:
    """Its archive has mmbench_cn/ and mm-vet/, its docs put the table into mmbench/ and mm-vet.zip into mmvet/."""
    cn, mmvet = data[1]["mmbench_cn"].folder, data[1]["mmvet"].folder
    shutil.copytree(cn, tmp_path / "mmbench")
    (tmp_path / "mmbench_cn" / "answers_upload").mkdir(parents=True)
    assert questions("mmbench_cn", tmp_path).keys() == questions("mmbench_cn", cn).keys()
    shutil.copytree(mmvet, tmp_path / "mmvet" / "mm-vet")
    (tmp_path / "mm-vet").mkdir()
    (tmp_path / "mmvet" / "mm-vet" / "llava-mm-vet.jsonl").rename(tmp_path / "mm-vet" / "llava-mm-vet.jsonl")
    assert questions("mmvet", tmp_path) == questions("mmvet", mmvet)


PICTURES = {
    "vqav2": "val2014",
    "gqa": "data/images",
    "vizwiz": "val",
    "scienceqa": "images/test",
    "textvqa": "train_images",
    "pope": "val2014",
    "mme": "MME_Benchmark_release_version",
    "seed": ".",
    "llava_bench": "images",
    "mmvet": "images",
    "custom": "images",
}
"""What LLaVA's scripts give as --image-folder, below each benchmark's folder."""


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_may_lie_elsewhere(name: str, data, tmp_path) -> None:
    folder = data[1][name].folder
    elsewhere = shutil.copytree(folder / PICTURES[name], tmp_path / "elsewhere")
    without = shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    assert questions(name, without, elsewhere) == questions(name, folder)


def questions(name: str, data: Path, images: Path | None = None) -> dict[tuple[str, str], list[bytes]]:
    """What is asked, and the pictures' bytes."""
    benchmark = named(name)
    asked = benchmark.questions(official.place(data, benchmark.folders, images))
    return {one.key: [image.data or Path(image.path).read_bytes() for image in one.images] for one in asked}


def test_a_partial_run_says_its_share_and_has_no_score(model, data, tmp_path) -> None:
    words = ["--benchmark", "pope,mme", "--data", data[0], "--out", tmp_path, "--limit", 4, "--max-new-tokens", 2]
    code, found, said = spoken("evaluate", model, *words, "--device", "cpu")
    assert code == 0, said
    for name, questions in (("pope", 12), ("mme", 28)):
        one = found["benchmarks"][name]
        assert one["partial"] and one["score"] is None and one["share"] == pytest.approx(4 / questions)
        assert (one["answered"], one["questions"]) == (4, questions)
    assert f"PARTIAL, 4 of 12 questions answered ({4 / 12:.1%})" in said


def test_a_missing_question_file_is_named(model, data, tmp_path) -> None:
    copy = shutil.copytree(data[1]["mmbench"].folder, tmp_path / "mmbench")
    (copy / "mmbench_dev_20230712.tsv").rename(copy / "elsewhere.txt")
    code, _, said = spoken("evaluate", model, "--benchmark", "mmbench", "--data", tmp_path, "--device", "cpu")
    assert code == 2 and str(copy) in said and "tsv" in said and "docs/evaluate.md" in said
    code, _, said = spoken("evaluate", model, "--benchmark", "mmbnch", "--data", tmp_path, "--device", "cpu")
    assert code == 2 and "Did you mean mmbench?" in said


def test_an_unreadable_picture_is_named_and_the_others_are_asked(model, data, tmp_path) -> None:
    copy = shutil.copytree(data[1]["gqa"].folder, tmp_path / "gqa")
    (copy / "data" / "images" / "n1.jpg").write_bytes(b"no picture")
    (copy / "data" / "images" / "n2.jpg").unlink()
    words = ["--benchmark", "gqa", "--data", tmp_path, "--out", tmp_path / "out", "--max-new-tokens", 2]
    code, found, said = spoken("evaluate", model, *words, "--device", "cpu")
    assert code == 0, said
    one = found["benchmarks"]["gqa"]
    assert one["partial"] and one["answered"] == 2 and one["score"] is None
    named_ones = one["remarks"]["unreadable"]
    assert ["n1.jpg" in named_ones[0], "n2.jpg" in named_ones[1], len(named_ones)] == [True, True, 2]
    assert one["remarks"]["missing"] == ["20100001", "20100002"]
