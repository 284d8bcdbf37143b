"""What counts as standing still, what is said of whom, and what leaving with an error tells: without processes."""

import time

import pytest
import torch.distributed as dist

from vistune import ranks
from vistune.train.guarding import watchdog


@pytest.fixture
def ended(monkeypatch, capsys):
    """What was said when the process would have ended; the exit itself is an exception here."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    return lambda: capsys.readouterr().err


def long_ago(watch, step, phase, keys=()):
    watch.beat(step, phase, list(keys))
    watch._since -= 1000


@pytest.fixture
def alone():
    watch = watchdog.Watchdog(10)
    watch.beat(7, "data", [])  # the first step of this process, after a resume
    return watch


@pytest.mark.parametrize(
    ("step", "phase", "counts"),
    [
        (7, "data", True),
        (7, "forward", False),  # compilation
        (7, "update", False),
        (8, "forward", True),
        (8, "update", True),
        (8, "data", True),
        (8, "save", False),  # slow disks
        (9, "finish", False),
        (0, "start", False),
    ],
)
def test_what_counts_as_standing_still(alone, step, phase, counts):
    long_ago(alone, step, phase)
    assert bool(alone._look({})) == counts


def test_a_step_within_its_time_is_left_alone(alone):
    alone.beat(8, "forward", [])
    assert not alone._look({})
    alone._since -= 0.7 * 10
    assert not alone._look({})
    alone._since -= 0.2 * 10
    assert alone._look({})


def test_the_message_names_samples_by_source_and_row(alone):
    alone.sources = ["a.json", "b.parquet"]
    alone.planned = lambda step, rank: [(1, step), (0, rank)]
    long_ago(alone, 8, "forward", [(0, 3), (1, 4)])
    assert "step 8, forward, samples a.json:3, b.parquet:4: standing still for 1e+03 s" in alone._behind()
    long_ago(alone, 9, "data")
    assert "step 9, data, samples b.parquet:9, a.json:0: standing" in alone._behind()
    long_ago(alone, 9, "forward", [(0, row) for row in range(99)])
    assert alone._behind().count("a.json:") == 16


@pytest.fixture
def two(monkeypatch):
    """Rank 0 and rank 1 of a run, on one store; `turn` says which of both speaks."""
    store, turn = dist.HashStore(), [0]
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: turn[0])
    monkeypatch.setattr(watchdog, "_connect", lambda timeout: store)
    both = [watchdog.Watchdog(8), watchdog.Watchdog(8)]

    def speak(rank, step, phase, alive=None):
        turn[0] = rank
        long_ago(both[rank], step, phase)
        if alive is not None:
            store.set(f"alive/{rank}", str(alive))
        return both[rank]

    return speak


@pytest.mark.parametrize(
    ("zero", "one", "least"),
    [
        ((5, "forward"), (5, "data"), "rank 1"),
        ((5, "data"), (5, "forward"), "rank 0"),
        ((5, "update"), (5, "forward"), "rank 1"),
        ((5, "save"), (6, "data"), "rank 0"),
        ((6, "data"), (5, "save"), "rank 1"),
    ],
)
def test_who_is_least_far_is_behind(two, zero, one, least):
    two(1, *one)
    said = two(0, *zero)._behind()
    assert said.startswith(f"{least} (") and f"Waiting for it: rank {1 - int(least[-1])} (" in said


def test_ranks_that_stand_at_the_same_place_are_all_named(two):
    two(1, 5, "update")
    said = two(0, 5, "update")._behind()
    assert said.startswith("all 2 ranks stand still") and "rank 0 (" in said and "rank 1 (" in said


def test_a_rank_without_signs_of_life_is_gone_and_one_that_left_is_not(two):
    two(1, 5, "forward", alive=3)
    watch, seen = two(0, 5, "save", alive=1), {}  # in a save nobody stands still, but somebody may be gone
    assert not watch._look(seen)
    seen = {rank: (sign, then - 100) for rank, (sign, then) in seen.items()}
    watch._store.set("alive/0", "2")
    assert "rank 1 (" in (said := watch._look(seen)) and "gone without a word" in said and "rank 0" not in said
    watch._store.set("left/1", "1")
    assert not watch._look(dict.fromkeys((0, 1), (b"3", time.monotonic() - 100)))


def test_a_broken_collective_is_the_fault_of_who_is_gone(two, ended):
    two(1, 5, "forward", alive=3)
    watch = two(0, 5, "forward", alive=1)
    watch.pulse = 0.01
    with pytest.raises(SystemExit) as left:
        watch._explain(RuntimeError("Connection closed by peer"))
    assert left.value.code == watchdog.CODE and "rank 1 (" in (said := ended()) and "gone" in said


def test_an_error_of_ones_own_is_told_and_raised(two):
    """RuntimeErrors are not all broken collectives: with everybody alive it stays what it is."""
    two(1, 5, "forward", alive=3)
    watch = two(0, 5, "forward")
    watch.pulse = 0.01
    watch._signs = lambda: {1: str(time.monotonic()).encode()}
    watch._explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    told = two(1, 5, "forward")._told()
    assert (told.rank, told.code) == (0, 1) and told.text.startswith("RuntimeError: mat1 and mat2")


def test_a_mistake_that_all_ranks_make_is_said_once(two):
    two(0, 5, "save")._explain(ValueError("cannot write it: no space"))
    with pytest.raises(ranks.SaidElsewhere):
        two(1, 5, "save")._explain(ValueError("cannot write it: no space"))
    two(1, 5, "save")._explain(ValueError("another one"))  # raised as it is
