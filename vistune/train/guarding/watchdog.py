"""Every rank says what it is about to do; one that stands still or is gone is named, and the run ends on all ranks.

What is said goes into the process group's store over a connection of its own, so that finding out takes no collective.
Knows steps, phases and samples by number; nothing of what a step does.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from vistune import console, ranks

PHASES = ("start", "data", "forward", "update", "save", "evaluate", "finish")
CODE = 3  # exit code of a run that ended because a rank stood still or was lost
STILL = 0.8  # of parallel.timeout without a beat: before the collectives' own time is over, and they end it wordless
_SHOWN = 16  # samples in a message
_ANSWER = 10.0  # seconds that the store may take for one
_runs = itertools.count()  # a process may run several stages with one store

Key = tuple[int, int]


@dataclass(frozen=True)
class Beat:
    """What a rank is about to do: `step` counts from 1, `keys` are its samples (source, row)."""

    step: int = 0
    phase: str = "start"
    keys: list[Key] = field(default_factory=list)
    place: str = ""  # host and process

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def pack(self) -> str:
        return json.dumps([self.step, self.phase, self.keys[: _SHOWN + 1], self.place])

    @classmethod
    def unpack(cls, text: bytes) -> Beat:
        step, phase, keys, place = json.loads(text)
        return cls(step, phase, [(source, row) for source, row in keys], place)


class Watchdog:
    """A context around a run, on every rank. `timeout`: seconds a collective may take.

    A rank is behind when its beat is `STILL` of the timeout old. Not counted: the start and the end of a run, saves,
    evaluations, and in the first step all but its data, since compilation falls there. A rank is gone when its thread
    has given no sign of life for a third of the timeout, a minute at most; or shortly after a collective broke.
    Then one message says who, where and with which samples, and the process ends with `CODE`, as do the others.
    """

    def __init__(self, timeout: float):
        self.still = STILL * timeout
        self.silent = min(60.0, timeout / 3)
        self.pulse = min(1.0, timeout / 40)
        self.folder: Path | None = None  # where stacks of a rank that stands still are written
        self.sources: list[str] = []
        self.planned: Callable[[int, int], list[Key]] = lambda step, rank: []  # samples of a step on a rank
        self._store = _connect(min(timeout, _ANSWER))
        self._here = f"{socket.gethostname()}, process {os.getpid()}"
        self._mine, self._since = Beat(place=self._here), time.monotonic()
        self._first: int | None = None  # step of the first beat
        self._host = self._mine  # rank 0's last beat that was read: the store may be lost with it
        self._left = threading.Event()
        self._saying = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str, keys: list[Key]) -> None:
        """Say what this rank is about to do. Some microseconds."""
        if self._first is None and phase == "data":
            self._first = step
        self._mine, self._since = Beat(step, phase, keys, self._here), time.monotonic()
        if self._store is not None:
            self._store.set(f"beat/{ranks.rank()}", self._mine.pack())

    def __enter__(self) -> Watchdog:
        self.beat(0, "start", [])
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if self._store is not None and error is not None:
                self._explain(error)
        finally:
            self._left.set()
            self._thread.join()
            if self._store is not None:
                self._leave(8 * self.pulse if error is not None else 3 * self.silent)

    # What is said at the end of a rank.

    def _explain(self, error: BaseException) -> None:
        """Tell the others why this rank leaves. A broken collective is another rank's doing: ends the process."""
        if isinstance(error, ranks.SaidElsewhere) or hasattr(error, "code"):  # of all ranks alike; stopped by a signal
            return
        said = str(error).strip().split("\n")[0]
        try:
            if isinstance(error, RuntimeError) and (found := self._find_out(said)):
                self._end(found)
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = f"{name}{said}"
            told = self._tell(text, 2 if isinstance(error, ValueError) else 1)
        except dist.DistError:
            self._end(self._lost_store())
        if told.text == text and told.rank != ranks.rank() and isinstance(error, ValueError):
            raise ranks.SaidElsewhere(said) from error

    def _find_out(self, said: str) -> str:
        """Why a collective broke, a moment after it did; empty if nobody else is at fault."""
        before = self._signs()
        for _ in range(6):
            time.sleep(self.pulse)
            if told := self._told():
                return told.quoted
        if gone := [rank for rank, sign in self._signs().items() if sign == before[rank] and rank != ranks.rank()]:
            return self._gone(gone)
        return self._behind() if "timed out" in said.lower() or "timeout" in said.lower() else ""

    def _leave(self, patience: float) -> None:
        """The rank that may host the store stays until nobody needs it, `patience` seconds at most."""
        assert self._store is not None
        try:
            self._store.set(f"left/{ranks.rank()}", "1")
            ends = time.monotonic() + patience
            while ranks.is_first() and self._others_present() and time.monotonic() < ends:
                time.sleep(min(0.02, self.pulse))
        except dist.DistError as error:
            console.warn(f"the store of the process group is gone before its time: {error}")

    def _others_present(self) -> bool:
        assert self._store is not None
        return not self._store.check([f"left/{rank}" for rank in range(ranks.world())])

    # What is looked for while a rank works.

    def _watch(self) -> None:
        counter = itertools.count()
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._left.wait(self.pulse):
            try:
                if self._store is not None:
                    self._store.set(f"alive/{ranks.rank()}", str(next(counter)))
                found = self._look(seen)
            except dist.DistError:
                found = self._lost_store()
            if found and not self._left.is_set():
                self._end(found)

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str:
        """What is wrong, as a sentence; empty while nothing is. `seen`: last signs of life, and when they were new."""
        now, idle = time.monotonic(), time.monotonic() - self._since
        if self._store is not None:
            if told := self._told():
                # A rank that can says the same by itself: the collective breaks, or it raises what the other raised.
                return "" if self._left.wait(3 * self.pulse) else told.quoted
            self._host = self._read(0) or self._host
            if idle > self.silent / 2:
                signs = self._signs()
                seen |= {r: (sign, now) for r, sign in signs.items() if r not in seen or seen[r][0] != sign}
                if gone := [rank for rank in signs if now - seen[rank][1] > self.silent]:
                    return self._gone(gone)
            else:
                seen.clear()
        return self._behind() if self._counts() and idle > self.still else ""

    def _counts(self) -> bool:
        """Whether what this rank is at may be called standing still."""
        step, phase = self._mine.step, self._mine.phase
        return phase == "data" or (phase in ("forward", "update") and step != self._first)

    def _signs(self) -> dict[int, bytes]:
        """The counters of ranks that have not left."""
        here = [rank for rank in range(ranks.world()) if not self._has(f"left/{rank}")]
        return {rank: self._get(f"alive/{rank}") for rank in here}

    # What the store holds.

    def _has(self, key: str) -> bool:
        assert self._store is not None
        return self._store.check([key])

    def _get(self, key: str) -> bytes:
        assert self._store is not None
        return self._store.get(key) if self._has(key) else b""

    def _read(self, rank: int) -> Beat | None:
        return Beat.unpack(text) if (text := self._get(f"beat/{rank}")) else None

    def _told(self) -> _Told | None:
        return _Told(*json.loads(text)) if (text := self._get("told")) else None

    def _tell(self, text: str, code: int) -> _Told:
        """Say why the run ends, unless somebody did; returns what was said first."""
        assert self._store is not None
        mine = json.dumps([ranks.rank(), text, code])
        return _Told(*json.loads(self._store.compare_set("told", "", mine)))

    # Sentences.

    def _beats(self) -> dict[int, Beat]:
        if self._store is None:
            return {0: self._mine}
        return {rank: self._read(rank) or Beat() for rank in range(ranks.world())}

    def _behind(self) -> str:
        """Which ranks are least far, and where they stand."""
        beats = self._beats()
        least = min(beat.order for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.order == least]
        where = self._list(beats, behind)
        advice = "Raise parallel.timeout if this is only slow."
        if len(behind) == len(beats) and len(beats) > 1:
            return f"all {len(beats)} ranks stand still for {self._age()}: {where}. {advice}"
        others = [rank for rank in beats if rank not in behind]
        wait = f" Waiting for it: {self._list(beats, others, samples=False)}." if others else ""
        return f"{where}: standing still for {self._age()}.{wait} {advice}"

    def _gone(self, gone: list[int]) -> str:
        beats = self._beats()
        return (
            f"{self._list(beats, gone)}: gone without a word. It was killed (by the system where memory ran out: see "
            "its kernel's log), or its machine was lost. The same command goes on from the last checkpoint."
        )

    def _lost_store(self) -> str:
        return (
            f"{self._line(0, self._host)}: gone, and with it what ranks tell each other through, or its machine "
            f"cannot be reached from {self._here}. The same command goes on from the last checkpoint."
        )

    def _age(self) -> str:
        return f"{time.monotonic() - self._since:.3g} s"

    def _list(self, beats: dict[int, Beat], chosen: list[int], samples: bool = True) -> str:
        shown = "; ".join(self._line(rank, beats[rank], samples) for rank in chosen[:4])
        return shown + (f"; and {len(chosen) - 4} more" if len(chosen) > 4 else "")

    def _line(self, rank: int, beat: Beat, samples: bool = True) -> str:
        """`rank 1 (host, process 7) at step 5, data, samples data.json:12, data.json:40`."""
        text = f"rank {rank}{f' ({beat.place})' if beat.place else ''} at "
        text += f"step {beat.step}, {beat.phase}" if beat.step else beat.phase
        if not samples or beat.phase not in ("data", "forward", "update"):
            return text
        keys = beat.keys or self.planned(beat.step, rank)
        names = [f"{self.sources[source] if source < len(self.sources) else source}:{row}" for source, row in keys]
        return text + (f", samples {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}" if names else "")

    def _end(self, text: str) -> NoReturn:
        """Say it, once in the whole run where there is a way to know, and end this process whatever it hangs in."""
        with self._saying:  # the thread and the run itself may find out at the same time
            code = CODE
            if self._store is not None:
                try:
                    told = self._tell(text, code)
                    code, text = told.code, text if told.rank == ranks.rank() else told.quoted
                except dist.DistError as error:
                    text = f"{text} ({str(error).splitlines()[0][:80]})"
            if self.folder is not None and self.folder.is_dir():
                with (self.folder / f"stacks-rank-{ranks.rank()}.txt").open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            console.fail(text)
            if self._store is not None:
                self._leave(8 * self.pulse)
            for worker in multiprocessing.active_children():  # the one that hangs would outlive us
                worker.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@dataclass(frozen=True)
class _Told:
    rank: int
    text: str
    code: int

    @property
    def quoted(self) -> str:
        return f"rank {ranks.rank()} ends because rank {self.rank} said: {self.text}"


def _connect(timeout: float) -> dist.Store | None:
    """This rank's own way to the store that `torchrun` describes; None for one rank."""
    if ranks.world() == 1:
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"vistune/watchdog/{attempt}/{next(_runs)}", store)
