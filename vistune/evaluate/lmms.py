"""The plug-in for lmms-eval: what its entry point finds, and its words (arguments of generation, messages) in ours.

Knows the shapes of lmms-eval's requests and needs no lmms-eval itself; the classes it runs are in `lmms_model`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath
from typing import Any, cast

import PIL.Image

from vistune.decoding import Settings, marked
from vistune.samples import IMAGE_MARK, Image, Message, Role

LONGEST = 1024
"""New tokens where a task names no number, as LLaVA's scripts for long answers."""
INJECTED = ["\n\n"]
"""What lmms-eval puts into `until` where a task says nothing. LLaVA's scripts have no such stop, so this very list is
dropped; a task that means it says it in another form, "\\n\\n" without the list."""
KNOWN = {"max_new_tokens", "temperature", "top_p", "do_sample", "until", "num_beams"}
VIDEO = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif"}
PLAIN = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}
"""Modes that a PNG holds as they are."""


@dataclass(frozen=True)
class Asked:
    """A conversation that ends in a question, and its pictures in the order of their marks."""

    messages: tuple[Message, ...]
    pictures: tuple[Image, ...]


@dataclass(frozen=True)
class Manner:
    """How a request wants its answer: what `generate` is told, where the text is cut, what is not heeded."""

    settings: Settings
    stops: tuple[str, ...]
    ignored: tuple[str, ...]


def manifest() -> Any:
    """What the entry point `vistune` of the group lmms_eval.models gives: chat, or simple with --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "vistune.evaluate.lmms_model"
    return ModelManifest(model_id="vistune", simple_class_path=f"{path}.Simple", chat_class_path=f"{path}.Chat")


def manner(said: Mapping[str, Any]) -> Manner:
    """A request's `gen_kwargs`. Greedy unless a temperature above 0 is given and do_sample is not false."""
    warmth = float(said.get("temperature") or 0.0) if said.get("do_sample", True) else 0.0
    settings = Settings(
        max_new_tokens=int(said.get("max_new_tokens") or LONGEST),
        temperature=warmth,
        top_p=float(said.get("top_p") or 1.0),
    )
    beams = {"num_beams"} if (said.get("num_beams") or 1) > 1 else set()
    return Manner(settings, stops(said.get("until")), tuple(sorted((set(said) - KNOWN) | beams)))


def stops(until: Any) -> tuple[str, ...]:
    """The texts that end an answer; see `INJECTED`. ValueError for anything but a string or strings."""
    if until is None or until == INJECTED:
        return ()
    found = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"until: {until!r}; give a string, or a list of strings")
    return tuple(one for one in found if one)


def cut(text: str, ends: Sequence[str]) -> str:
    """`text` up to the first of `ends`, without spaces around it."""
    places = [place for end in ends if (place := text.find(end)) >= 0]
    return text[: min(places, default=len(text))].strip()


def asked(context: str, visuals: Iterable[Any] | None) -> Asked:
    """A request of a simple model: one question. Pictures without a mark come first, a line each."""
    pictures = [picture(one) for one in visuals or ()]
    return Asked((Message(role="user", text=marked(context, pictures)),), tuple(pictures))


def conversation(messages: Sequence[Mapping[str, Any]]) -> Asked:
    """A request of a chat model: turns of parts. Each part is a line; turns of one role in a row become one."""
    pictures: list[Image] = []
    turns: list[tuple[str, str]] = []
    for message in messages:
        lines, seen = _lines(message["content"])
        turns.append((message["role"], "\n".join(lines)))
        pictures += seen
    merged = [
        Message(role=cast(Role, role), text="\n".join(text for _, text in same))
        for role, same in groupby(turns, key=lambda turn: turn[0])
    ]
    return Asked(tuple(merged), tuple(pictures))


def _lines(content: str | Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Image]]:
    """The lines of one message, with a mark for each picture, and its pictures.

    Where the text has marks of its own, one for each picture, they say where the pictures go.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if unknown := {part["type"] for part in parts} - {"text", "image"}:
        raise ValueError(f"lmms-eval: a message has {', '.join(sorted(unknown))}; this model takes text and images")
    seen = [picture(part["url"]) for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if seen and sum(text.count(IMAGE_MARK) for text in texts) == len(seen):
        return texts, seen
    return [part["text"] if part["type"] == "text" else IMAGE_MARK for part in parts], seen


def picture(given: Any) -> Image:
    """A PIL image, or the path of one, as ours. ValueError for a video and anything else."""
    if isinstance(given, PIL.Image.Image):
        stream = io.BytesIO()
        (given if given.mode in PLAIN else given.convert("RGB")).save(stream, "PNG", compress_level=1)
        return Image(data=stream.getvalue())
    if isinstance(given, str) and PurePath(given).suffix.lower() not in VIDEO:
        return Image(path=given)
    shown = given if isinstance(given, str) else type(given).__name__
    raise ValueError(f"lmms-eval: the task shows {shown}; this model takes images, not videos or sound")
