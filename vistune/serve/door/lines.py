"""Lines for the log, written in a thread of their own: a terminal that stands still must not stop a server.

Knows nothing of what they say.
"""

from __future__ import annotations

import queue
import sys
import threading
import time

MOST = 10_000
"""Lines that wait; what is more is dropped, and counted."""


class Lines:
    """Call it with a line. From any thread, at once."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[str] = queue.Queue(MOST)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._waiting.put_nowait(f"{stamp} {line}\n")
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            text = self._waiting.get()
            while not self._waiting.empty() and len(text) < 1 << 16:
                text += self._waiting.get()
            if self._dropped:
                text, self._dropped = f"{text}{self._dropped} lines were dropped\n", 0
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except (OSError, ValueError):  # nobody reads it any more
                return
