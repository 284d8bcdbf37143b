"""The plan: which samples form which pack, which packs form step k, for every rank. A pure function of index and seed.

Knows lengths, never contents. Step k costs the same wherever it stands, so a run that resumes needs only its number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch

from vistune.data import epochs as known
from vistune.data.grouping import length_grouped, modality_grouped
from vistune.data.index import Index
from vistune.data.order import Order, Permutation
from vistune.data.packing import deal, pack
from vistune.data.shares import Share

Pack = tuple[int, ...]
"""Positions of the index whose samples share one row of `length` tokens."""

# What a token pair of attention and a placeholder's share of the vision tower cost beside one token through the layers,
# for 7B and CLIP-L/336 (2 x 6.7e9 FLOP a token against 4 x 32 x 4096 / 2 a pair; 0.38e12 an image of 576 placeholders,
# forward only, against forward and backward). For balance, not accounts.
_PAIR_COST = 1 / 50_000
_IMAGE_COST = 10 / 576
_KEPT_WINDOWS = 4
_FORMAT = 2  # of the order and of what is kept of it; raised when either changes
_FACTS = ("packs", "samples", "tokens", "supervised", "images", "shortened", "longest", "most_images")
# Steps that `describe` looks at as one piece of work; of an epoch of more samples, so many pieces, evenly spread.
_PIECE, _ALL_UP_TO, _PIECES = 32, 4_000_000, 64


class Plan:
    """The order of the data of a run.

    `unit` "samples": a step is `batch` samples, packed among themselves, and the last step of an epoch may be smaller.
    `unit` "packs": a step is `batch` packs; `window` samples at a time are packed together, and windows and the packs
    within them are shuffled anew in every epoch. `pack` = False makes each sample a pack.

    `shares` says how many samples of each source an epoch has.
    With whole numbers of epochs the windows of "packs" are the same in every epoch; otherwise other samples come in
    each, so that each is packed anew and may have some steps more or less.

    `images_per_pack` above 0 is the most pictures of a pack. `group` "length" or "modality" (with `pack` = False and
    steps of `batch` / `micro_batch` micro-batches) is the order of `grouping`. `block` rows that are neighbours in the
    data stay in one window (see `Order`). `workers` processes help with the work that takes a pass over all lengths.

    Raises ValueError when there is no sample to plan, for samples longer than `length` or of too many pictures, and
    for what contradicts itself.
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
        window: int = 16384,
        shares: Sequence[Share] | None = None,
        images_per_pack: int = 0,
        group: Literal["none", "modality", "length"] = "none",
        micro_batch: int = 1,
        block: int = 1,
        workers: int = 0,
    ):
        self.index, self.batch, self.unit, self.length, self.pack = index, batch, unit, length, pack
        self.seed, self.epochs, self.window, self.group, self.micro_batch = seed, epochs, window, group, micro_batch
        self.images_per_pack, self.workers, self.block = images_per_pack, workers, block
        self.order = Order(index, seed, shares, block=block, span=window)
        self._steps = steps
        self._windows: dict[tuple[int, int], list[Pack]] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._check()

    def _check(self) -> None:
        if not any(self.order.good):
            faults = self.index.faults
            first = f", the first because: {faults[0].code}: {faults[0].reason}" if faults else ""
            raise ValueError(f"no sample to train on: {self.order.bad} of {len(self.index)} rows are set aside{first}")
        if not len(self.order):
            raise ValueError("no sample to train on: the sources' epochs leave less than half a sample of each")
        if self.index.length > self.length:
            raise ValueError(
                f"the index was made for samples of {self.index.length} tokens, packs have room for {self.length}"
            )
        if self.group != "none" and (self.pack or self.batch % self.micro_batch):
            raise ValueError(
                f"data.group = {self.group!r} needs data.pack = false and a batch of whole micro-batches: "
                f"train.batch = {self.batch} is {self.batch / self.micro_batch:g} times {self.micro_batch}"
            )
        images = self.index.columns["images"]
        if self.pack and self.images_per_pack and (most := int(images.max())) > self.images_per_pack:
            at = int(images.argmax())
            raise ValueError(
                f"data.images_per_pack = {self.images_per_pack}: row {self.index.columns['row'][at]} of source "
                f"{self.index.columns['source'][at]} has {most} pictures, and nothing is cut; allow as many"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets; it maps for itself what is kept on disk."""
        held = {cycle: table for cycle, table in self._tables.items() if not isinstance(table, np.memmap)}
        return {**self.__dict__, "_windows": {}, "_tables": held}

    @cached_property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; of every one, unless packs are counted and epochs have other samples each."""
        return self._steps_in(0)

    @cached_property
    def steps(self) -> int:
        """Of the whole run."""
        if self._steps:
            return self._steps
        whole = int(self.epochs + 1e-9)
        if self._all_alike:
            return max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))
        part = self.epochs - whole
        begun = math.ceil(part * self._steps_in(whole) - 1e-9) if part > 1e-9 else 0
        return max(1, sum(map(self._steps_in, range(whole))) + begun)

    def prepare(self) -> None:
        """Work out what all epochs of the run need beside the index, and `describe`, where it is not kept there yet."""
        last, _ = self._place(self.steps - 1)
        self.describe()
        if self.group != "none":
            for epoch in range(last + 1):
                self._grouped(epoch)

    def step(self, k: int) -> list[Pack]:
        """The packs of step k (from 0, over all epochs), the same for any number of ranks and workers."""
        epoch, within = self._place(k)
        start = within * self.batch
        stop = min(start + self.batch, len(self.order))
        if self.group != "none":
            return [(position,) for position in self._grouped(epoch)[start:stop].tolist()]
        if self.unit == "packs":
            return self._packs_between(epoch, start, start + self.batch)
        return self._pack(self.order(epoch, np.arange(start, stop)))

    def micro_batches(self, k: int, rank: int, world: int, packs_per_micro: int) -> list[list[Pack]]:
        """This rank's share of step k: as many micro-batches as every other rank has, the last ones possibly empty."""
        return [micro[rank] for micro in self.shares(k, world, packs_per_micro)]

    def shares(self, k: int, world: int, packs_per_micro: int) -> list[list[list[Pack]]]:
        """[micro-batch][rank] -> packs of step k.

        Packs are dealt by what they cost. Grouped samples keep their order: the next micro-batch to the next rank.
        """
        packs = self.step(k)
        if self.group != "none":
            micros = [packs[start : start + packs_per_micro] for start in range(0, len(packs), packs_per_micro)]
            micros += [[]] * (-len(micros) % world)
            return [micros[start : start + world] for start in range(0, len(micros), world)]
        dealt = deal(self.costs(packs), world, packs_per_micro)
        return [[[packs[i] for i in mine] for mine in micro] for micro in dealt]

    def costs(self, packs: Sequence[Pack]) -> np.ndarray:
        """float64 [packs]: work of each pack, in tokens through the layers."""
        flat, starts = _flat(packs)
        tokens = self.index.tokens(flat).astype(np.float64)
        work = tokens + tokens**2 * _PAIR_COST + self.index.columns["image"][flat] * _IMAGE_COST
        return np.add.reduceat(work, starts)

    def supervised(self, k: int) -> int:
        """Targets of step k, as far as the index knows."""
        return int(self.index.columns["supervised"][_flat(self.step(k))[0]].sum())

    def describe(self) -> dict[str, Any]:
        """What the first epoch consists of, before any of it is loaded. Padding is counted at rows of `length` tokens.

        With `unit` "samples" and very many of them, `estimated_from_steps` says from how many evenly spread steps all
        but the samples and steps are estimated.
        """
        table = self._facts_of_packs(0) if self._counts_packs else self._facts_of_steps()
        facts = dict(zip(_FACTS, table.sum(0).tolist(), strict=True))
        samples, scale = len(self.order), len(self.order) / facts["samples"]
        tokens, packs = facts["tokens"], facts["packs"]
        return {
            "samples": samples,
            "set_aside": self.order.bad,
            "shortened": round(facts["shortened"] * scale),
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "packs": round(packs * scale),
            "tokens": round(tokens * scale),
            "supervised": round(facts["supervised"] * scale),
            "padding_share": 1 - tokens / (packs * self.length),
            "longest_pack": int(table[:, _FACTS.index("longest")].max()),
            "images_per_pack_max": int(table[:, _FACTS.index("most_images")].max()),
            "images_per_pack_mean": facts["images"] / packs,
            **({} if scale == 1 else {"estimated_from_steps": len(table) * _PIECE}),
        }

    @property
    def _counts_packs(self) -> bool:
        return self.unit == "packs" and self.group == "none"

    @cached_property
    def _all_alike(self) -> bool:
        """Whether every epoch has as many steps as the first."""
        return not self._counts_packs or self.order.same_every_epoch

    def _steps_in(self, epoch: int) -> int:
        count = int(self._facts_of_packs(epoch)[:, 0].sum()) if self._counts_packs else len(self.order)
        return math.ceil(count / self.batch)

    def _place(self, k: int) -> tuple[int, int]:
        """Epoch of step k, and its number there."""
        if self._all_alike:
            return divmod(k, self.steps_per_epoch)
        epoch = 0
        while k >= (here := self._steps_in(epoch)):
            epoch, k = epoch + 1, k - here
        return epoch, k

    def _pack(self, positions: np.ndarray) -> list[Pack]:
        if not self.pack:
            return [(position,) for position in positions.tolist()]
        images = self.index.columns["images"][positions].astype(np.int64) if self.images_per_pack else None
        packs = pack(self.index.tokens(positions), self.length, images, self.images_per_pack)
        return [tuple(positions[places].tolist()) for places in packs]

    # -- packs by the window

    def _window(self, epoch: int, window: int) -> list[Pack]:
        """Packs of one window, before an epoch shuffles them. The last few are kept."""
        if (epoch, window) not in self._windows:
            start = window * self.window
            places = np.arange(start, min(start + self.window, len(self.order)))
            while len(self._windows) >= _KEPT_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, window] = self._pack(self.order(epoch, places))
        return self._windows[epoch, window]

    def _packs_between(self, epoch: int, start: int, stop: int) -> list[Pack]:
        """Packs `start` to `stop` of an epoch, or as many as it has."""
        counts = self._facts_of_packs(epoch)[:, 0]
        made_in = self._made_in(epoch)
        windows = Permutation(len(counts), self.seed, epoch, "windows")(np.arange(len(counts)))
        ends = np.cumsum(counts[windows])
        stop = min(stop, int(ends[-1]))
        found: list[Pack] = []
        for at in range(int(np.searchsorted(ends, start, side="right")), len(windows)):
            begin = int(ends[at]) - int(counts[windows[at]])
            if begin >= stop:
                break
            packs = self._window(made_in, int(windows[at]))
            places = np.arange(max(start, begin), min(stop, int(ends[at]))) - begin
            shuffled = Permutation(len(packs), self.seed, epoch, "window", int(windows[at]))(places)
            found += [packs[i] for i in shuffled]
        return found

    def _made_in(self, epoch: int) -> int:
        """The epoch whose windows `epoch` has: all share the first one's, unless their samples differ."""
        return 0 if self.order.same_every_epoch else epoch

    # -- what takes a pass over all lengths

    def _facts_of_packs(self, epoch: int) -> np.ndarray:
        """int64 [windows, facts] of an epoch, kept beside the index."""
        epoch = self._made_in(epoch)
        if epoch not in self._tables:
            windows = range(math.ceil(len(self.order) / self.window))
            measure = partial(self._measure_window, epoch)
            make = partial(known.measured, measure, windows, len(_FACTS), "plan", self.workers)
            self._tables[epoch] = known.kept(self.index.folder, self._name("packs", epoch), make)
        return self._tables[epoch]

    def _facts_of_steps(self) -> np.ndarray:
        """int64 [pieces, facts] of the first epoch, or of pieces evenly spread over it; kept beside the index."""
        pieces: Sequence[int] = range(math.ceil(self.steps_per_epoch / _PIECE))
        if len(self.order) > _ALL_UP_TO and len(pieces) > _PIECES:
            pieces = np.linspace(0, len(pieces) - 2, _PIECES).astype(int).tolist()  # the last may have fewer steps
        make = partial(known.measured, self._measure_steps, pieces, len(_FACTS), "plan", self.workers)
        return known.kept(self.index.folder, self._name("steps", self.batch, self.micro_batch), make)

    def _measure_window(self, epoch: int, window: int) -> list[int]:
        return self._facts(self._window(epoch, window))

    def _measure_steps(self, piece: int) -> list[int]:
        steps = range(piece * _PIECE, min((piece + 1) * _PIECE, self.steps_per_epoch))
        return self._facts([packed for k in steps for packed in self.step(k)])

    def _facts(self, packs: list[Pack]) -> list[int]:
        flat, starts = _flat(packs)
        tokens, images = self.index.tokens(flat), self.index.columns["images"][flat].astype(np.int64)
        sums = (self.index.columns[name][flat].sum(dtype=np.int64) for name in ("supervised", "shortened"))
        supervised, shortened = map(int, sums)
        longest, most = np.add.reduceat(tokens, starts).max(), np.add.reduceat(images, starts).max()
        total = (int(tokens.sum(dtype=np.int64)), supervised, int(images.sum()), shortened)
        return [len(packs), len(flat), *total, int(longest), int(most)]

    def _grouped(self, epoch: int) -> np.ndarray:
        """int64: the positions of an epoch in grouped order, kept beside the index. Sorts the epoch as a whole."""
        if epoch not in self._tables:
            make = partial(self._group, epoch)
            name = self._name("grouped", epoch, self.batch, self.micro_batch)
            self._tables[epoch] = known.kept(self.index.folder, name, make)
        return self._tables[epoch]

    def _group(self, epoch: int) -> np.ndarray:
        positions = self.order.unshuffled(epoch, np.arange(len(self.order)))
        lengths = self.index.tokens(positions).astype(np.int64)
        generator = torch.Generator().manual_seed(int(self._digest("group", epoch)[:15], 16))
        steps = self.micro_batch, self.batch // self.micro_batch
        if self.group == "length":
            return positions[length_grouped(lengths, *steps, generator)]
        lengths[self.index.columns["images"][positions] == 0] *= -1
        return positions[modality_grouped(lengths, *steps, generator)]

    def _name(self, kind: str, *of: int) -> str:
        """Of a file that holds what depends on all of this."""
        settings = (self.index.hash, self.unit, self.length, self.pack, self.window, self.images_per_pack, self.group)
        return f"plan-{kind}-{self._digest(*settings, self.block, *self.order.taken, *of)[:16]}"

    def _digest(self, *parts: str | int) -> str:
        return hashlib.sha256(repr((_FORMAT, self.seed, *parts)).encode()).hexdigest()


def _flat(packs: Sequence[Pack]) -> tuple[np.ndarray, np.ndarray]:
    """All positions of the packs in a row, and where each pack starts in it."""
    sizes = np.fromiter(map(len, packs), np.int64, len(packs))
    return np.concatenate([np.asarray(pack, np.int64) for pack in packs]), np.cumsum(sizes) - sizes
