"""`torch.compile`, layer by layer: a layer is compiled once and serves for all its like, for every pack and length.

Where compiling cannot work it is off, and where it fails the layers run as they are; both are said once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from vistune import console
from vistune.models.families import Family
from vistune.recipe import Recipe
from vistune.train.spreading import recompute

BACKEND = "inductor"
RECOMPILES = 64
"""Times that torch may compile a function anew. All kinds of layers share one: a wrapper of `transformers`."""
FAILURES = (TorchDynamoException, InductorError)


def wrap(model: nn.Module, family: Family, recipe: Recipe) -> None:
    """Compile each layer's forward in place where `train.compile` says so and this machine can."""
    if not recipe.train.compile:
        return
    if why := missing(_kind(recipe.train.device)):
        console.warn(f"train.compile: {why}; layers run uncompiled, with the same results")
        return
    functorch.force_non_lazy_backward_lowering = True  # what fails in compiling backward fails in forward
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    plain: list[Callable[[], None]] = []
    for part in ("vision", "language"):
        for layer in recompute.pieces(family.layers(model, part)):
            layer.forward = _Compiled(layer, plain)


@functools.cache
def missing(device: str) -> str:
    """Why a device of this type compiles nothing here, found by compiling a tiny function; empty when it does."""
    try:
        with torch.enable_grad():
            x = torch.ones(8, device=device, requires_grad=True)
            torch.compile(lambda x: (x * 2 + 1).sigmoid(), backend=BACKEND)(x).sum().backward()
    except (*FAILURES, RuntimeError, OSError, ImportError) as error:
        return _reason(error)
    return ""


def _kind(device: str) -> str:
    if device != "auto":
        return torch.device(device).type
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


class _Compiled:
    """A layer's forward, compiled. When compiling fails, all layers run as they were before."""

    def __init__(self, layer: Any, plain: list[Callable[[], None]]):
        self.layer, self.before = layer, layer.forward
        self.compiled = torch.compile(layer.forward, backend=BACKEND)
        self.plain = plain
        plain.append(self._restore)

    def _restore(self) -> None:
        self.layer.forward = self.before

    def __call__(self, *given: Any, **named: Any) -> Any:
        try:
            return self.compiled(*given, **named)
        except FAILURES as error:
            console.warn(f"train.compile: {_reason(error)}; layers go on uncompiled, with the same results")
            for restore in self.plain:
                restore()
            return self.before(*given, **named)


def _reason(error: BaseException) -> str:
    """The first line that says something, and what is usually missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if "rror" in line), lines[0] if lines else "")[:300]
    whole = str(error)
    if "Python.h" in whole:
        return "Python.h is missing, which compiled code includes (install python3-dev)"
    if "InvalidCxxCompiler" in type(error).__name__ + whole or "No working C++ compiler" in whole:
        return "there is no C++ compiler (install g++)"
    if "riton" in whole and ("find a working" in whole or "No module named" in whole):
        return "there is no working triton, which compiles for this device"
    return f"it fails here ({type(error).__name__}: {text})"
