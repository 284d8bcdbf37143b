"""Where a process runs: devices that are not there, too many processes, and a recipe for many GPUs on one."""

from __future__ import annotations

import pytest
import torch

from tests.made import made_recipe
from vistune import ranks
from vistune.train import stage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def two_cards(monkeypatch):
    """A machine with two cards, as torch would tell of it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


def process(monkeypatch, local: int, here: int):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:7", r"train\.device = cuda:7: cuda:7 does not exist, this machine has 2 \(cuda:0 to cuda:1\)"),
        ("xpu", r"this machine has no xpu"),
        ("gpu", r"train\.device = 'gpu': no such device"),
    ],
)
def test_a_device_that_is_not_there(two_cards, name, said):
    with pytest.raises(ValueError, match=said):
        ranks.start(name)


def test_each_process_has_its_own(two_cards, monkeypatch):
    process(monkeypatch, 1, 2)
    assert ranks.start("auto") == ranks.start("cuda") == torch.device("cuda", 1)
    with pytest.raises(ranks.SaidElsewhere, match="2 processes cannot share cuda:1"):
        ranks.start("cuda:1")


def test_more_processes_than_cards(two_cards, monkeypatch):
    """The first of the machine says it, the others leave with it."""
    for local in range(4):
        process(monkeypatch, local, 4)
        with pytest.raises(ValueError, match=r"4 processes on a machine with 2 cuda device\(s\)") as met:
            ranks.start("auto")
        assert isinstance(met.value, ranks.SaidElsewhere) == (local > 0)


def test_no_cards(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ranks.start("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="this machine has no cuda"):
        ranks.start("cuda")


def test_host_facts_go_over_the_host():
    assert ranks._backend("cpu") == "gloo" and ranks._backend("cuda") == "cpu:gloo,cuda:nccl"


@pytest.mark.slow
def test_a_recipe_for_eight_gpus_on_one(start, data, tmp_path, capsys):
    """The same global batch by accumulation, unsharded, and it says so."""
    shards = {"shard": "zero3", "replicas": 2}
    eight = stage.run(made_recipe(start, data, tmp_path / "eight", parallel=shards, train={"steps": 2}))
    said = "parallel.shard = zero3: one rank, nothing is sharded; steps are the same 8 samples, by accumulation"
    assert said in " ".join(capsys.readouterr().out.split())
    one = stage.run(made_recipe(start, data, tmp_path / "one", train={"steps": 2}))
    assert eight["losses"] == one["losses"]
    offloaded = stage.run(
        made_recipe(start, data, tmp_path / "host", parallel=shards | {"offload": True}, train={"steps": 2})
    )
    assert offloaded["losses"] == pytest.approx(one["losses"], abs=1e-5)
