"""Votes on answers, a line of JSON each, as readers of LLaVA's logs know them. Whole lines only, whoever else writes.

Knows nothing of the page.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from vistune import __version__
from vistune.serve.refused import Refused

MOST_BODY = 1 << 18
"""Bytes of a vote: texts of a conversation, no pictures."""
MOST_FILE = 1 << 30
"""Bytes of the file of votes: a full disk would end more than votes."""

_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
"""What some readers take for the end of a line, and JSON leaves as it is."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=MOST_BODY)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Told(_Strict):
    """A message of the conversation. `pictures`: SHA-256 of each one's bytes, in hexadecimal."""

    role: Literal["system", "user", "assistant"]
    text: Text
    pictures: Annotated[list[Digest], Field(max_length=256)] = []


class Parameters(_Strict):
    """How the answer was asked for; what was left to the server is None."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


class Vote(_Strict):
    """What somebody thinks of `answer`, to `messages` by `model`."""

    type: Literal["upvote", "downvote", "flag"]
    model: Annotated[str, Field(min_length=1, max_length=300)]
    messages: Annotated[list[Told], Field(min_length=1, max_length=1024)]
    answer: Text
    parameters: Parameters = Parameters()

    def line(self, ip: str) -> dict[str, Any]:
        """The vote as it is kept: `tstamp`, `type`, `model`, `state` and `ip` are the fields of LLaVA's log; pictures
        stand in a text as `<image>`, their digests under `images`. Separators are the template's affair: null."""
        talk = [one for one in self.messages if one.role != "system"]
        state = {
            "system": "\n".join(one.text for one in self.messages if one.role == "system"),
            "roles": ["USER", "ASSISTANT"],
            "messages": [*map(_pair, talk), ["ASSISTANT", self.answer]],
            "offset": 0,
            "sep": None,
            "sep2": None,
        }
        return {
            "tstamp": round(time.time(), 4),
            "type": self.type,
            "model": self.model,
            "state": state,
            "ip": ip,
            "images": [digest for one in talk for digest in one.pictures],
            "parameters": self.parameters.model_dump(),
            "vistune": __version__,
        }


def _pair(told: Told) -> list[str]:
    marks = "<image>\n" * len(told.pictures)
    return ["USER" if told.role == "user" else "ASSISTANT", marks + told.text]


async def read_vote(request: Request) -> Vote:
    """The vote of a request. Refused: 413 where it is too large, 415 where it is no JSON by its header (which a foreign
    page's form could send), 400 where it is none."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "a vote is sent as application/json", code="media_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise Refused(413, f"a vote may have {MOST_BODY} bytes", code="too_large")
    try:
        return Vote.model_validate_json(bytes(body))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Refused(400, wrong["msg"], param=".".join(map(str, wrong["loc"])), code="invalid_vote") from None


class Votes:
    """A file that votes are added to, from any thread and from several processes. OSError when it cannot be opened."""

    def __init__(self, path: Path, most: int = MOST_FILE):
        self.path, self.most, self._lock = Path(path), most, Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(self._open())

    def add(self, line: Mapping[str, Any]) -> None:
        """One line at the end of the file, whole or not at all. Refused: 507 when it is full or cannot be written."""
        text = json.dumps(line, ensure_ascii=False).translate(_BREAKS)
        data = text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            with self._lock:
                self._append(data)
        except OSError as error:
            raise Refused(507, f"the vote was not written: {error.strerror}", code="votes_unwritten") from error

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _append(self, data: bytes) -> None:
        file = self._open()  # each time: the file may have been moved away, as logs are
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data  # half a line of a machine that went down
            if size + len(data) > self.most:
                raise Refused(507, f"the file of votes has its {self.most} bytes", code="votes_full")
            if os.write(file, data) != len(data):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, "no space left")
        finally:
            os.close(file)
