"""The plan's promises: every sample once, no pack too long, the same for any ranks, any step reachable directly."""

from __future__ import annotations

import json
import pickle
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import make_index
from vistune.data import epochs
from vistune.data import plan as plans
from vistune.data.grouping import length_grouped, modality_grouped
from vistune.data.index import COLUMNS, Index, open_index
from vistune.data.plan import Plan
from vistune.data.shares import Share

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)
UNIT = st.sampled_from(["samples", "packs"])


def flat(steps) -> list[int]:
    return [position for packs in steps for pack in packs for position in pack]


def epoch(plan: Plan, number: int = 0):
    start = number * plan.steps_per_epoch
    return [plan.step(k) for k in range(start, start + plan.steps_per_epoch)]


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


KINDS = st.sampled_from(
    [
        {"unit": "samples"},
        {"unit": "packs"},
        {"unit": "samples", "pack": False},
        {"unit": "packs", "images_per_pack": 4},
        {"pack": False, "group": "modality"},
        {"pack": False, "group": "length", "unit": "packs"},
    ]
)
SHARES = st.sampled_from(
    [
        (Share(), Share()),
        (Share(epochs=2.0), Share(epochs=0.5)),
        (Share(cap=9), Share(epochs=1.5, cap=40)),
        (Share(weight=3.0), Share(weight=1.0, cap=50)),
    ]
)


def of_two_sources(lengths):
    """An index of which the first third is one source; none, one or two pictures a sample."""
    images = np.arange(len(lengths)) % 3
    return make_index(lengths, images, sources=np.arange(len(lengths)) * 3 // len(lengths) > 0, length=64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 64), min_size=4, max_size=200), st.integers(1, 10), KINDS, SHARES, st.data())
def test_any_step_is_reached_directly(lengths, batch, kind, shares, data):
    def plan():
        more = {"batch": 4 * batch, "micro_batch": 2, "length": 64, "seed": 3, "window": 16, "epochs": 3.0}
        return Plan(of_two_sources(lengths), **{**more, **kind}, shares=shares)

    one = plan()
    steps = [one.step(k) for k in range(one.steps)]
    k = data.draw(st.integers(0, len(steps) - 1))
    assert plan().step(k) == steps[k]
    assert pickle.loads(pickle.dumps(one)).step(k) == steps[k]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 64), min_size=4, max_size=200), st.integers(1, 10), KINDS, SHARES)
def test_three_epochs_of_a_mixture_lose_nothing_at_their_borders(lengths, batch, kind, shares):
    index = of_two_sources(lengths)
    plan = Plan(
        index, **{"batch": 4 * batch, "micro_batch": 2, "length": 64, "window": 16, **kind}, shares=shares, epochs=3.0
    )
    steps = [plan.step(k) for k in range(plan.steps)]
    drawn, each = flat(steps), len(plan.order)
    assert len(drawn) == 3 * each
    for number in range(3):
        here = Counter(drawn[number * each : (number + 1) * each])
        for source, taken in enumerate(plan.order.taken):
            counts = [here[i] for i in np.flatnonzero(index.source == source).tolist()]
            assert sum(counts) == taken and max(counts) - min(counts) <= 1
    total = Counter(drawn)
    for source in (0, 1):
        counts = [total[i] for i in np.flatnonzero(index.source == source).tolist()]
        assert max(counts) - min(counts) <= 1
    most = kind.get("images_per_pack", len(lengths) * 2)
    assert all(sum(i % 3 for i in row) <= most for step in steps for row in step)
    assert all(sum(lengths[i] for i in row) <= 64 for step in steps for row in step)


def test_a_fraction_takes_other_samples_each_epoch_in_packs_too():
    index = make_index(np.arange(200) % 50 + 5, length=64)
    plan = Plan(index, batch=4, unit="packs", length=64, shares=[Share(epochs=0.5)], window=64, epochs=2.0)
    drawn = flat(plan.step(k) for k in range(plan.steps))
    assert sorted(drawn) == list(range(200)) and len(plan.order) == 100
    assert plan.steps == plan._steps_in(0) + plan._steps_in(1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.sampled_from([4, 8, 16]), st.integers(0, 3))
def test_grouped_steps_have_one_modality_but_for_a_tail(lengths, batch, seed):
    images = np.arange(len(lengths)) % 3 // 2
    plan = Plan(
        make_index(lengths, images, length=64),
        batch=batch,
        micro_batch=4,
        length=64,
        pack=False,
        group="modality",
        seed=seed,
    )
    steps = epoch(plan)
    kinds = [{int(images[i]) for i in flat([step])} for step in steps]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert sorted(flat(steps)) == list(range(len(lengths)))
    for k, step in enumerate(steps):  # the next micro-batch of like samples goes to the next rank
        for world in (1, 2, 3):
            ranks = [plan.micro_batches(k, rank, world, 4) for rank in range(world)]
            turns = [micro for turn in zip(*ranks, strict=True) for micro in turn]
            assert [row for micro in turns for row in micro] == step
            assert all(len(micro) == 4 for micro in turns[: len(step) // 4])


def test_costs_count_attention_and_vision():
    index = make_index([100, 100, 600])
    index.columns["image"][2] = 576
    plan = Plan(index, batch=3, length=2000)
    one, two, seen = plan.costs([(0,), (0, 1), (2,)])
    assert one == pytest.approx(100 + 100**2 / 50_000) and two == pytest.approx(
        2 * one
    )  # samples do not see each other
    assert seen == pytest.approx(1176 + 1176**2 / 50_000 + 10)


def test_groups_are_the_references_and_change_with_the_epoch():
    rng = np.random.default_rng(0)
    lengths, images = rng.integers(4, 60, 96), rng.integers(0, 2, 96)
    index = make_index(lengths, images, length=64)
    made = {}
    for group in ("modality", "length"):
        plan = Plan(index, batch=16, micro_batch=4, length=64, pack=False, group=group, seed=5)
        generator = torch.Generator().manual_seed(int(plan._digest("group", 1)[:15], 16))
        signed = np.where(images, lengths, -lengths)
        order = (
            modality_grouped(signed, 4, 4, generator)
            if group == "modality"
            else length_grouped(lengths, 4, 4, generator)
        )
        made[group] = flat(epoch(plan, 1))
        assert made[group] == order.tolist() != flat(epoch(plan, 0))
    assert made["modality"] != made["length"]


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
    with pytest.raises(ValueError, match="no sample to train on: 2 of 2 rows"):
        Plan(make_index([3, 3], bad=[0, 1]), batch=1, length=64)
    with pytest.raises(ValueError, match="samples of 100 tokens, packs have room for 64"):
        Plan(make_index([3, 100]), batch=1, length=64)
    with pytest.raises(ValueError, match="2 sources, shares are given for 1"):
        Plan(make_index([3, 3], sources=[0, 1]), batch=1, length=64, shares=[Share()])
    with pytest.raises(ValueError, match="less than half a sample"):
        Plan(make_index([3, 3]), batch=1, length=64, shares=[Share(epochs=0.1)])
    with pytest.raises(ValueError, match="images_per_pack = 2: row 1 of source 0 has 3 pictures"):
        Plan(make_index([3, 3], images=[1, 3]), batch=1, length=64, images_per_pack=2)
    with pytest.raises(ValueError, match=r"train\.batch = 6 is 1\.5 times 4"):
        Plan(make_index([3, 3]), batch=6, micro_batch=4, length=64, pack=False, group="length")


def kept_index(folder, lengths, images=None, length=0):
    """The same index as `make_index`, on disk."""
    made = make_index(lengths, images, length=length)
    for name, column in made.columns.items():
        np.save(folder / f"{name}.npy", column)
    (folder / "faults.jsonl").touch()
    (folder / "meta.json").write_text(json.dumps({"hash": made.hash, "length": made.length, "faults": 0}))
    return open_index(folder)


def test_what_takes_a_pass_over_the_data_is_kept_beside_the_index(tmp_path, monkeypatch):
    index = kept_index(tmp_path, np.arange(600) % 60 + 4, np.arange(600) % 2, 64)
    kinds = [{"unit": "packs", "window": 32, "workers": 2}, {"pack": False, "group": "modality", "micro_batch": 4}]
    first = [Plan(index, batch=16, length=64, **kind) for kind in kinds]
    for plan in first:
        plan.prepare()
        plan.describe()
    files = sorted(file.name for file in tmp_path.glob("plan-*"))
    assert len(files) == 3 and not list(tmp_path.glob(".*"))
    assert len(pickle.dumps(first[1])) < 4000  # another process maps what is on disk
    again = [Plan(open_index(tmp_path), batch=16, length=64, **kind) for kind in kinds]
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "measured", refuse)
        patch.setattr(Plan, "_group", refuse)
        assert [plan.describe() for plan in again] == [plan.describe() for plan in first]
        assert [plan.step(5) for plan in again] == [plan.step(5) for plan in first]
    for change in ({"seed": 1}, {"images_per_pack": 9}, {"window": 33}):
        Plan(index, batch=16, length=64, **{**kinds[0], **change}).prepare()
    assert len(list(tmp_path.glob("plan-packs-*"))) == 4
    in_memory = Plan(
        make_index(np.arange(600) % 60 + 4, np.arange(600) % 2, length=64), batch=16, length=64, **kinds[0]
    )
    assert in_memory.describe() == first[0].describe() and in_memory.step(7) == first[0].step(7)


def test_a_torn_or_unwritable_table_is_worked_out_again(tmp_path, monkeypatch, capsys):
    index = kept_index(tmp_path, np.arange(200) % 60 + 4, length=64)

    def plan():
        return Plan(index, batch=4, unit="packs", length=64, window=32)

    steps = plan().step(9)
    (file,) = tmp_path.glob("plan-packs-*")
    file.write_bytes(file.read_bytes()[:50])
    assert plan().step(9) == steps
    file.unlink()
    monkeypatch.setattr(epochs.np, "save", refuse)
    assert plan().step(9) == steps
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err
    assert not list(tmp_path.glob(".plan*"))


def refuse(*given):
    raise OSError(30, "Read-only file system")


def test_very_many_samples_are_estimated_from_spread_steps(monkeypatch):
    lengths = np.random.default_rng(0).integers(4, 60, 60_000)
    plan = Plan(make_index(lengths, length=64), batch=32, length=64)
    exact = plan.describe()
    monkeypatch.setattr(plans, "_ALL_UP_TO", 1000)
    monkeypatch.setattr(plans, "_PIECES", 8)
    facts = plan.describe()
    assert facts["estimated_from_steps"] == 8 * 32 and "estimated_from_steps" not in exact
    for key in ("samples", "steps_per_epoch", "steps", "set_aside"):
        assert facts[key] == exact[key]
    for key in ("packs", "tokens", "supervised", "padding_share"):
        assert facts[key] == pytest.approx(exact[key], rel=0.05)


@pytest.mark.slow
def test_an_index_of_millions_is_not_held(tmp_path):
    """Step k of 10 million rows in little time, and nothing of the size of the data in memory."""
    rows = 10_000_000
    columns = {name: np.lib.format.open_memmap(tmp_path / name, "w+", kind, (rows,)) for name, kind in COLUMNS.items()}
    columns["text"][:] = np.arange(rows) % 1000 + 4
    columns["source"][rows // 2 :] = 1
    index = Index(columns, [], "made-up", 2048)
    tracemalloc.start()
    begin = time.process_time()
    for kind in (
        {"batch": 128, "seed": 0},
        {"batch": 128, "block": 1024, "seed": 1, "shares": [Share(), Share(cap=999)]},
    ):
        plan = Plan(index, length=2048, **kind)
        assert len(flat([plan.step(plan.steps_per_epoch // 2)])) == 128
        assert sum(len(packed) for packed in plan._window(0, 100)) == plan.window
    assert time.process_time() - begin < 5  # 0.6 s alone on one core
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
