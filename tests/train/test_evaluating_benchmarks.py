"""Every benchmark as training asks it: files read and the rule tried before the first step, a part of it is partial."""

from __future__ import annotations

import json

import pytest

from tests.evaluate import toys
from vistune.asking import Said
from vistune.recipe import Evaluate
from vistune.train.measuring import benchmarks

JUDGED = ("llava_bench", "mmvet")
each_layout = pytest.mark.parametrize("name", toys.LAYOUTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All of them in one folder, as playground/data/eval is."""
    folder = tmp_path_factory.mktemp("eval")
    for make in toys.LAYOUTS.values():
        make(folder)
    return folder


@each_layout
def test_each_is_read_and_scored(name, root, tmp_path):
    toy = toys.LAYOUTS[name](tmp_path)
    (chosen,) = benchmarks.read(Evaluate(benchmarks=[name], data=str(root)))
    assert len(chosen.questions) == chosen.total > 0
    right = {(str(row["question_id"]), row["prompt"]): row["text"] for row in toy.right}
    said = [Said(text=right.get(one.key, one.truth)) for one in chosen.questions]
    found = benchmarks.scored(chosen, said, 3)
    assert json.loads(json.dumps(found.samples)) == found.samples and len(found.samples) == 3
    assert set(found.scores) == set(chosen.scores)
    if name in JUDGED:
        assert not found.scores and found.headline is None
    else:
        assert found.share == 1 and found.headline in (100.0, 2000.0)
        assert all(sample["correct"] for sample in found.samples)


@each_layout
def test_a_part_of_each_is_partial(name, root):
    (chosen,) = benchmarks.read(Evaluate(benchmarks=[name], data=str(root), limit=2))
    assert len(chosen.questions) == 2 < chosen.total
    found = benchmarks.scored(chosen, [Said(text="A"), Said(error="unreadable")], 0)
    assert 0 < found.share <= 1 / chosen.total and found.samples == []
