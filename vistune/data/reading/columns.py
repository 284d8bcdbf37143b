"""What the columns of a row mean: conversations as OpenAI, ShareGPT and FineVision write them, questions, captions.

A row is a mapping of plain Python values here; where it was read, and where its pictures lie, is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vistune.samples import IMAGE_MARK, FaultCode, Message, Role

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "sample_id", "uid"),
    "messages": ("messages", "conversations", "conversation", "texts"),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption",),
    "images": ("images", "image", "image_url", "image_path"),
}
"""What a column is for, and the names it is found under, in order."""

_TEXTS = ("messages", "question", "answer", "caption")

MAX_TEXT = 1 << 23
"""Characters of one conversation, some two million tokens: more is no conversation, and would take gigabytes to cut."""

_PICTURE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")


class ColumnError(ValueError):
    """A row that is no conversation, with the code of its fault."""

    def __init__(self, code: FaultCode, reason: str):
        self.code = code
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what; "" where there is none. Either `messages`, or `question` and `answer`, or `caption`."""

    id: str = ""
    messages: str = ""
    question: str = ""
    answer: str = ""
    caption: str = ""
    images: str = ""

    def used(self) -> list[str]:
        return [name for name in (self.id, *self.text(), self.images) if name]

    def text(self) -> list[str]:
        """The columns that the conversation comes from."""
        asked = [self.question, self.answer] if self.question and self.answer else []
        return [self.messages] if self.messages else asked or ([self.caption] if self.caption else [])


def find_columns(there: Sequence[str], chosen: Mapping[str, str]) -> Columns:
    """The columns of a table or row with the names `there`; `chosen` says it for those it names ("": none).

    Raises ColumnError when a chosen one is not there, or none holds a conversation.
    """
    for use, name in chosen.items():
        if name and name not in there:
            raise ColumnError("row_unreadable", f"there is no column {name!r} for {use}; there are {_list(there)}")
    # A chosen conversation is not shared with what else would be found for one.
    skip = _TEXTS if any(use in chosen for use in _TEXTS) else ()
    found = {use: next((n for n in names if n in there and use not in skip), "") for use, names in NAMES.items()}
    columns = Columns(**{**found, **chosen})
    if not columns.text():
        expected = "messages, conversations, texts, question and answer, or caption"
        raise ColumnError("row_unreadable", f"no column {expected}; there are {_list(there)}")
    return columns


def conversation(row: Mapping[str, Any], columns: Columns, prompt: str) -> tuple[list[Message], list[Any], list[Any]]:
    """The messages, the pictures that their parts hold (None: the next of the column), and those of the column.

    When no part and no text places a picture, marks for the column's stand in front of the first user turn. `prompt` is
    what a caption answers to. Raises ColumnError.
    """
    own: list[Any] = []
    messages = list(_messages(row, columns, prompt, own))
    if sum(len(message.text) for message in messages) > MAX_TEXT:
        raise ColumnError("row_unreadable", f"a conversation of more than {MAX_TEXT:,} characters")
    column = _as_list(row.get(columns.images)) if columns.images else []
    if column and not own and not any(IMAGE_MARK in message.text for message in messages if message.role == "user"):
        messages = _marked(messages, len(column))
    return messages, own, column


def notes(row: Mapping[str, Any], columns: Columns, kept: Sequence[str] | None = None) -> dict[str, Any]:
    """What else the row says, as long as it is small; of `kept` alone when that is given."""
    used = columns.used()
    names = (name for name in (row if kept is None else kept) if name not in used)
    return {name: row[name] for name in names if row.get(name) is not None and _is_small(row[name])}


def _messages(row: Mapping[str, Any], columns: Columns, prompt: str, own: list[Any]) -> Iterator[Message]:
    if columns.messages:
        turns = row.get(columns.messages)
        if not isinstance(turns, list) or not turns:
            raise ColumnError("row_unreadable", f"{columns.messages} is {_shown(turns)}, expected a list of turns")
        for number, turn in enumerate(turns):
            yield from _turn(number, turn, own)
    elif columns.question and columns.answer:
        yield Message(role="user", text=_one(row, columns.question))
        yield Message(role="assistant", text=_one(row, columns.answer))
    else:
        yield Message(role="user", text=prompt)
        yield Message(role="assistant", text=_one(row, columns.caption))


def _turn(number: int, turn: Any, own: list[Any]) -> Iterator[Message]:
    """`{role, content}`, `{from, value}`, or `{user, assistant}`, which is two turns."""
    if not isinstance(turn, Mapping):
        raise ColumnError("row_unreadable", f"turn {number} is {_shown(turn)}, expected an object")
    for who, what in (("role", "content"), ("from", "value")):
        if turn.get(who) is not None and what in turn:
            yield Message(role=_role(number, turn[who]), text=_content(number, turn[what], own))
            return
    if "user" not in turn or "assistant" not in turn:
        raise ColumnError(
            "row_unreadable",
            f"turn {number} has {_list(turn)}; expected role and content, from and value, or user and assistant",
        )
    yield Message(role="user", text=_content(number, turn["user"], own))
    yield Message(role="assistant", text=_content(number, turn["assistant"], own))


def _role(number: int, said: Any) -> Role:
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise ColumnError("role_order", f"turn {number} is from {_shown(said)}, expected one of {', '.join(ROLES)}")
    return role


def _content(number: int, content: Any, own: list[Any]) -> str:
    """The text, with a mark where a part is a picture: on a line of its own, as LLaVA writes it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ColumnError("row_unreadable", f"turn {number} says {_shown(content)}, expected text or a list of parts")
    text = ""
    after_mark = False
    for part in content:
        piece, picture = _part(number, part)
        if picture is not _NO_PICTURE:
            own.append(picture)
            text += ("\n" if text and not text[-1].isspace() else "") + IMAGE_MARK
        elif piece:
            text += ("\n" if after_mark and not piece[0].isspace() else "") + piece
        after_mark = picture is not _NO_PICTURE or (after_mark and not piece)
    return text


_NO_PICTURE = object()


def _part(number: int, part: Any) -> tuple[str, Any]:
    """A part's text, or its picture: None for the next one of the row's column."""
    if isinstance(part, str):
        return part, _NO_PICTURE
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"], _NO_PICTURE
    if kind in _PICTURE_PARTS:
        return "", _picture(part)
    raise ColumnError("row_unreadable", f"turn {number} has the part {_shown(part)}, expected text or a picture")


def _picture(part: Mapping[str, Any]) -> Any:
    said = next((part[key] for key in ("image", "image_url", "data") if part.get(key)), None)
    if said is None:
        return part if any(part.get(key) for key in ("bytes", "path", "url")) else None
    return (
        said if not isinstance(said, Mapping) or any(said.values()) else None
    )  # arrow fills what is not there with nulls


def _one(row: Mapping[str, Any], column: str) -> str:
    """The text of a column, the first one of a list of them."""
    value = row.get(column)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str):
        raise ColumnError("row_unreadable", f"{column} is {_shown(value)}, expected text")
    return value


def _marked(messages: list[Message], count: int) -> list[Message]:
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        return messages
    text = f"{IMAGE_MARK}\n" * count + messages[first].text
    return [*messages[:first], Message(role="user", text=text.rstrip("\n")), *messages[first + 1 :]]


def _as_list(value: Any) -> list[Any]:
    """A column's pictures. A single one that is null, or a struct of nulls as `datasets` writes it, is none."""
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping) and not any(value.values()):
        return []
    return [value]


def _is_small(value: Any) -> bool:
    """A number, a short text, or a short list of them."""
    if isinstance(value, list):
        return len(value) <= 256 and all(_is_small(entry) for entry in value)
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 4096)


def _shown(value: Any) -> str:
    return (
        repr(value)[:80] if not isinstance(value, bytes | list | Mapping) else f"{type(value).__name__} {value!r:.60}"
    )


def _list(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:20])) or "none"
