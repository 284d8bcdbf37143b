"""A rank that has no pictures for fifty steps beside one that has some: it does not hang, and changes nothing."""

from __future__ import annotations

import json

import pytest

from tests.made import made_data, made_recipe
from tests.train.sharded import assert_equal, on_ranks, take_steps

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50
PLACEHOLDER = 1000


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Of eight rows one has a picture; of two in a step the one with a picture costs more, and goes to rank 0."""
    path = made_data(tmp_path_factory.mktemp("few"), rows=2 * STEPS)
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row["conversations"] = row["conversations"][:2]
        if number % 8:
            row.pop("image", None)
            asked, answer = row["conversations"]
            asked["value"], answer["value"] = "red or green?", answer["value"][:20]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.slow
def test_fifty_steps(start, few, tmp_path):
    """Where neither has one nothing learns, and there is no backward pass."""

    def recipe(shard):
        train = {"batch": 2, "steps": STEPS, "seed": 1}
        learn = {"connector": 1e-3}
        sections = {"data": {"pack": False}, "parallel": {"shard": shard}}
        return made_recipe(start, few, tmp_path / shard, learn=learn, train=train, **sections)

    def work():
        shown = []
        result = take_steps(recipe("zero3"), STEPS, lambda batches: shown.extend(map(seen, batches)))
        return result | {"shown": shown}

    two, one = on_ranks(2, work, tmp_path), take_steps(recipe("none"), STEPS)
    with_pictures = [step for step, (images, _) in enumerate(two[0]["shown"]) if images]
    assert len(two[1]["shown"]) == STEPS and 5 < len(with_pictures) < STEPS / 2
    for step, (images, own) in enumerate(two[1]["shown"]):
        assert images == (step in with_pictures) and not own
    for rank in two:
        assert_equal(rank, one)


def seen(batch):
    """Pictures of a micro-batch, and placeholders among the tokens of its samples."""
    ids = batch.ids[: batch.tokens]
    return batch.images, int((ids == PLACEHOLDER).sum())
