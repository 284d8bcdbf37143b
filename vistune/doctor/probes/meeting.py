"""One rank at the meeting that torchrun calls: who came, whose clock is off, whether gloo and NCCL pass anything on."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vistune.doctor.trial import tell

ROUNDS = 5
"""Times that the clocks are compared."""


def main(patience: float, findings: str) -> None:
    """Facts: `present` (what each rank told), `missing`; `skews` in seconds; `gloo`, `nccl`: True or the error.

    `findings` is JSON of what this rank has found, to be told to rank 0.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(rank, world, patience)
    store.set(f"vistune-doctor/{rank}", json.dumps(introduce(rank) | {"findings": json.loads(findings)}))
    present, missing = gather(store, world, patience)
    tell(present=present, missing=missing)
    if missing:
        return
    limit = timedelta(seconds=patience)
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=world, timeout=limit)
    tell(skews=skews(world), gloo=adds_up(torch.ones(1), world))
    if may_use_nccl(present):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        tell(nccl="hung")
        tell(nccl=adds_up(torch.ones(1, device=device), world, dist.new_group(backend="nccl", timeout=limit)))
    store.set(f"vistune-doctor/done/{rank}", "1")
    for other in range(world) if rank == 0 else ():  # the store may live in this process: leave last
        store.wait([f"vistune-doctor/done/{other}"], limit)


def open_store(rank: int, world: int, patience: float) -> dist.Store:
    """The store that torchrun serves, or one of rank 0's own where no torchrun does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=patience)
    return dist.TCPStore(host, port, world, rank == 0 and not served, timeout=limit, wait_for_workers=False)


def introduce(rank: int) -> dict[str, Any]:
    """Who this is: host, device with its own number, versions."""
    said: dict[str, Any] = {"rank": rank, "host": socket.gethostname(), "torch": torch.__version__, "device": "cpu"}
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        properties = torch.cuda.get_device_properties(index)
        uuid = str(getattr(properties, "uuid", "")) or f"{said['host']} {index}"
        said |= {"device": properties.name, "uuid": uuid}
    elif torch.accelerator.is_available():
        said |= {"device": f"{torch.accelerator.current_accelerator()} {index}", "uuid": f"{said['host']} {index}"}
    return said


def gather(store: dist.Store, world: int, patience: float) -> tuple[list[dict[str, Any]], list[int]]:
    """What every rank told, and the ranks that told nothing within the time."""
    until, present, missing = time.monotonic() + patience, [], []
    for rank in range(world):
        key = f"vistune-doctor/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
            present.append(json.loads(store.get(key)))
        except (RuntimeError, dist.DistError):
            missing.append(rank)
    return present, missing


def skews(world: int) -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's: read right after a barrier, the middle of several times."""
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        stamps: list[Any] = [None] * world
        dist.all_gather_object(stamps, time.time())
        rounds.append([stamp - stamps[0] for stamp in stamps])
    return [round(statistics.median(column), 4) for column in zip(*rounds, strict=True)]


def may_use_nccl(present: list[dict[str, Any]]) -> bool:
    """Every rank has a card of its own; two on one card would only hear NCCL's own complaint."""
    uuids = [one.get("uuid") for one in present]
    return (
        torch.cuda.is_available() and dist.is_nccl_available() and None not in uuids and len(set(uuids)) == len(uuids)
    )


def adds_up(one: torch.Tensor, world: int, group: Any = None) -> bool | str:
    """Whether the sum over the ranks is right, or the error."""
    try:
        dist.all_reduce(one, group=group)
        return True if float(one) == world else f"the sum of {world} ones is {float(one)}"
    except (RuntimeError, dist.DistError) as error:
        return " ".join(str(error).split())[:400]


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
