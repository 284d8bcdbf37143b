"""Samples read, tokenized and decoded, then laid in one row: what a step gets. Knows no plan, no workers, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vistune.data.formats import Reader
from vistune.data.tokenize import Language, Tokens, fault, tokenize
from vistune.images import ImageError, open_image
from vistune.samples import Fault, Sample, SampleError

PAD_ID = 0
"""Stands in padding and in the place of a sample that could not be read. No sample attends to it, nothing learns it."""


@dataclass
class Batch:
    """One micro-batch: its packs laid end to end in one row of T tokens. Attention never crosses a segment."""

    ids: Tensor  # int64 [T], images as their placeholders
    positions: Tensor  # int64 [T], from 0 in every segment
    lengths: list[int]  # of the segments in order, T in all; padding, if any, is the last segment
    rows: Tensor  # int64 [S]: positions whose next token, of the same sample, is learned
    targets: Tensor  # int64 [S]: those next tokens
    pixels: Tensor | None  # uint8 [N, 3, H, W], in the order of the placeholders
    samples: int
    tokens: int  # padding apart
    keys: list[tuple[int, int]] = field(default_factory=list)  # (number of the source, row) of every sample
    faults: list[Fault] = field(default_factory=list)  # met while loading

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            ids=moved(self.ids),
            positions=moved(self.positions),
            rows=moved(self.rows),
            targets=moved(self.targets),
            pixels=None if self.pixels is None else moved(self.pixels),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the index says of a row; a sample that turns out otherwise is set aside, so that no pack changes."""

    source: int
    row: int
    tokens: int
    images: int


@dataclass(frozen=True, slots=True)
class Item:
    """One sample ready to be laid in a batch. A fault leaves it without targets, in its place."""

    key: tuple[int, int]
    tokens: Tokens
    pixels: list[np.ndarray]  # uint8 [3, H, W] of every image
    faults: list[Fault] = field(default_factory=list)


def read_item(reader: Reader, planned: Planned, language: Language, length: int) -> Item:
    """Read, tokenize and decode one row. What is wrong with the row or its images ends in the item, not in an error."""
    key = (planned.source, planned.row)
    try:
        sample = reader[planned.row]
        tokens = tokenize(sample, language, length, look=False)
        found = (len(tokens.ids), len(tokens.images))
        if found != (planned.tokens, planned.images):
            reason = f"{found[0]} tokens and {found[1]} image(s), the index has {planned.tokens} and {planned.images}"
            raise fault(sample, "row_unreadable", f"the row changed since the index was made: {reason}")
    except SampleError as error:
        return Item(key, _placeholder(planned.tokens), [], [error.fault])
    pixels, faults = _pixels(sample, len(tokens.images), language)
    if faults:
        tokens = replace(tokens, loss_mask=np.zeros_like(tokens.loss_mask))
    return Item(key, tokens, pixels, faults)


def collate(items: Sequence[Item], pad_to: int = 1) -> Batch:
    """Lay `items` in a row of a multiple of `pad_to` tokens. No items make a row of padding, never an empty one."""
    lengths = [len(item.tokens.ids) for item in items]
    tokens = sum(lengths)
    padding = max(1, -(-tokens // pad_to)) * pad_to - tokens
    ids = np.concatenate([*(item.tokens.ids for item in items), np.full(padding, PAD_ID, np.int32)])
    if padding:
        lengths.append(padding)
    # The first token of a sample has none before it in the sample, so nothing predicts it.
    learned = [np.append(item.tokens.loss_mask[1:], False) for item in items]
    rows = np.flatnonzero(np.concatenate([*learned, np.zeros(padding, np.bool_)]))
    pixels = [image for item in items for image in item.pixels]
    ids = ids.astype(np.int64)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        lengths=lengths,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(ids[rows + 1]),
        pixels=torch.from_numpy(np.stack(pixels)) if pixels else None,
        samples=len(items),
        tokens=tokens,
        keys=[item.key for item in items],
        faults=[fault for item in items for fault in item.faults],
    )


def _placeholder(tokens: int) -> Tokens:
    return Tokens(np.full(tokens, PAD_ID, np.int32), np.zeros(tokens, np.bool_), [])


def _pixels(sample: Sample, images: int, language: Language) -> tuple[list[np.ndarray], list[Fault]]:
    """Pixels of the first `images` images; blank ones and a fault for those that cannot be opened."""
    pixels: list[np.ndarray] = []
    faults: list[Fault] = []
    for image in sample.images[:images]:
        try:
            pixels.append(language.layout.prepare(open_image(image)))
        except ImageError as error:
            pixels.append(language.layout.blank())
            faults.append(fault(sample, error.code, error.reason, image.path).fault)
    return pixels, faults
