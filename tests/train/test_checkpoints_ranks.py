"""What one process saved is loaded by two, saved, loaded by four, saved, and loaded by one again: the same bits."""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vistune import ranks
from vistune.train.keeping import checkpoint, saving

STATE = {"state": {"step": 2}, "quarantine": [{"source": "a", "row": 3}]}


def drawn():
    """Shapes that two and four ranks cannot share evenly, a scalar, whole numbers, halves."""
    draw = torch.Generator().manual_seed(0)
    return {
        "model/matrix": torch.randn(7, 5, generator=draw),
        "model/one row": torch.randn(1, 6, generator=draw).to(torch.bfloat16),
        "optimizer/codes": torch.randint(0, 255, (9, 4), generator=draw, dtype=torch.uint8),
        "plain/vector": torch.randn(11, generator=draw),
        "plain/step": torch.tensor(17.0),
    }


def laid(world, tensors):
    """Over the ranks, the names that begin with plain apart; of four ranks two pairs hold copies (HSDP)."""
    if world == 1:
        return tensors
    mesh = init_device_mesh("cpu", (world,) if world < 4 else (2, 2))
    places = (Shard(0),) if world < 4 else (Replicate(), Shard(0))
    whole = {name: one for name, one in tensors.items() if name.startswith("plain")}
    return {name: one if name in whole else distribute_tensor(one, mesh, places) for name, one in tensors.items()}


def pass_on(source, target):
    """Load what is in `source` into tensors of nothing, compare, and save them to `target` with a later change."""
    ranks.start("cpu", 60)
    held = laid(ranks.world(), {name: torch.zeros_like(one) for name, one in drawn().items()})
    if source is not None:
        assert checkpoint.load(checkpoint.folders(source)[-1], held) == STATE
        for name, value in drawn().items():
            now = held[name].full_tensor() if isinstance(held[name], DTensor) else held[name]
            assert torch.equal(now, value), name
    else:
        held = drawn()
    with saving.Saver(target, keep=1) as saver:
        saver.save(2, held, STATE)
        for one in held.values():  # the next steps
            local = one.to_local() if isinstance(one, DTensor) else one
            local.zero_()
    assert checkpoint.folders(target)  # on every rank, once `wait` is over
    ranks.stop()


def in_processes(world, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    each = [context.Process(target=as_rank, args=(rank, world, port, *arguments)) for rank in range(world)]
    for process in each:
        process.start()
    for process in each:
        process.join(60)
    assert [process.exitcode for process in each] == [0] * world


def as_rank(rank, world, port, *arguments):
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pass_on(*arguments)


def test_one_two_four_one(tmp_path):
    assert not dist.is_initialized()
    places = [None, tmp_path / "1", tmp_path / "2", tmp_path / "4", tmp_path / "again"]
    for world, source, target in zip((1, 2, 4, 1), places, places[1:], strict=False):
        in_processes(world, source, target)
    sizes = [sorted(file.stat().st_size for file in checkpoint.folders(p)[0].glob("*.distcp")) for p in places[1:]]
    assert [len(one) for one in sizes] == [1, 2, 4, 1]  # every rank writes its part
