"""Which of the processes of a run this one is, and the few collectives everybody needs.

Works unchanged without a process group: then there is one rank and every collective is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def start(device: str = "auto", timeout: float = 1800.0) -> torch.device:
    """Join the process group that `torchrun` describes, if there is one, and choose this rank's device.

    `device` is "auto", "cpu" or anything `torch.device` takes. Raises ValueError for a device that is not there.
    """
    chosen = _device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return chosen


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            assert kind is not None
            chosen = torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
        else:
            chosen = torch.device("cpu")
    else:
        chosen = torch.device(name)
    if chosen.type not in ("cpu", "meta"):
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ValueError(
                f"train.device: {chosen} does not exist, this machine has {count} accelerator(s). "
                "Start at most that many processes per node, or set train.device=cpu."
            )
        torch.accelerator.set_device_index(chosen.index or 0)
    return chosen


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (picklable, small), in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


class SaidElsewhere(ValueError):
    """A ValueError of rank 0, which reports it; the other ranks only leave with it."""


def on_first(work: Callable[[], Any]) -> None:
    """Rank 0 does `work` while the others wait; if it ends in a ValueError, every rank leaves with it."""
    error: ValueError | None = None
    if is_first():
        try:
            work()
        except ValueError as mistake:
            error = mistake
    said = from_first(str(error) if error else None)
    if error:
        raise error
    if said is not None:
        raise SaidElsewhere(said)


def from_first(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
