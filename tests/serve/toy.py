"""A reader, keys and values, a tongue and a drawing that compute next to nothing but notice every mistake.

What a row says next depends on all that it was given, in its order: a swapped row or a lost token changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vistune.decoding import Settings, Shown
from vistune.serve.answering.drawing import Draw
from vistune.serve.answering.lane import Ticket
from vistune.serve.answering.prefixes import Prefixes
from vistune.serve.answering.scheduler import Scheduler
from vistune.serve.limits import Limits
from vistune.serve.work import Ended, Piece, Work

LETTERS = 27
END, PICTURE, TALKS = 26, -1, 30
"""An id that ends an answer; what stands for a piece of a picture; a prompt that begins with it has no end."""


def said_next(past: Sequence[float]) -> int:
    """What the toy says after these."""
    found = 7
    for one in past:
        found = (found * 31 + int(one) + 3) % 1_000_003
    return found % (LETTERS - 1 if past[0] == TALKS else LETTERS)


def answer(ids: Sequence[int], pictures: Sequence[int], most: int) -> str:
    """The whole answer to a prompt, by the definition; `pictures`: a number for each `PICTURE`."""
    each, past, text = iter(pictures), [], ""
    past = [1000 + next(each) if one == PICTURE else one for one in ids]
    for _ in range(most):
        new = said_next(past)
        if new == END:
            break
        past.append(new)
        text += chr(97 + new)
    return text


class ToyKv:
    """What each row was given."""

    def __init__(self, may_fail: Callable[[str], None]) -> None:
        self.may_fail = may_fail
        self.rows = self.room = 0
        self.lengths: list[int] = []
        self.past: list[list[float]] = []

    def reserve(self, rows: int, tokens: int) -> None:
        self.rows, self.room = max(rows, self.rows), max(tokens, self.room)
        more = self.rows - len(self.past)
        self.past += [[] for _ in range(more)]
        self.lengths += [0] * more

    def shrink(self, rows: int, tokens: int) -> None:
        assert not any(self.lengths[rows:]) and max(self.lengths, default=0) <= tokens
        self.rows, self.room = min(rows, self.rows), min(tokens, self.room)
        del self.past[rows:], self.lengths[rows:]

    def move(self, source: int, target: int) -> None:
        self.past[target], self.lengths[target] = self.past[source], self.lengths[source]
        self.past[source], self.lengths[source] = [], 0

    def swap(self, one: int, other: int) -> None:
        for held in (self.past, self.lengths):
            held[one], held[other] = held[other], held[one]  # type: ignore[index]

    def free(self, row: int) -> None:
        self.past[row], self.lengths[row] = [], 0

    alike = True

    def cut(self, row: int, start: int, stop: int) -> Tensor:
        self.may_fail("cut")
        assert stop <= self.lengths[row]
        return torch.tensor(self.past[row][start:stop], dtype=torch.float64).view(1, 1, -1, 1)

    def lay(self, row: int, pieces: Sequence[Tensor]) -> None:
        self.may_fail("lay")
        self.past[row] = torch.cat(list(pieces), dim=2).view(-1).tolist()
        self.lengths[row] = len(self.past[row])
        assert self.lengths[row] <= self.room and row < self.rows


class ToyReader:
    """`fails[name]` is raised by the next call of that name; `spend` hears what a call costs: its name and amount."""

    picture = PICTURE

    def __init__(self, spend: Callable[[str, int], None] = lambda name, amount: None, alone: bool = True):
        self.alone, self.spend = alone, spend
        self.kvs: list[ToyKv] = []
        self.seen: list[list[int]] = []
        self.reads: list[list[int]] = []
        self.fails: dict[str, list[Exception]] = {}

    def kv(self) -> ToyKv:
        self.kvs.append(ToyKv(self._may_fail))
        return self.kvs[-1]

    def _may_fail(self, name: str) -> None:
        if self.fails.get(name):
            raise self.fails[name].pop(0)

    def see(self, pictures: Sequence[Shown]) -> list[Tensor]:
        self._may_fail("see")
        numbers = [int(one.pixels.view(-1)[0]) for one in pictures]
        if any(number == 99 for number in numbers):
            raise RuntimeError("poison")
        self.seen.append(numbers)
        self.spend("see", sum(one.tokens for one in pictures))
        return [torch.full((one.tokens, 1), 1000.0 + number) for one, number in zip(pictures, numbers, strict=True)]

    def embed(self, ids: Sequence[int], features: Sequence[Tensor] = ()) -> Tensor:
        self._may_fail("embed")
        found = torch.tensor(ids, dtype=torch.float32).unsqueeze(1)
        places = [i for i, one in enumerate(ids) if one == PICTURE]
        assert len(places) == sum(map(len, features))
        if places:
            found[places] = torch.cat(list(features))
        return found

    def read(
        self, kv: ToyKv, rows: Sequence[int], embeds: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        self._may_fail("read")
        assert len(set(rows)) == len(rows) and max(counts) == embeds.shape[1]
        self.reads.append(list(counts))
        self.spend("read", embeds.shape[0] * embeds.shape[1])
        return self._go_on(kv, rows, embeds, starts, counts)

    def step(self, kv: ToyKv, ids: Sequence[int], starts: Sequence[int]) -> Tensor:
        self._may_fail("step")
        self.spend("step", len(ids))
        embeds = torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1)
        return self._go_on(kv, range(len(ids)), embeds, starts, [1] * len(ids))

    def _go_on(self, kv: ToyKv, rows: Any, embeds: Tensor, starts: Any, counts: Any) -> Tensor:
        logits = torch.zeros(len(rows), LETTERS)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            if start == 0:
                kv.free(row)
            assert kv.lengths[row] == start, f"row {row} ends at {kv.lengths[row]}, not at {start}"
            kv.past[row] = [*kv.past[row][:start], *embeds[i, :count, 0].tolist()]
            kv.lengths[row] = start + count
            assert kv.lengths[row] <= kv.room
            logits[i, said_next(kv.past[row])] = 1.0
        return logits


class ToyTongue:
    """Letters."""

    ends, stop, local = {END}, "", True

    def text(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + one) for one in ids)

    def alone(self, one: int) -> tuple[str, str]:
        return chr(97 + one), chr(97 + one)


class ToyDrawing:
    def begin(self, settings: Settings, ids: Sequence[int], device: Any) -> Draw:
        return Draw(settings, None)


class ToyAdapters:
    """Wearing one is noted; `sees`: whose eyes."""

    names = ("red", "blue")

    def __init__(self) -> None:
        self.worn = ""

    def wear(self, name: str) -> None:
        self.worn = name

    def sees(self, name: str) -> str:
        return name if name == "blue" else ""


class Heard:
    """What an asker is told, in its order."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.pieces: list[Piece] = []
        self.ended: list[Ended] = []
        self.at: list[float] = []
        self.clock = clock

    def __call__(self, said: Piece | Ended) -> None:
        assert not self.ended, "something is said after the end"
        self.at.append(self.clock())
        (self.ended if isinstance(said, Ended) else self.pieces).append(said)  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        return "".join(one.text for one in self.pieces)


def picture(number: int, tokens: int = 3) -> Shown:
    return Shown(torch.full((1, 2, 2), number, dtype=torch.uint8), tokens, None)


def work(ids: Sequence[int], most: int = 8, pictures: Sequence[int] = (), tokens: int = 3, **more: Any) -> Work:
    """`PICTURE` in `ids` stands for a whole picture of so many tokens."""
    laid = [one for each in ids for one in ([PICTURE] * tokens if each == PICTURE else [each])]
    shown = tuple(picture(number, tokens) for number in pictures)
    digests = tuple(bytes([number]) for number in pictures)
    return Work(ids=laid, settings=Settings(max_new_tokens=most), pictures=shown, digests=digests, **more)


def never_ends(seed: int, most: int) -> Work:
    """A prompt whose answer is as long as it may be."""
    return work([TALKS, seed], most)


def expected(asked: Work) -> str:
    """What the toy answers, by the definition."""
    numbers = [int(one.pixels.view(-1)[0]) for one in asked.pictures for _ in range(one.tokens)]
    return answer(asked.ids, numbers, asked.settings.max_new_tokens)


def scheduler(
    reader: ToyReader,
    kv_tokens: int = 10_000,
    adapters: Any = None,
    clock: Any = None,
    prefixes: int = 0,
    **limits: Any,
) -> Scheduler:
    more = {} if clock is None else {"clock": clock}
    tongue: Any = ToyTongue()
    drawing: Any = ToyDrawing()
    made = Scheduler(reader, Limits(**limits), tongue, drawing, kv_tokens, adapters, **more)
    made.reading.prefixes = Prefixes(prefixes, block=4)
    return made


def handed_in(to: Scheduler, asked: Work, clock: Callable[[], float] = lambda: 0.0) -> tuple[Ticket, Heard]:
    heard = Heard(clock)

    def stir() -> None:
        to.stirred = True

    ticket = Ticket(asked, heard, stir)
    to.add(ticket)
    return ticket, heard


def run(one: Scheduler, steps: int = 10_000) -> None:
    """Until nobody is here."""
    while one.busy:
        one.step()
        steps -= 1
        assert steps, "somebody is never answered"
