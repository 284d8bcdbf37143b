"""Some steps of a recipe on one process or on several, forked from the tests' and joined over gloo on the loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vistune import inputs, ranks
from vistune.recipe import Recipe
from vistune.train import learn, stage
from vistune.train import loop as loops
from vistune.train.spreading import parallel


def take_steps(recipe: Recipe, count: int, look: Callable[[Any], None] = lambda batches: None) -> dict[str, Any]:
    """The first `count` steps: their rows, the bytes of weights that this rank holds at the start, and what was
    learned, whole. `look` sees every step's batches."""
    folder = stage.claim(recipe)
    loaded = stage.load_model(recipe)
    learned = learn.apply(loaded.model, loaded.family, recipe)
    data = stage.read_data(recipe, loaded, folder)
    made = stage.make_loop(recipe, folder, torch.device("cpu"), loaded, learned, data)
    held = sum(_bytes(parameter) for parameter in loaded.model.parameters())
    batches = stage.load_batches(
        data.plan,
        data.readers,
        data.language,
        stop_step=count,
        rank=ranks.rank(),
        world=ranks.world(),
        packs_per_micro=recipe.train.micro_batch,
        pad_to=inputs.pad_to(recipe, "cpu", recipe.train.micro_batch),
        alike=parallel.sharded(recipe),
    )
    stop, rows = loops.Stop(), []
    for step in batches:
        look(step)
        made.step(step, stop)
        rows += made.rows()
    stop.release()
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "bytes": held,
        "weights": {one.name: whole(one.parameter) for one in learned},
        "buffers": {name: value.clone() for name, value in parallel.followed(loaded.model).items()},
    }


def _bytes(parameter: Tensor) -> int:
    return parallel.local(parameter.detach()).untyped_storage().nbytes()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses, norms and what was learned are the same within `tolerance`."""
    assert found["losses"] == pytest.approx(wanted["losses"], abs=tolerance)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=20 * tolerance)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def on_ranks(world: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns on each of `world` ranks (anything `torch.save` takes)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, world, port, work, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    said = [file.read_text()[-2000:] for file in sorted(folder.glob("error-*.txt"))]
    for process in processes:
        process.kill()
    assert all(process.exitcode == 0 for process in processes), "\n".join(said) or "hangs"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, port: int, work: Callable[[], Any], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        ranks.start("cpu", timeout=60)
        torch.save(work(), folder / f"result-{rank}.pt")
        ranks.stop()
    except BaseException:  # noqa: BLE001 - the parent reports it
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
