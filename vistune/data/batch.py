"""Samples read, tokenized and decoded, then laid in one row: what a step gets. Knows no plan, no workers, no model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vistune.data.formats import Reader
from vistune.data.index import Index
from vistune.data.tokenize import Language, Tokens, fault, tokenize
from vistune.images import ImageError, Layout, Picture, open_image
from vistune.samples import Fault, Image, Sample, SampleError

NOBODY = (-1, -1)
"""The key of what no row of any source is."""
_SMALL = 56
"""Pixels of a side of a picture that shows nothing, where its size decides how many tokens it is."""

PAD_ID = 0
"""Stands in padding and in the place of a sample that could not be read. No sample attends to it, nothing learns it."""


@dataclass
class Batch:
    """One micro-batch: its packs laid end to end in one row of T tokens. Attention never crosses a segment."""

    ids: Tensor  # int64 [T], images as their placeholders
    positions: Tensor  # int64 [T], from 0 in every segment
    lengths: list[int]  # of the segments in order, T in all; padding, if any, is the last of them
    rows: Tensor  # int64 [S]: positions whose next token, of the same sample, is learned
    targets: Tensor  # int64 [S]: those next tokens
    pixels: Tensor | None  # uint8 [N, 3, H, W], or [patches, values] or [tiles, 3, H, W], as the placeholders come
    samples: int
    tokens: int  # padding apart
    keys: list[tuple[int, int]] = field(default_factory=list)  # (number of the source, row) of every sample
    faults: list[Fault] = field(default_factory=list)  # met while loading
    grids: Tensor | None = None  # int64 [N, 3], always on the host: what the layout says of each image (`Layout.grid`)
    blank: bool = False  # its pictures are nobody's: beside the samples, so that every rank has some

    @property
    def images(self) -> int:
        if self.grids is not None:
            return len(self.grids)
        return 0 if self.pixels is None else len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`; the grids stay, since the host counts with them."""

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
    pixels: list[np.ndarray]  # uint8 [3, H, W] or [patches, values] of every image
    faults: list[Fault] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # of every image that is patches


def read_planned(index: Index, readers: Sequence[Reader], position: int, language: Language) -> Item:
    """The sample at this position of the index."""
    columns = index.columns
    planned = Planned(
        source=int(columns["source"][position]),
        row=int(columns["row"][position]),
        tokens=int(columns["text"][position]) + int(columns["image"][position]),
        images=int(columns["images"][position]),
    )
    return read_item(readers[planned.source], planned, language, index.length)


def read_item(reader: Reader, planned: Planned, language: Language, length: int) -> Item:
    """Read, tokenize and decode one row. What is wrong with the row or its images ends in the item, not in an error.

    A picture that cannot be decoded leaves blank pixels. One that no longer says its size where the layout needs it, or
    a row that is not what the index says, leaves placeholders of nothing.
    """
    key = (planned.source, planned.row)
    with ExitStack() as open_files:
        try:
            sample = reader[planned.row]
            pictures = _pictures(sample, open_files) if language.layout.needs_size else []
            sizes = [picture.size for picture in pictures] if language.layout.needs_size else None
            tokens = tokenize(sample, language, length, look=False, sizes=sizes)
            _check(sample, tokens, planned)
        except SampleError as error:
            return Item(key, _placeholder(planned.tokens), [], [error.fault])
        item = Item(key, tokens, [])
        for number, image in enumerate(sample.images[: len(tokens.images)]):
            _show(item, sample, image, pictures[number] if pictures else None, language.layout)
    if item.faults:
        return replace(item, tokens=replace(tokens, loss_mask=np.zeros_like(tokens.loss_mask)))
    return item


def _pictures(sample: Sample, open_files: ExitStack) -> list[Picture]:
    """The sample's pictures with their headers read, open until they are decoded: each file is opened once."""
    pictures = []
    for image in sample.images:
        try:
            pictures.append(open_files.enter_context(Picture(image)))
        except ImageError as error:
            raise fault(sample, error.code, error.reason, image.path) from None
    return pictures


def _check(sample: Sample, tokens: Tokens, planned: Planned) -> None:
    found = (len(tokens.ids), len(tokens.images))
    if found != (planned.tokens, planned.images):
        reason = f"{found[0]} tokens and {found[1]} image(s), the index has {planned.tokens} and {planned.images}"
        raise fault(sample, "row_unreadable", f"the row changed since the index was made: {reason}")


def _show(item: Item, sample: Sample, image: Image, picture: Picture | None, layout: Layout) -> None:
    """The image's pixels, or blank ones and a fault."""
    width, height = picture.size if picture else (0, 0)
    if (grid := layout.grid(width, height)) is not None:
        item.grids.append(grid)
    try:
        item.pixels.append(layout.prepare(picture.rgb() if picture else open_image(image)))
    except ImageError as error:
        item.pixels.append(layout.blank(width, height))
        item.faults.append(fault(sample, error.code, error.reason, image.path).fault)


def nothing_to_see(language: Language) -> Item:
    """One blank picture and no text: what a rank without pictures computes so that all ranks do the same."""
    layout, size = language.layout, (_SMALL, _SMALL)
    count, grid = layout.tokens(*size), layout.grid(*size)
    ids = np.full(count, language.image_token_id, np.int32)
    tokens = Tokens(ids, np.zeros(count, np.bool_), [(0, count)])
    return Item(NOBODY, tokens, [layout.blank(*size)], [], [] if grid is None else [grid])


def collate(items: Sequence[Item], pad_to: int = 1, beside: Sequence[Item] = ()) -> Batch:
    """Lay `items` in a row of a multiple of `pad_to` tokens. No items make a row of padding, never an empty one.

    What is `beside` them is laid there too, in segments of its own, and counted as padding.
    """
    tokens = sum(len(item.tokens.ids) for item in items)
    samples, items = list(items), [*items, *beside]
    lengths = [len(item.tokens.ids) for item in items]
    padding = max(1, -(-sum(lengths) // pad_to)) * pad_to - sum(lengths)
    ids = np.concatenate([*(item.tokens.ids for item in items), np.full(padding, PAD_ID, np.int32)])
    if padding:
        lengths.append(padding)
    # The first token of a sample has none before it in the sample, so nothing predicts it.
    learned = [np.append(item.tokens.loss_mask[1:], False) for item in items]
    rows = np.flatnonzero(np.concatenate([*learned, np.zeros(padding, np.bool_)]))
    pixels = [image for item in items for image in item.pixels]
    grids = [grid for item in items for grid in item.grids]
    joined = (np.concatenate if grids else np.stack)(pixels) if pixels else None
    ids = ids.astype(np.int64)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        lengths=lengths,
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(ids[rows + 1]),
        pixels=None if joined is None else torch.from_numpy(joined),
        samples=len(samples),
        tokens=tokens,
        keys=[item.key for item in samples],
        faults=[fault for item in items for fault in item.faults],
        grids=torch.tensor(grids) if grids else None,
        blank=bool(beside),
    )


def _placeholder(tokens: int) -> Tokens:
    return Tokens(np.full(tokens, PAD_ID, np.int32), np.zeros(tokens, np.bool_), [])
