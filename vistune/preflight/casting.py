"""Autocast over pretended tensors: the types that CUDA's autocast computes in, in Python.

Its C++ rules ask a tensor's device, which for a pretended one is none that casts. The lists are those of
aten/src/ATen/autocast_mode.h; weights that are cast are kept until the outermost autocast ends, as there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

LOWER = (
    *("linear", "matmul", "mm", "mv", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "prelu"),
    *("conv1d", "conv2d", "conv3d", "conv2d.padding", "convolution", "_convolution", "conv_transpose2d.input"),
)
FULL = (
    *("layer_norm", "native_layer_norm", "group_norm", "exp", "expm1", "log", "log1p", "reciprocal", "rsqrt"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "logsumexp", "cosine_similarity"),
    *("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "prod", "norm.Scalar"),
)
WIDEST = ("cat", "stack", "addcmul", "addcdiv", "dot", "index_put", "scatter_add", "bilinear", "atan2")
WHOLE = ("silu_backward", "mish_backward")
"""One kernel on a GPU, taken to pieces by a build of torch that has none for it."""
KEY = torch._C.DispatchKey.AutocastCUDA


class _Casts:
    """What was cast while autocast is on: parameters once, everything else each time."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def lower(self, value: Any) -> Any:
        kind = torch.get_autocast_dtype("cuda")
        if not _eligible(value) or value.dtype == kind:
            return value
        kept = value.requires_grad and value.is_leaf and value.dtype == torch.float32
        if not (kept and torch.is_autocast_cache_enabled()):
            return value.to(kind)
        if id(value) not in self.kept:
            self.kept[id(value)] = value, value.to(kind)
        return self.kept[id(value)][1]

    def clear(self) -> None:
        self.kept.clear()


def _eligible(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda" and value.dtype in _FLOATS


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _full(value: Any) -> Any:
    return value.float() if _eligible(value) else value


def _widest(given: Any) -> Any:
    kinds = {one.dtype for one in torch.utils._pytree.tree_leaves(given) if _eligible(one)}
    if len(kinds) < 2:
        return given
    return tree_map(lambda one: _full(one) if torch.float32 in kinds else one, given)


@contextmanager
def imitated() -> Iterator[None]:
    """Inside, `torch.autocast("cuda")` casts pretended tensors."""
    casts, clear = _Casts(), torch.clear_autocast_cache
    library = torch.library.Library("aten", "IMPL")

    rules: tuple[tuple[tuple[str, ...], Callable[[Any], Any]], ...] = (
        (LOWER, lambda given: tree_map(casts.lower, given)),
        (FULL, lambda given: tree_map(_full, given)),
        (WIDEST, _widest),
    )

    def rule(name: str, change: Callable[[Any], Any]) -> None:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
                args, kwargs = change((args, kwargs))
                return operation(*args, **kwargs)

        library.impl(name, cast, "AutocastCUDA")

    def forget() -> None:
        casts.clear()
        clear()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")  # that is what they are for
        for names, change in rules:
            for name in names:
                rule(name, change)
        for name in WHOLE:
            library.impl(name, torch.library.fallthrough_kernel, "AutogradCUDA")
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        mock.patch.object(torch, "clear_autocast_cache", forget),
    ):
        try:
            yield
        finally:
            library._destroy()
