"""The loss scale of fp16, twice: as the host knows it, and as the device has it, which is a step or two ahead. Both
follow the same rule from the same flags, so that they agree wherever a run is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLEAN = 1000
"""Steps without an overflow after which the scale is doubled."""


@dataclass
class LossScale:
    """Dynamic scale for fp16: halved when a gradient overflows, doubled after 1,000 clean steps. 1 otherwise."""

    value: float = 1.0
    clean: int = 0

    def good(self) -> None:
        self.clean += 1
        if self.value > 1 and self.clean % CLEAN == 0:
            self.value *= 2

    def bad(self) -> bool:
        """Halve; False when there is nothing left to halve, so that the step is a true fault."""
        self.clean = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True


class DeviceScale:
    """The same scale where the gradients are: a step need not wait for the host to hear how the one before ended."""

    def __init__(self, scale: LossScale, device: torch.device):
        self.used = scale.value > 1  # from 1 it never moves
        self.value = torch.tensor(scale.value, dtype=torch.float32, device=device)
        self.clean = torch.tensor(scale.clean, dtype=torch.int64, device=device)

    def follow(self, bad: Tensor) -> None:
        """Take in how a step ended: `bad`, a boolean scalar on the device."""
        if not self.used:
            return
        self.clean = torch.where(bad, 0, self.clean + 1)
        moved = torch.where(bad, 0.5, torch.where(self.clean % CLEAN == 0, 2.0, 1.0))
        self.value = torch.where(self.value > 1, self.value * moved, self.value)
