"""Moments in 8 bits: beside bitsandbytes' own optimizer, over shards, through a checkpoint, stochastically rounded."""

import builtins

import pytest
import torch
from torch import nn

from vistune.recipe import Optimizer as Settings
from vistune.recipe import Rate
from vistune.train.learn import Learned
from vistune.train.updating import moments
from vistune.train.updating import optimizer as room
from vistune.train.updating.optimizer import Optimizer

bnb = pytest.importorskip("bitsandbytes")
SETTINGS = Settings(name="adamw8bit", betas=(0.9, 0.95), schedule="constant", warmup=0, weight_decay=0.1)


def learned(*shapes: tuple[int, ...], dtype=torch.float32) -> list[Learned]:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    return [Learned(f"w{i}", nn.Parameter(v), "connector", Rate(lr=0.01)) for i, v in enumerate(values)]


def gradient(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Of very unequal rows, with zeros, as gradients are."""
    draw = torch.Generator().manual_seed(step)
    grad = torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw) ** 4
    return grad * (torch.rand(shape, generator=draw) > 0.1)


def steps(made: Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for one in made.learned:
            grad = gradient(step, tuple(one.parameter.shape))
            one.parameter.grad = grad.to(one.parameter.dtype)
        made.update(step, skip=torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes_own(dtype):
    """Codes, scales and weights after each of 20 updates: small tensors in 32 bits, matrices in 8. Its CPU kernel adds
    in another order, so a value in the middle between two codes may go to the other one."""
    mine = learned((64, 256), (32, 32), dtype=dtype)
    twins = [nn.Parameter(one.parameter.detach().float().clone()) for one in mine]
    oracle = bnb.optim.AdamW8bit(twins, lr=0.01, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=0.1)
    made = Optimizer(SETTINGS, mine, steps=20)
    for step in range(1, 21):
        steps(made, step, step)
        for one, twin in zip(mine, twins, strict=True):
            twin.grad = one.parameter.grad.float()
        oracle.step()
    values = [made.masters.get(one.name, one.parameter.detach()) for one in mine]
    for value, twin in zip(values, twins, strict=True):
        torch.testing.assert_close(value, twin.detach(), rtol=1e-4, atol=1e-4)
    kept, state = made.state(), oracle.state[twins[0]]
    assert kept["w0/exp_avg"].dtype == torch.uint8 and kept["w1/exp_avg"].dtype == torch.float32
    assert oracle.state[twins[1]]["state1"].dtype == torch.float32
    for name, codes, scales in (("exp_avg", "state1", "absmax1"), ("exp_avg_sq", "state2", "absmax2")):
        assert (kept[f"w0/{name}"] == state[codes]).float().mean() > 0.998
        torch.testing.assert_close(kept[f"w0/{name}_scale"].view(-1), state[scales], rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [16, 64, 100, 192, 588, 896])
def test_rows_of_any_width_follow_fp32_moments(width):
    """Blocks that end inside a row are shorter, none crosses it: the update stays near that of 32 bits."""
    mine, plain = learned((256, width)), learned((256, width))
    made = Optimizer(SETTINGS, mine, steps=9)
    full = Optimizer(SETTINGS.model_copy(update={"name": "adamw"}), plain, steps=9)
    start = mine[0].parameter.detach().clone()
    steps(made, 1, 5)
    steps(full, 1, 5)
    assert made.held[0].first.bits == 8 and made.held[0].first.scales.shape[0] == 256
    ours, theirs = mine[0].parameter - start, plain[0].parameter - start
    assert (ours - theirs).norm() / theirs.norm() < 0.1 and (ours - theirs).norm() > 0.0


@pytest.mark.parametrize(("seed", "dtype"), [(None, torch.float32), (None, torch.bfloat16), (4, torch.bfloat16)])
@pytest.mark.parametrize("width", [256, 100])
def test_shards_of_rows_are_the_whole_cut(seed, dtype, width, monkeypatch):
    """Codes, scales and weights of two halves are those of the whole to the bit, rounding included."""
    whole = learned((64, width), dtype=dtype)
    cuts = slice(0, 40), slice(40, 64)
    monkeypatch.setattr(moments, "SMALL", 64)  # else a half counts as small; a shard's parameter says the whole size
    parts = [nn.Parameter(whole[0].parameter.detach()[rows].clone()) for rows in cuts]
    cut = [[Learned("w0", part, "connector", Rate(lr=0.01))] for part in parts]
    halves = [Optimizer(SETTINGS, half, 9, rounding_seed=seed) for half in cut]
    made = Optimizer(SETTINGS, whole, steps=9, rounding_seed=seed)
    real = room.first_element
    for step in (1, 2, 3):
        grad = gradient(step, (64, width)).to(dtype)
        whole[0].parameter.grad = grad
        made.update(step)
        for half, rows in zip(halves, cuts, strict=True):
            half.learned[0].parameter.grad = grad[rows].clone()
            monkeypatch.setattr(room, "first_element", lambda piece, rows=rows: real(piece) + rows.start * width)
            half.update(step)
        monkeypatch.setattr(room, "first_element", real)
    assert torch.equal(torch.cat([half.learned[0].parameter for half in halves]), whole[0].parameter)
    for name, value in made.state().items():
        if not name.endswith("step"):
            assert torch.equal(torch.cat([half.state()[name] for half in halves]), value), name


def test_what_is_loaded_goes_on_to_the_bit():
    one, other = Optimizer(SETTINGS, learned((64, 300)), 9), Optimizer(SETTINGS, learned((64, 300)), 9)
    steps(one, 1, 3)
    saved = {name: value.clone() for name, value in one.state().items()}
    weight = one.learned[0].parameter.detach().clone()
    steps(one, 4, 6)
    for name, value in other.state().items():
        value.copy_(saved[name])
    other.learned[0].parameter.data.copy_(weight)
    steps(other, 4, 6)
    assert torch.equal(one.learned[0].parameter, other.learned[0].parameter)
    assert all(torch.equal(value, other.state()[name]) for name, value in one.state().items())


def test_stochastic_rounding_goes_where_fp32_goes():
    """bf16 weights without masters: after 60 updates the mean way is that of fp32 weights; rounded to the nearest
    they would not have moved."""
    slow = [Rate(lr=2e-4)] * 2
    exact = [Learned("w", nn.Parameter(torch.ones(64, 256)), "connector", slow[0])]
    half = [Learned("w", nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16)), "connector", slow[1])]
    one, other = Optimizer(SETTINGS, exact, 60), Optimizer(SETTINGS, half, 60, rounding_seed=1)
    for step in range(1, 61):
        for made in (one, other):
            made.learned[0].parameter.grad = torch.ones(64, 256).to(made.learned[0].parameter.dtype)
            made.update(step)
    assert half[0].parameter.dtype == torch.bfloat16 and not other.masters
    assert half[0].parameter.float().mean().item() == pytest.approx(exact[0].parameter.mean().item(), abs=2e-4)
    assert exact[0].parameter.mean().item() < 0.99


def test_without_the_library_it_is_one_sentence(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    moments._library.cache_clear()
    moments.dynamic_map.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"^optimizer\.name = adamw8bit: needs bitsandbytes .*vistune\[quant\]"):
        Optimizer(SETTINGS, learned((64, 256)), steps=1)
