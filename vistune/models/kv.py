"""Keys and values of requests that are answered together: a row for each, which begins at 0 and has its own length.

Knows nothing of requests, and of a model no more than what its layers hand in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vistune.models.attention.rows import Places, moved

_AT_ONCE = 16
"""Pieces that are joined before they are laid: fewer copies than one by one, and less memory than all."""


@dataclass
class _Writing:
    """Where a call of the model writes, and what it reads."""

    places: Places
    first: int
    rows: list[int]
    kept: Tensor | None
    """Which of the new positions, rows end to end, are no padding; None: all of them."""
    at: Tensor
    """The row and the place of each of those: int64 [2, T]."""
    chosen: Tensor | None
    """The rows that are read where they are not neighbours, from `first` on."""
    flat: dict[int, Tensor] = field(default_factory=dict)


class Kv(Cache):
    """`past_key_values` of a stock language model. For each layer a tensor [rows, heads, room, width] of keys and one
    of values, made when the layer first hands some in.

    Rows 0 to n - 1, or any neighbours in order, are read where they lie; others are copied for the time of a call.
    """

    def __init__(self, device: torch.device):
        super().__init__(layers=[])
        self.device = device
        self.rows = self.room = 0
        self.lengths: list[int] = []
        """Places of each row that hold something of its request."""
        self._written: list[int] = []
        """How far something was ever written that is still there: more, where a call has failed."""
        self._layers: list[list[Tensor]] = []
        self._writing: _Writing | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._layers for tensor in pair)

    def reserve(self, rows: int, tokens: int) -> None:
        """Room for at least so many rows of so many tokens, and no more than the larger of this and what there is.
        Layer by layer: only one of them is held twice."""
        self._resize(max(rows, self.rows), max(tokens, self.room))

    def shrink(self, rows: int, tokens: int) -> None:
        """Give back what lies beyond so many rows of so many tokens; it must not be in use."""
        assert not any(self.lengths[rows:]) and max(self.lengths, default=0) <= tokens, "rows in use would be cut"
        self._resize(min(rows, self.rows), min(tokens, self.room))

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """What row `source` holds is in row `target` then, and `source` is free."""
        if source == target:
            return
        length = self._written[source]
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]
            tensor[target, :, length : self._written[target]] = 0
        self.lengths[target], self._written[target] = self.lengths[source], length
        self.free(source)

    @torch.inference_mode()
    def swap(self, one: int, other: int) -> None:
        length = max(self._written[one], self._written[other])
        if one == other or not length:
            return
        for tensor in self._tensors():
            held = tensor[one, :, :length].clone()
            tensor[one, :, :length] = tensor[other, :, :length]
            tensor[other, :, :length] = held
        for said in (self.lengths, self._written):
            said[one], said[other] = said[other], said[one]

    @torch.inference_mode()
    def free(self, row: int) -> None:
        """Forget what a row holds. It is overwritten: what is not seen is multiplied by 0, which a number that is none
        would survive, and the next request would end of the last one's."""
        if self._written[row]:
            for tensor in self._tensors():
                tensor[row, :, : self._written[row]] = 0
        self.lengths[row] = self._written[row] = 0

    @torch.inference_mode()
    def cut(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of what places `start` to `stop` of a row hold: [2 x layers, heads, places, width], keys of a layer
        before its values."""
        assert stop <= self.lengths[row], f"row {row} ends at {self.lengths[row]}, before {stop}"
        return torch.stack([tensor[row, :, start:stop] for tensor in self._tensors()])

    @torch.inference_mode()
    def lay(self, row: int, pieces: Sequence[Tensor]) -> None:
        """A row is another request's from here on, and begins with these, end to end, as they were `cut`."""
        first = pieces[0]
        self._layers = self._layers or [
            [self._new(keys[None]), self._new(values[None])]
            for keys, values in zip(first[::2], first[1::2], strict=True)
        ]
        self.free(row)
        self._written[row] = sum(piece.shape[2] for piece in pieces)
        end = 0
        for start in range(0, len(pieces), _AT_ONCE):
            piece = torch.cat(list(pieces[start : start + _AT_ONCE]), dim=2)
            for tensor, held in zip(self._tensors(), piece, strict=True):
                tensor[row, :, end : end + piece.shape[2]] = held
            end += piece.shape[2]
        self.lengths[row] = end

    @property
    def alike(self) -> bool:
        """Whether keys and values of every layer have one shape, so that they can be `cut`."""
        return len({tensor.shape for tensor in self._tensors()}) <= 1

    @contextmanager
    def writing(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> Iterator[Places]:
        """While this is open a model hands in `counts[i]` new positions of `rows[i]` from `starts[i]` on, in rows of
        `width`: from where the row ends, or from 0. A row that starts at 0 is another request's from here on. When the
        model fails, rows end where they did."""
        assert len(set(rows)) == len(rows) and max(rows) < self.rows, f"rows {rows} of {self.rows}"
        for row, start in zip(rows, starts, strict=True):
            if start == 0:
                self.free(row)
            assert start == self.lengths[row], f"row {row} ends at {self.lengths[row]}, not at {start}"
        places = Places(starts, counts, width, self.room, self.device)
        assert places.longest <= self.room, f"{places.longest} places of {self.room}"
        self._writing = _plan(list(rows), counts, places)
        for row, start, count in zip(rows, starts, counts, strict=True):
            self._written[row] = max(self._written[row], start + count)
        try:
            yield places
        finally:
            self._writing = None
        for row, start, count in zip(rows, starts, counts, strict=True):
            self.lengths[row] = start + count

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """New keys and values [n, heads, c, width] of a layer -> those of the rows up to the longest's end."""
        assert self._writing is not None, "no rows were said to be written"
        if layer_idx == len(self._layers):
            self._layers.append([self._new(key_states), self._new(value_states)])
        keys, values = self._layers[layer_idx]
        return self._write(self._writing, keys, key_states), self._write(self._writing, values, value_states)

    def _write(self, now: _Writing, held: Tensor, new: Tensor) -> Tensor:
        """`new` into its places; what is read: [n, heads, L, width]."""
        heads, wide = held.shape[1], held.shape[3]
        source = new.transpose(1, 2).reshape(-1, heads, wide)
        if now.kept is not None:
            source = source.index_select(0, now.kept)
        if heads not in now.flat:
            row, place = now.at.unsqueeze(2)
            now.flat[heads] = ((row * heads + torch.arange(heads, device=self.device)) * self.room + place).view(-1)
        held.view(-1, wide).index_copy_(0, now.flat[heads], source.reshape(-1, wide).to(held.dtype))
        if now.chosen is not None:
            return held[:, :, : now.places.seen].index_select(0, now.chosen)
        return held[now.first : now.first + len(now.rows), :, : now.places.seen]

    def _tensors(self) -> Iterator[Tensor]:
        for pair in self._layers:
            yield from pair

    def _new(self, like: Tensor) -> Tensor:
        """Zeros, since what is not seen is multiplied by 0 all the same."""
        return like.new_zeros(self.rows, like.shape[1], self.room, like.shape[3])

    @torch.inference_mode()
    def _resize(self, rows: int, room: int) -> None:
        if (rows, room) == (self.rows, self.room):
            return
        both, places = min(rows, self.rows), min(room, self.room)
        self.rows, self.room = rows, room
        self.lengths, self._written = (
            [*(min(one, room) for one in said[:rows]), *[0] * (rows - len(said))]
            for said in (self.lengths, self._written)
        )
        for pair in self._layers:
            for number, old in enumerate(pair):
                pair[number] = self._new(old)
                pair[number][:both, :, :places] = old[:both, :, :places]
                del old

    # What else a stock class may ask of what it is given as `past_key_values`.

    is_compileable = False

    def __len__(self) -> int:
        return len(self._layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._writing is None else self._writing.places.longest - self._writing.places.width

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        assert self._writing is not None
        return self._writing.places.seen, 0


def _plan(rows: list[int], counts: Sequence[int], places: Places) -> _Writing:
    width, device = places.width, places.device
    row_of = moved(rows, device)
    at = torch.stack([row_of.unsqueeze(1).expand_as(places.positions), places.positions]).flatten(1)
    kept = None
    if any(count != width for count in counts):
        kept = moved([i * width + each for i, count in enumerate(counts) for each in range(count)], device)
        at = at.index_select(1, kept)
    neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
    return _Writing(places, rows[0], rows, kept, at, None if neighbours else row_of)
