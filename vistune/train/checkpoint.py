"""Checkpoints of a run: what learned, the optimizer, and where the run stands. Written beside, then renamed.

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

from vistune import ranks
from vistune.recipe import Recipe
from vistune.train.learn import Learned
from vistune.train.optimizer import Optimizer

MAY_DIFFER = (
    *("name", "run", "parallel", "checkpoint", "log"),
    *("data.workers", "data.cache", "data.strict", "data.quarantine_cap"),
)
"""Keys of the recipe that may differ between a run and its resumption: nothing here touches a weight."""


def folders(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(p for p in found if re.fullmatch(r"step-\d{8}", p.name) and (p / "run.json").is_file())


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step` and drop all but the newest `keep`. A kill at any moment leaves the older ones whole."""
    target = run / "checkpoints" / f"step-{step:08d}"
    beside = target.with_name(target.name + ".tmp")
    with disk_errors(target):
        if ranks.is_first():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        ranks.barrier()
        with warnings.catch_warnings():  # one process without a process group is a case of its own for DCP, and meant
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(tensors, checkpoint_id=beside)
        if ranks.is_first():
            (beside / "run.json").write_text(json.dumps(state), encoding="utf-8")
            _sync(beside)
            if target.exists():  # the same step again, after a resume: the same bytes
                shutil.rmtree(target)
            os.replace(beside, target)
            _sync(target.parent)
            for old in folders(run)[:-keep]:
                shutil.rmtree(old)
    ranks.barrier()
    return target


def load(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Read a checkpoint into `tensors`, in place; returns the state that was saved with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, checkpoint_id=folder)
    except Exception as error:  # DCP wraps what its planner and storage raise
        raise ValueError(
            f"checkpoint {folder}: cannot be read ({str(error).splitlines()[0][:200]}). "
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


def _sync(folder: Path) -> None:
    """Flush a folder's files, then its own entry, to the disk, before a rename makes them count."""
    for path in [p for p in folder.iterdir() if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """A full disk or a read-only folder becomes one sentence; nothing that stood before is touched."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        text = str(error)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            reason = os.strerror(cause.errno or 0)
        elif "No space left" in text or "PytorchStreamWriter failed writing" in text:
            reason = os.strerror(errno.ENOSPC)
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
