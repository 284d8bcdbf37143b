"""A GPU that is not there: tensors on it have shapes, types and storages, and no memory, and a ledger counts the bytes.

The host's own tensors stay real. Works on a build of torch without CUDA, backward included. Knows no models.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from vistune.models import attention as _attention  # defines the operator of packed attention
from vistune.preflight import casting

assert _attention

CUDA, META = torch.device("cuda", 0), torch.device("meta")
GRAIN = 512
"""CUDA's caching allocator gives memory in multiples of so many bytes (c10/cuda, kMinBlockSize)."""


class Ledger:
    """Bytes in use by label, and how they stood when they were most."""

    def __init__(self) -> None:
        self.label = "working room"
        self.now: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._held: dict[int, tuple[Any, str, int]] = {}

    def add(self, label: str, size: int) -> None:
        """Take (or give back, below zero) bytes that no tensor stands for."""
        self.now[label] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.now.copy()

    def touch(self, size: int) -> None:
        """Bytes that are taken and given back at once."""
        self.add(self.label, size)
        self.add(self.label, -size)

    def take(self, tensor: Tensor) -> None:
        """A tensor that an operation gave back: new if its storage is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = rounded(storage.nbytes())
        self._held[key] = weakref.ref(storage, lambda _: self._gone(key)), self.label, size
        self.add(self.label, size)

    def name(self, tensor: Tensor, label: str, size: int | None = None) -> None:
        """What a tensor's storage is for, and what it counts, where that is not its size (a shard of it)."""
        key = tensor.untyped_storage()._cdata
        if key not in self._held:
            return
        held, before, counted = self._held[key]
        wanted = counted if size is None else size
        self._held[key] = held, label, wanted
        self.add(before, -counted)
        self.add(label, wanted)

    def again(self) -> None:
        """Forget the peak: what is held now is the most there was."""
        self.peak, self.at_peak = self.total, self.now.copy()

    def _gone(self, key: int) -> None:
        _, label, size = self._held.pop(key)
        self.add(label, -size)

    @contextmanager
    def doing(self, label: str) -> Iterator[None]:
        """What is made inside is `label`'s."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before


def rounded(size: int) -> int:
    """Bytes that the allocator counts for a tensor of `size`."""
    return -(-size // GRAIN) * GRAIN


class Pretended(FakeTensorMode):
    """The mode under which `device="cuda"` gives tensors without memory, each counted in `ledger`.

    Towards C++ such a tensor lies on the meta device, which every build has: autograd needs the device's guard, which
    a build without CUDA lacks. Towards Python it lies on cuda:0, and autocast treats it so.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and to be wrapped against that takes a third of the time

    def __init__(self, ledger: Ledger):
        super().__init__(allow_non_fake_inputs=True)
        self.ledger = ledger
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return META
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        device = kwargs.get("device")
        here = device is not None and torch.device(device).type in ("meta", "cuda")
        if here:
            kwargs = {**kwargs, "device": CUDA}
        elif not any(isinstance(one, FakeTensor) for one in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # the host's
        if func is torch.ops.vistune.packed_attention_backward.default:
            self.ledger.touch(_rooms(*args[1:4]))
        self._depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if not self._depth:  # not what an operation is imitated with, which a kernel has no need of
            for one in tree_leaves(out):
                if isinstance(one, FakeTensor) and one.fake_device.type == "cuda":
                    self.ledger.take(one)
        return out


def _rooms(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Bytes that the kernel of attention takes for itself in backward: a sum a row and the query's gradient in fp32,
    and key's and value's for each head of the query (FlashAttention 2, flash_api.cpp, mha_varlen_bwd)."""
    grouped = key.numel() != query.numel()
    return 4 * query.numel() // query.shape[-1] + 4 * query.numel() + grouped * 2 * query.nbytes


class _Flash(torch.autograd.Function):
    """What a fused kernel holds and makes, [B,H,T,d]: its output and a number a row, never the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        query.new_empty(_rooms(query, key, value), dtype=torch.uint8)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _sdpa(query: Tensor, *given: Any, **named: Any) -> Tensor:
    if not isinstance(query, FakeTensor):
        return _STOCK(query, *given, **named)
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    out: Any = _Flash.apply(query.to(kind), *(one.to(kind) for one in given[:2]))
    return out


_STOCK = F.scaled_dot_product_attention


@contextmanager
def pretended() -> Iterator[Ledger]:
    """Inside, `device="cuda"` is a GPU without memory; the ledger says what it would hold."""
    ledger = Ledger()
    with casting.imitated(), mock.patch.object(F, "scaled_dot_product_attention", _sdpa), Pretended(ledger):
        yield ledger
