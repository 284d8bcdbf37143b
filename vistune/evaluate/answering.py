"""Who answers a benchmark's questions: what every answerer can, and the one whose model is in this process.

Knows questions and answers, nothing of scores or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from vistune.asking import Said, answers
from vistune.evaluate.items import Question
from vistune.models.load import Loaded

__all__ = ["NEAR", "Answerer", "Local", "Said", "is_near_tie"]

NEAR = 1e-4
"""Two logits nearer than this may change places with the size of a batch, in fp32 as well."""


class Answerer(Protocol):
    """A model that can be asked."""

    name: str
    """As answers and pages call it."""

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[tuple[int, Said]]:
        """What is said to each question, with its place in `questions`, in any order, as it comes; greedy.

        A question that cannot be asked gives `Said(error=...)` and the others go on. ValueError when nobody answers any
        more.
        """


class Local:
    """A model in this process, asked `batch` questions at once; answers do not depend on how many."""

    def __init__(self, loaded: Loaded, batch: int = 16, name: str = ""):
        self.loaded, self.batch, self.name = loaded, batch, name or loaded.where

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[tuple[int, Said]]:
        """See `Answerer`."""
        asked = [(question.text, question.images) for question in questions]
        return answers(self.loaded, asked, max_new_tokens, self.batch)


def is_near_tie(margin: float | None) -> bool:
    """Whether an answer with this margin may differ from the one to the question asked alone."""
    return margin is not None and margin < NEAR
