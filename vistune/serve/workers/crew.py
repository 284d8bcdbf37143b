"""All workers' processes: ready together, watched, started again when one dies, ended together.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import httpx

from vistune import console
from vistune.serve.workers.process import Process
from vistune.serve.workers.worker import Worker

LOOK = 0.2
"""Seconds between questions whether a worker is ready: while it starts, ..."""
LOOK_AGAIN = 1.0
"""... and afterwards."""
ANSWER = 10.0
"""Seconds that it may take to say so."""
LOST = 60.0
"""A worker that lives, and for so many seconds is not ready, is ended and started again."""
PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before one that died is started again, twice as many each time, up to the longest; ..."""
STEADY = 300.0
"""... and as at first for one that was ready for so long."""


class Crew:
    """`start(worker)` makes the process of a worker, which is not started yet; each start gets one of its own."""

    def __init__(self, workers: Sequence[Worker], start: Callable[[Worker], Process]):
        self.workers, self._make = list(workers), start
        self._processes: dict[int, Process] = {}
        self._watching: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Returns when all are ready. ValueError, with its own error, when one ends before it is: the others are ended
        by whoever calls (`end`)."""
        tasks = [asyncio.create_task(self._started(worker)) for worker in self.workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._watching = [asyncio.create_task(self._watch(worker)) for worker in self.workers]

    def tell(self) -> None:
        """Tell all of them to end (SIGTERM); nobody is started again."""
        for task in self._watching:
            task.cancel()
        for process in self._processes.values():
            process.leave()

    async def end(self, seconds: float) -> None:
        """Tell all of them to end, and end those that have not within so many seconds."""
        self.tell()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for worker in self.workers:
            worker.ready, worker.state = False, "ending"
        await asyncio.gather(*(process.end(seconds) for process in self._processes.values() if process.alive))
        for worker in self.workers:
            await worker.close()

    async def _started(self, worker: Worker) -> None:
        worker.ready, worker.state = False, "starting"
        worker.place.unlink(missing_ok=True)  # what one that was killed left behind
        process = self._processes[worker.number] = self._make(worker)
        worker.starts += 1
        await process.start()
        ended = asyncio.create_task(process.ended())
        try:
            while not (await _opened(worker) and await _ready(worker)):
                await asyncio.wait([ended], timeout=LOOK)
                if ended.done():
                    raise ValueError(process.reason(ended.result()))
        finally:
            ended.cancel()
        worker.ready, worker.state = True, "ready"

    async def _watch(self, worker: Worker) -> None:
        pause = PAUSE
        while True:
            lasted = await self._while_it_lives(worker)
            pause = PAUSE if lasted > STEADY else pause
            while True:
                worker.state = "dead"
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                try:
                    await self._started(worker)
                    console.warn(f"worker {worker.number} is there again")
                    break
                except (ValueError, OSError) as error:
                    console.warn(f"worker {worker.number} does not start: {error}; again in {pause:.0f} s")

    async def _while_it_lives(self, worker: Worker) -> float:
        """Seconds after which it ended, or was ended because it was lost; until then `worker.ready` is kept right."""
        process, loop = self._processes[worker.number], asyncio.get_running_loop()
        began = seen = loop.time()
        ended = asyncio.create_task(process.ended())
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=LOOK_AGAIN)
                worker.ready = not ended.done() and await _ready(worker)
                worker.state = "ready" if worker.ready else "not ready"
                seen = loop.time() if worker.ready else seen
                if loop.time() - seen > LOST and process.alive:
                    console.warn(f"worker {worker.number} has not been ready for {LOST:.0f} s and is ended")
                    await process.end(0.0)
            worker.ready = False
            console.warn(f"worker {worker.number} has died: {process.reason(ended.result())}")
        finally:
            ended.cancel()
        return loop.time() - began


async def _opened(worker: Worker) -> bool:
    """Whether it has read its models. Asked before `_ready`, which it would count among what it has refused."""
    try:
        answer = await worker.get("/health", ANSWER)
        return answer.status_code == 200 and b'"opening"' not in answer.content
    except httpx.HTTPError:
        return False


async def _ready(worker: Worker) -> bool:
    """Whether it says that it is."""
    try:
        return (await worker.get("/ready", ANSWER)).status_code == 200
    except httpx.HTTPError:
        return False
