"""What a worker's process runs: the words of a command line, as `python -m vistune` runs them, for as long as whoever
started it lives. On the standard library alone."""

from __future__ import annotations

import os
import runpy
import sys
import threading


def main() -> None:
    """Standard input is a pipe whose other end is held by the process in front and by nobody else."""
    threading.Thread(target=_end_with_the_front, name="front", daemon=True).start()
    runpy.run_module("vistune", run_name="__main__", alter_sys=True)


def _end_with_the_front() -> None:
    """The pipe's end comes when the front has ended, however it did; nobody is left to hear an answer."""
    while os.read(0, 1 << 10):
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.argv[0] = "vistune"
    main()
