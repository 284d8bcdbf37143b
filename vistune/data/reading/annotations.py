"""Annotations of pictures as samples: what the readers of raw annotation files have in common.

A row of one data set only its own format understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistune.data.reading.json_members import BadRow, Rows, digest
from vistune.data.reading.pictures import LONGEST_PATH, Folders, beside
from vistune.samples import IMAGE_MARK, Fault, Image, Message, Sample, SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What a row of an annotation file says: questions and answers about one picture, called by its path, or about none
    (""). The picture's mark comes before the first question, or after it."""

    id: str
    picture: str
    rounds: Sequence[tuple[str, str]]
    after: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


class Annotations:
    """A reader whose rows are annotations of pictures; a format says in `annotation` how its rows are understood."""

    def __init__(self, rows: Rows, images: Sequence[str], name: str, *facts: Any):
        """`facts`: what else the samples depend on (options, companion files)."""
        self.rows, self.name = rows, name
        self.folders = Folders(rows.path, images, beside(rows.path))
        self._facts = digest(rows.facts, rows.place, rows.only, name, self.folders.fingerprint(), *facts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        id = ""
        try:
            key, value = self.rows[row]
            id = self.id_of(key, value)
            found = self.annotation(key, value)
        except BadRow as error:
            fault = Fault(source=self.name, row=row, id=id, code=error.code, reason=error.reason)
            raise SampleError(fault) from None
        return Sample(
            id=found.id,
            source=self.name,
            row=row,
            messages=messages_of(found.rounds, "after" if found.after else "before" if found.picture else ""),
            images=(Image(path=self.folders.resolve(found.picture)),) if found.picture else (),
            notes=found.notes,
        )

    def fingerprint(self) -> str:
        return self._facts

    def annotation(self, key: str, row: Any) -> Annotation:
        """What this row says. Raises BadRow."""
        raise NotImplementedError

    def id_of(self, key: str, row: Any) -> str:
        """How faults call a row that is not understood."""
        value = row.get("question_id", "") if isinstance(row, dict) else ""
        return key or str(value)


def messages_of(rounds: Sequence[tuple[str, str]], mark: str = "before") -> tuple[Message, ...]:
    """Questions and answers as messages, the picture's mark "before" or "after" the first question, or nowhere ("")."""
    messages = []
    for number, (question, answer) in enumerate(rounds):
        parts = {"before": [IMAGE_MARK, question], "after": [question, IMAGE_MARK]}.get(mark, [question])
        text = question if number else "\n".join(part for part in parts if part)
        messages += [Message(role="user", text=text), Message(role="assistant", text=answer)]
    return tuple(messages)


def picture_path(pattern: str, id: str) -> str:
    """`pattern` with {id} filled in; {id:012} pads a number with zeros. Raises BadRow."""
    if "\0" in id or len(id) > LONGEST_PATH:
        raise BadRow(f"picture {id[:60]!r} is no name of a file")
    try:
        return pattern.format(id=int(id) if ":" in pattern else id)
    except (ValueError, LookupError, AttributeError) as error:
        raise BadRow(f"picture {id!r} does not fit the pattern {pattern!r}: {error}") from None


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of equally frequent ones the first given. Raises BadRow for none."""
    if not answers:
        raise BadRow("there is no answer in it", "empty_answer")
    return max(answers, key=lambda answer: (answers.count(answer), -answers.index(answer)))


def option(path: str, format: str, options: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A text among the options of a format. Raises ValueError when it is missing or no text."""
    value = options.get(key, default)
    if not isinstance(value, str) or not value:
        given = f"is {options[key]!r}" if key in options else "is missing"
        raise ValueError(f"{path}: option {key} of format {format!r} {given}; it must be a text")
    return value


def choice(path: str, format: str, options: Mapping[str, Any], key: str, known: Sequence[str]) -> str:
    """A text among the options of a format, one of `known`; the first is the default. Raises ValueError."""
    value = option(path, format, options, key, known[0])
    if value not in known:
        raise ValueError(f"{path}: option {key} of format {format!r} is {value!r}; it may be {', '.join(known)}")
    return value
