"""A worker's process: started, heard, told to end, ended. What it writes is passed on with its number before each line.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from vistune import console

PROGRAM = (sys.executable, "-m", "vistune.serve.workers.watched")
SECRETS = ("VISTUNE_API_KEY",)
"""Variables that workers do not get: who may ask is judged in front, and their sockets are this user's alone."""
ERROR = "error: "
"""How a process says why it ends; whoever waits for it says it once, and not each of several workers."""
LAST = 20
"""Lines that are remembered, for the reason of an end."""
LINE = 1 << 20
"""Bytes of a line that is passed on; what is longer is passed on in pieces."""


class Process:
    """Its standard input is the pipe that ends it when we end (see `watched`); it has a session of its own, so that a
    terminal's Ctrl-C reaches only us, who then tell it. Lines with something of `hidden` in them are not passed on."""

    def __init__(self, number: int, words: Sequence[str], environment: Mapping[str, str], hidden: Sequence[str] = ()):
        self.hidden = tuple(hidden)
        self.number, self.words, self.environment = number, list(words), dict(environment)
        self.last: deque[str] = deque(maxlen=LAST)
        self._process: Any = None
        self._told = False
        self._heard: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self.words,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={name: value for name, value in os.environ.items() if name not in SECRETS} | self.environment,
            start_new_session=True,
        )
        streams = (self._process.stdout, self._process.stderr)
        self._heard = [asyncio.create_task(self._hear(stream)) for stream in streams]

    async def _hear(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while piece := await stream.read(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._said(line)
        if rest:
            self._said(rest)

    def _said(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            self.last.append(text)
        if text and not text.startswith(ERROR) and not any(one in text for one in self.hidden):
            console.err.print(f"worker {self.number}: {text}", markup=False)

    async def ended(self) -> int:
        """Returns its exit code when it has ended and everything it wrote is heard; a signal's number is negative."""
        code: int = await self._process.wait()
        await asyncio.wait(self._heard, timeout=1.0)  # a grandchild may hold the pipes open
        return code

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def leave(self) -> None:
        """Tell it to end (SIGTERM), once: the second time it would end in the middle of its answers."""
        if self.alive and not self._told:
            self._told = True
            self._process.terminate()

    async def end(self, seconds: float) -> None:
        """Tell it to end, and end it when it has not within so many seconds."""
        self.leave()
        try:
            async with asyncio.timeout(seconds):
                await self.ended()
        except TimeoutError:
            self._process.kill()
            await self.ended()

    def reason(self, code: int) -> str:
        """Why it ended, in one sentence: its own error where it said one."""
        errors = [line.removeprefix(ERROR) for line in self.last if line.startswith(ERROR)]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return errors[-1] if errors else f"worker {self.number} ended {how}{_last(self.last)}"


def _last(lines: Sequence[str]) -> str:
    return f"; its last words: {lines[-1]}" if lines else ""
