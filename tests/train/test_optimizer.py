"""Schedules by their closed forms, what decays, AdamW to the bit of torch's, clipping and skipping, masters."""

import math

import pytest
import torch
from torch import nn

from vistune.recipe import Optimizer as Settings
from vistune.recipe import Rate
from vistune.train.learn import Learned
from vistune.train.updating import adamw, optimizer
from vistune.train.updating.optimizer import Optimizer, schedule


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


SETTINGS = Settings(betas=(0.8, 0.9), eps=1e-6, schedule="constant", warmup=0, weight_decay=0.1)


def learned(dtype=torch.float32) -> list[Learned]:
    """Two matrices, a convolution in channels-last, vectors and a single number."""
    torch.manual_seed(0)
    values = {
        "layer.weight": torch.randn(24, 40),
        "layer.bias": torch.randn(24),
        "norm.weight": torch.randn(24),
        "conv.weight": torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last),
        "scale": torch.randn(()),
    }
    return [Learned(n, nn.Parameter(v.to(dtype)), "connector", Rate(lr=0.01)) for n, v in values.items()]


def give_gradients(mine: list[Learned], step: int, factor: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(step)
    for one in mine:
        grad = torch.randn(one.parameter.shape, generator=draw).to(one.parameter.dtype) * factor
        one.parameter.grad = torch.empty_like(one.parameter).copy_(grad)


def torch_adamw(mine: list[Learned], settings: Settings = SETTINGS) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    """torch's own fused AdamW over fp32 copies of the weights."""
    twins = [nn.Parameter(one.parameter.detach().float().clone()) for one in mine]
    decays = [one.parameter.ndim > 1 for one in mine]
    groups = [
        {"params": [p for p, d in zip(twins, decays, strict=True) if d is kind], "weight_decay": wd}
        for kind, wd in ((True, settings.weight_decay), (False, 0.0))
    ]
    return twins, torch.optim.AdamW(groups, lr=0.01, betas=settings.betas, eps=settings.eps, fused=True)


def test_equals_torchs_to_the_bit():
    mine = learned()
    twins, oracle = torch_adamw(mine)
    made = Optimizer(SETTINGS, mine, steps=9)
    for step in (1, 2, 3):
        give_gradients(mine, step)
        for one, twin in zip(mine, twins, strict=True):
            twin.grad = one.parameter.grad.clone()
        made.update(step)
        oracle.step()
    for one, twin in zip(mine, twins, strict=True):
        assert torch.equal(one.parameter, twin), one.name
        assert torch.equal(made.state()[f"{one.name}/exp_avg_sq"], oracle.state[twin]["exp_avg_sq"])


@pytest.mark.parametrize("given", [True, False])
def test_half_weights_follow_fp32_masters_to_the_bit(given, monkeypatch):
    """Also where they are updated piece by piece; masters may be finer than the weights."""
    monkeypatch.setattr(optimizer, "PIECE", 400)  # a multiple of what a CPU computes at once
    fine = learned()
    mine = learned(torch.bfloat16)
    twins, oracle = torch_adamw(fine if given else mine)
    masters = {one.name: one.parameter.detach().clone() for one in fine} if given else None
    made = Optimizer(SETTINGS, mine, steps=9, masters=masters)
    for step in (1, 2, 3):
        give_gradients(mine, step)
        for one, twin in zip(mine, twins, strict=True):
            twin.grad = torch.empty_like(twin).copy_(one.parameter.grad)
        made.update(step)
        oracle.step()
    for one, twin in zip(mine, twins, strict=True):
        assert torch.equal(made.masters[one.name], twin), one.name
        assert torch.equal(one.parameter, twin.to(torch.bfloat16)), one.name


def test_masters_gather_updates_that_would_round_away():
    mine = [Learned("w", nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)), "connector", Rate(lr=1e-4))]
    made = Optimizer(Settings(schedule="constant", warmup=0), mine, steps=100)
    for step in range(1, 61):
        mine[0].parameter.grad = torch.ones_like(mine[0].parameter)
        made.update(step)
    torch.testing.assert_close(made.masters["w"], torch.full((4, 4), 1 - 60e-4), rtol=1e-4, atol=1e-5)
    assert mine[0].parameter[0, 0].item() < 1.0


def test_the_divisor_is_torchs_loss_scale():
    """Gradients times 1024 divided by 1024 in the kernel: the same to the bit."""
    plain, scaled = learned(), learned()
    one, other = Optimizer(SETTINGS, plain, steps=9), Optimizer(SETTINGS, scaled, steps=9)
    for step in (1, 2):
        give_gradients(plain, step)
        give_gradients(scaled, step, 1024.0)
        one.update(step)
        other.update(step, divisor=torch.tensor(1024.0))
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(plain, scaled, strict=True))


def test_clipping_on_the_device_is_clipping():
    mine = learned()
    twins, oracle = torch_adamw(mine)
    made = Optimizer(SETTINGS, mine, steps=9)
    give_gradients(mine, 1)
    for one, twin in zip(mine, twins, strict=True):
        twin.grad = one.parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    made.update(1, divisor=((norm + 1e-6) / 1.0).clamp(min=1.0))
    oracle.step()
    for one, twin in zip(mine, twins, strict=True):
        torch.testing.assert_close(one.parameter.data, twin.data, rtol=1e-6, atol=1e-7)


KINDS = [(d, n, s) for d in (torch.float32, torch.bfloat16) for n in ("adamw", "adamw8bit") for s in (None, 3)]


@pytest.mark.parametrize(("dtype", "name", "seed"), [k for k in KINDS if k[0] != torch.float32 or k[2] is None])
def test_a_skipped_step_leaves_everything_to_the_bit(dtype, name, seed, monkeypatch):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("vistune.train.updating.moments.SMALL", 64)
    mine = learned(dtype)
    made = Optimizer(SETTINGS.model_copy(update={"name": name}), mine, steps=9, rounding_seed=seed)
    give_gradients(mine, 1)
    made.update(1, skip=torch.tensor(0.0))

    def all_of_it() -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in {**{o.name: o.parameter.detach() for o in mine}, **made.state()}.items()}

    before = all_of_it()
    give_gradients(mine, 2, float("nan"))
    made.update(2, divisor=torch.tensor(float("nan")), skip=torch.tensor(1.0))
    after = all_of_it()
    assert all(torch.equal(before[k], after[k]) for k in before) and float(after["scale/step"]) == 1
    give_gradients(mine, 3)
    made.update(3, skip=torch.tensor(0.0))
    assert not torch.equal(before["layer.weight"], mine[0].parameter) and float(made.count) == 2


def test_a_device_without_the_kernel_does_the_same_and_says_so(monkeypatch, capsys):
    plain, other = learned(), learned()
    one, two = Optimizer(SETTINGS, plain, steps=9), Optimizer(SETTINGS, other, steps=9)
    give_gradients(plain, 1, 8.0)
    one.update(1, divisor=torch.tensor(8.0), skip=torch.tensor(0.0))
    adamw.fused.cache_clear()
    monkeypatch.setattr(adamw, "_get_fused_kernels_supported_devices", lambda: ["cuda"])
    give_gradients(other, 1, 8.0)
    two.update(1, divisor=torch.tensor(8.0), skip=torch.tensor(0.0))
    give_gradients(other, 2, float("inf"))
    two.update(2, divisor=torch.tensor(8.0), skip=torch.tensor(1.0))
    adamw.fused.cache_clear()
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a.parameter.data, b.parameter.data, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().err.count("no fused AdamW for cpu") == 1 and float(two.count) == 1


def test_biases_and_norms_do_not_decay():
    made = Optimizer(SETTINGS, learned(), steps=10)
    assert [held.decays for held in made.held] == [True, False, False, True, False]


def test_a_parameter_without_gradient_counts_as_zero():
    made = Optimizer(Settings(), learned(), steps=3)
    assert all(float(g.abs().sum()) == 0 for g in made.gradients())


def test_state_is_whole_before_the_first_update_and_what_is_loaded_counts():
    made, other = Optimizer(SETTINGS, learned(), steps=3), Optimizer(SETTINGS, learned(), steps=3)
    names = set(made.state())
    give_gradients(made.learned, 1)
    made.update(1)
    assert set(made.state()) == names and "layer.weight/exp_avg" in names
    for name, value in made.state().items():
        other.state()[name].copy_(value)
    for one, twin in zip(made.learned, other.learned, strict=True):
        twin.parameter.data.copy_(one.parameter.data)
    for each in (made, other):
        give_gradients(each.learned, 2)
        each.update(2)
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(made.learned, other.learned, strict=True))
