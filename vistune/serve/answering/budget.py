"""How much can be read in a given time: what calls have cost so far, and how many prompts to read in the next one.

Knows numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_FORGETS = 0.8
"""What a measurement still counts when the next one comes: about the last five decide."""


class Cost:
    """Seconds of a call that handles some amount: so many for the call and so many for each, by least squares over
    the last ones. Where those were all alike, each costs its share."""

    def __init__(self) -> None:
        self.calls = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.calls += 1
        kept, new = (self._n, self._x, self._y, self._xx, self._xy), (1, amount, seconds, amount**2, amount * seconds)
        self._n, self._x, self._y, self._xx, self._xy = (
            _FORGETS * old + one for old, one in zip(kept, new, strict=True)
        )

    def seconds(self, amount: float) -> float:
        """Of a call; 0 when nobody knows yet."""
        call, each = self._line()
        return call + each * amount

    def most(self, seconds: float) -> float:
        """The amount that a call of so many seconds handles; without end when nobody knows yet."""
        call, each = self._line()
        if each <= 0:
            return math.inf
        return max((seconds - call) / each, 0.0)

    def _line(self) -> tuple[float, float]:
        if not self._x:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x**2
        share = self._y / self._x
        if spread < 1e-3 * self._x**2:
            return 0.0, share
        each = (self._n * self._xy - self._x * self._y) / spread
        call = (self._y - each * self._x) / self._n
        return (call, each) if each > 0 and call > 0 else (0.0, share)


def together(left: Sequence[int], budget: int, least: int) -> tuple[int, int]:
    """How many prompts to read at once, of those with so many tokens left (first come first), and the most tokens of
    each: where `budget` tokens, padding included, read the most. Pieces are not below `least` but of one prompt."""
    best = (0, 1, budget)
    for count in range(1, len(left) + 1):
        each = budget // count
        if count > 1 and each < least:
            break
        read = sum(min(one, each) for one in left[:count])
        if read > best[0]:
            best = (read, count, each)
    return best[1:]
