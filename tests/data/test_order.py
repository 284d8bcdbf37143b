"""Which samples an epoch has, and where: permutations, and shares of sources over several epochs."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import make_index
from vistune.data.order import Order, Permutation, shuffled
from vistune.data.shares import Share, samples_each

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def drawn(order: Order, epoch: int) -> list[int]:
    return order(epoch, np.arange(len(order))).tolist()


def index_of(sizes, bad=()):
    return make_index(np.full(sum(sizes), 5), sources=np.repeat(np.arange(len(sizes)), sizes), bad=bad)


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


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 60))
def test_blocks_move_as_they_are(size, block):
    moved = shuffled(np.arange(size), size, block, "key")
    assert sorted(moved.tolist()) == list(range(size))
    whole = moved[: size // block * block].reshape(-1, block)
    assert (np.diff(whole, axis=1) == 1).all() and (whole[:, 0] % block == 0).all()


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_epochs_of_a_source(sizes, data):
    """Over three epochs every usable sample comes as often as every other of its source, give or take one."""
    times = data.draw(st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    index = index_of(sizes, bad=[0] if sizes[0] > 1 else [])
    order = Order(index, 1, [Share(epochs=n) for n in times], block=data.draw(st.sampled_from([1, 7])), span=32)
    total: Counter[int] = Counter()
    for epoch in range(3) if len(order) else ():
        here = Counter(drawn(order, epoch))
        total.update(here)
        for source, n in enumerate(times):
            good = [i for i in np.flatnonzero(index.source == source).tolist() if not index.fault[i]]
            assert sum(here[i] for i in good) == int(len(good) * n + 0.5) == order.taken[source]
            for counts in ([here[i] for i in good], [total[i] for i in good]):
                assert max(counts) - min(counts) <= 1
        assert not here[0] or sizes[0] == 1
    assert order.same_every_epoch == all(taken % good == 0 for taken, good in zip(order.taken, order.good, strict=True))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_weights_split_an_epoch_of_the_usable_samples(sizes, data):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    order = Order(index_of(sizes), 0, [Share(weight=weight, epochs=7.0) for weight in weights])
    assert len(order) == sum(sizes)
    for taken, weight in zip(order.taken, weights, strict=True):
        assert abs(taken - sum(sizes) * weight / sum(weights)) < 1 + 1e-6
    for epoch in range(3):
        sources = np.repeat(np.arange(len(sizes)), sizes)[drawn(order, epoch)]
        assert np.bincount(sources, minlength=len(sizes)).tolist() == order.taken


def test_a_cap_takes_other_samples_each_epoch_until_all_have_come():
    order = Order(index_of([10, 25]), 0, [Share(), Share(cap=10)])
    assert order.taken == [10, 10] and not order.same_every_epoch
    epochs = [[i for i in drawn(order, epoch) if i >= 10] for epoch in range(5)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert not set(epochs[0]) & set(epochs[1])
    assert Counter(i for epoch in epochs for i in epoch) == Counter(dict.fromkeys(range(10, 35), 2))
    assert Order(index_of([10, 25]), 0, [Share(cap=99), Share(epochs=2, cap=30)]).taken == [10, 30]


def test_arithmetic_of_shares():
    assert samples_each([100, 300], [Share(weight=1), Share(weight=1)]) == [200, 200]
    assert samples_each([1, 1, 1], [Share(weight=w) for w in (1, 1, 2)]) == [1, 1, 1]  # .75 .75 1.5: largest remainders
    assert samples_each([100, 300], [Share(weight=3), Share(weight=1, cap=50)]) == [300, 50]
    assert samples_each([3, 0], [Share(epochs=0.5), Share()]) == [2, 0]
    assert samples_each([5], [Share(), Share()]) == [5]  # a last source without a row is not in the index
    with pytest.raises(ValueError, match="2 sources, shares are given for 1"):
        samples_each([3, 3], [Share()])
    with pytest.raises(ValueError, match="source 1 has no weight"):
        samples_each([3, 3], [Share(weight=1), Share()])
    with pytest.raises(ValueError, match="source 1 has a weight and no sample"):
        samples_each([3, 0], [Share(weight=1), Share(weight=1)])


def test_a_source_without_a_usable_row_is_passed_over():
    order = Order(index_of([2, 3, 2], bad=[2, 3, 4]), 0)
    assert sorted(drawn(order, 0)) == [0, 1, 5, 6] and order.good == [2, 0, 2]


def test_blocks_bound_what_a_span_reads():
    """With blocks a span of the order touches few stretches of the data, and still is shuffled within."""
    index = index_of([10_000])
    order = Order(index, 3, block=100, span=1000)
    assert sorted(drawn(order, 0)) == list(range(10_000))
    for start in (0, 5000):
        here = order(0, np.arange(start, start + 1000))
        assert len(np.unique(here // 100)) == 10 and abs(np.corrcoef(here[:-1], here[1:])[0, 1]) < 0.1
    assert drawn(order, 0) != drawn(order, 1)
