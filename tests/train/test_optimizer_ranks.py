"""8-bit moments and stochastic rounding over shards: two ranks with half of the weights each go on from one rank's
checkpoint. What is laid out over ranks is no copy."""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from tests.made import made_recipe
from tests.runs import finish_run, run_both, start_run
from tests.train.test_optimizer_runs import losses
from vistune.train.spreading import parallel
from vistune.train.spreading import precision as precisions
from vistune.train.updating import moments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "shard", "near"),
    [("fp32", "zero2", 1e-5), pytest.param("bf16_stochastic", "zero3", 2e-3, marks=pytest.mark.slow)],
)
def test_two_ranks_go_on_as_one(start, data, tmp_path, precision, shard, near, monkeypatch):
    """Sums over ranks add in another order, and in bf16 gradients of several micro-batches round otherwise; codes,
    scales and noise are the same by themselves, as the tests of single updates show to the bit."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)
    monkeypatch.setattr(moments, "SMALL", 64)
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = made_recipe(
        start,
        data,
        one,
        optimizer={"name": "adamw8bit", "schedule": "constant"},
        train={"precision": precision, "batch": 4, "steps": 3},
        checkpoint={"every": 1, "keep": 9},
    )
    finish_run(start_run(recipe, tmp_path), tmp_path)
    later = ("model", "summary.json", "metrics.jsonl", "step-00000002", "step-00000003")
    shutil.copytree(one, two, ignore=shutil.ignore_patterns(*later))
    assert "step 1 of 3" in run_both(recipe, tmp_path, f"run={two}", f"parallel.shard={shard}")
    assert losses(two) == pytest.approx(losses(one)[1:], abs=near)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_what_lies_on_the_host_is_laid_out_where_it_is(alone, monkeypatch):
    """As with offload, where the mesh is of GPUs: a copy there would leave a resumed run without its moments."""
    like = distribute_tensor(torch.zeros(6, 4), alone, [Shard(0)])
    held, scales = torch.ones(6, 4, dtype=torch.uint8), torch.ones(6, 2)
    monkeypatch.setattr(DeviceMesh, "device_type", property(lambda self: "cuda"))
    for mine, columns in ((held, None), (scales, 2)):
        laid = parallel.spread(mine, like, columns)
        assert laid.shape == mine.shape and laid.dtype == mine.dtype and laid.placements == like.placements
        assert laid._local_tensor is mine
