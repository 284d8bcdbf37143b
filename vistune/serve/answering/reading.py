"""Pictures and prompts within a time: what is seen and read in the next call, for whom, and what it cost.

Knows a reader's calls and a lane's rows; nothing of who waits for a row, and of how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vistune.serve.answering.budget import Cost, together
from vistune.serve.answering.failing import free_memory
from vistune.serve.answering.lane import Lane, Sight, Ticket
from vistune.serve.answering.prefixes import Prefixes
from vistune.serve.answering.seen import Seen

LEAST = 16
"""Tokens of the smallest piece of a prompt: below it a call costs what this costs."""
MOST = 4096
"""Tokens that are read, or into which pictures are encoded, in one call: what a call needs beside the weights stays
small beside them."""


class Reading:
    """`reader`: a `Reader`. `held`: bytes of pictures that are remembered, `prefixes`: tokens of prompts that are.
    `clock`: seconds, read when all that was asked of the device is done. `begin(lane, tickets, logits)` is called for
    those that are read to their ends."""

    def __init__(
        self,
        reader: Any,
        held: int,
        prefixes: int,
        clock: Callable[[], float],
        begin: Callable[[Lane, list[Ticket], Tensor], None],
    ):
        self.reader, self.clock, self.begin = reader, clock, begin
        self.seen, self.prefixes = Seen(held), Prefixes(prefixes)
        self.reads, self.sights = Cost(), Cost()
        self.pictures_seen = self.pictures_again = self.tokens_again = 0
        self.bytes_out = 0
        """Bytes of requests that are not needed any more."""
        self.most = MOST
        self.concerned: list[Ticket] = []
        """Those for whom the current call computes."""
        self.looks = False
        """Whether that call sees pictures or lays prompts, which are a request's own."""

    def at_fault(self) -> bool:
        """Whether what just went wrong was a request's own, since a prompt without pictures can be laid still."""
        if not self.looks:
            return False
        self.looks = False
        try:
            self.reader.embed([0], ())
        except Exception:  # noqa: BLE001 - that is the answer
            return False
        return True

    def sight(self, ticket: Ticket, eyes: str) -> None:
        """What has to be seen for a request, by `eyes`: each picture, or all together where none is seen alone."""
        work = ticket.work
        if not work.pictures:
            return
        digests = work.digests or (b"",) * len(work.pictures)
        if self.reader.alone:
            each = zip(work.pictures, digests, strict=True)
            ticket.sights = [Sight((eyes, digest), [picture]) for picture, digest in each]
        else:
            whole = b"".join(digests) if all(digests) else b""
            ticket.sights = [Sight((eyes, whole), work.pictures)]
        places = [place for place, one in enumerate(ticket.ids) if one == self.reader.picture]
        for sight in ticket.sights:
            ticket.pictures += [(place, sight.key[1]) for place in places[:1]]
            places = places[len(sight) :]

    # What was read before.

    def recall(self, ticket: Ticket) -> None:
        """What is known of a prompt's beginning need not be read, nor the pictures in it be seen. Its last token is
        always read: what comes next is not known."""
        if not self.prefixes.most:
            return
        if not ticket.names:
            ticket.names = self.prefixes.names(ticket.work.adapter, ticket.ids, ticket.pictures)
        found = self.prefixes.find(ticket.names[: (len(ticket.ids) - 1) // self.prefixes.block])
        if len(found) <= len(ticket.known):
            return
        ticket.known = found
        ticket.place = ticket.reused = len(found) * self.prefixes.block
        covered = sum(map(len, ticket.sights)) - self._laid(ticket)
        while ticket.sights and len(ticket.sights[0]) <= covered:
            sight = ticket.sights.pop(0)
            covered -= len(sight)
            self.pictures_again += len(sight.pictures) if sight.features is None else 0

    def _laid(self, ticket: Ticket) -> int:
        """Pieces of pictures in what is not known of its prompt."""
        return ticket.ids[ticket.reused :].count(self.reader.picture)

    def keep(self, lane: Lane, ticket: Ticket) -> None:
        """Remember what its row holds."""
        row = ticket.row
        if row is None or not self.prefixes.most or not lane.kv.alike:
            return
        names = ticket.names[: ticket.place // self.prefixes.block]
        if ticket.place > len(ticket.ids):
            said = [*ticket.ids, *ticket.said][: ticket.place]
            names = self.prefixes.names(lane.adapter, said, ticket.pictures, names)
        self.prefixes.put(lane.adapter, names, lambda start, stop: lane.kv.cut(row, start, stop))

    def read(self, lane: Lane, lanes: Sequence[Lane], left: float, must: bool) -> float:
        """See and read within `left` seconds, at least the smallest piece where something `must` be; the seconds spent.
        Who came first goes first, so a picture behind a prompt waits for it."""
        spent, self.looks = 0.0, False
        self.concerned.clear()
        if lane.reading and self._blind(lane.reading[0]):
            spent = self._see(lane, lanes, left, must)
        spent += self._piece(lane, left - spent, must and not spent)
        if any(self._blind(one) for one in lane.reading):
            spent += self._see(lane, lanes, left - spent, must and not spent)
        return spent

    def let_go(self, ticket: Ticket) -> None:
        """What the request brought is not needed any more."""
        self.bytes_out += ticket.nbytes
        ticket.nbytes = 0
        ticket.forget_pictures()

    def make_room(self) -> None:
        """The memory was too small for a call: what need not be there goes."""
        self.prefixes.forget()
        free_memory()

    # Pictures.

    def _blind(self, ticket: Ticket) -> bool:
        """Whether a picture is missing that is not remembered either."""
        for one in ticket.sights:
            if one.features is None and one.key[1] and (known := self.seen.get(one.key)):
                one.features = known
                self.pictures_again += len(one.pictures)
        return ticket.blind

    def _see(self, lane: Lane, lanes: Sequence[Lane], left: float, must: bool, most: int = 1 << 30) -> float:
        """Pictures in one call, those of the first who wait for theirs; each that is the same one gets it. Where the
        call fails the first is seen alone, so that nobody suffers from another's picture."""
        chosen = self._fitting(list(self._missing(lane)), left, must)[:most]
        if not chosen:
            return 0.0
        begun, tokens = self.clock(), sum(map(len, chosen))
        self.concerned[:] = [one for one in lane.reading if any(sight in one.sights for sight in chosen)]
        self.looks = True
        try:
            features = self.reader.see([picture for sight in chosen for picture in sight.pictures])
        except Exception as error:
            if len(chosen) == 1:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                self.most = tokens // 2
                self.make_room()
            return self._see(lane, lanes, left, True, 1)
        spent = max(self.clock() - begun, 1e-9)
        self.looks = False
        self.sights.add(tokens, spent)
        for sight in chosen:
            sight.features, features = features[: len(sight.pictures)], features[len(sight.pictures) :]
            self.pictures_seen += len(sight.pictures)
            self._share(sight, lanes)
        return spent

    def _missing(self, lane: Lane) -> Iterator[Sight]:
        """What is to be seen, in the order in which requests came, each picture once; never what is remembered."""
        found: set[Any] = set()
        blind = [ticket for ticket in lane.reading if self._blind(ticket)]
        for one in (one for ticket in blind for one in ticket.sights):
            name = one.key if one.key[1] else id(one)
            if one.features is None and name not in found:
                found.add(name)
                yield one

    def _fitting(self, sights: Sequence[Sight], left: float, must: bool) -> list[Sight]:
        """The first of them that go into one call and into the time."""
        chosen: list[Sight] = []
        tokens = 0
        for sight in sights:
            if chosen and not (self.reader.alone and sight.like(chosen[0])):
                continue
            tokens += len(sight)
            late = tokens > self.most or not self.sights.calls or self.sights.seconds(tokens) > left
            if late if chosen else late and not must:
                break
            chosen.append(sight)
        return chosen

    def _share(self, sight: Sight, lanes: Sequence[Lane]) -> None:
        """All who are here and ask about the same picture have it from now on, and for a while who comes later."""
        assert sight.features is not None
        if not sight.key[1]:
            return
        self.seen.put(sight.key, sight.features)
        for other in (one for lane in lanes for ticket in lane.reading for one in ticket.sights):
            if other.features is None and other.key == sight.key:
                other.features = sight.features
                self.pictures_again += len(other.pictures)

    # Prompts.

    def _piece(self, lane: Lane, left: float, must: bool) -> float:
        """The next piece of prompts, of as many as read the most in the time."""
        ready = [one for one in lane.reading if not one.blind]
        budget = int(min(self.reads.most(left), self.most)) if left > 0 else 0
        if budget < LEAST:
            budget = LEAST if must else 0
        if not ready or not budget:
            return 0.0
        count, most = together([one.left for one in ready], budget, LEAST)
        begun = self.clock()
        chosen = self._in_rows(lane, ready[:count])
        counts = [min(one.left, most) for one in chosen]
        try:
            logits = self._pieces(lane, chosen, counts)
        except torch.OutOfMemoryError:
            if count * max(counts) <= LEAST:
                raise
            self.most = max(LEAST, count * max(counts) // 2)
            lane.again(chosen)
            self.make_room()
            return max(self.clock() - begun, 1e-9)
        spent = max(self.clock() - begun, 1e-9)
        self.reads.add(count * max(counts), spent)
        self.most = min(self.most + LEAST, MOST)
        for ticket, read in zip(chosen, counts, strict=True):
            ticket.place += read
        done = [i for i, one in enumerate(chosen) if not one.left]
        if done:
            self.begin(lane, [chosen[i] for i in done], logits if len(done) == count else logits[done])
        return spent

    def _in_rows(self, lane: Lane, tickets: list[Ticket]) -> list[Ticket]:
        """Each with a row and its prompt laid, in the order of rows: neighbours are read where they lie."""
        self.looks = True
        for ticket in tickets:
            self.concerned[:] = [ticket]
            if ticket.row is None:
                if ticket.embeds is None:
                    ticket.embeds = self._laid_out(ticket)
                lane.place(ticket)
        self.looks = False
        self.concerned[:] = tickets
        return sorted(tickets, key=lambda one: one.row or 0)

    def _laid_out(self, ticket: Ticket) -> Tensor:
        """What of its prompt is to be read, as the language model takes it; its pictures are not needed any more."""
        self.recall(ticket)  # others may have been read meanwhile
        self.tokens_again += ticket.reused
        features = [one for sight in ticket.sights for one in sight.features or ()]
        count = self._laid(ticket)
        if count < sum(map(len, features)):  # some of the first picture is known
            features = [torch.cat(features)[-count:]] if count else []
        laid: Tensor = self.reader.embed(ticket.ids[ticket.reused :], features)
        self.let_go(ticket)
        return laid

    def _pieces(self, lane: Lane, chosen: list[Ticket], counts: list[int]) -> Tensor:
        pieces = [
            one.embeds[one.place - one.reused : one.place - one.reused + count]
            for one, count in zip(chosen, counts, strict=True)
            if one.embeds is not None
        ]
        embeds = pad_sequence(pieces, batch_first=True) if len(pieces) > 1 else pieces[0].unsqueeze(0)
        logits: Tensor = self.reader.read(
            lane.kv, [one.row for one in chosen], embeds, [one.place for one in chosen], counts
        )
        return logits
