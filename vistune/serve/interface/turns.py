"""The turns of a request as a chat template takes them: one text each, a mark where a picture stands.

Knows nothing of models and pictures' bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from vistune.samples import IMAGE_MARK, Message
from vistune.serve.interface.wire import Asked, ImagePart, Turn, wrong
from vistune.serve.limits import Limits


def links(asked: Asked) -> list[tuple[str, str]]:
    """The pictures of a request in their order: the parameter that names each, and its URL."""
    found = []
    for at, turn in enumerate(asked.messages):
        for number, part in enumerate(turn.content if isinstance(turn.content, list) else ()):
            if isinstance(part, ImagePart):
                name, url = part.link
                found.append((f"messages[{at}].content[{number}].{name}", url))
    return found


def conversation(asked: Asked, limits: Limits) -> list[Message]:
    """The turns with a mark where each picture stands: what a model can be asked. Refused: 400, for an order that no
    template has, too many turns or pictures, and text that would be taken for a picture."""
    turns = asked.messages
    if len(turns) > limits.messages:
        raise wrong(f"{len(turns)} messages; {limits.messages} are taken", "messages", "too_many_messages")
    pictures = len(links(asked))
    if pictures > limits.pictures:
        raise wrong(f"{pictures} pictures; {limits.pictures} are taken", "messages", "too_many_pictures")
    first = next((at for at, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    _check_order(turns, first)
    texts = [_text(turn, f"messages[{at}].content", bool(pictures)) for at, turn in enumerate(turns)]
    told = "\n\n".join(text for text in texts[:first] if text)
    system = [Message(role="system", text=told)] if first else []
    rest = zip(turns[first:], texts[first:], strict=True)
    return system + [Message(role="user" if turn.role == "user" else "assistant", text=text) for turn, text in rest]


def _check_order(turns: Sequence[Turn], first: int) -> None:
    for at in range(first, len(turns)):
        wanted = ("user", "assistant")[(at - first) % 2]
        if turns[at].role != wanted:
            why = f"{turns[at].role} where {wanted} must stand: system messages first, then user and assistant in turn"
            raise wrong(why, f"messages[{at}].role", "message_order")
    if turns[-1].role != "user":
        raise wrong("the last message must be the user's", f"messages[{len(turns) - 1}].role", "message_order")


def _text(turn: Turn, param: str, shows: bool) -> str:
    """A turn's text, a mark for each picture; parts that no space parts stand on lines of their own."""
    text, pictures = "", 0
    for number, part in enumerate([turn.content] if isinstance(turn.content, str) else turn.content):
        place = param if isinstance(part, str) else f"{param}[{number}]"
        if isinstance(part, ImagePart):
            if turn.role != "user":
                raise wrong("only the user's messages may have pictures", place, "unsupported_value")
            more, pictures = IMAGE_MARK, pictures + 1
        else:
            more = part if isinstance(part, str) else part.text
            _check_plain(more, place, shows)
        text += ("\n" if text and more and not (text[-1].isspace() or more[0].isspace()) else "") + more
    if shows and text.count(IMAGE_MARK) != pictures:
        _check_plain(IMAGE_MARK, param, shows)
    return text


def _check_plain(text: str, place: str, shows: bool) -> None:
    if shows and IMAGE_MARK in text:
        why = f"the text has {IMAGE_MARK}, which would be taken for a picture's place; write it otherwise"
        raise wrong(why, place, "picture_mark")
