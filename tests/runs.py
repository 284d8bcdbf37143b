"""`vistune train` in processes forked from the tests', which have imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

from vistune import cli
from vistune import recipe as recipes


def start_run(recipe: recipes.Recipe, folder: Path, *words: str, rank: int = 0, world: int = 1, port: int = 0):
    """`vistune train` in a process forked from this one, which has imported everything already."""
    file = folder / "recipe.toml"
    file.write_text(recipes.dump(recipe))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_train, args=(["train", str(file), *words], folder, rank, world, port))
    process.start()
    return process


def _train(arguments: list[str], folder: Path, rank: int, world: int, port: int) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setpgid(0, 0)
    with (folder / f"output-{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = cli._run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish_run(process, folder: Path, code: int = 0) -> str:
    process.join(120)
    output = (folder / "output-0.txt").read_text()
    assert process.exitcode == code, output[-3000:]
    return output


def start_ranks(recipe: recipes.Recipe, folder: Path, *words: str, world: int = 1) -> list:
    """`world` ranks over gloo on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start_run(recipe, folder, *words, rank=rank, world=world, port=port) for rank in range(world)]


def run_both(recipe: recipes.Recipe, folder: Path, *words: str, code: int = 0) -> str:
    """Two ranks over gloo on the loopback."""
    both = start_ranks(recipe, folder, *words, world=2)
    outputs = [finish_run(process, folder, code) for process in both]
    return outputs[0]
