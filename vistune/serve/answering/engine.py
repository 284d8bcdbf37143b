"""A model that answers requests in a thread of its own, many at once. Anybody may hand in work; what is said comes back
by a call. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vistune import console
from vistune.models.load import Loaded
from vistune.serve.answering.drawing import Drawing
from vistune.serve.answering.failing import explained
from vistune.serve.answering.lane import Hear, Ticket
from vistune.serve.answering.reader import Reader
from vistune.serve.answering.scheduler import Scheduler
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.work import State, Work
from vistune.speech import Tongue

__all__ = ["Engine", "Hear", "Ticket"]

FAILURES = 3
"""Steps in a row that failed, after which a model is given up."""
OF_DEVICE = 0.85
"""Share of a GPU's free memory that keys and values and remembered pictures may take; calls need the rest."""
OF_MACHINE, MOST_OF_MACHINE = 0.25, 4 << 30
"""The same of a machine without one, and the most of it in bytes: other programs live there too."""


class Engine:
    """See the module. `name` is the model's, for metrics and the log; `adapters` those on it that a request may name
    (`vistune.models.adapted`). `share`: its part of the memory that is free, where other engines take the rest."""

    def __init__(self, loaded: Loaded, limits: Limits, name: str = "", adapters: Any = None, *, share: float = 1.0):
        self.loaded, self.limits, self.name, self.adapters = loaded, limits, name, adapters
        self.reader = Reader(loaded)
        tokens = (limits.kv_bytes or self._free_bytes(share)) // self.reader.kv_token_bytes
        prefixes = int(tokens * limits.prefixes)
        self.scheduler = Scheduler(
            self.reader,
            limits,
            Tongue(loaded),
            Drawing(loaded),
            tokens - prefixes,
            adapters,
            _clock(loaded),
            prefixes=prefixes,
        )
        self._inbox: deque[Ticket] = deque()
        self._bytes_in = 0
        self._new = threading.Condition()
        self._stopping: float | None = None  # when the last answer has to have ended
        self._alive, self._turned = True, 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        """Begin to answer. Logs what keys and values may take."""
        tokens, each = self.scheduler.kv_tokens, self.reader.kv_token_bytes
        said = f"{self.name or 'model'}: {tokens:,} tokens of keys and values, {tokens * each / 2**30:.2f} GiB"
        prefixes = self.scheduler.reading.prefixes
        console.say(f"{said}; {prefixes.most * prefixes.block:,} more to remember what was read")
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        """Take no more; those who are here have `drain` seconds to be answered, the rest hear an error (503, code
        "stopping"). Returns when the thread has ended."""
        with self._new:
            if self._stopping is None or drain <= 0:
                self._stopping = time.monotonic() + drain
            self._new.notify()
        if self._thread.is_alive():
            self._thread.join()
        elif not self._thread.ident:  # it was never started
            self._end()

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together: by the model, by the limits, and by the memory."""
        most = min(self.reader.context, self.scheduler.kv_tokens)
        return min(self.limits.context or most, most)

    def submit(self, work: Work, hear: Hear) -> Ticket:
        """Hand in work, from any thread. Refused: 400 when it can never be answered here (longer than the context),
        404 for an adapter that is not there, 429 with `retry_after` when the queue is full, 503 when the engine is
        stopping or dead."""
        self._check(work)
        ticket = Ticket(work, hear, self._stir)
        with self._new:
            if self._stopping is not None:
                raise Refused(503, "the server is stopping", code="stopping")
            if not self._alive:
                raise Refused(503, "the model does not answer any more", code="engine_dead")
            self._check_room(ticket)
            self._bytes_in += ticket.nbytes
            self._inbox.append(ticket)
            self._new.notify()
        return ticket

    def state(self) -> State:
        now, waiting = self.scheduler.state(), len(self._inbox)
        idle = time.monotonic() - self._turned if self._turned else 0.0
        alive = self._alive and (self._thread.is_alive() or not self._thread.ident)
        return replace(now, waiting=now.waiting + waiting, alive=alive, idle=idle)

    def forget(self, adapter: str) -> None:
        """An adapter is another one now: what was seen and read for it counts no more."""
        self.scheduler.reading.seen.forget(adapter)
        self.scheduler.reading.prefixes.forget(adapter)

    def _check(self, work: Work) -> None:
        need = len(work.ids) + work.settings.max_new_tokens
        if need > self.context:
            said = (
                f"{len(work.ids)} tokens of the prompt and {work.settings.max_new_tokens} of the answer are more than"
            )
            raise Refused(400, f"{said} the {self.context} there are", code="context_length_exceeded", param="messages")
        if not work.ids:
            raise Refused(400, "the prompt is empty", param="messages")
        if work.adapter and (self.adapters is None or work.adapter not in self.adapters.names):
            raise Refused(404, "no such model", param="model", code="model_not_found")
        assert len(work.digests) in (0, len(work.pictures)), "a digest for each picture"

    def _check_room(self, ticket: Ticket) -> None:
        now = self.state()
        free = max(self.limits.rows - now.running, 0)
        if now.waiting >= self.limits.queue + free:
            raise Refused(429, "too many requests wait already", code="queue_full", retry_after=self._retry_after())
        held = self._bytes_in - self.scheduler.reading.bytes_out
        if held and held + ticket.nbytes > self.limits.waiting_bytes:
            said = "the pictures of requests that wait are too many already"
            raise Refused(429, said, code="queue_full", retry_after=self._retry_after())

    def _retry_after(self) -> float:
        """Seconds until the next row is free for certain; answers may end earlier, but others wait too."""
        return float(math.ceil(min(max(self.scheduler.row_free_in(), 1.0), self.limits.deadline)))

    def _stir(self) -> None:
        self.scheduler.stirred = True

    # The thread.

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
                if self.scheduler.failures >= FAILURES:
                    console.warn(f"{self.name}: {FAILURES} failures in a row: this model is given up")
                    break
        finally:
            self._end()

    def _wait(self) -> bool:
        """Take in what has come, once there is something to do; False when all is over."""
        with self._new:
            while not (self._inbox or self.scheduler.busy):
                self._turned = 0.0
                if self._stopping is not None:
                    return False
                self._new.wait()
            while self._inbox:
                self.scheduler.add(self._inbox.popleft())
            self._turned = time.monotonic()
            return self._stopping is None or self._turned < self._stopping

    def _turn(self) -> None:
        try:
            self.scheduler.step()
        except Exception as error:  # noqa: BLE001 - everybody here hears of it, and who comes next is answered
            self.scheduler.failures += 1
            self.scheduler.end_all(explained(error))

    def _end(self) -> None:
        """Whoever is still here hears that it is over."""
        with self._new:
            self._alive, self._turned = False, 0.0
            while self._inbox:
                self.scheduler.add(self._inbox.popleft())
        code, said = ("stopping", "the server is stopping") if self._stopping is not None else _DEAD
        self.scheduler.end_all(Refused(503, said, code=code))

    def _free_bytes(self, share: float) -> int:
        """Bytes for keys and values, where nobody said how many: of what is free beside the model."""
        device: torch.device = self.reader.device
        if device.type == "cuda":
            free = OF_DEVICE * torch.cuda.mem_get_info(device)[0] - self.limits.pictures_held
        else:
            free = min(OF_MACHINE * _free_of_machine(), MOST_OF_MACHINE)
        least = self.reader.kv_token_bytes * 1024
        return max(int(share * free), least)


_DEAD = ("engine_dead", "the model does not answer any more")


def _free_of_machine(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that are free on the machine and, in a container that has a limit, in it; 8 GiB where neither says."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE)
    free = int(found[1]) * 1024 if found else 8 << 30
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(int(most) - int(used.read_text()), 0))
    return free


def _clock(loaded: Loaded) -> Callable[[], float]:
    """Seconds, when all that was asked of the model's device is done."""
    device: Any = loaded.model.device
    if device.type != "cuda":
        return time.perf_counter

    def settled() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return settled
