"""What can be said about a picture: its caption, and questions with one right answer each.

Knows which digit stands in which of four cells; nothing of pixels, files or models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Cells = tuple[int | None, int | None, int | None, int | None]
"""The digits at the top left, top right, bottom left and bottom right; None where there is none."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "none"
KINDS = ("place", "count", "side", "largest", "smallest", "read")

_SIDES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def caption(cells: Cells) -> str:
    """Such as `two digits: seven top left, one bottom right`."""
    stands = [f"{DIGITS[d]} {place}" for d, place in zip(cells, PLACES, strict=True) if d is not None]
    return f"{DIGITS[len(stands)]} {'digit' if len(stands) == 1 else 'digits'}: {', '.join(stands)}"


def questions(cells: Cells, draw: random.Random) -> list[Question]:
    """One question of every kind that makes sense for the picture, in the order of `KINDS`."""
    return list(_questions(cells, draw))


def _questions(cells: Cells, draw: random.Random) -> Iterator[Question]:
    present = [d for d in cells if d is not None]
    full = [i for i, d in enumerate(cells) if d is not None]
    place = draw.choice(full if draw.random() < 0.85 else range(4))
    yield Question("place", f"Which digit is at the {PLACES[place]}?", _digits([cells[place]]))
    yield Question("count", "How many digits are there?", DIGITS[len(present)])
    filled = [name for name, (a, b) in _SIDES.items() if cells[a] is not None or cells[b] is not None]
    side = draw.choice(filled if draw.random() < 0.85 else list(_SIDES))
    yield Question("side", f"Which digits are in the {side}?", _digits([cells[i] for i in _SIDES[side]]))
    if len(present) > 1:
        yield Question("largest", "Which digit is the largest?", DIGITS[max(present)])
        yield Question("smallest", "Which digit is the smallest?", DIGITS[min(present)])
        yield Question("read", "Read all the digits.", _digits(present))


def _digits(values: Sequence[int | None]) -> str:
    return ", ".join(DIGITS[d] for d in values if d is not None) or NOTHING
