"""Answers as OpenAI's clients read them: whole, or chunk by chunk with an end that says so.

Knows nothing of engines and connections.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vistune import __version__
from vistune.serve.work import Ended

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
"""A comment, which clients pass over."""


def event(said: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Wording:
    """The words around one answer of `model`. With `usage`, chunks say how many tokens there were, the last one in
    numbers."""

    model: str
    version: str = ""
    usage: bool = False
    id: str = field(default_factory=_new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def _fingerprint(self) -> str:
        return "fp_" + hashlib.sha256(f"{__version__} {self.model} {self.version}".encode()).hexdigest()[:10]

    def _around(self, kind: str) -> dict[str, Any]:
        said = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return said | {"system_fingerprint": self._fingerprint}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        more = {"usage": usage} if self.usage else {}
        return event(self._around("chat.completion.chunk") | {"choices": choices} | more)

    def _piece(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def role(self) -> bytes:
        """What a stream begins with."""
        return self._piece({"role": "assistant", "content": "", "refusal": None})

    def more(self, text: str) -> bytes:
        return self._piece({"content": text})

    def end(self, ended: Ended, prompt_tokens: int) -> bytes:
        """What a stream ends with: "stop" or "length", the numbers where they are asked for, and that it is whole."""
        numbers = self._chunk([], counted(ended, prompt_tokens)) if self.usage else b""
        return self._piece({}, ended.reason) + numbers + DONE

    def whole(self, text: str, ended: Ended, prompt_tokens: int) -> dict[str, Any]:
        """All of an answer at once."""
        said = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": ended.reason}
        return self._around("chat.completion") | {"choices": [choice], "usage": counted(ended, prompt_tokens)}


def counted(ended: Ended, prompt_tokens: int) -> dict[str, Any]:
    """Tokens of the prompt, those of pictures too, how many of them had been read before, and of the answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": ended.tokens,
        "total_tokens": prompt_tokens + ended.tokens,
        "prompt_tokens_details": {"cached_tokens": ended.reused},
    }
