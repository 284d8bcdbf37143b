"""Packs: none too long, none with too many pictures, as full as an independent packer over all lengths makes them."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import GOLDEN, make_index
from vistune.data.packing import deal, pack
from vistune.data.plan import Plan

KNAPSACK = json.loads((GOLDEN.parent / "onevision15" / "labels.json").read_text())["greedy_knapsack"]
"""Lengths, and the bins that LLaVA-OneVision-1.5's offline packer (`greedy_knapsack`) put them in."""

# LLaVA's second stage: (share of the rows, picture or not, median text, spread), 576 placeholders a picture.
MIX = (
    (0.237, 1, 250, 0.6),  # conversations, descriptions, reasoning
    (0.061, 0, 900, 0.8),  # text alone
    (0.124, 1, 170, 0.35),  # short answers, many a picture
    (0.108, 1, 260, 0.5),
    (0.014, 1, 65, 0.2),
    (0.120, 1, 125, 0.25),
    (0.099, 1, 95, 0.2),
    (0.033, 1, 60, 0.25),
    (0.074, 1, 280, 0.6),  # regions
    (0.130, 1, 420, 0.5),
)


def mix(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and pictures of `rows` samples like those of LLaVA's mixture, shuffled, none above 2,048 tokens."""
    rng = np.random.default_rng(seed)
    lengths, images = [], []
    for share, picture, median, spread in MIX:
        count = int(rows * share)
        text = rng.lognormal(np.log(median), spread, count).astype(np.int64)
        lengths.append(np.clip(text, 30, 2048 - 576 * picture) + 576 * picture)
        images.append(np.full(count, picture))
    order = rng.permutation(sum(map(len, lengths)))
    return np.concatenate(lengths)[order], np.concatenate(images)[order]


def offline(lengths: np.ndarray, room: int) -> int:
    """Packs of an independent packer that sees all lengths: the longest that fits, again and again (as first-fit
    decreasing gives), over a histogram."""
    counts = np.bincount(lengths, minlength=room + 1).tolist()
    sizes = np.flatnonzero(counts).tolist()
    packs, left = 0, len(lengths)
    while left:
        space, packs = room, packs + 1
        for size in reversed(sizes):
            taken = min(counts[size], space // size)
            counts[size] -= taken
            space -= taken * size
            left -= taken
        sizes = [size for size in sizes if counts[size]]
    return packs


@pytest.mark.parametrize("case", KNAPSACK, ids=lambda case: f"{len(case['lengths'])}-in-{case['capacity']}")
def test_never_more_packs_than_the_references_bins(case):
    lengths, room = np.array(case["lengths"], np.int64), case["capacity"]
    if "error" in case:
        with pytest.raises(ValueError, match="does not fit"):
            pack(lengths, room)
        return
    packs = pack(lengths, room)
    assert len(packs) <= len(case["bins_of_indices"]) == offline(lengths, room)
    assert sorted(place for packed in packs for place in packed) == list(range(len(lengths)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), min_size=1, max_size=80), st.integers(0, 12))
def test_every_sample_once_within_room_and_pictures(samples, most):
    lengths, images = np.array(samples).T
    packs = pack(lengths, 100, images, most if most >= 4 else 0)
    assert sorted(place for packed in packs for place in packed) == list(range(len(samples)))
    loads = sorted(int(lengths[packed].sum()) for packed in packs)
    assert loads[-1] <= 100
    if most >= 4:
        assert max(int(images[packed].sum()) for packed in packs) <= most
    else:  # no two packs could be joined
        assert len(packs) == 1 or sum(loads[:2]) > 100


def test_a_perfect_packing_is_found():
    rng = np.random.default_rng(0)
    cuts = [np.diff([0, *sorted(rng.choice(np.arange(1, 2048), 3, replace=False)), 2048]) for _ in range(300)]
    assert len(pack(np.concatenate(cuts), 2048)) <= 303


@pytest.mark.slow
def test_packs_of_llavas_mixture_are_full():
    """8192: 98 % and more. 2048: within a point of an offline packer, which cannot do much with 576 a picture."""
    lengths, images = mix(20_000)
    index = make_index(lengths, images, length=2048)
    for room in (2048, 8192):
        plan = Plan(index, batch=64, unit="packs", length=room)
        begin = time.process_time()
        fill = 1 - plan.describe()["padding_share"]
        assert time.process_time() - begin < 5  # 0.5 s alone on one core
        best = lengths.sum() / offline(lengths, room) / room
        assert fill >= (0.98 if room == 8192 else best - 0.01), (fill, best)


def test_a_budget_of_pictures_costs_little():
    lengths, images = mix(16_000)
    for most in (4, 8, 10):
        packs = pack(lengths, 8192, images, most)
        assert max(images[packed].sum() for packed in packs) <= most
        least = max(lengths.sum() / 8192, images.sum() / most)
        assert len(packs) <= 1.02 * least


def test_what_fits_no_pack():
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit a pack of 10"):
        pack(np.array([3, 11]), 10)
    with pytest.raises(ValueError, match="a sample of 3 pictures does not fit a pack of 2 pictures"):
        pack(np.array([3, 4]), 10, np.array([0, 3]), 2)


@pytest.mark.parametrize(("room", "batch", "worst"), [(2048, 128, 1.02), (8192, 16, 1.03)])
def test_ranks_of_a_step_have_like_work(room, batch, worst):
    """What waiting for the slowest of 8 ranks costs, in packs as the plan makes them."""
    plan = Plan(make_index(*mix(16_000), length=2048), batch=batch, unit="packs", length=room)
    for k in (0, plan.steps_per_epoch - 2):
        costs = plan.costs(plan.step(k))
        slowest = sum(max(costs[rank].sum() for rank in micro) for micro in deal(costs, 8, 1))
        assert slowest * 8 < worst * costs.sum()


def test_unlike_packs_are_dealt_alike():
    costs = np.random.default_rng(0).lognormal(7, 0.5, 256)
    dealt = deal(costs, 8, 1)
    slowest = sum(max(costs[packed] for rank in micro for packed in rank) for micro in dealt)
    assert slowest * 8 < 1.1 * costs.sum()  # in given order a half is lost
    had = np.array([sum(costs[packed] for micro in dealt for packed in micro[rank]) for rank in range(8)])
    assert had.max() < 1.03 * had.min()
