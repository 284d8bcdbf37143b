"""Runs packed attention forward and backward on the run's device, by the very code that training uses, against
attention written out; and asks that code which of its kernels run here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune.doctor.trial import tell
from vistune.models import attention

LENGTHS = (5, 0, 19, 40)
HEADS, SHARED, WIDTH = 4, 2, 64


def main() -> None:
    """Facts: `device`, `dtype`; `packed`: True or the error; `chosen`: part -> kernel; `kernels`: name -> "" or why
    it does not run."""
    device = chosen_device()
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    tell(device=str(device), dtype=str(dtype).removeprefix("torch."))
    with redirect_stdout(sys.stderr):
        packed = tried(lambda: compare(device, dtype))
    tell(packed=packed)
    language = attention.Heads(device, dtype, 128, 4, True)
    vision = attention.Heads(device, dtype, 64, causal=False)
    tell(chosen={"language": name_of(language), "vision": name_of(vision)})
    kernels: dict[str, str] = {}
    for name in attention.KERNELS:
        kernels[name] = why_not(language, name)
        tell(kernels=kernels)


def name_of(heads: attention.Heads) -> str:
    return str(tried(lambda: attention.chosen(heads, "auto").name))


def why_not(heads: attention.Heads, name: str) -> str:
    """Nothing where the kernel runs and its numbers are right, else the reason."""
    try:
        attention.chosen(heads, name)
    except ValueError as error:
        return str(error).partition("): ")[2].rpartition("; ")[0] or str(error)
    return ""


def chosen_device() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    own = os.environ.get("LOCAL_RANK", "0")
    index = int(own) if own.isdigit() and int(own) < torch.accelerator.device_count() else 0
    return torch.device(kind.type, index)


def compare(device: torch.device, dtype: torch.dtype) -> bool:
    """Packed attention and its gradients against each segment by itself in fp32; raises where they differ."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, heads, total, WIDTH) for heads in (HEADS, SHARED, SHARED))
    ours = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    plain = [x.detach().float().cpu().requires_grad_() for x in ours]
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    segments = attention.segments(LENGTHS, device)
    out, _ = attention.attend(module, ours[0], ours[1], ours[2], None, scaling=WIDTH**-0.5, segments=segments)
    expected = by_segment(*plain)
    weights = torch.randn(expected.shape)
    (out.float().cpu() * weights).sum().backward()
    (expected * weights).sum().backward()
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]
    for name, (got, want) in zip(("output", "q", "k", "v"), pairs, strict=True):
        assert got is not None and want is not None
        far = float((got.detach().float().cpu() - want.detach()).abs().max() / want.detach().abs().max())
        if not far < limit:
            raise RuntimeError(f"{name}: off by {far:.2g} of its greatest value")
    return True


def by_segment(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1,H,T,d] -> [1,T,H,d], written out: scores, mask, softmax."""
    key, value = (x.repeat_interleave(HEADS // SHARED, dim=1) for x in (key, value))
    outs = []
    for q, k, v in zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(2, 3) * WIDTH**-0.5).masked_fill(hidden, float("-inf"))
        outs.append(F.softmax(scores, dim=-1) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2)


def tried(work: Callable[[], Any]) -> Any:
    """What it gives, or the error as text."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
