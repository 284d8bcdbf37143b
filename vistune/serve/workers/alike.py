"""Which workers were given bodies that begin like this one: what they have read and seen, they need not read again.

Knows bytes and numbers of workers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

PIECE = 512
"""Bytes of a body by which beginnings are told apart."""
LONGEST = 1 << 16
"""What is looked at of a body: two pictures differ well before."""
HELD = 1 << 15
"""Pieces that are remembered, some 5 MB; the longest unwanted are forgotten."""


class Alike:
    def __init__(self, held: int = HELD):
        self.held = held
        self._given: OrderedDict[bytes, set[int]] = OrderedDict()

    def known(self, body: bytes) -> dict[int, int]:
        """How many pieces of this beginning each worker was given before, by its number."""
        found: dict[int, int] = {}
        for count, name in enumerate(_names(body), 1):
            workers = self._given.get(name)
            if not workers:
                break
            found |= dict.fromkeys(workers, count)
        return found

    def give(self, body: bytes, worker: int) -> None:
        for name in reversed(_names(body)):  # beginnings are the last to be forgotten
            self._given.setdefault(name, set()).add(worker)
            self._given.move_to_end(name)
        while len(self._given) > self.held:
            self._given.popitem(last=False)


def _names(body: bytes) -> list[bytes]:
    """One for each whole piece, by all bytes up to its end."""
    read, found = hashlib.sha256(), []
    for start in range(0, min(len(body), LONGEST) - PIECE + 1, PIECE):
        read.update(body[start : start + PIECE])
        found.append(read.digest()[:16])
    return found
