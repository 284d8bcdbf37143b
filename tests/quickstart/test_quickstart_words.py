"""Captions and answers agree with the cells, by an independent reading of the English."""

import random
import re
from collections import Counter

import pytest

from vistune.quickstart import words

VALUE = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
PLACE = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


def cells_of(seed: int) -> words.Cells:
    draw = random.Random(seed)
    full = set(draw.sample(range(4), draw.randint(1, 4)))
    return tuple(draw.randrange(10) if cell in full else None for cell in range(4))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(60))
def test_caption_can_be_read_back(seed):
    cells = cells_of(seed)
    head, _, rest = words.caption(cells).partition(": ")
    found = [None] * 4
    for part in rest.split(", "):
        word, place = part.split(" ", 1)
        found[PLACE[place]] = VALUE[word]
    assert tuple(found) == cells
    count = 4 - found.count(None)
    assert head == f"{list(VALUE)[count]} digit{'s' * (count > 1)}"


def truth(cells, question: str) -> str:
    """The answer by looking at the grid: rows are (0, 1) and (2, 3)."""
    present = [d for d in cells if d is not None]
    word = dict(enumerate(VALUE)) | {None: "none"}
    if at := re.search(r"at the (.*)\?", question):
        return word[cells[PLACE[at[1]]]]
    if side := re.search(r"in the (top|bottom) row\?", question):
        row = cells[:2] if side[1] == "top" else cells[2:]
        return ", ".join(word[d] for d in row if d is not None) or "none"
    if side := re.search(r"in the (left|right) column\?", question):
        column = cells[::2] if side[1] == "left" else cells[1::2]
        return ", ".join(word[d] for d in column if d is not None) or "none"
    if question == "Read all the digits.":
        return ", ".join(word[d] for d in present)
    pick = {"many": len(present), "largest": max(present), "smallest": min(present)}
    return word[next(value for key, value in pick.items() if key in question)]


def test_every_answer_is_true():
    kinds = Counter()
    for seed in range(400):
        cells = cells_of(seed)
        for question in words.questions(cells, random.Random(seed)):
            assert question.answer == truth(cells, question.text), (cells, question)
            kinds[question.kind] += 1
    assert set(kinds) == set(words.KINDS) and min(kinds.values()) > 100


def test_answers_cannot_be_guessed():
    """The most common answer to each text of a question stays under 40 %, so pictures have to be looked at."""
    answers: dict[str, Counter] = {}
    for seed in range(4000):
        for question in words.questions(cells_of(seed), random.Random(seed)):
            answers.setdefault(question.text, Counter())[question.answer] += 1
    for text, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.4, (text, counts.most_common(3))
