"""Stochastic rounding: its mean is the value, what bf16 holds stays, any split gives the same, and the hash is the one
that is written down."""

import math

import pytest
import torch

from vistune.train.updating import rounding


def reference(seed: int, step: int, name: str, element: int) -> int:
    """The noise of one element in plain integers."""
    factor, add = rounding.key(seed, step, name)
    x = (element * factor + add) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x >> 16


@pytest.mark.parametrize("first", [0, 5, 2**31 - 3, 2**32 + 7])
def test_noise_is_the_hash_of_the_element(first):
    noise = torch.empty(64, dtype=torch.int32)
    rounding.number(noise, first, rounding.key(3, 11, "layer.weight"))
    expected = [reference(3, 11, "layer.weight", first + i) for i in range(64)]
    assert rounding.mix(noise).tolist() == expected


def test_the_mean_is_the_value():
    """Of 200,000 draws; the standard error of the mean of p(1 - p) is below 0.0012 of a step of bf16."""
    for value in (1.0 + 0.3 / 128, -3.0e-5, 7.77e20, 1e-40):
        value = torch.tensor(value).item()
        drawn = rounding.rounded(torch.full((200_000,), value), 0, 1, "w").double()
        low, high = drawn.min().item(), drawn.max().item()
        assert low < value < high and drawn.unique().numel() == 2
        assert abs(drawn.mean().item() - value) < 5 * 0.0012 * (high - low)


def test_updates_below_half_a_step_are_not_lost():
    weight = torch.ones(1000, dtype=torch.bfloat16)
    for step in range(1, 201):
        weight = rounding.rounded(weight.float() - 1e-4, 5, step, "w")
    assert weight.float().mean().item() == pytest.approx(1 - 200e-4, abs=1e-3)
    assert (torch.ones(1, dtype=torch.bfloat16) - 1e-4).to(torch.bfloat16).item() == 1.0  # nearest would stay


def test_every_bf16_stays_as_it_is():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for step in (1, 2, 3):
        after = rounding.rounded(every.float(), 0, step, "w")
        numbers = ~every.isnan()
        assert torch.equal(after[numbers], every[numbers]) and bool(after[~numbers].isnan().all())


def test_what_is_no_number_stays_none_and_the_largest_do_not_overflow():
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -8388607], dtype=torch.int32).view(torch.float32)
    assert odd.isnan().all() and rounding.rounded(odd, 0, 1, "w").isnan().all()
    ends = torch.tensor([math.inf, -math.inf, 3.3895e38, -3.3895e38, 0.0, -0.0])
    after = rounding.rounded(ends, 0, 1, "w")
    assert after[:2].tolist() == [math.inf, -math.inf] and after[2:4].isfinite().all()
    assert after[4:].tolist() == [0.0, 0.0] and torch.signbit(after[5])


@pytest.mark.parametrize("cuts", [(10, 20), (1, 2), (0, 32)])
def test_any_split_in_rows_gives_the_same(cuts):
    torch.manual_seed(0)
    whole = torch.randn(32, 24)
    expected = rounding.rounded(whole, 7, 4, "w")
    parts = [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]]
    firsts = [0, cuts[0] * 24, cuts[1] * 24]
    done = [rounding.rounded(part, 7, 4, "w", first) for part, first in zip(parts, firsts, strict=True)]
    assert torch.equal(torch.cat(done), expected)


def test_seed_step_and_name_each_change_the_noise():
    values = torch.full((4096,), 1 + 1 / 256)
    drawn = [rounding.rounded(values, *said) for said in ((0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"))]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert 0.4 < (one == other).float().mean().item() < 0.6
