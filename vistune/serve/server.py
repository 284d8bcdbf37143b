"""A whole server: what is guarded by what, where it listens, what is said when it starts, and its end.

Knows nothing of how requests are answered.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, FastAPI

from vistune import __version__, console
from vistune.serve import api, hosts, listening, page, probes
from vistune.serve.guard import Guard
from vistune.serve.keys import Keys
from vistune.serve.limits import Limits
from vistune.serve.lines import Lines
from vistune.serve.media import Media
from vistune.serve.metrics import Metrics
from vistune.serve.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server is reached, and what it shows beside the interface. Nothing here costs memory or time."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str = ""
    """A Unix socket instead of host and port; only this user may connect to it."""
    keys: tuple[str, ...] = ()
    new_key: str = ""
    """The one of `keys` that was made for this start, and is shown."""
    root_path: str = ""
    """The prefix under which a proxy shows this server."""
    behind_proxy: bool = False
    """X-Forwarded-Host is a proxy's word and may be trusted; so it is with `root_path`."""
    allow_hosts: tuple[str, ...] = ()
    """Names beside the loopback's under which the server may be asked without a key, and pages of which may ask."""
    page: bool = True
    votes: str = ""
    """A JSON-lines file; without it there is no voting."""
    log: bool = True
    """A line for every request."""

    def __post_init__(self) -> None:
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise ValueError(
                f"--root-path {self.root_path}: it begins with / and does not end with one, such as /lab/x"
            )
        if not (self.keys or self.uds or hosts.loopback(self.host)):
            raise ValueError(
                f"--host {self.host}: everybody who reaches this machine could ask. Add --api-key new, which makes a "
                "key and prints it (or --api-key-file FILE), or stay on 127.0.0.1 and come through ssh -L"
            )


def application(shelf: Shelf, limits: Limits, options: Options) -> Guard:
    """The whole server as an ASGI application. The shelf is started and stopped by others."""
    made = guarded(limits, options)
    made.app = inside(shelf, made, shown(limits, options))
    return made


def guarded(limits: Limits, options: Options, metrics: Metrics | None = None) -> Guard:
    """A guard around nothing yet: it says that the models are being read."""
    return Guard(
        probes.opening,
        limits,
        metrics or Metrics(),
        keys=Keys(options.keys),
        names=options.allow_hosts,
        root=options.root_path,
        behind=options.behind_proxy,
        anywhere=bool(options.uds),
        say=Lines() if options.log else None,
    )


def shown(limits: Limits, options: Options) -> list[APIRouter]:
    """What there is for people. ValueError where votes cannot be kept."""
    if not options.page:
        return []
    try:
        return [page.router(limits, Path(options.votes) if options.votes else None)]
    except OSError as error:
        raise ValueError(f"--votes {options.votes}: {error.strerror or error}") from error


def inside(shelf: Shelf, guard: Guard, more: Sequence[APIRouter] = ()) -> FastAPI:
    """Everything that a guard lets requests come to."""
    limits, metrics = guard.limits, guard.metrics
    app = api.create(shelf, limits, metrics, Media(limits))
    for router in (probes.router(shelf, limits, metrics, lambda: guard.draining), *more):
        app.include_router(router)
    return app


def bound(options: Options) -> socket.socket:
    """The socket that the options name. ValueError."""
    return listening.on_file(options.uds) if options.uds else listening.on_port(options.host, options.port)


class _Opening:
    """The models are read in a thread while the server answers that it lives. What went wrong is kept."""

    def __init__(self, open_shelf: Callable[[], Shelf], guard: Guard, options: Options, said: Callable[[Shelf], None]):
        self.shelf: Shelf | None = None
        self.error: Exception | None = None
        self.server = listening.Listening(guard, self.stop, lambda: self.shelf is not None, options.uds)
        self._open, self._guard, self._said = open_shelf, guard, said
        self._shown = shown(guard.limits, options)
        self.thread = threading.Thread(target=self._run, name="opening", daemon=True)

    def _run(self) -> None:
        try:
            shelf = self._open()
            shelf.start()
            self._guard.app = inside(shelf, self._guard, self._shown)
            self.shelf = shelf
            self._said(shelf)
        except Exception as error:  # noqa: BLE001 - raised again in the main thread, when the server has ended
            self.error = error
            self.server.should_exit = True

    def stop(self) -> None:
        if self.shelf is not None:
            self.shelf.stop()


def run(open_shelf: Callable[[], Shelf], limits: Limits, options: Options) -> None:
    """Listen, read the models, answer until SIGTERM or Ctrl-C. Raises what opening them raised, and ValueError where
    there is no listening."""
    opening = _Opening(open_shelf, guarded(limits, options), options, lambda shelf: welcome(shelf, options, place))
    place = bound(options)
    console.say(f"reading the models; {address(options, place)}/health answers already")
    opening.thread.start()
    listening.listen(opening.server, place)
    if opening.error is not None:
        raise opening.error
    if opening.thread.is_alive():
        leave()
    opening.stop()


def leave() -> None:
    """End the process with 0 now: a thread reads a model, and cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def address(options: Options, place: socket.socket) -> str:
    """Where the server is asked from this machine, without a slash at the end."""
    if options.uds:
        return f"unix:{options.uds}:"
    host, port = place.getsockname()[:2]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}{options.root_path}"


def welcome(shelf: Shelf, options: Options, place: socket.socket) -> None:
    """What to do next: addresses, the key, and how to come from another machine."""
    at = address(options, place)
    console.say(f"vistune {__version__} serves {', '.join(one.name for one in shelf.served())}")
    if options.page:
        console.say(f"  page  {at}/")
    console.say(f"  api   {at}/v1")
    console.say(f"  key   {_key(options)}")
    if not options.uds and hosts.loopback(options.host):
        port = place.getsockname()[1]
        who = f"{getpass.getuser()}@{socket.gethostname()}"
        console.say(f"  from your own machine: ssh -N -L {port}:127.0.0.1:{port} {who}, then http://127.0.0.1:{port}/")


def _key(options: Options) -> str:
    if options.new_key:
        return f"{options.new_key} (a browser asks for it as a password, with any user name)"
    if options.keys:
        return "as you gave it (a browser asks for it as a password, with any user name)"
    return "none is needed: whoever uses this machine can ask"
