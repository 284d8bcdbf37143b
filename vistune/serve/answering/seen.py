"""Encoded pictures that are remembered, so that identical ones are encoded once; the longest unwanted are forgotten.

Knows nothing of requests. May be asked from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

Key = tuple[str, bytes]
"""Whose eyes saw it (an adapter's name, or empty), and the picture's digest."""


class Seen:
    """Features by picture, `limit` bytes of them at most."""

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._held: OrderedDict[Key, tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> tuple[Tensor, ...] | None:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: Key, features: Sequence[Tensor]) -> None:
        """Remember, unless it alone is more than may be held."""
        size = _bytes(features)
        if size > self.limit:
            return
        with self._lock:
            self._drop(key)
            self._held[key] = tuple(features)
            self.nbytes += size
            while self.nbytes > self.limit:
                self._drop(next(iter(self._held)))

    def forget(self, eyes: str | None = None) -> None:
        """All, or what these eyes saw."""
        with self._lock:
            for key in [key for key in self._held if eyes is None or key[0] == eyes]:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self.nbytes -= _bytes(self._held.pop(key, ()))


def _bytes(features: Sequence[Tensor]) -> int:
    return sum(one.nbytes for one in features)
