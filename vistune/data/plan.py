"""The plan: which samples form which pack, which packs form step k, for every rank. A pure function of index and seed.

Knows lengths, never contents. Step k costs the same wherever it stands, so a run that resumes needs only its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from vistune.data.index import Index
from vistune.data.order import Order, Permutation
from vistune.data.packing import best_fit, deal

Pack = tuple[int, ...]
"""Positions of the index whose samples share one row of `length` tokens."""

# What a token pair of attention and an image cost beside one token through the layers, for 7B and CLIP-L/336
# (2 x 6.7e9 FLOP a token against 4 x 32 x 4096 / 2 a pair; 0.38e12 an image, forward only). For balance, not accounts.
_PAIR_COST = 1 / 50_000
_IMAGE_COST = 10.0
_KEPT_WINDOWS = 4


class Plan:
    """The order of the data of a run.

    `unit` "samples": a step is `batch` samples, packed among themselves; every sample comes once an epoch and the
    last step of an epoch may be smaller. `unit` "packs": a step is `batch` packs; `window` samples at a time are
    packed together, in every epoch the same, and windows and the packs within them are shuffled anew. `pack` = False
    makes each sample a pack. `repeats` is how often each source's samples come in an epoch.

    Raises ValueError when there is no sample to plan, and for samples longer than `length`.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch: int,
        unit: Literal["samples", "packs"] = "samples",
        length: int,
        pack: bool = True,
        seed: int = 0,
        epochs: float = 1.0,
        steps: int | None = None,
        repeats: Sequence[float] | None = None,
        window: int = 16384,
    ):
        self.index, self.batch, self.unit, self.length, self.pack = index, batch, unit, length, pack
        self.seed, self.epochs, self.window = seed, epochs, window
        self.order = Order(index, seed, repeats)
        if not len(self.order):
            first = f", the first because: {index.faults[0].code}: {index.faults[0].reason}" if index.faults else ""
            raise ValueError(f"no sample to train on: {len(index.faults)} of {len(index)} rows are set aside{first}")
        if index.length > length:
            raise ValueError(f"the index was made for samples of {index.length} tokens, packs have room for {length}")
        self._steps = steps
        self._windows: dict[int, list[Pack]] = {}

    @cached_property
    def steps_per_epoch(self) -> int:
        count = len(self.order) if self.unit == "samples" else int(self._pack_counts.sum())
        return math.ceil(count / self.batch)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self._steps or max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))

    def step(self, k: int) -> list[Pack]:
        """The packs of step k (from 0, over all epochs), the same for any number of ranks and workers."""
        epoch, within = divmod(k, self.steps_per_epoch)
        start = within * self.batch
        if self.unit == "packs":
            return self._packs_between(epoch, start, start + self.batch)
        places = np.arange(start, min(start + self.batch, len(self.order)))
        return self._pack(self.order(epoch, places))

    def micro_batches(self, k: int, rank: int, world: int, packs_per_micro: int) -> list[list[Pack]]:
        """This rank's share of step k: as many micro-batches as every other rank has, the last ones possibly empty."""
        packs = self.step(k)
        dealt = deal(self.costs(packs), world, packs_per_micro)
        return [[packs[i] for i in micro[rank]] for micro in dealt]

    def costs(self, packs: Sequence[Pack]) -> np.ndarray:
        """float64 [packs]: work of each pack, in tokens through the layers."""
        flat, starts = _flat(packs)
        tokens = self.index.tokens(flat).astype(np.float64)
        work = tokens + tokens**2 * _PAIR_COST + self.index.columns["images"][flat] * _IMAGE_COST
        return np.add.reduceat(work, starts)

    def supervised(self, k: int) -> int:
        """Targets of step k, as far as the index knows."""
        return int(self.index.columns["supervised"][_flat(self.step(k))[0]].sum())

    def describe(self) -> dict[str, Any]:
        """What one epoch consists of, before any of it is loaded. Padding is counted at rows of `length` tokens."""
        samples = tokens = supervised = packs = longest = images = most_images = shortened = 0
        for k in range(self.steps_per_epoch):
            here = self.step(k)
            flat, starts = _flat(here)
            fill = np.add.reduceat(self.index.tokens(flat), starts)
            pictures = np.add.reduceat(self.index.columns["images"][flat].astype(np.int64), starts)
            samples, packs = samples + len(flat), packs + len(here)
            tokens, images = tokens + int(fill.sum()), images + int(pictures.sum())
            supervised += int(self.index.columns["supervised"][flat].sum())
            shortened += int(self.index.columns["shortened"][flat].sum())
            longest, most_images = max(longest, int(fill.max())), max(most_images, int(pictures.max()))
        return {
            "samples": samples,
            "set_aside": int(np.count_nonzero(self.index.columns["fault"])),
            "shortened": shortened,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "packs": packs,
            "tokens": tokens,
            "supervised": supervised,
            "padding_share": 1 - tokens / (packs * self.length),
            "longest_pack": longest,
            "images_per_pack_max": most_images,
            "images_per_pack_mean": images / packs,
        }

    def _pack(self, positions: np.ndarray) -> list[Pack]:
        if not self.pack:
            return [(position,) for position in positions.tolist()]
        packs = best_fit(self.index.tokens(positions), self.length)
        return [tuple(positions[places].tolist()) for places in packs]

    def _window(self, window: int) -> list[Pack]:
        """Packs of one window, before an epoch shuffles them. The last few are kept."""
        if window not in self._windows:
            start = window * self.window
            places = np.arange(start, min(start + self.window, len(self.order)))
            while len(self._windows) >= _KEPT_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[window] = self._pack(self.order(0, places))
        return self._windows[window]

    @cached_property
    def _pack_counts(self) -> np.ndarray:
        """int64 [windows]: packs of each. The one thing that takes a pass over all lengths; all epochs share it."""
        windows = range(math.ceil(len(self.order) / self.window))
        return np.array([len(self._window(window)) for window in windows], np.int64)

    def _packs_between(self, epoch: int, start: int, stop: int) -> list[Pack]:
        """Packs `start` to `stop` of an epoch, or as many as it has."""
        windows = Permutation(len(self._pack_counts), self.seed, epoch, "windows")(np.arange(len(self._pack_counts)))
        ends = np.cumsum(self._pack_counts[windows])
        stop = min(stop, int(ends[-1]))
        found: list[Pack] = []
        for at in range(int(np.searchsorted(ends, start, side="right")), len(windows)):
            begin = int(ends[at]) - int(self._pack_counts[windows[at]])
            if begin >= stop:
                break
            packs = self._window(int(windows[at]))
            places = np.arange(max(start, begin), min(stop, int(ends[at]))) - begin
            shuffled = Permutation(len(packs), self.seed, epoch, "window", int(windows[at]))(places)
            found += [packs[i] for i in shuffled]
        return found


def _flat(packs: Sequence[Pack]) -> tuple[np.ndarray, np.ndarray]:
    """All positions of the packs in a row, and where each pack starts in it."""
    sizes = np.fromiter(map(len, packs), np.int64, len(packs))
    return np.concatenate([np.asarray(pack, np.int64) for pack in packs]), np.cumsum(sizes) - sizes
