"""How long running answers wait while others are read, by a clock that the calls themselves push on."""

from __future__ import annotations

import math

import pytest

from tests.serve.toy import PICTURE, ToyReader, expected, handed_in, never_ends, run, scheduler, work
from vistune.serve.answering.budget import Cost, together


class Time:
    """A clock that calls push on: so many seconds for a call, and for each of what it handles."""

    def __init__(self, **costs: tuple[float, float]):
        self.now, self.costs, self.steps = 0.0, costs, 0

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, amount: int) -> None:
        call, each = self.costs[name]
        self.now += call + each * amount


@pytest.mark.parametrize("call", [0.0, 0.01])
def test_a_long_prompt_holds_running_answers_up_for_no_longer_than_the_budget(call):
    passing = Time(step=(0.02, 0.0), read=(call, 1e-3), see=(call, 1e-3))
    one = scheduler(ToyReader(passing.spend), 100_000, clock=passing, rows=8, prefill_ms=100)
    running = [handed_in(one, never_ends(seed, 400), passing)[1] for seed in range(4)]
    while sum(bool(heard.pieces) for heard in running) < 4:
        one.step()
    _, long = handed_in(one, work([3] * 6000, 4), passing)
    _, seeing = handed_in(one, work([PICTURE] * 30 + [3] * 500, 4, range(1, 31), tokens=20), passing)
    run(one)
    assert long.text == expected(work([3] * 6000, 4)) and seeing.ended[0].reason in ("stop", "length")
    for heard in running:
        gaps = [after - before for before, after in zip(heard.at, heard.at[1:], strict=False)]
        assert max(gaps) <= 0.1 + 0.02 + call + 16e-3 + 1e-9
    reading = [at for at in running[0].at if at < long.at[0]]
    assert len(reading) > 50  # they went on all the time
    assert long.at[0] < 6.0 / 0.1 * 0.125 + 2.0  # and the budget was used


def test_the_budget_binds_nobody_when_nobody_runs():
    passing = Time(step=(0.02, 0.0), read=(0.0, 1e-4), see=(0.0, 1e-4))
    reader = ToyReader(passing.spend)
    one = scheduler(reader, clock=passing, prefill_ms=100)
    handed_in(one, work([3] * 3000, 4))
    one.step()
    assert reader.reads == [[3000]]


def test_short_prompts_are_read_together_and_short_pieces_are_not():
    assert together([600], 512, 16) == (1, 512)
    assert together([600, 600], 512, 16) == (1, 512)
    assert together([100, 100, 100, 100], 512, 16) == (4, 128)
    assert together([20] * 9, 64, 16) == (4, 16)
    assert together([5], 16, 16) == (1, 16)
    reader = ToyReader()
    one = scheduler(reader)
    for length in (5, 6, 7):
        handed_in(one, work([3] * length, 4))
    one.step()
    assert reader.reads == [[5, 6, 7]]


def test_what_calls_cost_is_learned():
    cost = Cost()
    assert cost.seconds(100) == 0 and cost.most(0.1) == math.inf
    for amount in (100, 100, 100):
        cost.add(amount, 0.05)
    assert cost.most(0.1) == pytest.approx(200)
    for amount in (50, 200, 400, 30) * 4:
        cost.add(amount, 0.03 + 1e-4 * amount)
    assert cost.most(0.1) == pytest.approx(700, rel=0.02) and cost.seconds(700) == pytest.approx(0.1, rel=0.02)
    assert cost.most(0.01) == 0
