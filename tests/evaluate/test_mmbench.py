"""MMBench: prompts as LLaVA builds them, the server's workbook cell for cell, and the score by rule."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.evaluate.scored import GOLDEN, answer, refused, result, said, write_answers
from vistune import images
from vistune.evaluate import official, sheet
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.mmbench import letter

FOLDERS = {"mmbench": GOLDEN / "submission" / "mmbench_en", "mmbench_cn": GOLDEN / "submission" / "mmbench_cn"}
ANSWERS = "answers/llava-v1.5-tiny.jsonl"
both = pytest.mark.parametrize("name", FOLDERS)
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category")
TSV = "mmbench_dev_20230712.tsv"


def picture(colour: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def row(index: int | str = 1, **more: object) -> dict[str, object]:
    """A question with two options."""
    plain = {"index": index, "question": "What?", "A": "cat", "B": "dog", "answer": "B", "image": picture()}
    return plain | {"category": "animals", "l2-category": "perception"} | more


def table(folder: Path, *rows: dict[str, object], columns: tuple[str, ...] = COLUMNS, name: str = TSV) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def place(folder: Path) -> official.Place:
    return official.place(folder, ("mmbench",))


def cells(path: Path | str) -> list[list[object]]:
    return [[cell.value for cell in line] for line in openpyxl.load_workbook(path)["Sheet1"].iter_rows()]


def uploaded(folder: Path, *answers: official.Answer) -> list[list[object]]:
    [path] = named("mmbench").submission(place(folder), answers, folder / "out")
    return cells(path)


@both
def test_the_workbook_is_the_golden_one(name, tmp_path, capsys):
    data = FOLDERS[name]
    found = said(name, data, data / ANSWERS, capsys, "--out", tmp_path)
    expected = json.loads((data / "expected_upload_cells.json").read_text())
    [path] = found["submission"]
    assert cells(path) == [expected["header"], *expected["rows"]] == cells(data / "expected_upload.xlsx")
    kinds = [[type(cell) for cell in line] for line in cells(path)]
    assert kinds == [[type(cell) for cell in line] for line in cells(data / "expected_upload.xlsx")]
    assert Path(path).stem == next(data.glob("*.tsv")).stem
    assert found["protocol"] == "llava-official, scored by rule" and "MMBench server" in found["scored_elsewhere"]


@both
def test_the_score_by_rule_is_that_of_the_workbook(name):
    """The rule again, from the cells that the server gets."""
    data = FOLDERS[name]
    found = result(name, data, data / ANSWERS)
    header, *rows = cells(data / "expected_upload.xlsx")
    right = {}
    for line in rows:
        one = dict(zip(header, line, strict=True))
        options = [one[key] for key in "ABCD"]
        options = options[: options.index(None)] if None in options else options
        right[one["index"]] = letter(one["prediction"] or "", options) == one["answer"]
    answered = [one for one in found.items if one["answer"] is not None]
    assert {one["question_id"]: one["correct"] for one in answered} == {
        one["question_id"]: right[one["question_id"]] for one in answered
    }
    assert found.scores == {"accuracy_rule": pytest.approx(100 * sum(right.values()) / len(answered))}
    assert found.answered == len(answered) == 84 and len(found.remarks["missing"]) == 6
    assert len(found.remarks["duplicate"]) == 1 and found.headline == "accuracy_rule"


@both
def test_options_end_before_the_first_that_is_none(name):
    benchmark = named(name)
    asked = {one.id: one for one in benchmark.questions(official.place(FOLDERS[name], benchmark.folders))}
    assert len(asked) == 90
    assert asked[10].row["option_char"] == ["A", "B", "C"]  # D is None
    assert asked[11].row["option_char"] == ["A"]  # B is NA
    assert asked[1000012].row["options"][0] == "1.0" and asked[14].row["options"][0] == "  spaced "
    lines = asked[13].text.split("\n")
    assert lines[:2] == ["two", "line hint"] and lines[3] == 'A. "quoted" text'
    assert lines[-1] == ("请直接回答选项字母。" if name == "mmbench_cn" else
                         "Answer with the option's letter from the given choices directly.")  # fmt: skip
    assert not asked[3].text.startswith("\n") and asked[3].text.split("\n")[1].startswith("A. ")


def test_the_prompt_and_the_row(tmp_path):
    folder = table(tmp_path, row(7, hint="Look.\nWell.", C="cow"))
    [asked] = named("mmbench").questions(place(folder))
    assert asked.text == (
        "Look.\nWell.\nWhat?\nA. cat\nB. dog\nC. cow\nAnswer with the option's letter from the given choices directly."
    )
    assert asked.row == {"round_id": 0, "options": ["cat", "dog", "cow"], "option_char": ["A", "B", "C"]}
    assert (asked.id, asked.category, asked.truth) == (7, "animals", "B")
    assert images.image_size(asked.images[0]) == (3, 2)


@pytest.mark.parametrize("word", ["", "nan", "NaN", "None", "NONE", "none", "NA", "null", "#N/A", "n/a"])
def test_what_is_none_to_pandas_or_to_llava(word, tmp_path):
    folder = table(tmp_path, row(1, hint=word, C=word, D="never seen"))
    [asked] = named("mmbench").questions(place(folder))
    assert asked.text.startswith("What?\nA. cat\nB. dog\nAnswer") and asked.row["options"] == ["cat", "dog"]


def test_rotated_rows_have_one_picture_and_one_circle(tmp_path):
    rows = [row(i + 1_000_000 * turn, image=picture() if turn == 0 else str(i)) for i in (1, 2) for turn in range(2)]
    folder = table(tmp_path, *rows)
    asked = named("mmbench").questions(place(folder))
    assert asked[0].images[0].data is asked[1].images[0].data
    given = [answer(one.id, "B" if one.id != 1_000_002 else "A") for one in asked]
    found = named("mmbench").score(place(folder), given)
    assert found.scores == {"accuracy_rule": 75.0, "accuracy_circular": 50.0}
    assert found.headline == "accuracy_circular" and not found.partial
    assert found.tables["MMBench, by category"] == [{"category": "animals", "rows": 4} | found.scores]
    assert found.tables["MMBench, by l2_category"] == [{"l2_category": "perception", "rows": 4} | found.scores]
    part = named("mmbench").score(place(folder), given[:3])
    assert part.scores == {"accuracy_rule": 100.0, "accuracy_circular": 100.0} and part.partial


def test_later_rounds_of_llavas_all_rounds_are_said(tmp_path):
    folder = table(tmp_path, row(1))
    rows = [{"question_id": 1, "text": text, "round_id": turn} for turn, text in enumerate(["B", "A"])]
    given, _ = official.answers(write_answers(tmp_path / "a.jsonl", rows))
    found = named("mmbench").score(place(folder), given)
    assert found.scores == {"accuracy_rule": 100.0} and found.remarks == {"of a later round": ["1"]}


def test_without_right_answers_there_is_no_score_and_a_workbook(tmp_path):
    columns = tuple(name for name in COLUMNS if name != "answer")
    folder = table(tmp_path, row(1), columns=columns, name="mmbench_test_20230712.tsv")
    found = named("mmbench").score(place(folder), [answer(1, "B")])
    assert found.scores == {} and found.items[0]["correct"] is None and found.items[0]["parsed"] == "B"
    assert uploaded(folder, answer("1", "B")) == [
        ["index", "question", "A", "B", "C", "D", "prediction"],
        [1, "What?", "cat", "dog", None, None, "B"],
    ]


@pytest.mark.parametrize(
    "text", ["B", "B.", "(B)", "B) cat", "The answer is B", "*B*", "[B]: so", "a dog", "DOGS", "\nB"]
)
def test_answers_that_choose_b(text):
    assert letter(text, ["cat", "dog"]) == "B"


@pytest.mark.parametrize("text", ["b", "A or B", "cat and dog", "C", "", "BA", "\uff22", "\u7b54\u6848\u662fB", "B's"])
def test_answers_that_choose_nothing(text):
    assert letter(text, ["cat", "dog"]) is None


def test_an_article_is_an_a():
    assert letter("A dog", ["cat", "dog"]) == "A"


def test_columns_are_read_as_pandas_reads_them():
    assert sheet.typed(["1", " 2 ", "+3", "-04"]) == [1, 2, 3, -4]
    assert sheet.typed(["1", "", "3"]) == [1, None, 3]
    assert sheet.typed(["1.0", "2e3", ".5", "5.", "NA"]) == [1.0, 2000.0, 0.5, 5.0, None]
    assert sheet.typed(["1.0", "x", "None"]) == ["1.0", "x", None]
    assert sheet.typed(["True", "FALSE", ""]) == [True, False, None]
    assert sheet.typed(["true", "no"]) == ["true", "no"]
    assert sheet.typed(["1_000", "2"]) == ["1_000", "2"]
    assert sheet.typed(["١", "2"]) == ["١", "2"]
    assert sheet.typed(["", "NA"]) == [None, None]


def test_cells_that_a_workbook_cannot_hold_or_would_compute(tmp_path, capsys):
    folder = table(tmp_path, row(1, question="=1+1"), row(2), row(3), row(4))
    given = [answer(1, "=A1"), answer(2, "a\x07b\x1f"), answer(3, "x" * 40_000), answer(4, "#N/A"), answer(9, "far")]
    found = uploaded(folder, *given)
    assert [line[6] for line in found] == ["prediction", "=A1", "ab", "x" * 32_767, "#N/A"]
    assert found[1][1] == "=1+1" and "control characters" in capsys.readouterr().err.replace("\n", " ")
    [path] = (folder / "out").glob("*.xlsx")
    assert {cell.data_type for line in openpyxl.load_workbook(path)["Sheet1"]["B1:G5"] for cell in line} <= {"s", "n"}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), min_size=1, max_size=5))
def test_any_answer_reaches_its_cell(tmp_path_factory, texts):
    folder = table(tmp_path_factory.mktemp("t"), *[row(i) for i in range(len(texts))])
    found = uploaded(folder, *[answer(i, text) for i, text in enumerate(texts)])
    assert [line[6] for line in found[1:]] == [text or None for text in texts]


def test_bad_files_are_named(tmp_path, capsys):
    file = write_answers(tmp_path / "a.jsonl", [{"question_id": 1, "text": "B"}])
    assert TSV in refused("mmbench", tmp_path, file, capsys)
    for number, gone in enumerate(("index", "question", "A")):
        folder = table(tmp_path / str(number), row(), columns=tuple(name for name in COLUMNS if name != gone))
        assert f"column {gone} is missing" in refused("mmbench", folder, file, capsys)
    folder = table(tmp_path / "number", row("one"))
    assert "'one' is no number" in refused("mmbench", folder, file, capsys)
    folder = table(tmp_path / "twice", row(1), row(1))
    assert "question_id 1" in refused("mmbench", folder, file, capsys)
    folder = table(tmp_path / "long", row(1))
    with (folder / TSV).open("a") as stream:
        stream.write("2" + "\tx" * 20 + "\n")
    assert f"{TSV}:3: 21 cells" in refused("mmbench", folder, file, capsys).replace("\n", "")
    for image, word in (("iVBOR*", "no base64"), ("iVBORw0KGg", "no base64"), ("", "empty")):
        with pytest.raises(ValueError, match=f"index 3: the picture is {word}"):
            named("mmbench").questions(place(table(tmp_path / "image", row(1), row(3, image=image))))
    with pytest.raises(ValueError, match="column image is missing"):
        table(tmp_path / "none", row(), columns=tuple(name for name in COLUMNS if name != "image"))
        named("mmbench").questions(place(tmp_path / "none"))
