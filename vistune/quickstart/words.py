"""What can be said about a picture: its caption, and questions with one right answer each.

Knows which digit stands in which of four cells; nothing of pixels, files or models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

Cells = tuple[int | None, int | None, int | None, int | None]
"""The digits at the top left, top right, bottom left and bottom right; None where there is none."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "none"
KINDS = ("place", "count", "largest", "smallest", "where", "beside", "read", "sum")

_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_BESIDE = (  # (cell asked about, cell named, relation)
    (0, 1, "to the left of"),
    (1, 0, "to the right of"),
    (2, 3, "to the left of"),
    (3, 2, "to the right of"),
    (0, 2, "above"),
    (1, 3, "above"),
    (2, 0, "below"),
    (3, 1, "below"),
)


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def number(value: int) -> str:
    """A number from 0 to 39 in words."""
    assert 0 <= value < 40, value
    if value < 20:
        return (*DIGITS, *_TEENS)[value]
    tens, ones = ("twenty", "thirty")[value // 10 - 2], value % 10
    return f"{tens} {DIGITS[ones]}" if ones else tens


def caption(cells: Cells) -> str:
    """Such as `two digits: seven top left, one bottom right`."""
    stands = [f"{DIGITS[d]} {place}" for d, place in zip(cells, PLACES, strict=True) if d is not None]
    return f"{number(len(stands))} {'digit' if len(stands) == 1 else 'digits'}: {', '.join(stands)}"


def questions(cells: Cells, draw: random.Random) -> list[Question]:
    """One question of every kind that makes sense for the picture, in the order of `KINDS`."""
    return list(_questions(cells, draw))


def _questions(cells: Cells, draw: random.Random) -> Iterator[Question]:
    present = [d for d in cells if d is not None]
    full = [i for i, d in enumerate(cells) if d is not None]
    unique = [i for i in full if present.count(cells[i] or 0) == 1]
    place = draw.choice(full if draw.random() < 0.85 else range(4))
    yield Question("place", f"Which digit is at the {PLACES[place]}?", _digit(cells[place]))
    yield Question("count", "How many digits are there?", number(len(present)))
    if len(present) > 1:
        yield Question("largest", "Which digit is the largest?", DIGITS[max(present)])
        yield Question("smallest", "Which digit is the smallest?", DIGITS[min(present)])
    if unique:
        found = draw.choice(unique)
        yield Question("where", f"Where is the {_digit(cells[found])}?", PLACES[found])
    neighbours = [entry for entry in _BESIDE if entry[1] in unique and cells[entry[0]] is not None]
    if not neighbours and draw.random() < 0.2:
        neighbours = [entry for entry in _BESIDE if entry[1] in unique]
    if neighbours:
        asked, named, relation = draw.choice(neighbours)
        yield Question("beside", f"Which digit is {relation} the {_digit(cells[named])}?", _digit(cells[asked]))
    if len(present) > 1:
        yield Question("read", "Read all the digits.", ", ".join(DIGITS[d] for d in present))
        yield Question("sum", "What is the sum of the digits?", number(sum(present)))


def _digit(value: int | None) -> str:
    return NOTHING if value is None else DIGITS[value]
