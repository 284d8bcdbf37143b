"""The client of an OpenAI-compatible endpoint, for whoever asks one: a model under evaluation, or a judge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

TIMEOUT = 600.0
"""Seconds that one request may take; a long answer of a busy server takes minutes."""
RETRIES = 6
"""A request is sent again, waiting ever longer (half a second to eight), where the connection or the server failed."""
NO_KEY = "none"
"""What a server of one's own, which asks for no key, is sent."""


def open_client(url: str, key_variable: str = "", *, timeout: float = TIMEOUT, retries: int = RETRIES) -> Any:
    """An `openai.OpenAI` for the endpoint `url` (up to /v1), with the key that the environment variable holds.

    Refusals of the server (a bad key, an unknown model) are not tried again. ValueError without the package, and for a
    URL that is none.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: is no URL of a server; give http://HOST:PORT/v1")
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"{url}: asking a server needs the openai package; pip install 'vistune[eval]'") from error
    key = os.environ.get(key_variable, "") if key_variable else ""
    return openai.OpenAI(base_url=url.rstrip("/"), api_key=key or NO_KEY, timeout=timeout, max_retries=retries)


class Completer:
    """Chat completions of one endpoint, in the words that it turned out to want: newer ones call the longest reply
    something else. Safe to call from several threads."""

    def __init__(self, client: Any):
        self.client, self.length = client, "max_tokens"

    def __call__(self, model: str, messages: Sequence[Mapping[str, Any]], temperature: float, longest: int) -> Any:
        """The completion as the client gives it. Raises what the client raises."""
        import openai

        word = self.length
        try:
            return self._post(model, messages, temperature, longest, word)
        except openai.BadRequestError as error:
            if word != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self.length = "max_completion_tokens"
            return self._post(model, messages, temperature, longest, self.length)

    def _post(
        self, model: str, messages: Sequence[Mapping[str, Any]], temperature: float, longest: int, word: str
    ) -> Any:
        given = [dict(message) for message in messages]
        return self.client.chat.completions.create(
            model=model, messages=given, temperature=temperature, **{word: longest}
        )


def reason(error: Exception) -> str:
    """What went wrong with a request, on one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:297] + "..."
