"""Rows of one adapter (or of the model itself) in their keys and values: who runs, who is read, who waits for sight.

Knows where a request lies; nothing of what is computed for it, and of when.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vistune.decoding import Shown
from vistune.serve.answering.drawing import Draw
from vistune.serve.answering.seen import Key
from vistune.serve.work import Ended, Piece, Work
from vistune.speech import Speech

Hear = Callable[[Piece | Ended], None]
"""Called in the engine's thread, so it must return at once: pieces as they come, then one `Ended`, the last of all."""

_STEP = 64
"""Tokens by which room is taken, so that a longer neighbour does not mean copying everything each time."""


def _rounded(room: int) -> int:
    return -(-room // _STEP) * _STEP


class Ticket:
    """A request's place in an engine. All but `leave` belongs to the engine's thread."""

    def __init__(self, work: Work, hear: Hear, stir: Callable[[], None] = lambda: None):
        self.work, self.hear = work, hear
        self.gone = threading.Event()
        self._stir = stir
        self.ids = work.ids
        self.need = len(work.ids) + work.settings.max_new_tokens
        self.nbytes = work.nbytes
        self.sights: list[Sight] = []
        self.pictures: list[tuple[int, bytes]] = []  # where each begins, and its key's digest
        self.names: list[bytes] = []  # of its prompt's blocks
        self.known: list[Tensor] = []  # keys and values of the prompt's beginning, until it has a row
        self.reused = 0  # tokens of them
        self.embeds: Tensor | None = None  # of the prompt from there on
        self.said: list[int] = []
        self.row: int | None = None
        self.place = 0  # tokens that its keys and values hold
        self.last = self.tokens = self.number = 0
        self.margin = math.inf
        self.speech: Speech | None = None
        self.draw: Draw | None = None
        self.over = False

    def leave(self) -> None:
        """The asker has gone: its row leaves before the next step, and `Ended("left")` comes. From any thread."""
        self.gone.set()
        self._stir()

    @property
    def blind(self) -> bool:
        """Whether a picture of it is not encoded yet."""
        return any(one.features is None for one in self.sights)

    @property
    def left(self) -> int:
        """Tokens of the prompt that are not read yet."""
        return max(len(self.ids) - self.place, 0)

    def forget_pictures(self) -> None:
        self.work = replace(self.work, pictures=(), digests=())
        self.sights = []


class Sight:
    """A picture that a request asks about (or all of them, where the features of each depend on the others): `key` is
    empty of a digest when nobody said which picture it is."""

    def __init__(self, key: Key, pictures: Sequence[Shown]):
        self.key, self.pictures = key, tuple(pictures)
        self.features: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return sum(one.tokens for one in self.pictures)

    def like(self, other: Sight) -> bool:
        """Whether the pixels of both go into one tensor."""
        one, two = self.pictures[0], other.pictures[0]
        if one.grid is None or two.grid is None:
            return one.grid is two.grid and one.pixels.shape == two.pixels.shape
        return one.pixels.shape[1:] == two.pixels.shape[1:]


class Lane:
    """`rows[:running]` draw tokens, the rest of `rows` are being read; `reading` are all that are not read to the end,
    in the order in which they came, with and without a row yet."""

    def __init__(self, adapter: str, kv: Any):
        self.adapter, self.kv = adapter, kv
        self.rows: list[Ticket] = []
        self.running = 0
        self.reading: list[Ticket] = []

    def __len__(self) -> int:
        return self.running + len(self.reading)

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.rows[: self.running], *self.reading]

    @property
    def longest(self) -> int:
        return max((one.need for one in self.tickets), default=0)

    @property
    def reserved(self) -> int:
        """Tokens of keys and values that it may fill: as many rows as requests, each as long as the longest."""
        return len(self) * self.longest

    @property
    def held(self) -> int:
        """Tokens that memory is taken for."""
        return int(self.kv.rows * self.kv.room)

    def with_one(self, need: int) -> int:
        """`reserved` with one more request."""
        return (len(self) + 1) * max(self.longest, need)

    def fit(self, most_rows: int, most: int) -> None:
        """Take memory for all that are here, `most` tokens of it at most; more than needed where there is enough, so
        that the next ones cost no copying."""
        rows, room = len(self), self.longest
        if self.kv.rows >= rows and self.kv.room >= room and self.held <= most:
            return
        wide, long = min(1 << (rows - 1).bit_length(), most_rows), _rounded(room)
        ample = self.kv.room if room <= self.kv.room else _rounded(max(room, self.kv.room * 5 // 4))
        options = ((wide, ample), (wide, long), (wide, room), (rows, long), (rows, room))
        rows, room = next(one for one in options if one[0] * one[1] <= most or one == options[-1])
        self.kv.shrink(rows, room)
        self.kv.reserve(rows, room)

    def tighten(self) -> None:
        """Give back what nobody here needs."""
        self.kv.shrink(len(self), self.longest)

    def has(self, ticket: Ticket) -> bool:
        return ticket.row is not None or ticket in self.reading

    def again(self, tickets: Sequence[Ticket]) -> None:
        """A call that wrote for them came to nothing: their rows end where they ended before."""
        for ticket in tickets:
            if ticket.row is not None:
                self.kv.lengths[ticket.row] = ticket.place

    def place(self, ticket: Ticket) -> None:
        """A row for one that is begun to be read, with what is known of it."""
        if ticket.known:
            self.kv.lay(len(self.rows), ticket.known)
            ticket.known = []
        ticket.row = len(self.rows)
        self.rows.append(ticket)

    def begin(self, ticket: Ticket) -> None:
        """It is read to its end, and runs."""
        assert ticket.row is not None
        other = self.rows[self.running]
        self.kv.swap(ticket.row, self.running)
        self.rows[ticket.row], other.row = other, ticket.row
        self.rows[self.running], ticket.row = ticket, self.running
        self.running += 1
        self.reading.remove(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Its row is free, and those that run stand side by side from row 0 on."""
        hole = ticket.row
        if hole is None or hole >= self.running:
            self.reading.remove(ticket)
        if hole is None:
            return
        if hole < self.running:
            self.running -= 1
            hole = self._move(self.running, hole)
        hole = self._move(len(self.rows) - 1, hole)
        self.kv.free(hole)
        self.rows.pop()
        ticket.row = None
        if len(self) and len(self) * 4 <= self.kv.rows:
            self.kv.shrink(2 * len(self), _rounded(self.longest))

    def _move(self, source: int, hole: int) -> int:
        """The request of row `source` goes where nobody is; the row that is free then."""
        if source != hole:
            self.kv.move(source, hole)
            moved = self.rows[hole] = self.rows[source]
            moved.row = hole
        return source
