"""`evaluate` over toy benchmarks with a tiny model, here or in forked processes, which may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tests.evaluate.toys import LAYOUTS
from vistune import cli
from vistune.evaluate import run
from vistune.evaluate.written import Written

NAMES = ["pope", "mme", "custom"]


def toys_in(folder: Path, *names: str) -> Path:
    """The toy benchmarks of these names (or all) under `folder`."""
    for name in names or LAYOUTS:
        LAYOUTS[name](folder)
    return folder


def settings(**more: Any) -> run.Settings:
    return run.Settings(**({"device": "cpu", "max_new_tokens": 12, "batch": 8} | more))


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()]


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], near: float = 1e-4) -> int:
    """How many rows were near ties; all others say the same of the same questions, in the same order."""
    ties = 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one["question_id"], one["prompt"]) == (other["question_id"], other["prompt"])
        if min(one["metadata"]["margin"], other["metadata"]["margin"]) < near:
            ties += 1
            continue
        assert one["text"] == other["text"] and one["metadata"]["tokens"] == other["metadata"]["tokens"]
    return ties


def start(words: list[str], folder: Path, *, rank: int = 0, world: int = 1, port: int = 0, killed_after: int = 0):
    """`vistune evaluate` in a forked process; `killed_after` so many answers it is killed in the midst of a line."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_evaluate, args=(words, folder, rank, world, port, killed_after))
    process.start()
    return process


def start_both(words: list[str], folder: Path, *, killed_after: int = 0) -> list:
    """Two ranks over gloo on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(words, folder, rank=rank, world=2, port=port, killed_after=killed_after) for rank in range(2)]


def _evaluate(words: list[str], folder: Path, rank: int, world: int, port: int, killed_after: int) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if killed_after:
        _die_after(killed_after)
    with (folder / f"output-{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = cli._run(["evaluate", *words])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_after(count: int) -> None:
    write, done = Written.write, []

    def dying(self: Written, at: int, said: Any) -> None:
        if len(done) == count:
            self._file.write('{"question_id": 1, "prompt": "torn')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, at, said)
        done.append(at)

    Written.write = dying  # type: ignore[method-assign]
