"""How LLaVA's workers speak: JSON objects, each ended by NUL, with the prompt and everything said so far in `text`.

Knows nothing of models.
"""

from __future__ import annotations

import json
import re

TOO_LONG = "Exceeds max token length. Please start a new conversation, thanks."
"""What the reference's worker says where a prompt leaves no room for an answer (llava/serve/model_worker.py): clients
know it, and it is no error to them."""
OK, FAILED, NO_WORKER, LOST = 0, 1, 2, 3
"""Codes: an answer; the worker could not answer; nobody has this model; the worker's answer broke off."""
TYPE = "application/octet-stream"
"""The reference says none; NUL is no text and no lines of JSON."""


_TAG = re.compile(r"<[^<>`]*>")


def line(text: str, code: int = OK) -> bytes:
    """A reason's `<image>` and the like are put between backticks: the reference's page would take them for HTML, and
    show nothing. An answer is as the model said it."""
    if code != OK:
        text = _TAG.sub(r"`\g<0>`", text)
    return json.dumps({"text": text, "error_code": code}).encode() + b"\0"
