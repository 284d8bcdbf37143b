"""What kind of work an operator of torch or a kernel of a GPU is, by its name; and a profile as shares of time.

Knows names alone. What no pattern takes is "other".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PATTERNS = (
    ("collectives", r"nccl|gloo|all_?reduce|all_?gather|reduce_scatter|c10d"),
    ("optimizer", r"adam|multi_tensor|_foreach|optimizer|stochastic|clip_grad"),
    ("attention", r"attention|flash|fmha|varlen|flex|vistune::pack|sdpa|cudnn.*mha"),
    ("convolutions", r"conv|wgrad|dgrad|im2col|winograd"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|\b(?:mm|addmm|bmm|baddbmm|matmul|linear)\b|mkl|lora"),
    ("loss", r"log_?softmax|nll|cross_entropy|logsumexp"),
    (
        "copies",
        r"copy|memcpy|memset|\bcat\b|catarray|clone|\bto\b|fill|zero|index|gather|scatter|split|stack|contiguous|embedding"
        r"|narrow|slice|select|masked|repeat|expand",
    ),
    (
        "norms and elementwise",
        r"mul|add|sub|div|neg|pow|rsqrt|sqrt|mean|sum|norm|silu|gelu|sigmoid|relu|exp|softmax|where|triton|elementwise"
        r"|reduce|vectorized|dropout|bernoulli|uniform|normal|cos|sin|max|min|isfinite|abs|\b(?:eq|ne|lt|le|gt|ge|any|all)\b",
    ),
)
_COMPILED = [(kind, re.compile(pattern)) for kind, pattern in _PATTERNS]
KINDS = (*(kind for kind, _ in _PATTERNS), "other")
USEFUL = ("products", "attention", "convolutions")
"""What a step cannot do without; the share outside is what could be saved."""


def kind(name: str) -> str:
    """The kind of one operator (`aten::mm`) or kernel (`sm90_xmma_gemm_...`)."""
    lowered = name.lower().removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
    return next((found for found, pattern in _COMPILED if pattern.search(lowered)), "other")


@dataclass(frozen=True)
class Work:
    """One operator or kernel over a whole profile: its own seconds, calls, and FLOPs where torch knows them."""

    name: str
    seconds: float
    calls: int
    flops: float = 0.0


def work_of(profile: Any, device: str) -> list[Work]:
    """What ran, longest first. `device` "cpu": operators by their own time; else kernels by theirs."""
    found = []
    for event in profile.key_averages():
        on_host = event.device_type.name == "CPU"
        if on_host != (device == "cpu"):
            continue
        micros = event.self_cpu_time_total if on_host else event.self_device_time_total
        if micros > 0:
            found.append(Work(event.key, micros / 1e6, event.count, float(getattr(event, "flops", 0) or 0)))
    return sorted(found, key=lambda work: -work.seconds)


def shares(works: Iterable[Work]) -> dict[str, Work]:
    """The same by kind, in the order of `KINDS`; kinds that took no time are left out."""
    sums: dict[str, Work] = {}
    for work in works:
        name = kind(work.name)
        was = sums.get(name, Work(name, 0.0, 0))
        sums[name] = Work(name, was.seconds + work.seconds, was.calls + work.calls, was.flops + work.flops)
    return {name: sums[name] for name in KINDS if name in sums}
