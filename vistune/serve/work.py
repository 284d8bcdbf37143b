"""What goes to an engine and what comes back: a request as the model takes it, pieces of its answer, its end.

Knows nothing of HTTP, and nothing of how requests are answered together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vistune.decoding import Settings, Shown
from vistune.serve.refused import Refused


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request that was read, checked and prepared.

    `ids`: the prompt with the placeholders of every picture laid; `pictures` in their order, `digests` one for each:
    equal ones are the same picture to this model. `settings` says how the answer is drawn, `stops` what ends it beside
    the template's own stop (and is not part of it). `adapter`: by name, empty for the model itself. `until`: on
    `time.monotonic()`, when it has to be done.
    """

    ids: list[int]
    settings: Settings
    pictures: tuple[Shown, ...] = ()
    digests: tuple[bytes, ...] = ()
    stops: tuple[str, ...] = ()
    adapter: str = ""
    until: float = math.inf

    @property
    def nbytes(self) -> int:
        """What waiting costs."""
        return sum(one.pixels.nbytes for one in self.pictures) + 8 * len(self.ids)


@dataclass(frozen=True)
class Piece:
    """More of an answer: text that is certain (it may be empty), and how many tokens have been drawn for it so far."""

    text: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of an answer. `reason`: "stop", "length", "error" (then `error` says why), or "left" (the asker went).

    `margin`: the smallest gap between the two best logits of a greedy answer's steps, infinite where there are none.
    `reused`: tokens of the prompt that had been read for another request.
    """

    reason: str
    tokens: int = 0
    margin: float = math.inf
    reused: int = 0
    error: Refused | None = None


@dataclass(frozen=True, kw_only=True)
class State:
    """An engine at a moment: requests that run and wait; tokens of keys and values that are reserved, of those that
    there are; bytes of remembered pictures, pictures that were encoded, and such as needed not be, being known already;
    tokens of remembered prompts, and such as were not read again; whether it is alive, and seconds since its loop last
    turned (0 while it has nothing to do)."""

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_tokens: int = 0
    pictures_held: int = 0
    pictures_seen: int = 0
    pictures_again: int = 0
    prefix_tokens: int = 0
    tokens_again: int = 0
    alive: bool = True
    idle: float = 0.0
