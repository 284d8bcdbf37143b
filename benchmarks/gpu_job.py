"""A process that has imported everything, waits for one job on its standard input, runs it and ends.

So the next case's imports, half a minute on some machines, happen while this one's steps run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import gpu_ours
import torch
from peers import gpu_stock

RUNNERS = {"vistune": gpu_ours.result, "stock": gpu_stock.result, "preflight": gpu_ours.predicted}


def work(job: dict[str, Any], out: str) -> None:
    """Run the job and write its result, or why there is none, to `out`: beside and then renamed."""
    try:
        found = RUNNERS[job["who"]](job)
    except Exception as error:  # noqa: BLE001 - one case that fails costs its row, whatever it is
        traceback.print_exc()
        found = {"failed": why(error)}
    found["versions"] = {"torch": torch.__version__, "transformers": gpu_ours.TRANSFORMERS}
    beside = Path(out).with_suffix(".tmp")
    beside.write_text(json.dumps(found))
    beside.rename(out)


def why(error: BaseException) -> str:
    """One line; the same first words for every way of running out of memory."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in said.lower()
    return f"out of memory: {said}" if short else said


def work_in_fork(job: dict[str, Any], out: str, log: str) -> None:
    """`work` in a process forked from one that has everything, its words going to `log`."""
    with open(log, "w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    torch.set_num_threads(1)
    work(job, out)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    said = sys.stdin.readline()
    if said:
        asked = json.loads(said)
        work(asked["job"], asked["out"])
        sys.stdout.flush()
        os._exit(0)  # the result is written; data workers that are still reading are not waited for
