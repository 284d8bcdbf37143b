"""Who is answered when: at every step requests leave and join, all that run get a token, and prompts are read within a
budget of time. Knows a reader's calls; nothing of threads and of HTTP.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vistune import console
from vistune.serve.answering.budget import Cost
from vistune.serve.answering.drawing import Drawing, Drawn, draw
from vistune.serve.answering.failing import explained, no_memory, told
from vistune.serve.answering.lane import Lane, Ticket
from vistune.serve.answering.reading import Reading
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.work import Ended, Piece, State
from vistune.speech import Speech, Tongue

IDLE = 10
"""Budgets that one step may read when nobody runs: nobody waits then, but who leaves, or comes, should be heard."""


class Scheduler:
    """`reader`: a `Reader`. `kv_tokens`: tokens of keys and values, all rows together; `prefixes`: of those that are
    remembered, beside them. `clock`: seconds, read when all that was asked of the device is done. `failures`: steps
    that failed since one did not."""

    def __init__(
        self,
        reader: Any,
        limits: Limits,
        tongue: Tongue,
        drawing: Drawing,
        kv_tokens: int,
        adapters: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        prefixes: int = 0,
    ):
        self.reader, self.limits, self.tongue, self.drawing = reader, limits, tongue, drawing
        self.kv_tokens, self.adapters = kv_tokens, adapters
        self.waiting: deque[Ticket] = deque()
        self.lanes: dict[str, Lane] = {}
        self.reading = Reading(reader, limits.pictures_held, prefixes, clock, self._begin)
        self.turns = Cost()
        self.failures = 0
        self.stirred = False  # somebody has left
        self._soonest = math.inf
        self._came = 0

    # What may be asked from any thread.

    def state(self) -> State:
        lanes, reading = list(self.lanes.values()), self.reading
        return State(
            running=sum(map(len, lanes)),
            waiting=len(self.waiting),
            kv_used=sum(lane.reserved for lane in lanes),
            kv_tokens=self.kv_tokens,
            pictures_held=reading.seen.nbytes,
            pictures_seen=reading.pictures_seen,
            pictures_again=reading.pictures_again,
            prefix_tokens=reading.prefixes.tokens,
            tokens_again=reading.tokens_again,
        )

    def row_free_in(self) -> float:
        """Seconds after which a row is free for certain, as steps go now; 0 when nobody knows."""
        running = [ticket for lane in list(self.lanes.values()) for ticket in lane.tickets]
        left = min((one.work.settings.max_new_tokens - one.tokens for one in running), default=0)
        return left * self.turns.seconds(1)

    # The engine's thread from here on.

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.lanes)

    def add(self, ticket: Ticket) -> None:
        self._came += 1
        ticket.number = self._came
        self.waiting.append(ticket)
        self._soonest = min(self._soonest, ticket.work.until)

    def step(self) -> None:
        """One turn: who leaves, who joins; then, lane by lane, a token for all that run and as much of the prompts as
        the budget holds."""
        begun = time.perf_counter()
        self._dismiss()
        self._admit()
        runs = any(lane.running for lane in self.lanes.values())
        left, must = self.limits.prefill_ms / 1e3 * (1 if runs else IDLE), True
        for lane in self._in_order():
            with self._failing(lane.tickets, lane):
                if self.adapters is not None:
                    self.adapters.wear(lane.adapter)
                self._say(lane)
            with self._failing(self.reading.concerned, lane):
                spent = self.reading.read(lane, list(self.lanes.values()), left, must)
                left, must = left - spent, must and not spent
        for name in [name for name, lane in self.lanes.items() if not len(lane)]:
            del self.lanes[name]
        self.reading.concerned.clear()  # or the last request would be held by it
        if runs:
            self.turns.add(1, time.perf_counter() - begun)

    def end(self, ticket: Ticket, reason: str, error: Refused | None = None) -> None:
        """It is over: its row and all that it held are free, and its asker hears so."""
        if ticket.over:
            return
        ticket.over = True
        lane = self.lanes.get(ticket.work.adapter)
        if lane is not None and lane.has(ticket):
            if error is None:
                self._keep(lane, ticket)
            lane.leave(ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
        self.reading.let_go(ticket)
        ticket.embeds = ticket.draw = None
        ticket.known = []
        ends = Ended(reason=reason, tokens=ticket.tokens, margin=ticket.margin, reused=ticket.reused, error=error)
        told(ticket, ends)

    def end_all(self, error: Refused) -> None:
        """Nobody here is answered any more, in whatever state the rows are."""
        everybody = self._everybody()
        self.lanes.clear()
        self.waiting.clear()
        for ticket in everybody:
            self.end(ticket, "error", error)

    def _everybody(self) -> list[Ticket]:
        return [ticket for lane in self.lanes.values() for ticket in lane.tickets] + list(self.waiting)

    def _in_order(self) -> list[Lane]:
        """Lanes, the one first whose prompt has waited longest."""
        lanes = list(self.lanes.values())
        return sorted(lanes, key=lambda lane: lane.reading[0].number if lane.reading else math.inf)

    # Leaving and joining.

    def _dismiss(self) -> None:
        now = time.monotonic()
        if not self.stirred and now < self._soonest:
            return
        self.stirred = False
        everybody = self._everybody()
        for ticket in everybody:
            if ticket.gone.is_set():
                self.end(ticket, "left")
            elif ticket.work.until <= now:
                self.end(ticket, "error", Refused(504, "the answer was not ready in time", code="deadline"))
        self._soonest = min((ticket.work.until for ticket in everybody if not ticket.over), default=math.inf)

    def _admit(self) -> None:
        """Those who wait, in their order, while a row is free and the memory holds all that are here to their ends."""
        while self.waiting and sum(map(len, self.lanes.values())) < self.limits.rows:
            ticket = self.waiting[0]
            lane = self.lanes.get(ticket.work.adapter)
            others = sum(one.reserved for one in self.lanes.values() if one is not lane)
            if others + (lane.with_one(ticket.need) if lane else ticket.need) > self.kv_tokens:
                return
            self.waiting.popleft()
            if lane is None:
                lane = self.lanes[ticket.work.adapter] = Lane(ticket.work.adapter, self.reader.kv())
            lane.reading.append(ticket)
            with self._failing([ticket]):
                eyes = self.adapters.sees(lane.adapter) if self.adapters is not None else ""
                ticket.speech = Speech(self.tongue, ticket.work.stops)
                self.reading.sight(ticket, eyes)
                self.reading.recall(ticket)
            with self._failing(lane.tickets, lane, lost=True):
                self._make_room(lane)

    def _make_room(self, lane: Lane) -> None:
        others = [one for one in self.lanes.values() if one is not lane]
        if lane.reserved + sum(one.held for one in others) > self.kv_tokens:
            for one in others:
                one.tighten()
        lane.fit(self.limits.rows, self.kv_tokens - sum(one.held for one in others))

    # A token for all that run.

    def _say(self, lane: Lane) -> None:
        if not lane.running:
            return
        running = lane.rows[: lane.running]
        with self._failing(running, lane):
            logits = self.reader.step(lane.kv, [one.last for one in running], [one.place for one in running])
            drawn = draw(logits, [one.draw for one in running if one.draw])
            for ticket in running:
                ticket.place += 1
            self._hand_out(running, drawn)

    def _begin(self, lane: Lane, tickets: list[Ticket], logits: Tensor) -> None:
        """They are read to their ends, and run: `logits` are for their first tokens."""
        with self._failing(tickets):
            for ticket in tickets:
                ticket.embeds = None
                ticket.draw = self.drawing.begin(ticket.work.settings, ticket.ids, logits.device)
                lane.begin(ticket)
            self._hand_out(tickets, draw(logits, [one.draw for one in tickets if one.draw]))
            for ticket in tickets:
                if not ticket.over:
                    self._keep(lane, ticket)

    def _hand_out(self, tickets: Sequence[Ticket], drawn: Sequence[Drawn]) -> None:
        self.failures = 0
        for ticket, one in zip(tickets, drawn, strict=True):
            self._take(ticket, one)

    def _take(self, ticket: Ticket, drawn: Drawn) -> None:
        """A request's next token."""
        if math.isnan(drawn.margin):
            said = "the model's numbers are not finite any more"
            return self.end(ticket, "error", Refused(500, said, code="engine_error"))
        speech, ticket.last = ticket.speech, drawn.token
        ticket.said.append(drawn.token)
        assert speech is not None
        ticket.tokens += 1
        ticket.margin = min(ticket.margin, drawn.margin)
        text = speech.add(drawn.token)
        stops, full = speech.ended, ticket.tokens >= ticket.work.settings.max_new_tokens
        if full and not stops:
            text += speech.close()
        if text or ticket.tokens == 1:
            told(ticket, Piece(text, ticket.tokens))
        if stops or full:
            self.end(ticket, "stop" if stops else "length")

    # What goes wrong.

    @contextmanager
    def _failing(self, concerned: Sequence[Ticket], lane: Lane | None = None, *, lost: bool = False) -> Iterator[None]:
        """Whatever goes wrong inside ends those whom it concerns. Where the memory was too small for a call in `lane`
        the newest of them end, and the others go on from where they were, unless its keys and values are `lost`."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.reading.make_room()
            here = sorted((one for one in concerned if not one.over), key=lambda one: one.number)
            drop = len(here) if lane is None or lost else max(1, len(here) // 4)
            console.warn(f"out of memory: {drop} of {len(here)} answers ended")
            self._drop(here[len(here) - drop :], no_memory(), lane if lost else None)
            if lane is not None and not lost:
                lane.again([one for one in here if not one.over])
        except Exception as error:  # noqa: BLE001 - those concerned hear of it, the log has it, and the others go on
            self.failures += not self.reading.at_fault()
            self._drop(list(concerned), explained(error), lane if lost else None)

    def _keep(self, lane: Lane, ticket: Ticket) -> None:
        """What goes wrong here costs nobody an answer."""
        with self._failing(()):
            self.reading.keep(lane, ticket)

    def _drop(self, tickets: Sequence[Ticket], error: Refused, lost: Lane | None) -> None:
        if lost is not None:
            self.lanes.pop(lost.adapter, None)
        for ticket in tickets:
            self.end(ticket, "error", error)
