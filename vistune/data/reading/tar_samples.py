"""What the members of one sample in a tar mean: conversation, pictures and notes, for each known kind of sample.

The layouts are written down here, since a dataset's own loader is never run. Knows no shards and no rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vistune.data.reading.columns import MAX_TEXT
from vistune.data.reading.json_rows import MAX_ROW
from vistune.data.reading.nv_meta import Kind
from vistune.data.reading.tar import Member
from vistune.samples import IMAGE_MARK, FaultCode, Image, Message, Role

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
MAX_PART = MAX_ROW
"""Bytes of a part that is no picture: as many as a row of any other format may have."""

_FIELD = re.compile(r"^([^[\]]+)((?:\[[^[\]]+\])*)$")
_FIELDS: dict[Kind, dict[str, str]] = {
    # where the fields of a sample lie when the dataset does not say
    "caption": {"image": "", "caption": "txt,json[caption],json[text],json"},
    "vqa": {"image": "", "context": "json[context],json[question]", "answers": "json[answers],json[answer]"},
}


class Misread(ValueError):
    """A sample that is not laid out as its kind says."""

    def __init__(self, code: FaultCode, reason: str):
        self.code: FaultCode = code
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Raw:
    """One sample of the tar `path`: its parts by name, none of them read yet but through `read`."""

    path: str
    key: str
    parts: Mapping[str, Member]
    read: Callable[[Member], bytes]

    @cached_property
    def json(self) -> Any:
        """The part named json. Raises Misread."""
        return self.loaded("json")

    def loaded(self, part: str) -> Any:
        """A part as data: JSON where its name says so, else text. Raises Misread."""
        member = self.parts.get(part)
        if member is None:
            raise Misread("row_unreadable", f"the sample has no part {part!r}, only {', '.join(self.parts) or 'none'}")
        if member.size > MAX_PART:
            raise Misread("row_unreadable", f"part {part!r} has {member.size} bytes, at most {MAX_PART} are read")
        raw = self.read(member)
        try:
            return json.loads(raw) if part.rsplit(".", 1)[-1] == "json" else raw.decode("utf-8")
        except (ValueError, RecursionError) as error:
            raise Misread("row_unreadable", f"part {part!r} (byte {member.start}): {error}") from None

    def picture(self, *parts: str) -> Image:
        """The first of `parts` that is there, as a slice of the tar. Raises Misread."""
        for part in parts:
            if member := self.parts.get(part):
                return Image(path=self.path, start=member.start, size=member.size, name=part)
        raise Misread("image_missing", f"the sample has no part {parts[0]!r}, only {', '.join(self.parts) or 'none'}")

    def pictures(self) -> list[str]:
        return [part for part in self.parts if is_picture(part)]


@dataclass(frozen=True, slots=True)
class Read:
    """A sample as read: what becomes a `Sample` once it is known where it stands."""

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def is_picture(part: str) -> bool:
    return part.rsplit(".", 1)[-1].lower() in PICTURES


def recognise(raw: Raw) -> Kind | None:
    """The kind of a sample by its parts alone; None when it looks like none of them."""
    if "json" not in raw.parts:
        return "caption" if "txt" in raw.parts and raw.pictures() else None
    value = raw.json
    if isinstance(value, dict):
        if {"prompts", "captions", "images"} <= set(value):
            return "packed"
        if "texts" in value or _turns(value) is not None:
            return "mixqa"
        if ("context" in value or "question" in value) and ("answers" in value or "answer" in value):
            return "vqa"
        if raw.pictures() and ("txt" in raw.parts or isinstance(value.get("caption", value.get("text")), str)):
            return "caption"
    return "mixqa" if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else None


def count(kind: Kind, raw: Raw) -> int:
    """Rows that one sample stands for: several for a packed one. Never 0: a sample that cannot be read is one row."""
    if kind != "packed":
        return 1
    try:
        return max(1, *(len(value) for value in _packed_lists(raw)))
    except Misread:
        return 1


def read(kind: Kind, raw: Raw, sub: int, fields: Mapping[str, str]) -> Read:
    """Row `sub` of the sample. Raises Misread."""
    if kind == "packed":
        got = _packed(raw, sub)
    elif kind == "mixqa":
        got = _mixqa(raw)
    else:
        got = _caption(raw, fields) if kind == "caption" else _vqa(raw, fields)
    if sum(len(message.text) for message in got.messages) > MAX_TEXT:
        raise Misread("row_unreadable", f"a conversation of more than {MAX_TEXT:,} characters")
    return got


def _packed_lists(raw: Raw) -> tuple[list[Any], list[Any], list[Any]]:
    value = raw.json
    lists = [value.get(name) if isinstance(value, dict) else None for name in ("prompts", "captions", "images")]
    prompts, captions, images = lists
    if not isinstance(prompts, list) or not isinstance(captions, list) or not isinstance(images, list):
        raise Misread("row_unreadable", "its json has no lists prompts, captions and images")
    return prompts, captions, images


def _packed(raw: Raw, sub: int) -> Read:
    """One sub-sample: strings for one turn and one picture `img0.jpg`; lists for several (`img0_1.jpg`)."""
    prompts, captions, images = _packed_lists(raw)
    if not len(prompts) == len(captions) == len(images):
        told = f"{len(prompts)} prompts, {len(captions)} captions, {len(images)} images"
        raise Misread("row_unreadable", f"the lists of its json differ in length: {told}")
    if not prompts:
        raise Misread("row_unreadable", "the lists of its json are empty")
    asked, said = _texts(prompts[sub], "prompts", sub), _texts(captions[sub], "captions", sub)
    if len(asked) != len(said):
        raise Misread("role_order", f"sub-sample {sub} has {len(asked)} prompts and {len(said)} captions")
    turns = zip(asked, said, strict=True)
    messages = [message for turn in turns for message in _messages_of(*turn)]
    named = images[sub]
    found = _sub_pictures(raw, sub, named if isinstance(named, list) else [named], nested=isinstance(named, list))
    return Read(tuple(messages), found, {"images": named})


def _texts(value: Any, name: str, sub: int) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Misread(
            "row_unreadable", f"{name}[{sub}] is {json.dumps(value)[:60]}, expected a text or a list of texts"
        )
    return texts


def _sub_pictures(raw: Raw, sub: int, names: list[Any], nested: bool) -> tuple[Image, ...]:
    found = []
    for i, name in enumerate(names):
        stems = [f"img{sub}_{i}", f"img{sub:03d}_sub{i:03d}"] if nested else [f"img{sub}", f"img0_{sub}"]
        stems += [f"img{sub}"] if nested and len(names) == 1 else []
        parts = [f"{stem}.jpg" for stem in stems] + [str(name)]
        parts += [f"{stem}.{suffix}" for stem in stems for suffix in PICTURES[1:]]
        found.append(raw.picture(*parts))
    return tuple(found)


def _mixqa(raw: Raw) -> Read:
    """MultiMixQA: `texts`, `media` and the names of the parts; or a list of turns with one picture beside it."""
    value = raw.json
    about = value if isinstance(value, dict) else {"texts": value}
    turns = _turns(about)
    if turns is None:
        raise Misread("row_unreadable", "its json has no list `texts` of turns")
    media = about.get("media", "image")
    if media not in ("image", "text"):
        raise Misread("row_unreadable", f"its media is {media!r}; only image and text can be read")
    names = about.get("name")
    if names is None:
        names = sorted(raw.pictures()) if media == "image" and "media" not in about else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Misread("row_unreadable", f"name is {json.dumps(names)[:60]}, expected a list of parts")
    messages = _with_system([_message(turn, i) for i, turn in enumerate(turns)])
    notes = {k: v for k, v in about.items() if k not in ("texts", "messages", "conversations", "media", "name")}
    return Read(messages, tuple(raw.picture(name) for name in names), notes)


def _turns(about: Mapping[str, Any]) -> list[Any] | None:
    for name in ("texts", "messages", "conversations"):
        if isinstance(value := about.get(name), list) and value and all(isinstance(turn, dict) for turn in value):
            return value
    return None


def _message(turn: Mapping[str, Any], i: int) -> Message:
    role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(text, str):
        raise Misread("row_unreadable", f"turn {i} has no text: {json.dumps(turn)[:80]}")
    if not isinstance(role, str) or role not in ROLES:
        raise Misread("role_order", f"turn {i} is from {role!r}, expected one of {', '.join(ROLES)}")
    return Message(role=ROLES[role], text=text)


def _with_system(messages: list[Message]) -> tuple[Message, ...]:
    """Of an odd number of turns the first is the system's, whatever role it tells, if those after it alternate.

    The reference takes it so without looking at those after it, and then learns the user's words of a conversation
    that merely lacks its last answer.
    """
    roles = [message.role for message in messages]
    if len(roles) % 2 and len(roles) > 1 and roles[1:] == ["user", "assistant"] * (len(roles) // 2):
        return (Message(role="system", text=messages[0].text), *messages[1:])
    return tuple(messages)


def _caption(raw: Raw, fields: Mapping[str, str]) -> Read:
    caption = _field(raw, "caption", fields, "caption")
    if not isinstance(caption, str):
        raise Misread("row_unreadable", f"its caption is no text: {json.dumps(caption)[:60]}")
    return Read(_messages_of(IMAGE_MARK, caption), (_picture_field(raw, fields),), _notes(raw, caption))


def _vqa(raw: Raw, fields: Mapping[str, str]) -> Read:
    """Of several answers the first. A question without a mark has its picture before it."""
    context, answers = _field(raw, "vqa", fields, "context"), _field(raw, "vqa", fields, "answers")
    answer = answers[0] if isinstance(answers, list) and answers else answers
    if not isinstance(context, str) or not isinstance(answer, str):
        told = json.dumps([context, answers])[:80]
        raise Misread("row_unreadable", f"its context and answers are {told}, expected texts")
    asked = context if IMAGE_MARK in context else f"{IMAGE_MARK}\n{context}"
    notes = {"answers": answers} if isinstance(answers, list) else {}
    return Read(_messages_of(asked, answer), (_picture_field(raw, fields),), notes)


def _messages_of(asked: str, answer: str) -> tuple[Message, Message]:
    return Message(role="user", text=asked), Message(role="assistant", text=answer)


def _notes(raw: Raw, caption: str) -> dict[str, Any]:
    """What else the json of a picture with a caption says."""
    value = raw.json if "json" in raw.parts else None
    return {k: v for k, v in value.items() if v != caption} if isinstance(value, dict) else {}


def _picture_field(raw: Raw, fields: Mapping[str, str]) -> Image:
    if told := fields.get("image"):
        return raw.picture(*told.split(","))
    pictures = raw.pictures()
    if len(pictures) != 1:
        told = f"{len(pictures)} pictures ({', '.join(pictures)})" if pictures else "no picture"
        raise Misread("image_missing" if not pictures else "row_unreadable", f"the sample has {told}, expected one")
    return raw.picture(pictures[0])


def _field(raw: Raw, kind: Kind, fields: Mapping[str, str], name: str) -> Any:
    """What a field map's entry points to: `json[caption]`, `txt`, or the first that is there of `txt,json[text]`."""
    told = fields.get(name) or _FIELDS[kind][name]
    tried = []
    for option in told.split(","):
        found = _FIELD.match(option.strip())
        if found is None or found[1] not in raw.parts:
            tried.append(option)
            continue
        value = raw.loaded(found[1]) if found[1] != "json" else raw.json
        try:
            for step in re.findall(r"\[([^[\]]+)\]", found[2]):
                value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, ValueError, TypeError):
            tried.append(option)
            continue
        return value
    raise Misread("row_unreadable", f"the sample has no {name} at {' or '.join(tried)}, only {', '.join(raw.parts)}")
