"""Every family in shards over two ranks: towers of any kind, and one rank that shows a blank picture of the layout."""

from __future__ import annotations

import pytest
import torch

from tests.each_family import folders_in
from tests.made import made_recipe
from tests.train.sharded import assert_equal, on_ranks, take_steps
from vistune.models.families import names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_two_ranks_equal_one(data, tmp_path):
    """Batches of three samples leave a rank without pictures at times. Batch norms that learn see their own rank's
    pictures, so FastViTHD is frozen here."""
    folder = folders_in(tmp_path / "made")
    starts = {name: folder(name) for name in names()}

    def recipe(name, shard):
        learn = {"connector": 1e-3, "language.layers.0": 1e-4} | ({} if name == "fastvlm" else {"vision": 1e-5})
        sections = {"data": {"length": 1200}, "train": {"batch": 3}, "parallel": {"shard": shard}}
        return made_recipe(starts[name], data, tmp_path / shard / name, learn=learn, **sections)

    def work():
        return {name: take_steps(recipe(name, "zero3"), 2) for name in starts}

    two = on_ranks(2, work, tmp_path)
    for name in starts:
        one = take_steps(recipe(name, "none"), 2)
        for rank in two:
            assert_equal(rank[name], one, 2e-5)


@pytest.mark.slow
def test_statistics_of_batch_norms_leave_blank_pictures_out(data, tmp_path):
    """Against two ranks with whole weights, which see the same pictures and no blank ones."""
    start = folders_in(tmp_path / "made")("fastvlm")

    def recipe(shard):
        learn = {"connector": 1e-4, "vision": 1e-4}
        sections = {"data": {"length": 1200}, "train": {"batch": 3}, "parallel": {"shard": shard}}
        return made_recipe(start, data, tmp_path / shard, learn=learn, **sections)

    def work():
        blanks = []
        found = take_steps(recipe("zero3"), 2, lambda batches: blanks.extend(batch.blank for batch in batches))
        return found, take_steps(recipe("none"), 2), blanks

    two = on_ranks(2, work, tmp_path)
    assert any(any(blanks) for _, _, blanks in two)
    for found, wanted, _ in two:
        assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5) and found["buffers"]
        for name, value in wanted["buffers"].items():
            torch.testing.assert_close(found["buffers"][name], value, rtol=1e-4, atol=1e-5)
