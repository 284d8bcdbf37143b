"""`--workers N` from beginning to end: a folder of sockets, the workers, the process in front, and all of their end.

Knows nothing of models, and imports nothing of them.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from vistune import __version__, console
from vistune.serve.door.guard import Guard
from vistune.serve.door.listening import Listening, listen, many_files
from vistune.serve.door.options import Options, address, bound, guarded, reached
from vistune.serve.limits import Limits
from vistune.serve.llava.registering import register
from vistune.serve.llava.status import Status
from vistune.serve.metrics import Metrics
from vistune.serve.waiting import waiting
from vistune.serve.workers.crew import Crew
from vistune.serve.workers.front import Front
from vistune.serve.workers.places import places
from vistune.serve.workers.process import PROGRAM, Process
from vistune.serve.workers.worker import Worker

LONGEST_SOCKET = 100
"""Characters of a Unix socket's path; systems take 104 to 108."""
ENDING = 5.0
"""Seconds that a worker's process has to end, once its answers have ended."""
NAMES = 15.0
"""Seconds between questions which models there are."""
MOST = 64


def run(words: Sequence[str], limits: Limits, options: Options, count: int, *, device: str = "auto") -> None:
    """Serve with `count` workers until SIGTERM or Ctrl-C. `words`: of the command line that each of them gets, from
    `serve` on, without what says where to listen and who may ask; `device`: what was asked for. ValueError where there
    is no listening, and with a worker's own error where one cannot start."""
    if not 1 <= count <= MOST:
        raise ValueError(f"--workers {count}: 1 to {MOST}")
    folder = Path(tempfile.mkdtemp(prefix="vistune-"))  # for this user alone
    try:
        if len(str(folder)) + 8 > LONGEST_SOCKET:
            raise ValueError(f"{folder} is too long for a socket: set TMPDIR to a shorter one")
        listening = bound(options)  # first, since asking for GPUs takes a while
        found = places(count, device, sized=bool(limits.kv_bytes))
        workers = [Worker(number, folder / f"{number}.sock") for number in range(count)]

        def started(worker: Worker) -> Process:
            place = found[worker.number]
            at = [*(["--device", place.device] if place.device else []), "--uds", str(worker.place)]
            return Process(worker.number, [*PROGRAM, *words, *at], place.environment, hidden=(str(folder), "  key   "))

        _serve(Crew(workers, started), limits, options, listening)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(crew: Crew, limits: Limits, options: Options, place: socket.socket) -> None:
    metrics = Metrics()
    front = Front(crew.workers, lambda: metrics.text({}).decode(), lambda: guard.draining)
    guard = guarded(waiting(front, options, front.opening), limits, options, metrics)
    console.say(f"{len(crew.workers)} workers read the models; {address(options, place)}/health answers already")

    def said(names: Sequence[str]) -> None:
        console.say(f"vistune {__version__} serves {', '.join(names)} with {len(crew.workers)} workers")
        for line in reached(options, place):
            console.say(line)
        register(options, place, server.status)

    server = Fronting(guard, crew, said, options.uds)
    with many_files(2 * limits.connections):  # each goes on to a worker
        listen(server, place)
    if server.error is not None:
        raise server.error


class Fronting(Listening):
    """Listens, starts the workers, tells `said` the names of their models, and ends with them. `error`: why they could
    not start."""

    def __init__(self, guard: Guard, crew: Crew, said: Callable[[Sequence[str]], None], path: str = ""):
        super().__init__(guard, lambda: None, lambda: self.begun, path)
        self.crew, self.said = crew, said
        self.begun = False
        self.names: list[str] = []
        self.error: Exception | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        opening = asyncio.create_task(self._open())
        try:
            await super().serve(sockets)
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await self.crew.end(ENDING)

    def status(self) -> Status:
        """All workers as one, for a controller of LLaVA's. From any thread."""
        return Status(tuple(self.names), 1.0, float(sum(one.busy for one in self.crew.workers)))

    async def _open(self) -> None:
        try:
            await self.crew.begin()
            self.names = await models(self.crew.workers)
            self.begun = True
            self.said(self.names)
            while True:  # adapters come and go
                await asyncio.sleep(NAMES)
                self.names = await models(self.crew.workers) or self.names
        except Exception as error:  # noqa: BLE001 - raised again in the main thread, when the server has ended
            self.error = None if self.asked else error  # one that was told to end has not failed
            self.should_exit = True

    async def _drain(self) -> None:
        """The workers are told at the same moment: they end what is not done in time, and say so in the answers."""
        self.crew.tell()
        await super()._drain()


async def models(workers: Sequence[Worker]) -> list[str]:
    """The names that the first worker that is there says; none where none does."""
    for worker in [one for one in workers if one.ready]:
        try:
            answer = await worker.get("/v1/models", ENDING)
            return [one["id"] for one in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            console.warn(f"worker {worker.number} does not say its models: {type(error).__name__}")
    return []
