"""Why a request is not answered, as OpenAI's clients read it: status, sentence, parameter, code.

Knows nothing of what was asked; no sentence repeats a request's contents.
"""

from __future__ import annotations

import traceback
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(ValueError):
    """A request that gets an error for an answer: `status` of HTTP; `param` is the field of the body that is wrong,
    such as "messages[0].content[1].image_url"; `code` is one word for programs; `retry_after` in seconds, where coming
    again helps."""

    def __init__(self, status: int, message: str, *, param: str = "", code: str = "", retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """What OpenAI's clients take for an error: the whole body of an answer, or an event of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        said = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": said}


def described(error: BaseException) -> str:
    """A fault of our own as the log has it: the exception's type, those behind it, and where it came from, line by
    line. What it says stays unsaid, since that may hold what was asked."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    behind: BaseException | None = error
    names: list[str] = []
    while behind is not None and len(names) < 8:
        names.append(type(behind).__name__)
        behind = behind.__cause__ or behind.__context__
    return "\n  ".join([" < ".join(names), *frames])
