"""Orders by length and modality, against what LLaVA's own sampler gave."""

import json

import numpy as np
import pytest
import torch

from tests.data.small import GOLDEN
from vistune.data.grouping import length_grouped, modality_grouped

SAMPLER = json.loads((GOLDEN / "sampler.json").read_text())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=[f"{case['name']}-{case['seed']}" for case in cases])


@named(SAMPLER["modality_grouped"])
def test_modality_grouped_is_the_references(case):
    given = np.array(case["lengths"]), case["batch_size"], case["world_size"]
    assert modality_grouped(*given, seeded(case["seed"])).tolist() == case["order_generator_none"]
    apart = modality_grouped(*given, seeded(case["seed"]), seeded(case["generator_seed"]))
    assert apart.tolist() == case["order_with_generator"]


@named(SAMPLER["length_grouped"])
def test_length_grouped_is_the_references(case):
    given = np.array(case["lengths"]), case["batch_size"], case["world_size"]
    assert length_grouped(*given, seeded(case["seed"])).tolist() == case["order"]


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    modality_grouped(np.array([3, -4, 5, -6]), 1, 2, seeded(0))
    assert torch.equal(before, torch.get_rng_state())


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sample 1 has no length"):
        modality_grouped(np.array([3, 0, -2]), 1, 1, seeded(0))


def test_many_are_grouped_quickly():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2048, 60_000) * np.where(rng.random(60_000) < 0.06, -1, 1)
    order = modality_grouped(lengths, 16, 8, seeded(0))
    assert sorted(order.tolist()) == list(range(60_000))
    steps = (lengths[order] > 0)[: 60_000 // 128 * 128].reshape(-1, 128)
    assert (steps[:-2].all(1) | ~steps[:-2].any(1)).all()
    micros = np.abs(lengths[order[: 128 * 400]]).reshape(-1, 8, 16).sum(2)
    assert (micros.max(1) * 8 / micros.sum(1)).mean() < 1.03
