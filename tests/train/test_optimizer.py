"""Schedules by their closed forms, groups, and fp32 masters of half-precision weights."""

import math

import pytest
import torch
from torch import nn

from vistune.recipe import Optimizer as Settings
from vistune.recipe import Rate
from vistune.train.learn import Learned
from vistune.train.optimizer import Optimizer, schedule


def test_cosine_to_a_floor_as_a_published_log_shows_it():
    """LLaVA-OneVision-1.5 stage 1: 1e-4 to 1e-6, 5 warm-up steps of 2,500."""
    settings = Settings(schedule="cosine", warmup=5)
    assert f"{schedule(settings, 41, 2500, 1e-4, 1e-6):.6E}" == "9.994915E-05"
    assert f"{schedule(settings, 49, 2500, 1e-4, 1e-6):.6E}" == "9.992405E-05"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_peak_and_end(name):
    settings = Settings(schedule=name, warmup=0.1)
    rates = [schedule(settings, s, 100, 1.0, 0.25) for s in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.25)
    middle = {"cosine": 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 0.5)), "linear": 0.625, "constant": 1.0}[name]
    assert rates[54] == pytest.approx(middle)


def learned(dtype=torch.float32):
    torch.manual_seed(0)
    layer, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    named = {"layer.weight": layer.weight, "layer.bias": layer.bias, "norm.weight": norm.weight}
    for parameter in named.values():
        parameter.data = parameter.data.to(dtype)
    return [Learned(n, p, "connector", Rate(lr=0.1)) for n, p in named.items()]


def test_biases_and_norms_do_not_decay():
    optimizer = Optimizer(Settings(weight_decay=0.5), learned(), steps=10)
    decays = {id(p): g["weight_decay"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert [decays[id(one.parameter)] for one in optimizer.learned] == [0.5, 0.0, 0.0]


def test_equals_plain_adamw():
    settings = Settings(betas=(0.8, 0.9), eps=1e-6, schedule="constant", warmup=0)
    mine = learned()
    twin = [p.parameter.detach().clone().requires_grad_() for p in mine]
    optimizer = Optimizer(settings, mine, steps=3)
    oracle = torch.optim.AdamW(twin, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0, foreach=False, fused=False)
    for step in (1, 2, 3):
        for one, other in zip(mine, twin, strict=True):
            one.parameter.grad = torch.full_like(one.parameter, 0.1 * step)
            other.grad = one.parameter.grad.clone()
        optimizer.update(step)
        oracle.step()
    for one, other in zip(mine, twin, strict=True):
        torch.testing.assert_close(one.parameter.data, other.data, rtol=1e-6, atol=1e-7)


def test_half_weights_keep_fp32_masters_that_gather_small_updates():
    settings = Settings(schedule="constant", warmup=0)
    mine = [Learned("w", nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)), "connector", Rate(lr=1e-4))]
    optimizer = Optimizer(settings, mine, steps=100, true_half=True)
    for step in range(1, 61):
        mine[0].parameter.grad = torch.ones_like(mine[0].parameter)
        optimizer.update(step)
    assert mine[0].parameter.dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.masters["w"], torch.full((4, 4), 1 - 60e-4), rtol=1e-4, atol=1e-5)
    assert mine[0].parameter[0, 0].item() < 1.0  # one update of 1e-4 alone would round away


def test_a_parameter_without_gradient_counts_as_zero():
    optimizer = Optimizer(Settings(), learned(), steps=3)
    assert all(float(g.abs().sum()) == 0 for g in optimizer.gradients())


def test_state_is_whole_before_the_first_update():
    optimizer = Optimizer(Settings(), learned(), steps=3)
    names = set(optimizer.state())
    optimizer.gradients()
    optimizer.update(1)
    assert set(optimizer.state()) == names and "layer.weight/exp_avg" in names
