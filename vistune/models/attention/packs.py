"""What a kernel of packed attention is told of a pack, and gradients for kernels that have none of their own.

Shapes everywhere in this package: T tokens of a pack, H query heads, K key and value heads, d their width, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Where the samples of a pack begin, and where the last one ends: int32 [S + 1], where the pack lies and on the
    host. Tensors alone, so that compiled code serves every pack."""

    starts: Tensor
    host: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(self.host.diff().tolist())


@dataclass(frozen=True, slots=True)
class Pack:
    """How a pack attends: its samples, the scale of the scores, whether positions see only what came before, and how
    far back (None: to the sample's beginning)."""

    starts: Tensor
    lengths: tuple[int, ...]
    scale: float
    causal: bool
    window: int | None

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


class Heads(NamedTuple):
    """What a kernel must be able to do. `group`: query heads to each key head."""

    device: torch.device
    dtype: torch.dtype
    width: int
    group: int = 1
    causal: bool = True
    windowed: bool = False

    def __str__(self) -> str:
        kind = "" if self.causal else ", both directions"
        window = ", sliding window" if self.windowed else ""
        group = f", {self.group} to a key" if self.group > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device.type}, {dtype}, heads {self.width} wide{group}{kind}{window}"


class Kernel(Protocol):
    """A way to compute packed attention: one module here."""

    def lacks(self, heads: Heads) -> str:
        """Why it cannot do this, as far as that is known without trying; empty when it is worth a try."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor | None]:
        """[T,H,d], [T,K,d], [T,K,d] -> [T,H,d], and whatever of T * H fp32 values its backward wants."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, pack: Pack
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""


def differentiate(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` by running it again, for kernels whose backward is reached through autograd alone.

    Works where autograd is switched off because an operator is being computed.
    """
    functionality = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(functionality, False), torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        found = torch.autograd.grad(attend(*inputs), inputs, grad)
    return found[0], found[1], found[2]
