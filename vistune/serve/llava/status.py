"""What a worker says of itself to a controller, and what a controller takes for that.

Knows nothing of HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vistune.serve.refused import Refused


@dataclass(frozen=True)
class Status:
    """Names of models, speed beside other workers' (1 is any), requests in hand."""

    model_names: tuple[str, ...]
    speed: float
    queue_length: float

    def body(self) -> dict[str, Any]:
        return {"model_names": list(self.model_names), "speed": self.speed, "queue_length": self.queue_length}


MOST_NAMES, LONGEST_NAME = 256, 300


def read_status(said: Any) -> Status:
    """Refused: 400 where it is none. A speed of 0 would be divided by, and is none."""
    fields = said if isinstance(said, dict) else {}
    names, speed = fields.get("model_names"), _number(fields.get("speed"))
    length = queue_length(fields.get("queue_length"))
    named = isinstance(names, list) and all(isinstance(one, str) and 0 < len(one) <= LONGEST_NAME for one in names)
    if not named or len(names) > MOST_NAMES:  # type: ignore[arg-type]
        raise Refused(400, f"model_names: up to {MOST_NAMES} names", param="worker_status.model_names")
    if not speed > 0:
        raise Refused(400, "speed: a number above 0", param="worker_status.speed")
    return Status(tuple(dict.fromkeys(names)), speed, length)  # type: ignore[arg-type]


def queue_length(said: Any) -> float:
    """Refused: 400 where it is none."""
    length = _number(said)
    if not 0 <= length < math.inf:
        raise Refused(400, "queue_length: a number from 0 on", param="queue_length")
    return length


def _number(said: Any) -> float:
    """NaN where it is none."""
    found = said if isinstance(said, int | float) and not isinstance(said, bool) else math.nan
    return found if abs(found) < 1e12 else math.nan
