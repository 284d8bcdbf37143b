"""Weights in shards over two ranks: losses, norms and weights of one process, whatever is said of the shards."""

from __future__ import annotations

import weakref

import pytest

from tests.made import made_recipe
from tests.train.sharded import assert_equal, on_ranks, take_steps
from vistune.models import filling

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

LEARN = {"connector": 1e-3, "language": 2e-4, "vision.layers.-2:": 1e-5}
"""The first vision layer is frozen beside its like."""
CASES = {
    "none": {},
    "zero3": {"parallel": {"shard": "zero3"}},
    "zero2": {"parallel": {"shard": "zero2"}, "train": {"checkpointing": "full"}},
    "offload": {"parallel": {"shard": "zero3", "offload": True}},
    "lora": {"parallel": {"shard": "zero3"}, "lora": {"r": 4}},
}


def recipe_of(case, start, data, folder):
    return made_recipe(start, data, folder, learn=LEARN, **CASES[case])


@pytest.fixture(scope="module")
def two(start, data, tmp_path_factory):
    """Every case on two ranks, in one process group."""
    folder = tmp_path_factory.mktemp("two")

    def work():
        return {case: take_steps(recipe_of(case, start, data, folder / case), 2) for case in CASES if case != "none"}

    return on_ranks(2, work, folder / "results")


@pytest.fixture(scope="module")
def one(start, data, tmp_path_factory):
    """The same on one process, each kind once."""
    folder = tmp_path_factory.mktemp("one")
    return {case: take_steps(recipe_of(case, start, data, folder / case), 2) for case in ("none", "lora")}


@pytest.mark.parametrize("case", ["zero3", "zero2", "offload"])
def test_two_ranks_equal_one(one, two, case):
    for rank in two:
        assert_equal(rank[case], one["none"])


def test_adapters_equal_one_process(one, two):
    for rank in two:
        assert_equal(rank["lora"], one["lora"])
    assert any(".lora_A." in name for name in two[0]["lora"]["weights"])


def test_no_rank_holds_the_whole_model(one, two):
    """Rows are dealt evenly, but for the padding of what two do not divide."""
    for rank in two:
        assert rank["zero3"]["bytes"] <= 0.51 * one["none"]["bytes"]


def test_filling_holds_one_tensor_at_a_time(start, data, tmp_path, monkeypatch):
    """What is read of the stored model is let go before the next is read."""
    real, alive, most = filling.stored_tensors, weakref.WeakSet(), []

    def counted(loaded):
        read = real(loaded)

        def one(name):
            value = read(name).clone()
            alive.add(value)
            most.append(len(alive))
            return value

        return one

    monkeypatch.setattr(filling, "stored_tensors", counted)
    take_steps(made_recipe(start, data, tmp_path), 0)
    assert len(most) > 50 and max(most) <= 3
