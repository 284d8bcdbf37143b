"""Shards in half precision: gathered in the type of the products, summed in fp32; a loss scale, masters."""

from __future__ import annotations

import pytest

from tests.made import made_recipe
from tests.train.sharded import on_ranks, take_steps
from vistune.train.spreading import precision as precisions

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = ("bf16", "bf16_true", "fp16")


@pytest.mark.slow
def test_two_ranks_are_near_one(start, data, tmp_path, monkeypatch):
    """Not every rounding is the same; what is wrong by a factor, or not finite, is."""
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)
    learn = {"connector": 1e-3, "language": 2e-4}

    def recipe(precision, shard):
        train = {"precision": precision}
        return made_recipe(
            start, data, tmp_path / shard / precision, learn=learn, train=train, parallel={"shard": shard}
        )

    def work():
        return {precision: take_steps(recipe(precision, "zero3"), 2) for precision in PRECISIONS}

    two = on_ranks(2, work, tmp_path)
    for precision in PRECISIONS:
        one = take_steps(recipe(precision, "none"), 2)
        for rank in two:
            assert rank[precision]["losses"] == pytest.approx(one["losses"], abs=1e-2)
            assert rank[precision]["norms"] == pytest.approx(one["norms"], rel=5e-2)
        assert two[0][precision]["losses"] == two[1][precision]["losses"]
