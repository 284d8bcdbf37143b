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


def start(device: str = "auto", timeout: float = 1800.0, group: bool = False) -> torch.device:
    """Join the process group that `torchrun` describes, if there is one, and choose this rank's device. `group`: this
    process alone makes one where there is none; what lies in shards needs it.

    `device` is "auto", "cpu" or anything `torch.device` takes; "cuda" is each process's own. Raises ValueError for a
    device that is not there, or not there for as many processes.
    """
    chosen = _device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group(_backend(chosen.type), timeout=timedelta(seconds=timeout))
    elif group and not dist.is_initialized():
        dist.init_process_group(_backend(chosen.type), store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def _backend(kind: str) -> str:
    """Small facts of the host go over the host, so that nobody waits for an accelerator to tell them."""
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        chosen = (kind or torch.device("cpu")) if name == "auto" else torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device = {name!r}: no such device; say auto, cpu, cuda or cuda:1, ...") from None
    if chosen.type in ("cpu", "meta"):
        return chosen
    count = torch.accelerator.device_count() if kind is not None and kind.type == chosen.type else 0
    here, mine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    named = chosen.index is not None and name != "auto"
    index = chosen.index if named else mine
    if wrong := _wrong(chosen, named, count, max(here, mine + 1)):
        raise (ValueError if mine == 0 else SaidElsewhere)(f"train.device = {name}: {wrong}")
    torch.accelerator.set_device_index(index)
    return torch.device(chosen.type, index)


def _wrong(chosen: torch.device, named: bool, count: int, processes: int) -> str:
    """What is wrong with `processes` of this machine, which has `count` such devices, on the chosen one."""
    if not count:
        return f"this machine has no {chosen.type} that torch can use; set train.device=cpu, or run `vistune doctor`"
    if named and chosen.index >= count:
        return f"{chosen} does not exist, this machine has {count} ({chosen.type}:0 to {chosen.type}:{count - 1})"
    if named and processes > 1:
        return f"{processes} processes cannot share {chosen}; set train.device={chosen.type}, a device for each"
    if not named and processes > count:
        return f"{processes} processes on a machine with {count} {chosen.type} device(s); start one for each device"
    return ""


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
