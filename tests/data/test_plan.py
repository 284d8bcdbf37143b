"""The plan's promises: every sample once, no pack too long, the same for any ranks, any step reachable directly."""

from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest
from conftest import make_index
from hypothesis import given, settings
from hypothesis import strategies as st

from vistune.data.order import Order, Permutation
from vistune.data.packing import best_fit, deal
from vistune.data.plan import Plan

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)
UNIT = st.sampled_from(["samples", "packs"])


def flat(steps) -> list[int]:
    return [position for packs in steps for pack in packs for position in pack]


def epoch(plan: Plan, number: int = 0):
    start = number * plan.steps_per_epoch
    return [plan.step(k) for k in range(start, start + plan.steps_per_epoch)]


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**63))
def test_permutation_is_a_bijection(size, key):
    places = np.arange(size)
    moved = Permutation(size, key)(places)
    assert sorted(moved.tolist()) == places.tolist()
    some = places[:: max(1, size // 7)]
    assert Permutation(size, key)(some).tolist() == moved[some].tolist()


def test_permutation_of_very_many_is_quick_mixed_and_pinned():
    big = Permutation(85_000_000, 0, 0)
    begin = time.process_time()
    moved = big(np.arange(100_000))
    assert time.process_time() - begin < 2
    assert len(np.unique(moved)) == 100_000 and moved.min() >= 0 and moved.max() < 85_000_000
    # Neighbours must not stay neighbours, and every part of the range is reached alike.
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.02
    parts = np.bincount(moved // 8_500_000, minlength=10)
    assert parts.min() > 9_600 and parts.max() < 10_400
    # A resumed run must find the order it left, on any machine and with any numpy.
    assert Permutation(1000, 7, 1)(np.arange(6)).tolist() == [983, 729, 608, 5, 31, 699]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 40), UNIT, st.booleans(), st.integers(0, 5), st.integers(1, 50))
def test_every_good_sample_once_an_epoch_and_no_pack_too_long(lengths, batch, unit, pack, seed, window):
    bad = set(range(0, len(lengths), 7)) - {0}
    index = make_index(lengths, bad=bad, length=64)
    plan = Plan(index, batch=batch, unit=unit, length=64, pack=pack, seed=seed, window=window)
    for number in (0, 1):
        steps = epoch(plan, number)
        assert sorted(flat(steps)) == sorted(set(range(len(lengths))) - bad)
        assert all(sum(lengths[i] for i in row) <= 64 for step in steps for row in step)
        sizes = [len(flat([step])) if unit == "samples" else len(step) for step in steps]
        assert sizes[:-1] == [batch] * (len(sizes) - 1) and 1 <= sizes[-1] <= batch
        assert pack or all(len(row) == 1 for step in steps for row in step)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 40), UNIT, st.integers(1, 3))
def test_ranks_share_the_same_step(lengths, batch, unit, per_micro):
    plan = Plan(make_index(lengths, length=64), batch=batch, unit=unit, length=64, window=32)
    for k in range(plan.steps_per_epoch + 1):
        step = plan.step(k)
        for world in (1, 2, 4, 8):
            ranks = [plan.micro_batches(k, rank, world, per_micro) for rank in range(world)]
            assert sorted(pack for micros in ranks for micro in micros for pack in micro) == sorted(step)
            assert {len(micros) for micros in ranks} == {-(-len(step) // (world * per_micro))}
            assert all(len(micro) <= per_micro for micros in ranks for micro in micros)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 40), UNIT, st.data())
def test_any_step_is_reached_directly(lengths, batch, unit, data):
    def plan():
        return Plan(make_index(lengths, length=64), batch=batch, unit=unit, length=64, seed=3, window=16)

    one = plan()
    steps = [one.step(k) for k in range(3 * one.steps_per_epoch)]
    k = data.draw(st.integers(0, len(steps) - 1))
    assert plan().step(k) == steps[k]
    assert pickle.loads(pickle.dumps(one)).step(k) == steps[k]


@pytest.mark.parametrize("unit", ["samples", "packs"])
def test_order_depends_on_seed_and_epoch(unit):
    index = make_index(np.arange(1, 301) % 60 + 4, length=64)
    plans = [Plan(index, batch=16, unit=unit, length=64, seed=seed, window=64) for seed in (0, 0, 1)]
    first, same, other = (flat(epoch(plan)) for plan in plans)
    assert first == same != other
    assert flat(epoch(plans[0], 1)) != first


def test_steps_of_a_run():
    index = make_index([10] * 100)
    assert Plan(index, batch=30, length=64).steps == 4
    assert Plan(index, batch=30, length=64, epochs=2.0).steps == 8
    assert Plan(index, batch=30, length=64, epochs=0.5).steps == 2
    assert Plan(index, batch=30, length=64, epochs=2.0, steps=5).steps == 5
    assert Plan(index, batch=30, length=64).supervised(3) == 10 * 3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.data())
def test_sources_come_as_often_as_asked(sizes, data):
    repeats = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.5, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    sources = np.repeat(np.arange(len(sizes)), sizes)
    index = make_index(np.full(len(sources), 5), sources=sources, bad=[0] if sizes[0] > 1 else [])
    order = Order(index, 1, repeats)
    for number in (0, 1):
        drawn = order(number, np.arange(len(order))).tolist()
        for source, times in enumerate(repeats):
            good = [i for i in np.flatnonzero(sources == source).tolist() if not index.columns["fault"][i]]
            counts = [Counter(drawn)[i] for i in good]
            assert sum(counts) == round(len(good) * times)
            assert max(counts) - min(counts) <= 1
    assert 0 not in drawn or sizes[0] == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_best_fit_is_close_to_the_least_possible(lengths):
    packs = best_fit(np.array(lengths), 100)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(loads) <= 100
    # Best fit never opens a pack for what fits an open one, so no two packs could be joined.
    assert len(packs) == 1 or sum(sorted(loads)[:2]) > 100


def test_best_fit_finds_a_perfect_packing():
    rng = np.random.default_rng(0)
    cuts = [np.diff([0, *sorted(rng.choice(np.arange(1, 2048), 3, replace=False)), 2048]) for _ in range(300)]
    packs = best_fit(np.concatenate(cuts), 2048)
    assert len(packs) <= 303


def test_packs_are_full_and_quickly_made():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.8, 60_000).astype(int) + 576, 1, 2048)
    plan = Plan(make_index(lengths, length=8192), batch=16, unit="packs", length=8192)
    begin = time.process_time()
    assert plan.steps_per_epoch
    assert time.process_time() - begin < 5  # 0.3 s alone on one core
    facts = plan.describe()
    assert facts["padding_share"] < 0.03  # no sample is shorter than an image, so gaps below 577 stay
    assert facts["tokens"] == lengths.sum() and facts["samples"] == 60_000


def test_ranks_are_dealt_like_work():
    rng = np.random.default_rng(0)
    costs = rng.lognormal(7, 0.5, 256)
    dealt = deal(costs, 8, 1)
    slowest = sum(max(costs[pack] for rank in micro for pack in rank) for micro in dealt)
    assert slowest * 8 < 1.1 * costs.sum()  # waiting for the slowest rank costs a tenth; in given order a half
    had = np.array([sum(costs[pack] for micro in dealt for pack in micro[rank]) for rank in range(8)])
    assert had.max() < 1.03 * had.min()


def test_describe_counts():
    index = make_index([30, 30, 20, 10, 64], images=[1, 0, 2, 0, 1], bad=[3], length=64)
    facts = Plan(index, batch=5, length=64).describe()
    assert facts == {
        "samples": 4,
        "set_aside": 1,
        "shortened": 0,
        "steps_per_epoch": 1,
        "steps": 1,
        "packs": 3,
        "tokens": 144,
        "supervised": 10 + 10 + 6 + 21,
        "padding_share": 1 - 144 / 192,
        "longest_pack": 64,
        "images_per_pack_max": 2,
        "images_per_pack_mean": 4 / 3,
    }


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="no sample to train on: 0 of 2 rows"):
        Plan(make_index([3, 3], bad=[0, 1]), batch=1, length=64)
    with pytest.raises(ValueError, match="samples of 100 tokens, packs have room for 64"):
        Plan(make_index([3, 100]), batch=1, length=64)
    with pytest.raises(ValueError, match="a sample of 65 tokens does not fit a pack of 64"):
        best_fit(np.array([3, 65]), 64)
    with pytest.raises(ValueError, match="2 sources, epochs are given for 1"):
        Order(make_index([3, 3], sources=[0, 1]), 0, [1.0])
