"""Checkpoints of a run: what learned, the optimizer, and where the run stands. `saving` writes them.

Through `torch.distributed.checkpoint`, so a run may come back on another number of ranks. Frozen weights are not in
it: they are in the start folder. Knows nothing of the loop.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vistune import ranks
from vistune.recipe import Recipe
from vistune.train.learn import Learned
from vistune.train.updating.optimizer import Optimizer

MAY_DIFFER = (
    *("name", "run", "parallel", "checkpoint", "log", "evaluate"),
    *("data.workers", "data.cache", "data.strict", "data.quarantine_cap"),
)
"""Keys of the recipe that may differ between a run and its resumption: nothing here touches a weight."""


def folders(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(p for p in found if re.fullmatch(r"step-\d{8}", p.name) and is_whole(p))


def is_whole(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands, or will."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def load(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Read a checkpoint into `tensors`, in place; returns the state that was saved with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:  # the last is no Exception to DCP
        raise ValueError(
            f"checkpoint {folder}: cannot be read ({str(_root(error)).splitlines()[0][:200]}). "
            "If an older checkpoint stands beside it, remove this one and start again."
        ) from error
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def tensors(learned: list[Learned], optimizer: Optimizer, followed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: learned weights, the optimizer's state of them, and buffers that moved."""
    named = {f"model/{one.name}": one.parameter.detach() for one in learned}
    named |= {f"model/{name}": value for name, value in followed.items()}
    return named | {f"optimizer/{name}": value for name, value in optimizer.state().items()}


def clean(run: Path) -> None:
    """Remove what a killed save left half-written."""
    for beside in (run / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(beside, ignore_errors=True)


def differences(old: dict[str, Any], recipe: Recipe) -> list[str]:
    """Keys in which `recipe` differs from a run's saved one and must not; each as `key: old -> new`."""
    before, now = _flat(old), _flat(recipe.model_dump(mode="json"))
    allowed = MAY_DIFFER + (("train.steps", "train.epochs") if recipe.optimizer.schedule == "constant" else ())
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    return [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in keys if not _named(k, allowed)]


def _named(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO, errno.ESTALE)


def _root(error: BaseException) -> BaseException:
    """The OSError under an error, through what DCP wraps around it and what it was raised from; else the error."""
    if isinstance(error, CheckpointException):  # of one rank or several
        inner = [_root(one) for one, _ in error.failures.values()]
        return next((one for one in inner if isinstance(one, OSError)), inner[0] if inner else error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """A full disk or a read-only folder becomes one sentence; nothing that stood before is touched."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause, text = _root(error), str(error)
        if isinstance(cause, OSError) and cause.errno in _DISK:
            reason = os.strerror(cause.errno or 0)
        elif "No space left" in text or "PytorchStreamWriter failed writing" in text:
            reason = os.strerror(errno.ENOSPC)
        elif isinstance(error, CheckpointException):
            raise RuntimeError(f"{target}: {text}") from error
        else:
            raise
        place = next(p for p in (target, *target.parents) if p.exists())
        free = shutil.disk_usage(place).free / 2**30
        raise ValueError(
            f"cannot write {target}: {reason} ({free:.2f} GiB free). What was written before is whole; "
            "make room, or give another folder with run=DIR, and start the same command again."
        ) from error


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step (dropout), as a function of the step alone: checkpoints hold no generator states."""
    torch.manual_seed((seed * 1_000_003 + step * 7_919 + ranks.rank()) & 0x7FFF_FFFF_FFFF_FFFF)
