"""Four ranks: shards of a fourth, and two copies of halves; a head tied to its embedding."""

from __future__ import annotations

import pytest

from tests.made import made_recipe
from tests.tiny import tiny_language, tiny_vision
from tests.train.sharded import assert_equal, on_ranks, take_steps
from vistune.models.assemble import assemble

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {"four": {"shard": "zero3"}, "copies": {"shard": "zero2", "replicas": 2}}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    vision = tiny_vision(folder / "vision")
    language = tiny_language(folder / "language", "qwen2", tied=True)
    assemble(vision=str(vision), language=str(language), out=folder / "stage0", template="qwen_2", image="pad")
    return folder / "stage0"


@pytest.mark.slow
def test_four_ranks_equal_one(tied, data, tmp_path):
    learn = {"connector": 1e-3, "language": 2e-4}

    def recipe(case, **parallel):
        return made_recipe(tied, data, tmp_path / case, learn=learn, parallel=parallel)

    def work():
        refused = recipe("refused", shard="zero3", replicas=3)
        with pytest.raises(ValueError, match=r"parallel\.replicas = 3: 4 ranks cannot be dealt"):
            take_steps(refused, 1)
        return {case: take_steps(recipe(case, **CASES[case]), 2) for case in CASES}

    four, one = on_ranks(4, work, tmp_path), take_steps(recipe("one"), 2)
    assert not any("lm_head" in name for name in one["weights"])
    for rank in four:
        for case in CASES:
            assert_equal(rank[case], one)
        assert rank["four"]["bytes"] < 0.27 * one["bytes"] < rank["copies"]["bytes"] < 0.52 * one["bytes"]
