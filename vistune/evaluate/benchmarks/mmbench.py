"""MMBench and MMBench-CN: a picture and up to four options, each question asked again with its options rotated."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vistune.evaluate import sheet
from vistune.evaluate.benchmarks import LETTER, Benchmark
from vistune.evaluate.items import Answer, Question, Result, item, match, percent
from vistune.evaluate.official import Place
from vistune.samples import Image

LETTERS = "ABCD"
ROTATED = 1_000_000
"""The rotated copies of question i have the indices i + 1,000,000, i + 2,000,000, ..."""

LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that the upload has not."""

PREDICTION = 6
"""Where the upload has its column `prediction`: after index, question and the options."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))

Row = dict[str, str]


class MMBench(Benchmark):
    """Files: `mmbench_dev_20230712.tsv`, tab-separated with a header: index, question, hint, A, B, C, D, answer,
    category, image (base64, or the index of the row that has the picture), source, l2-category, comment, split.

    Prompt: the hint if there is one, the question, `A. ...` for each option, and "Answer with the option's letter from
    the given choices directly.", each on a line. Options end before the first that is empty, or says none or nan,
    or is anything else that pandas takes for empty (NA, null, ...): LLaVA reads the table with pandas.

    Rule, for what the answers in the file allow here (the official server asks a language model where it finds no
    option): . ( ) [ ] , : ; ! * # { } become blanks, and if exactly one of the options' capital letters is then a word
    of the answer, it is that one: "B", "B.", "(B)", "The answer is B", and "A" in "A dog". If not exactly one, and
    exactly one option's text is part of the answer, upper and lower case alike, it is that one. Else it is none, and
    wrong. `accuracy_rule` is the percentage of right rows, `accuracy_circular` that of questions (indices modulo
    1,000,000) with every row right, where the file has rotated rows; it is what the leaderboard's figure is made of.

    Rows of answers are LLaVA's: round_id, options and option_char beside. Of an answers file made with `--all-rounds`
    the first rounds count; others are remarks.

    Upload: a workbook of index, question, A, B, C, D, prediction, answer, split as `DataFrame.to_excel` writes it; a
    question without an answer has an empty cell, of two answers the later stands.
    """

    name: ClassVar[str] = "mmbench"
    title: ClassVar[str] = "MMBench"
    also: ClassVar[tuple[str, ...]] = ("mmb", "mmbench_en", "mmbench_dev", "mmbench_dev_en")
    folders: ClassVar[tuple[str, ...]] = ("mmbench", "MMBench", "mmbench_en")
    published: ClassVar[int | None] = 4377
    max_new_tokens: ClassVar[int] = 1024
    server: ClassVar[str] = "the MMBench server, https://mmbench.opencompass.org.cn"
    suffix: ClassVar[str] = LETTER
    files: ClassVar[tuple[str, ...]] = (
        *("mmbench_dev_20230712.tsv", "mmbench_dev_en_*.tsv", "MMBench_DEV_EN*.tsv"),
        *("mmbench_test_20230712.tsv", "mmbench_test_en_*.tsv", "MMBench_TEST_EN*.tsv"),
    )

    def questions(self, place: Place) -> list[Question]:
        path = place.file(*self.files)
        rows = list(sheet.rows(path, "index", "question", "image", "A"))
        pictures = _pictures(path, rows)
        asked = self._asked(path, rows)
        return [replace(question, images=(Image(data=data),)) for question, data in zip(asked, pictures, strict=True)]

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        path = place.file(*self.files)
        rows = _without_pictures(path)
        asked = self._asked(path, rows)
        first = [answer for answer in answers if not answer.row.get("round_id")]
        matched = match(asked, first)
        if len(first) < len(answers):
            matched.remarks["of a later round"] = [str(one.id) for one in answers if one.row.get("round_id")]
        told = zip(asked, rows, matched.answers, strict=True)
        items = [_scored(question, row, answer) for question, row, answer in told]
        scores = _figures(items)
        return Result(
            scores=scores,
            headline="accuracy_circular" if "accuracy_circular" in scores else "accuracy_rule",
            questions=len(asked),
            answered=matched.answered,
            tables={} if not scores else {f"{self.title}, by {key}": _grouped(items, key) for key in TABLES},
            items=items,
            remarks=matched.remarks,
            protocol=f"{self.protocol}, scored by rule",
        )

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        path = place.file(*self.files)
        rows = _without_pictures(path)
        said = {str(answer.id): answer.text for answer in answers}
        kept = [name for name in (rows[0] if rows else ()) if name not in LEFT_OUT]
        columns = [sheet.typed([row[name] for row in rows]) for name in kept]
        columns.insert(PREDICTION, [said.get(str(_index(path, row))) for row in rows])
        kept.insert(PREDICTION, "prediction")
        return [sheet.write(out / f"{path.stem}.xlsx", kept, list(zip(*columns, strict=True)))]

    def _asked(self, path: Path, rows: Sequence[Row]) -> list[Question]:
        """The questions, without their pictures."""
        return [self._question(path, row) for row in rows]

    def _question(self, path: Path, row: Row) -> Question:
        index, options = _index(path, row), _options(row)
        if _is_none(row["question"]):
            raise ValueError(f"{path}: index {index}: the question is empty; fetch the file again")
        lines = [] if _is_none(row.get("hint", "")) else [row["hint"]]
        lines += [row["question"], *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))]
        more = {"round_id": 0, "options": options, "option_char": list(LETTERS[: len(options)])}
        return Question(
            id=index,
            text="\n".join(lines) + self.suffix,
            category=_cell(row, "category"),
            truth=_cell(row, "answer"),
            row=more,
        )


class MMBenchCN(MMBench):
    """MMBench in Chinese, `mmbench_dev_cn_20231003.tsv`: as `MMBench`, and the last line of the prompt is Chinese."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    also = ("mmb_cn", "mmbcn", "mmbench_dev_cn")
    folders = ("mmbench_cn", "MMBench_CN", "mmbench")
    published = 4329
    suffix = "\n请直接回答选项字母。"
    files = (
        *("mmbench_dev_cn_20231003.tsv", "mmbench_dev_cn_*.tsv", "MMBench_DEV_CN*.tsv"),
        *("mmbench_test_cn_*.tsv", "MMBench_TEST_CN*.tsv"),
    )


TABLES = ("category", "l2_category")


def letter(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer chooses by the rule of `MMBench`, or None."""
    letters, words = LETTERS[: len(options)], text.translate(_MARKS).split()
    named = [one for one in letters if one in words]
    if len(named) == 1:
        return named[0]
    said = [one for one, option in zip(letters, options, strict=True) if option.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def _scored(question: Question, row: Row, answer: Answer | None) -> dict[str, Any]:
    parsed = None if answer is None else letter(answer.text, question.row["options"])
    right = None if answer is None or not question.truth else parsed == question.truth
    ability = _cell(row, "l2-category")
    return item(question, answer.text if answer else None, right, parsed=parsed, l2_category=ability)


def _figures(items: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`accuracy_rule`, and `accuracy_circular` where a question has several rows; of what was answered, and nothing
    where no right answers are known."""
    marks: dict[int, list[bool | None]] = {}
    for one in items:
        marks.setdefault(one["question_id"] % ROTATED, []).append(one["correct"])
    rows = [mark for group in marks.values() for mark in group if mark is not None]
    whole = [all(group) for group in marks.values() if None not in group]
    found = {"accuracy_rule": percent(sum(rows), len(rows))} if rows else {}
    if whole and any(len(group) > 1 for group in marks.values()):
        found["accuracy_circular"] = percent(sum(whole), len(whole))
    return found


def _grouped(items: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in items:
        groups.setdefault(one[key], []).append(one)
    return [{key: name, "rows": len(group)} | _figures(group) for name, group in sorted(groups.items())]


def _index(path: Path, row: Row) -> int:
    try:
        return int(row["index"])
    except ValueError:
        raise ValueError(f"{path}: index {row['index'][:40]!r} is no number; fetch the file again") from None


def _options(row: Row) -> list[str]:
    """The options up to the first that is none."""
    cells = [row.get(letter, "") for letter in LETTERS]
    return cells[: next((at for at, cell in enumerate(cells) if _is_none(cell)), len(cells))]


def _is_none(cell: str) -> bool:
    """Empty to pandas, or a word for it to LLaVA."""
    return cell in sheet.MISSING or cell.lower() in ("nan", "none")


def _cell(row: Row, name: str) -> str:
    cell = row.get(name, "")
    return "" if cell in sheet.MISSING else cell


def _without_pictures(path: Path) -> list[Row]:
    return [row | {"image": ""} if "image" in row else row for row in sheet.rows(path, "index", "question", "A")]


def _pictures(path: Path, rows: list[Row]) -> list[bytes]:
    """The picture of each row, its bytes decoded once for all rows that show it; takes the cells out of the rows."""
    cells = [row.pop("image") for row in rows]
    of_index = {row["index"]: cell for row, cell in zip(rows, cells, strict=True)}
    decoded: dict[str, bytes] = {}
    found = []
    for row, cell in zip(rows, cells, strict=True):
        shown = of_index.get(cell, cell)  # where it is an index, that row has the picture
        if shown not in decoded:
            decoded[shown] = _decoded(shown, f"{path}: index {row['index']}")
        found.append(decoded[shown])
    return found


def _decoded(cell: str, where: str) -> bytes:
    try:
        data = base64.b64decode("".join(cell.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the picture is no base64: {error}; fetch the file again") from None
    if not data:
        raise ValueError(f"{where}: the picture is empty; fetch the file again")
    return data
