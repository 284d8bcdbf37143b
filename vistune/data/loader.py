"""Steps of a plan as micro-batches, read here or in worker processes with the same bytes either way.

Knows where samples come from and in which order; nothing of what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vistune import limits
from vistune.data.batch import Batch, Item, collate, nothing_to_see, read_planned
from vistune.data.formats import Reader
from vistune.data.plan import Pack, Plan
from vistune.data.processes import context
from vistune.data.tokenize import Language


def load(
    plan: Plan,
    readers: Sequence[Reader],
    language: Language,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rank: int = 0,
    world: int = 1,
    packs_per_micro: int = 1,
    pad_to: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    alike: bool = False,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of steps `start_step` to `stop_step` (the run's end if None), one list a step.

    `prefetch` steps are made ahead in every worker. With a GPU present the tensors come in pinned memory. Errors of a
    worker are raised here as they are; faults of rows and images come with the batch.

    `alike`: where any rank has a picture in a micro-batch, every rank has at least a blank one, so that all compute the
    same modules in the same order. Which ranks have some is known from the plan; nobody asks the others.
    """
    steps = _Steps(plan, tuple(readers), language, rank, world, packs_per_micro, pad_to, alike)
    wanted = range(start_step, plan.steps if stop_step is None else stop_step)
    workers = limits.workers(workers) if workers else 0
    if not workers:
        yield from map(steps.batches, wanted)
        return
    language.encoder.make_ready(whole=language.template.own)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context(),
        generator=torch.Generator(),  # else it draws from the global one, and the workers change the run's randomness
    )
    for parcel in loader:
        if isinstance(parcel, Exception):
            raise parcel
        yield _unwrap(parcel)


@dataclass
class _Steps(Dataset):
    """Item k is step k of this rank, as a worker sends it."""

    plan: Plan
    readers: tuple[Reader, ...]
    language: Language
    rank: int
    world: int
    packs_per_micro: int
    pad_to: int
    alike: bool = False

    def __post_init__(self) -> None:
        assert self.plan.steps_per_epoch  # counted once here, not once in every worker

    def __getitem__(self, k: int) -> _Parcel | Exception:
        try:
            return _wrap(self.batches(k))
        except (ValueError, OSError) as error:  # the loader would raise another of the same type with a longer text
            return error

    def batches(self, k: int) -> list[Batch]:
        return [self._batch(micro) for micro in self.plan.shares(k, self.world, self.packs_per_micro)]

    def _batch(self, micro: list[list[Pack]]) -> Batch:
        """This rank's part of a micro-batch."""
        items = [self._item(position) for pack in micro[self.rank] for position in pack]
        lacks = self.alike and not any(item.pixels for item in items) and self._shows(micro)
        return collate(items, self.pad_to, [nothing_to_see(self.language)] if lacks else ())

    def _shows(self, micro: list[list[Pack]]) -> bool:
        """Whether any rank has a picture in it, as the index knows."""
        positions = [position for packs in micro for pack in packs for position in pack]
        return bool(self.plan.index.columns["images"][positions].any())

    def _item(self, position: int) -> Item:
        return read_planned(self.plan.index, self.readers, position, self.language)


@dataclass
class _Parcel:
    """A step on its way from a worker: each tensor sent costs an open file, so there are two for the whole step."""

    integers: Tensor  # int64: ids, positions, rows, targets, grids of batch after batch
    pixels: Tensor | None
    sizes: list[int]  # of the parts of `integers`
    shown: list[int]  # how much of `pixels` belongs to every batch
    batches: list[Batch]  # without their tensors

    def pin_memory(self) -> _Parcel:
        pixels = None if self.pixels is None else self.pixels.pin_memory()
        return replace(self, integers=self.integers.pin_memory(), pixels=pixels)


_NONE = torch.empty(0, dtype=torch.int64)


def _wrap(batches: list[Batch]) -> _Parcel:
    parts = [
        part
        for batch in batches
        for part in (
            batch.ids,
            batch.positions,
            batch.rows,
            batch.targets,
            _NONE if batch.grids is None else batch.grids.flatten(),
        )
    ]
    pixels = [batch.pixels for batch in batches if batch.pixels is not None]
    bare: dict[str, Any] = dict.fromkeys(("ids", "positions", "rows", "targets"), _NONE)
    return _Parcel(
        integers=torch.cat(parts),
        pixels=(torch.cat(pixels) if len(pixels) > 1 else pixels[0]) if pixels else None,
        sizes=[len(part) for part in parts],
        shown=[0 if batch.pixels is None else len(batch.pixels) for batch in batches],
        batches=[replace(batch, pixels=None, grids=None, **bare) for batch in batches],
    )


def _unwrap(parcel: _Parcel) -> list[Batch]:
    parts = iter(parcel.integers.split(parcel.sizes))
    shown = [None] * len(parcel.shown) if parcel.pixels is None else parcel.pixels.split(parcel.shown)
    return [
        replace(
            batch,
            ids=next(parts),
            positions=next(parts),
            rows=next(parts),
            targets=next(parts),
            grids=grids.view(-1, 3) if len(grids := next(parts)) else None,
            pixels=pixels if count else None,
        )
        for batch, pixels, count in zip(parcel.batches, shown, parcel.shown, strict=True)
    ]
