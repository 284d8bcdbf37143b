"""AdamW over the learned parameters, each with its own rate, and the schedule of the rates.

Knows nothing of models or data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistune.recipe import Optimizer as Settings
from vistune.train.learn import Learned


def schedule(settings: Settings, step: int, steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of update number `step` (the first is 1) out of `steps`.

    Linear warm-up from 0, then cosine, linear or constant down to `min_lr`, which the last update reaches.
    """
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return lr * step / warmup
    if settings.schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return min_lr + (lr - min_lr) * left


def warmup_steps(settings: Settings, steps: int) -> int:
    return math.ceil(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)


class Optimizer:
    """AdamW with one group per (learn key, decay or not). `true_half`: the weights are half precision, the optimizer
    keeps fp32 masters of them and writes them back after each update."""

    def __init__(self, settings: Settings, learned: list[Learned], steps: int, true_half: bool = False):
        self.settings, self.steps = settings, steps
        self.learned = learned
        self.masters: dict[str, Tensor] = {
            one.name: one.parameter.detach().float().clone() if true_half else one.parameter for one in learned
        }
        self.true_half = true_half
        fused = all(p.device.type in ("cpu", "cuda") for p in self.masters.values())
        self.adamw = torch.optim.AdamW(
            self._groups(), lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=fused
        )

    def _groups(self) -> list[dict]:
        groups: dict[tuple[str, bool], dict] = {}
        for one in self.learned:
            decays = one.parameter.ndim > 1 and not one.name.endswith("bias")
            group = groups.setdefault(
                (one.key, decays),
                {
                    "params": [],
                    "key": one.key,
                    "rate": one.rate,
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                },
            )
            group["params"].append(self.masters[one.name])
        return list(groups.values())

    def gradients(self) -> list[Tensor]:
        """Every learned parameter's gradient; one that got none this step has a zero gradient, on every rank alike."""
        for one in self.learned:
            if one.parameter.grad is None:
                one.parameter.grad = torch.zeros_like(one.parameter)
        return [one.parameter.grad for one in self.learned]  # type: ignore[misc]

    def update(self, step: int) -> None:
        """One AdamW update with the rates of update number `step`."""
        for group in self.adamw.param_groups:
            group["lr"] = schedule(self.settings, step, self.steps, group["rate"].lr, group["rate"].min_lr)
        if not self.true_half:
            self.adamw.step()
            return
        for one in self.learned:
            self.masters[one.name].grad = one.parameter.grad.float()  # type: ignore[union-attr]
        self.adamw.step()
        for one in self.learned:
            self.masters[one.name].grad = None
        self.write_back()

    def write_back(self) -> None:
        """Round the masters into the weights."""
        for one in self.learned:
            one.parameter.data.copy_(self.masters[one.name])

    def clear(self) -> None:
        for one in self.learned:
            one.parameter.grad = None

    def rates(self, step: int) -> dict[str, float]:
        """Rate of each `learn` key at update number `step`."""
        return {
            one.key: schedule(self.settings, step, self.steps, one.rate.lr, one.rate.min_lr) for one in self.learned
        }

    def state(self) -> dict[str, Tensor]:
        """Flat state by parameter name: moments, step counts, and masters where there are some."""
        flat = {}
        for one in self.learned:
            master = self.masters[one.name]
            for kind, value in self._moments(master).items():
                flat[f"{one.name}/{kind}"] = value
            if self.true_half:
                flat[f"{one.name}/master"] = master
        return flat

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one parameter, made as zeros if no update was done yet, so that it can be loaded into."""
        state = self.adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state


def scale_gradients(gradients: list[Tensor], factor: Tensor | float) -> None:
    torch._foreach_mul_(gradients, factor)
