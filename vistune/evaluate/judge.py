"""Another model as the judge of answers, behind an OpenAI-compatible endpoint: asked once, kept, never guessed.

Knows requests and replies; what is asked, and what a reply is worth, is its benchmark's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from vistune import console
from vistune.data.fetching.threads import spread
from vistune.data.teaching.teacher import THOUGHT
from vistune.evaluate.client import Completer, open_client, reason

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KNOCKS = 2
"""Times that the first request is sent again: an address where nobody is shall not take a minute to be named."""
IN_A_ROW = 10
"""Requests that fail one after the other before it is the judge and not the requests: the rest is not asked."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who judges: the endpoint's URL (up to /v1), the model's name there, and the environment variable with the key.

    `workers` requests at once; each may take `timeout` seconds, and is sent `tries` times while the server is busy,
    fails or drops the connection, with longer and longer waits between.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    workers: int = 4
    timeout: float = 120.0
    tries: int = 6


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the judge, in the words of its benchmark's protocol. `run` tells apart the times that the same
    words are asked."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    temperature: float = 0.0
    max_tokens: int = 1024
    run: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the judge said and when, or why it said nothing. `model`: who the endpoint says it was. `cached`: it was
    there before. `usage`: tokens as the endpoint counted them. What a model thinks aloud first is left out of `text`.
    """

    text: str = ""
    model: str = ""
    date: str = ""
    error: str = ""
    cached: bool = False
    usage: Mapping[str, int] = field(default_factory=dict)


class JudgeRefused(ValueError):
    """The endpoint cannot be used as it is called: address, key, or model."""


def ask(judge: Judge, requests: Sequence[Request], cache: Path) -> dict[str, Reply]:
    """Replies by the requests' ids. What `cache` holds for the same words and model is not asked again; a failure is
    asked again next time.

    Raises ValueError for a judge that is not there, refuses the key or the model, or has no reply to anything.
    """
    wanted = {request.id: digest(judge, request) for request in requests}
    assert len(wanted) == len(requests), "ids of requests differ"
    found = _kept(cache)
    fresh = {wanted[request.id]: request for request in requests if wanted[request.id] not in found}
    if fresh:
        found |= _asked(judge, fresh, cache)
    replies = {id: found[key] for id, key in wanted.items()}
    if replies and all(reply.error for reply in replies.values()):
        first = next(iter(replies.values()))
        raise JudgeRefused(f"judge {judge.model} at {_public(judge.url)}: not one reply; {first.error}")
    return replies


def told(judge: Judge, replies: Mapping[str, Reply]) -> dict[str, Any]:
    """Who judged and when, as scores.json has it: scores of two judges, or of one a year later, do not compare."""
    good = [reply for reply in replies.values() if not reply.error]
    dates = sorted(reply.date for reply in good if reply.date)
    return {
        "model": judge.model,
        "url": _public(judge.url),
        "answered_as": sorted({reply.model for reply in good if reply.model}),
        "first": dates[0] if dates else "",
        "last": dates[-1] if dates else "",
        "replies": len(good),
        "failed": len(replies) - len(good),
        "cached": sum(reply.cached for reply in good),
        "prompt_tokens": sum(reply.usage.get("prompt_tokens", 0) for reply in good),
        "completion_tokens": sum(reply.usage.get("completion_tokens", 0) for reply in good),
    }


def _public(url: str) -> str:
    """An address without the name and word that may stand before its host."""
    return re.sub(r"//[^/@]*@", "//", url)


def digest(judge: Judge, request: Request) -> str:
    """What a request is known by in the cache: whatever changes the reply, and nothing else."""
    words: list[Any] = [judge.model, [dict(one) for one in request.messages], request.temperature, request.max_tokens]
    written = json.dumps(words + [request.run] * bool(request.run), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()


def _kept(cache: Path) -> dict[str, Reply]:
    """The replies of a cache. A line that is none (a killed run leaves half of one) is asked again."""
    found, broken = {}, 0
    lines = cache.read_bytes().split(b"\n") if cache.exists() else []
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            found[str(row["request"])] = Reply(
                text=_spoken(row["reply"]),
                model=row["model"],
                date=row["date"],
                usage=row.get("usage") or {},
                cached=True,
            )
        except (ValueError, LookupError, TypeError):
            broken += 1
    if broken:
        console.warn(f"{cache}: {broken} lines are no replies; they are asked again")
    return found


def _asked(judge: Judge, fresh: Mapping[str, Request], cache: Path) -> dict[str, Reply]:
    """Replies to what was not in the cache, each written there as it comes."""
    asking = _Asking(judge)
    found: dict[str, Reply] = {}
    failed = 0
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("ab") as file, console.progress() as bar:
        if file.tell() and not _ends_a_line(cache):
            file.write(b"\n")
        task = bar.add_task(f"judge {judge.model}", total=len(fresh))
        for key, row in asking.all(fresh):
            found[key] = _reply(row)
            failed = failed + 1 if found[key].error else 0
            if failed >= IN_A_ROW:
                asking.given_up.set()
            if not found[key].error:
                file.write(json.dumps({"request": key, **row}, ensure_ascii=False).encode() + b"\n")
                file.flush()
            bar.advance(task)
    return found


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _reply(row: Mapping[str, Any]) -> Reply:
    if error := row.get("error"):
        return Reply(error=error, date=row["date"])
    return Reply(text=_spoken(row["reply"]), model=row["model"], date=row["date"], usage=row["usage"])


def _spoken(text: str) -> str:
    """A reply without what its model thought aloud; otherwise as it is, spaces too: the official parsers see them."""
    spoken, thoughts = THOUGHT.subn("", text)
    return spoken.lstrip() if thoughts else text


class _Asking:
    """One call of `ask`: the client, and what the endpoint turned out to want."""

    def __init__(self, judge: Judge):
        host = urlsplit(judge.url).hostname or ""
        if not os.environ.get(judge.key) and host not in LOOPBACK:
            raise JudgeRefused(
                f"judge at {_public(judge.url)}: the environment variable {judge.key} is not set; put the key into "
                "it, or any word if the server wants none, or name another variable with --judge-key"
            )
        self.judge, self.key = judge, os.environ.get(judge.key, "")
        self.client = open_client(judge.url, judge.key, timeout=judge.timeout, retries=max(0, judge.tries - 1))
        self.complete = Completer(self.client)
        self.given_up = Event()

    def all(self, fresh: Mapping[str, Request]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and what came, in any order. The first goes alone: address, key and model are known to be right then."""
        (key, first), *rest = fresh.items()
        row = self._knock(first)
        if "error" in row:
            rest.insert(0, (key, first))
        else:
            yield key, row
        yield from spread(self._one, rest, self.judge.workers, Event())

    def _knock(self, request: Request) -> dict[str, Any]:
        import openai

        knocking = Completer(self.client.with_options(max_retries=min(KNOCKS, self.judge.tries - 1)))
        try:
            return self._row(knocking, request)
        except openai.APIConnectionError as error:
            raise self._refused(f"{_cause(error)}; is that its address?") from None
        finally:
            self.complete.length = knocking.length

    def _one(self, task: tuple[str, Request]) -> tuple[str, dict[str, Any]]:
        import openai

        key, request = task
        if self.given_up.is_set():
            return key, _failed(f"not asked: {IN_A_ROW} requests in a row had failed")
        try:
            return key, self._row(self.complete, request)
        except openai.APIConnectionError as error:
            return key, _failed(_cause(error))

    def _row(self, complete: Completer, request: Request) -> dict[str, Any]:
        """What the cache keeps of a reply, or {"error", "date"}. Raises JudgeRefused, openai.APIConnectionError."""
        import openai

        try:
            found = complete(self.judge.model, request.messages, request.temperature, request.max_tokens)
            return _read(request, found)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused(f"the key in {self.judge.key} is refused: {reason(error)}") from None
        except openai.NotFoundError as error:
            raise self._refused(
                f"no model {self.judge.model} there, or the URL does not end at /v1: {reason(error)}"
            ) from None
        except openai.APIStatusError as error:
            if error.code == "insufficient_quota":
                raise self._refused(f"its quota is used up: {reason(error)}") from None
            return _failed(self._without_key(reason(error)))
        except (openai.APIResponseValidationError, json.JSONDecodeError) as error:
            return _failed(f"no chat completion: {reason(error)}")

    def _refused(self, why: str) -> JudgeRefused:
        return JudgeRefused(f"judge at {_public(self.judge.url)}: {self._without_key(why)}")

    def _without_key(self, said: str) -> str:
        """A server's refusal may repeat the key; what is printed and kept does not."""
        return said.replace(self.key, "***") if self.key else said


def _read(request: Request, found: Any) -> dict[str, Any]:
    choices = getattr(found, "choices", None) or []
    message = choices[0].message if choices else None
    if message is None:
        return _failed(f"no chat completion: {str(found)[:100]!r}; does the URL end at /v1?")
    if not isinstance(message.content, str) or not message.content:
        why = getattr(message, "refusal", None) or f"finish reason {choices[0].finish_reason}"
        return _failed(f"an empty reply ({why})")
    usage = found.usage.model_dump() if found.usage else {}
    return {
        "messages": [dict(one) for one in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "reply": message.content,
        "model": found.model or "",
        "date": _now(),
        "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if usage.get(name)},
    }


def _failed(why: str) -> dict[str, Any]:
    return {"error": why, "date": _now()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cause(error: Exception) -> str:
    """The client says "Connection error."; what lies under it says which."""
    under = error.__cause__
    return f"{reason(error).rstrip('.')} ({reason(under)})" if isinstance(under, Exception) else reason(error)
