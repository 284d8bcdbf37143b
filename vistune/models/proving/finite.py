"""Where in a model the first value appears that is not a number: in which module, and in what precision.

Knows nothing of families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def first_nonfinite(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """The first module, in the order of execution, whose output holds NaN or infinity when weights and inputs are
    `dtype`; None when all are finite. The model is left as it is. Needs memory for a second copy of the weights."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(each).all() for each in _floats(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    # Parameters alone: buffers such as rotary frequencies are kept in fp32 in every precision.
    cast = {name: _cast(value, dtype) for name, value in model.named_parameters()}
    try:
        functional_call(model, cast, kwargs={name: _cast(value, dtype) for name, value in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _floats(output: Any) -> list[Tensor]:
    """The floating tensors of a module's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [each for part in output for each in _floats(part)] if isinstance(output, list | tuple) else []
