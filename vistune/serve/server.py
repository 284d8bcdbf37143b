"""A whole server: what is guarded by what, where it listens, what is said when it starts, and its end.

Knows nothing of how requests are answered.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fastapi import APIRouter, FastAPI

from vistune import __version__, console
from vistune.serve.answering.engine import Engine
from vistune.serve.door import listening, probes
from vistune.serve.door.guard import Guard
from vistune.serve.door.options import Options, address, bound, guarded, reached
from vistune.serve.interface import api
from vistune.serve.limits import Limits
from vistune.serve.llava import routes as llava
from vistune.serve.llava.registering import register
from vistune.serve.page import routes as page
from vistune.serve.pictures.media import Media
from vistune.serve.shelf import Shelf
from vistune.serve.waiting import waiting


def application(shelf: Shelf, limits: Limits, options: Options) -> Guard:
    """The whole server as an ASGI application. The shelf is started and stopped by others."""
    made = guarded(probes.opening, limits, options)
    made.app = inside(shelf, made, options, shown(limits, options))
    return made


def shown(limits: Limits, options: Options) -> list[APIRouter]:
    """What there is for people. ValueError where votes cannot be kept."""
    if not options.page:
        return []
    try:
        return [page.router(limits, Path(options.votes) if options.votes else None)]
    except OSError as error:
        raise ValueError(f"--votes {options.votes}: {error.strerror or error}") from error


def inside(shelf: Shelf, guard: Guard, options: Options, more: Sequence[APIRouter] = ()) -> FastAPI:
    """Everything that a guard lets requests come to."""
    limits, metrics, media = guard.limits, guard.metrics, Media(guard.limits)
    app = api.create(shelf, limits, metrics, media)
    app.state.media = media
    routers = [probes.router(shelf, limits, metrics, lambda: guard.draining), *more]
    if options.llava or options.llava_controller:
        how, hosts, at = options.llava_dispatch, options.llava_allow, options.llava_address
        routers.append(llava.router(shelf, limits, metrics, media, dispatch=how, hosts=hosts, address=at))
    for router in routers:
        app.include_router(router)
    return app


class _Opening:
    """The models are read in a thread while the server answers that it lives. What went wrong is kept."""

    def __init__(self, open_shelf: Callable[[], Shelf], guard: Guard, options: Options, said: Callable[[Shelf], None]):
        self.shelf: Shelf | None = None
        self.error: BaseException | None = None
        self.media: Media | None = None
        self.server = listening.Listening(guard, self.stop, lambda: self.shelf is not None, options.uds)
        self._open, self._guard, self._options, self._said = open_shelf, guard, options, said
        self._shown = shown(guard.limits, options)
        self.thread = threading.Thread(target=self._run, name="opening", daemon=True)

    def _run(self) -> None:
        try:
            shelf = self._open()
            shelf.start()
            app = inside(shelf, self._guard, self._options, self._shown)
            self._guard.app, self.media = app, app.state.media
            self.shelf = shelf
            if not self._guard.draining:
                self._said(shelf)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, when the server has ended
            self.error = error
            self.server.should_exit = True

    def stop(self) -> None:
        if self.shelf is not None:
            self.shelf.stop()


def run(open_shelf: Callable[[], Shelf], limits: Limits, options: Options) -> None:
    """Listen, read the models, answer until SIGTERM or Ctrl-C. Raises what opening them raised, and ValueError where
    there is no listening."""

    def said(shelf: Shelf) -> None:
        welcome(shelf, options, place)
        register(options, place, lambda: llava.own_status(shelf))

    guard = guarded(waiting(probes.opening, options), limits, options)
    opening = _Opening(open_shelf, guard, options, said)
    place = bound(options)
    console.say(f"reading the models; {address(options, place)}/health answers already")
    opening.thread.start()
    listening.listen(opening.server, place)
    if opening.media is not None:
        opening.media.close()  # or pictures that nobody waits for would be read still
    if opening.error is not None and not guard.draining:  # who was told to end needs no model any more
        raise opening.error
    if opening.thread.is_alive() or opening.server.stuck:
        leave()


def leave() -> None:
    """End the process with 0 now: a thread reads a model, or stands in one, and cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def welcome(shelf: Shelf, options: Options, place: socket.socket) -> None:
    """What to do next: addresses, the key, and how to come from another machine."""
    console.say(f"vistune {__version__} serves")
    for engine in shelf.engines:
        console.say(
            f"  model {engine.name}: {_memory(engine)}, {engine.context:,} tokens, {engine.limits.rows} at once"
        )
    if adapters := [one.name for one in shelf.served() if one.adapter]:
        console.say(f"  adapters {', '.join(adapters)}")
    for line in reached(options, place):
        console.say(line)


def _memory(engine: Engine) -> str:
    model = engine.loaded.model
    held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    return f"{held / 2**30:.2f} GiB on {model.device}"
