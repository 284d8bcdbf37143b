"""The order of the samples in an epoch, as a function: nothing of the size of the data is held.

Knows which rows are good and how often a source comes; nothing of lengths, packs and steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from vistune.data.index import Index

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


class Order:
    """Places of an epoch -> positions of the index.

    Only rows without a fault come. `repeats[s]` is how often the samples of source s come in one epoch: 2.0 twice
    each, 0.5 another half of them each epoch.
    """

    def __init__(self, index: Index, seed: int, repeats: Sequence[float] | None = None):
        self._seed = seed
        bad = np.flatnonzero(index.columns["fault"])
        self._bad_ranks = bad - np.arange(len(bad))  # good rows before each bad one
        sources = index.columns["source"]
        count = int(sources[-1]) + 1 if len(sources) else 0
        if repeats is not None and len(repeats) < count:
            raise ValueError(f"the index has {count} sources, epochs are given for {len(repeats)}")
        edges = np.searchsorted(sources, np.arange(count + 1))
        self._good_edges = edges - np.searchsorted(bad, edges)  # good rows before each source
        good = np.diff(self._good_edges)
        taken = np.round(good * (np.ones(count) if repeats is None else np.array(repeats[:count], float)))
        self._edges = np.append(0, np.cumsum(taken)).astype(np.int64)  # places before each source, before shuffling

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """int64 positions of the index at these places of `epoch`."""
        shuffled = Permutation(len(self), self._seed, epoch)(places)
        sources = np.searchsorted(self._edges, shuffled, side="right") - 1
        ranks = np.empty(len(shuffled), np.int64)
        for source in np.unique(sources):
            here = sources == source
            first, size = self._good_edges[source], self._good_edges[source + 1] - self._good_edges[source]
            within = shuffled[here] - self._edges[source]
            if self._edges[source + 1] - self._edges[source] != size:  # not once each: which ones is up to the epoch
                within = Permutation(int(size), self._seed, epoch, "source", int(source))(within % size)
            ranks[here] = first + within
        return ranks + np.searchsorted(self._bad_ranks, ranks, side="right")
