"""Keys and values of what was read, in blocks, for requests that begin alike: a conversation that goes on, another
question about the same picture. The longest unwanted are forgotten. Knows blocks and their names; nothing of requests.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 32
"""Tokens of a block. Of a beginning that was read before, fewer are read again."""
AT_ONCE = 16
"""Blocks that are copied out of a row in one piece, so that a long one needs no memory of its length."""

Cut = Callable[[int, int], Tensor]
"""Places from, up to -> a copy of their keys and values [2 x layers, heads, places, width]."""


class Prefixes:
    """Blocks by name, `limit` tokens of them at most. `forget` may be called from any thread."""

    def __init__(self, limit: int, block: int = BLOCK):
        self.block, self.most = block, limit // block
        self._held: OrderedDict[bytes, tuple[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return len(self._held) * self.block

    def names(
        self, whose: str, ids: Sequence[int], pictures: Sequence[tuple[int, bytes]], known: Sequence[bytes] = ()
    ) -> list[bytes]:
        """A name for each whole block of `ids`, by all that stands up to its end and by whose keys and values these
        are. `pictures`: where each begins, and its digest; from one without a digest on, nothing has a name. `known`:
        the first of these names."""
        found, begun = list(known), len(known) * self.block
        name = found[-1] if found else hashlib.sha256(whose.encode()).digest()
        each = iter([*(one for one in pictures if one[0] >= begun), (len(ids), b"")])
        place, digest = next(each)
        for start in range(begun, len(ids) - self.block + 1, self.block):
            made = hashlib.sha256(name + array("q", ids[start : start + self.block]).tobytes())
            while place < start + self.block:
                if not digest:
                    return found
                made.update(place.to_bytes(8, "little") + hashlib.sha256(digest).digest())
                place, digest = next(each)
            name = made.digest()
            found.append(name)
        return found

    def find(self, wanted: Sequence[bytes]) -> list[Tensor]:
        """The blocks of the first of these names, as far as they are known."""
        with self._lock:
            found: list[Tensor] = []
            for name in wanted:
                if name not in self._held:
                    break
                found.append(self._held[name][1])
            self._touch(wanted[: len(found)])
            return found

    def put(self, whose: str, said: Sequence[bytes], cut: Cut) -> None:
        """Remember the blocks that have these names and are not known yet. Where the memory has no room for a copy,
        all is forgotten: what is answered now needs it more."""
        said = said[: self.most]
        with self._lock:
            first = next((i for i, name in enumerate(said) if name not in self._held), len(said))
            try:
                self._add(whose, said, first, cut)
            except torch.OutOfMemoryError:
                return self._held.clear()
            self._touch(said)
            while len(self._held) > self.most:
                self._held.popitem(last=False)

    def forget(self, whose: str | None = None) -> None:
        """All, or what is whose."""
        with self._lock:
            for name in [name for name, (one, _) in self._held.items() if whose in (None, one)]:
                del self._held[name]

    def _add(self, whose: str, said: Sequence[bytes], first: int, cut: Cut) -> None:
        for start in range(first, len(said), AT_ONCE):
            now = said[start : start + AT_ONCE]
            blocks = cut(start * self.block, (start + len(now)) * self.block).split(self.block, dim=2)
            for name, block in zip(now, blocks, strict=True):
                if name not in self._held:
                    self._held[name] = whose, block.clone()  # a view would keep all of them

    def _touch(self, said: Sequence[bytes]) -> None:
        """These are wanted; ends go before beginnings, without which nobody finds them."""
        for name in reversed(said):
            self._held.move_to_end(name)
