"""ScienceQA as its authors publish it: problems.json, one JSON object of multiple-choice problems by their id.

The prompts are those that LLaVA's ScienceQA data is made with, by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, choice, option, picture_path
from vistune.data.reading.json_members import BadRow, Rows, want

LETTERS = "ABCDE"
PICTURE = "{id}/image.png"
SPLITS = {"train": ["train"], "val": ["val"], "test": ["test"], "trainval": ["train", "val"]}

ASKED = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
"""Question, Context, options (M), Lecture, Explanation (the solution), in this order."""
ANSWERED = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")
PROMPTS = tuple(f"{asked}-{answered}" for asked in ASKED for answered in ANSWERED)
SWAPPED = {"AL": "E", "AE": "L", "ALE": "LE", "AEL": "EL"}
"""What follows the answer. With one letter alone LLaVA gives the other text than the letter says; its files were made
so, and so are these."""


class ScienceQa(Annotations):
    """A row is a problem, with or without a picture, whose mark comes last. Notes: `choices`, and in `answer` the right
    one's number (from 0)."""

    def __init__(self, rows: Rows, images: Sequence[str], name: str, prompt: str, picture: str):
        super().__init__(rows, images, name, prompt, picture)
        self.asked, self.answered = prompt.split("-")
        self.picture = picture

    def annotation(self, key: str, row: Any) -> Annotation:
        choices, right = want(row, "choices", list), want(row, "answer", int)
        if not all(isinstance(text, str) for text in choices) or not 0 <= right < len(choices) <= len(LETTERS):
            raise BadRow(f"answer is {right}, choices are {choices!r:.80}")
        shown = row.get("image") is not None
        return Annotation(
            id=key,
            picture=picture_path(self.picture, key) if shown else "",
            rounds=[(asked(row, self.asked), answered(row, self.answered))],
            after=shown,
            notes={"choices": choices, "answer": right},
        )


def asked(row: Any, order: str) -> str:
    """The question in the order that `order` spells."""
    because = "BECAUSE: " + " ".join(_reason(row, letter) for letter in order if letter in "LE")
    options = " ".join(f"({letter}) {one}" for letter, one in zip(LETTERS, row["choices"], strict=False))
    lines = {
        "Q": f"Question: {want(row, 'question', str)}",
        "C": f"Context: {want(row, 'hint', str).strip() or 'N/A'}",
        "M": f"Options: {options}",
        "L": because,
        "E": because,
    }
    return _tidy("\n".join(dict.fromkeys(lines[letter] for letter in order)), "Question: ")


def answered(row: Any, order: str) -> str:
    """The answer, with its reasons before it or after it as `order` spells."""
    letter = LETTERS[row["answer"]]
    if order == "LEPA":
        reasons = [("LECTURE", _reason(row, "L")), ("SOLUTION", _reason(row, "E"))]
        told = "".join(f"{name}: {text}\n" for name, text in reasons if text.strip())
        return _tidy(f"{told}###\nANSWER: {letter}.")
    parts = [f"The answer is {letter}."]
    if order in SWAPPED:
        parts += ["BECAUSE:", *(_reason(row, one) for one in SWAPPED[order])]
    else:
        parts = [*(_reason(row, one) for one in order[:-1]), *parts]
    return _tidy(" ".join(["Answer:", *parts]), "Answer: ")


def _reason(row: Any, letter: str) -> str:
    return want(row, {"L": "lecture", "E": "solution"}[letter], str).replace("\\n", "\n")


def _tidy(text: str, opening: str = "") -> str:
    """Double spaces become one, once; a reason that is not there is not announced, nor what the text opens with."""
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(opening, "") if opening and text.startswith(opening) else text


@register("scienceqa")
def open_scienceqa(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> ScienceQa:
    refuse_unknown(path, "scienceqa", options, ("picture", "prompt", "split"))
    split = choice(path, "scienceqa", options, "split", tuple(SPLITS))
    prompt = option(path, "scienceqa", options, "prompt", "QCM-LEPA")
    if prompt not in PROMPTS:
        raise ValueError(
            f"{path}: option prompt of format 'scienceqa' is {prompt!r}; it is one of {', '.join(ASKED)}, a hyphen, "
            f"and one of {', '.join(ANSWERED)}"
        )
    rows = Rows(path, ("*",), cache, ("split", SPLITS[split]))
    return ScienceQa(rows, images, name, prompt, option(path, "scienceqa", options, "picture", PICTURE))
