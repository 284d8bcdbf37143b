"""The workers that a controller knows: who they are, who is asked next, who has not been heard of for too long.

The reference's rules (llava/serve/controller.py). Knows nothing of HTTP; addresses are checked before they come here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vistune.serve.llava.status import Status
from vistune.serve.refused import Refused

EXPIRES = 30.0
"""Seconds without a beat after which a worker that sends them is forgotten (CONTROLLER_HEART_BEAT_EXPIRATION)."""
MOST = 256
METHODS = ("shortest_queue", "lottery")


@dataclass
class Known:
    """A worker at an address: what it says of itself, whether it sends beats, and when the last came."""

    status: Status
    beats: bool
    seen: float
    given: int = 0
    """Requests sent to it since it last said how many it has."""

    @property
    def wait(self) -> float:
        return (self.status.queue_length + self.given) / self.status.speed


class Controller:
    """`own` says what this server itself can do; it is asked like any worker, under the address that a client knows it
    by. `method`: one of METHODS. ValueError for another. Used on the event loop alone."""

    def __init__(
        self,
        own: Callable[[], Status],
        method: str = "shortest_queue",
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
    ):
        if method not in METHODS:
            raise ValueError(f"--llava-dispatch {method}: one of {', '.join(METHODS)}")
        self.own, self.method = own, method
        self._clock, self._draw = clock, draw or random.Random()
        self._known: dict[str, Known] = {}
        self._turn = 0

    @property
    def known(self) -> dict[str, Known]:
        """By address, without those that have not been heard of for too long."""
        now = self._clock()
        for address in [a for a, one in self._known.items() if one.beats and now - one.seen > EXPIRES]:
            del self._known[address]
        return self._known

    def register(self, address: str, status: Status, beats: bool) -> None:
        """Refused: 429 when there are too many."""
        if address not in self.known and len(self._known) >= MOST:
            raise Refused(429, f"{MOST} workers are registered already", code="too_many_workers")
        self._known[address] = Known(status, beats, self._clock())

    def forget(self, address: str) -> None:
        self._known.pop(address, None)

    def beat(self, address: str, length: float) -> bool:
        """Whether it is known; one that is not registers again."""
        one = self.known.get(address)
        if one is None:
            return False
        one.status = Status(one.status.model_names, one.status.speed, length)
        one.given, one.seen = 0, self._clock()
        return True

    def models(self) -> list[str]:
        """Ours first, each once."""
        names = [*self.own().model_names, *(name for one in self.known.values() for name in one.status.model_names)]
        return list(dict.fromkeys(names))

    def choose(self, model: str, here: str) -> str:
        """The address of who shall answer for `model`, `here` being our own; empty when nobody has it."""
        found = list(self._candidates(model, here))
        if not found:
            return ""
        if self.method == "lottery":
            speeds = [one.status.speed for _, one in found]
            return self._draw.choices([address for address, _ in found], speeds)[0]
        self._turn += 1
        least = min(one.wait for _, one in found)
        equal = [(address, one) for address, one in found if one.wait == least]
        address, one = equal[self._turn % len(equal)]
        one.given += 1  # more may ask before it says how many it has
        return address

    def _candidates(self, model: str, here: str) -> Iterator[tuple[str, Known]]:
        own = self.own()
        if model in own.model_names:
            yield here, Known(own, False, 0.0)
        yield from ((address, one) for address, one in self.known.items() if model in one.status.model_names)

    def whole(self) -> Status:
        """All workers as one, for a controller above this one."""
        each = [self.own(), *(one.status for one in self.known.values())]
        names = tuple(self.models())
        return Status(names, sum(one.speed for one in each), sum(one.queue_length for one in each))
