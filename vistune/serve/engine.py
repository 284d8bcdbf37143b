"""A model that answers requests in a thread of its own. Anybody may hand in work; what is said comes back by a call.

Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Queue
from typing import Any

from vistune import console
from vistune.decoding import Prompt, Settings, decode, spoken
from vistune.models.load import Loaded
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.work import Ended, Piece, State, Work

Hear = Callable[[Piece | Ended], None]
"""Called in the engine's thread, so it must return at once: pieces as they come, then one `Ended`, which is the last."""


class Ticket:
    """A request's place in an engine."""

    def __init__(self, work: Work, hear: Hear):
        self.work, self.hear = work, hear
        self.gone = threading.Event()

    def leave(self) -> None:
        """The asker has gone: its row leaves before the next step, and `Ended("left")` comes. From any thread."""
        self.gone.set()


class Engine:
    """See the module. `name` is the model's, for metrics and the log."""

    def __init__(self, loaded: Loaded, limits: Limits, name: str = ""):
        self.loaded, self.limits, self.name = loaded, limits, name
        self._inbox: Queue[Ticket | None] = Queue()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whoever still runs hears an error. Returns when it has ended."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        text: Any = self.loaded.model.config.text_config  # type: ignore[union-attr]
        return self.limits.context or text.max_position_embeddings

    def submit(self, work: Work, hear: Hear) -> Ticket:
        """Hand in work, from any thread. Refused: 400 when it can never be answered here (longer than the context),
        429 with `retry_after` when the queue is full, 503 when the engine is stopping or dead."""
        if self._inbox.qsize() >= self.limits.queue:
            raise Refused(429, "the server is busy", code="queue_full", retry_after=1.0)
        ticket = Ticket(work, hear)
        self._inbox.put(ticket)
        return ticket

    def state(self) -> State:
        return State(waiting=self._inbox.qsize(), alive=self._thread.is_alive())

    def _run(self) -> None:
        while (ticket := self._inbox.get()) is not None:
            try:
                self._answer(ticket)
            except Exception as error:  # noqa: BLE001 - the asker hears of it, and the next is answered
                console.warn(f"{self.name}: {type(error).__name__}")
                ticket.hear(Ended(reason="error", error=Refused(500, f"{type(error).__name__}", code="engine")))

    def _answer(self, ticket: Ticket) -> None:
        work = ticket.work
        prompt = Prompt(work.ids, [one.pixels for one in work.pictures], [one.grid for one in work.pictures if one.grid])
        settings: Settings = work.settings
        until = max(work.until - time.monotonic(), 0)
        assert until
        new = decode(self.loaded, [prompt], settings, told=ticket.gone)[0]
        text = spoken(self.loaded, new.ids)
        ticket.hear(Piece(text, len(new.ids)))
        reason = "length" if len(new.ids) == settings.max_new_tokens else "stop"
        ticket.hear(Ended(reason="left" if ticket.gone.is_set() else reason, tokens=len(new.ids), margin=new.margin))
