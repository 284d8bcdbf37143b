"""A server whose engine says what a test tells it to: what HTTP does is looked at without waiting for a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.serve.served import listening
from vistune.decoding import Settings
from vistune.models.load import Loaded
from vistune.serve import server
from vistune.serve.answering.engine import Hear
from vistune.serve.limits import Limits
from vistune.serve.shelf import Served, Shelf
from vistune.serve.work import Ended, Piece, State, Work

SETTINGS = Settings(max_new_tokens=8)


class Told:
    """Stands for a ticket. `gone` is set when the asker has left."""

    def __init__(self, work: Work, hear: Hear):
        self.work, self.hear = work, hear
        self.gone = threading.Event()

    def leave(self) -> None:
        self.gone.set()


class Scripted:
    """Stands for an engine. `script` is called for each request in a thread of its own; `now` is what `state` says."""

    context = 2048

    def __init__(self, loaded: Loaded, script: Callable[[Told], None], name: str = "m"):
        self.loaded, self.script, self.name = loaded, script, name
        self.now = State()
        self.tickets: list[Told] = []
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Nothing runs before a request."""

    def stop(self) -> None:
        for ticket in self.tickets:
            ticket.gone.set()
        for thread in self.threads:
            thread.join(10)

    def submit(self, work: Work, hear: Hear) -> Told:
        ticket = Told(work, hear)
        self.tickets.append(ticket)
        self.threads.append(threading.Thread(target=self.script, args=(ticket,), daemon=True))
        self.threads[-1].start()
        return ticket

    def state(self) -> State:
        return self.now


def says(*texts: str, reason: str = "stop", **more: Any) -> Callable[[Told], None]:
    """A script: these pieces, then the end."""

    def script(ticket: Told) -> None:
        for number, text in enumerate(texts):
            ticket.hear(Piece(text, number + 1))
        ticket.hear(Ended(reason=reason, tokens=len(texts), **more))

    return script


def waits(*texts: str) -> Callable[[Told], None]:
    """A script: these pieces, then nothing until the asker has gone."""

    def script(ticket: Told) -> None:
        for number, text in enumerate(texts):
            ticket.hear(Piece(text, number + 1))
        assert ticket.gone.wait(30)
        ticket.hear(Ended(reason="left", tokens=len(texts)))

    return script


class Alone(Shelf):
    """A shelf of one model."""

    def __init__(self, engine: Scripted):
        self.one = Served(name=engine.name, engine=engine, created=5)  # type: ignore[arg-type]

    @property
    def engines(self) -> list[Any]:
        return [self.one.engine]

    def served(self) -> list[Served]:
        return [self.one]

    def look(self) -> None:
        """Nothing comes and goes."""


@dataclass
class Stage:
    """A server with one model, "m", that `engine` answers for. `url` has no slash at its end; `client` asks there."""

    url: str
    engine: Scripted
    app: Any
    client: httpx.Client


def application(engine: Scripted, **limits: Any) -> Any:
    allowed = Limits(**limits)
    return server.application(Alone(engine), allowed, server.Options(log=False))


@contextmanager
def staged(loaded: Loaded, script: Callable[[Told], None], **limits: Any) -> Iterator[Stage]:
    engine = Scripted(loaded, script)
    app = application(engine, **limits)
    try:
        with listening(app) as url, httpx.Client(base_url=url, verify=False, trust_env=False, timeout=30) as client:
            yield Stage(url, engine, app, client)
    finally:
        engine.stop()
