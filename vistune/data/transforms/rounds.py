"""A conversation as rounds of question and answer, and the place of picture marks in them. Knows no transform."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vistune.data.reading.json_members import hash64
from vistune.samples import IMAGE_MARK, Image, Message, Sample


@dataclass(frozen=True, slots=True)
class Rounds:
    """A conversation in which a question and its answer take turns. `notes`: what is known of each round."""

    system: tuple[Message, ...]
    pairs: Sequence[tuple[str, str]]
    notes: Sequence[Mapping[str, Any]]

    def messages(self) -> tuple[Message, ...]:
        turns: list[Message] = []
        for question, answer in self.pairs:
            turns += [Message(role="user", text=question), Message(role="assistant", text=answer)]
        return (*self.system, *turns)


def rounds_of(sample: Sample) -> Rounds | None:
    """The rounds of a sample; None when its turns do not alternate, or when they end with a question."""
    turns = list(sample.messages)
    system = (turns.pop(0),) if turns and turns[0].role == "system" else ()
    questions, answers = turns[::2], turns[1::2]
    alternate = all(turn.role == "user" for turn in questions) and all(turn.role == "assistant" for turn in answers)
    if not turns or len(questions) != len(answers) or not alternate:
        return None
    pairs = [(question.text, answer.text) for question, answer in zip(questions, answers, strict=True)]
    notes = sample.notes.get("rounds")
    if not isinstance(notes, tuple) or len(notes) != len(pairs):  # a file's own note of that name is a list
        notes = (sample.notes,) * len(pairs)
    return Rounds(system, pairs, notes)


def with_rounds(sample: Sample, rounds: Rounds, **changes: Any) -> Sample:
    """`sample` with these rounds instead of its own; notes of each round are kept when there are several."""
    notes = {key: value for key, value in sample.notes.items() if key != "rounds"}
    own = {"rounds": tuple(_own(note) for note in rounds.notes)} if len(rounds.pairs) > 1 else _own(rounds.notes[0])
    return replace(sample, messages=rounds.messages(), notes=notes | own, **changes)


def _own(notes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in notes.items() if key not in ("rounds", "rows")}


def marked(text: str, count: int) -> str:
    """`text` without marks of its own, behind `count` of them, each on a line."""
    return (f"{IMAGE_MARK}\n" * count + unmarked(text)).rstrip("\n") if count else unmarked(text)


def unmarked(text: str) -> str:
    return text if IMAGE_MARK not in text else text.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").strip()


def split_marks(text: str) -> tuple[str, str]:
    """(the marks that `text` begins with, each on a line; the rest)."""
    line = f"{IMAGE_MARK}\n"
    count, rest = 0, text
    while rest.startswith(line) or rest == IMAGE_MARK:
        count, rest = count + 1, rest[len(line) :]
    return line * count, rest


def image_key(images: Sequence[Image]) -> int:
    """64 bits, with a sign, by which the same pictures are found again."""
    parts = [f"{image.path}\0{image.start}\0{image.size}\0{_bytes(image.data)}" for image in images]
    return signed(hash64("\1".join(parts)))


def _bytes(data: bytes | None) -> str:
    return "" if data is None else hashlib.blake2b(data, digest_size=16).hexdigest()


def signed(number: int) -> int:
    """An unsigned number of 64 bits as one with a sign."""
    return number - (1 << 64) if number >= 1 << 63 else number
