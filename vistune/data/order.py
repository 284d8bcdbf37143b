"""The order of the samples in an epoch, as a function: nothing of the size of the data is held.

Knows which rows are good and how many of a source come; nothing of lengths, packs and steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from vistune.data.index import Index
from vistune.data.shares import Share, samples_each

_ROUNDS = 6


class Permutation:
    """A bijection of 0 .. size - 1 chosen by `key`, evaluated at any places in O(places).

    A Feistel network over pairs of digits in base ceil(sqrt(size)); what falls outside walks on along its cycle
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, *key: int | str):
        self.size = size
        self._side = np.uint64(max(1, math.isqrt(max(0, size - 1)) + 1))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64: where `places` (0 <= place < size) go."""
        moved: np.ndarray = self._network(np.asarray(places).astype(np.uint64))
        while (outside := moved >= self.size).any():
            moved[outside] = self._network(moved[outside])
        return moved.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left: np.ndarray = values // self._side
        right: np.ndarray = values % self._side
        for key in self._keys:
            left, right = right, (left + _mix(right ^ key) % self._side) % self._side
        return left * self._side + right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(values: np.ndarray, size: int, block: int, *key: int | str) -> np.ndarray:
    """int64: `values` (0 <= value < size) under a permutation that moves blocks of `block` neighbours as they are.

    What is left over behind the last whole block stays where it is.
    """
    blocks = size // block
    if block == 1 or not blocks:
        return Permutation(size, *key)(values) if block == 1 else values
    moved = Permutation(blocks, *key)(np.minimum(values // block, blocks - 1)) * block + values % block
    return np.where(values < blocks * block, moved, values)


class Order:
    """Places of an epoch -> positions of the index.

    Only rows without a fault come, and of each source as many as its share asks for (`taken`). A source that comes a
    whole number of times gives each sample so often. Of any other an epoch takes the next ones of a fixed cycle, so
    that every sample has come n or n + 1 times at any moment.

    With `block` above 1, runs of so many neighbouring rows stay within one span of `span` places, and are shuffled
    there: a span then reads a few stretches of the data and not all of it, at the price of a less thorough shuffle.
    """

    def __init__(
        self, index: Index, seed: int, shares: Sequence[Share] | None = None, *, block: int = 1, span: int = 16384
    ):
        self._seed, self._block, self._span = seed, block, span
        bad = np.flatnonzero(index.columns["fault"])
        self.bad = len(bad)
        self._bad_ranks = bad - np.arange(len(bad))  # good rows before each bad one
        sources = index.columns["source"]
        count = int(sources[-1]) + 1 if len(sources) else 0
        # Needles of the column's own type: of any other, the whole column would be converted.
        edges = np.append(np.searchsorted(sources, np.arange(count, dtype=sources.dtype)), len(sources))
        self._good_edges = edges - np.searchsorted(bad, edges)  # good rows before each source
        self.good = np.diff(self._good_edges).tolist()
        self.taken = samples_each(self.good, [Share()] * count if shares is None else shares)
        self._edges = np.append(0, np.cumsum(self.taken)).astype(np.int64)  # places before each source, not shuffled

    def __len__(self) -> int:
        """Samples of one epoch, of every one."""
        return int(self._edges[-1])

    @property
    def same_every_epoch(self) -> bool:
        """Whether all epochs have the same samples."""
        return all(not good or taken % good == 0 for good, taken in zip(self.good, self.taken, strict=True))

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """int64 positions of the index at these places of `epoch`."""
        places = np.asarray(places, np.int64)
        if self._block > 1:
            places = self._within_spans(epoch, places)
        return self.unshuffled(epoch, shuffled(places, len(self), self._block, self._seed, epoch))

    def unshuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """int64 positions of the index, when the samples of `epoch` lie source after source."""
        sources = np.searchsorted(self._edges, places, side="right") - 1
        ranks = np.empty(len(places), np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            within, size, taken = places[here] - self._edges[source], self.good[source], self.taken[source]
            if taken % size:
                cycle = (within + epoch * taken) % size
                within = shuffled(cycle, size, self._block, self._seed, "source", source)
            ranks[here] = self._good_edges[source] + within % size
        return ranks + np.searchsorted(self._bad_ranks, ranks, side="right")

    def _within_spans(self, epoch: int, places: np.ndarray) -> np.ndarray:
        moved = np.empty_like(places)
        spans = places // self._span
        for span in np.unique(spans).tolist():
            here, start = spans == span, span * self._span
            permute = Permutation(min(self._span, len(self) - start), self._seed, epoch, "span", span)
            moved[here] = start + permute(places[here] - start)
        return moved
