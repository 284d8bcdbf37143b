"""Another model as the judge of answers, behind an OpenAI-compatible endpoint: asked once, kept, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who judges: the endpoint's URL (up to /v1), the model's name there, and the environment variable with the key."""

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the judge, in the words of its benchmark's protocol."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the judge said and when, or why it said nothing."""

    text: str = ""
    model: str = ""
    date: str = ""
    error: str = ""


def ask(judge: Judge, requests: Sequence[Request], cache: Path) -> dict[str, Reply]:
    """Replies by the requests' ids. What `cache` holds for the same words and model is not asked again; a failure is
    asked again next time."""
    raise NotImplementedError
