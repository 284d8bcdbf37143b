"""Low-rank adapters: where they go, how they are saved in peft's layout, and how they are folded into the weights.

Knows parts through the family, nothing of optimizers or data.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vistune.models import merge
from vistune.models.families import Family
from vistune.recipe import Lora


def inject(model: nn.Module, family: Family, lora: Lora) -> list[str]:
    """Put low-rank adapters beside the linear layers of `lora.parts`, by full path, the head left alone.

    Returns the adapters' parameter names. Beside a model on the meta device they take no memory yet; `initial` gives
    their values. Matching by leaf name would also hit the vision tower (q_proj).
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = merge.lora_config(lora, lora_targets(model, family, lora))
    inject_adapter_in_model(config, model, low_cpu_mem_usage=next(model.parameters()).is_meta)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Activations have the type that products are computed in already; a copy in the adapter's is not needed.
            module.cast_input_dtype_enabled = False
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


_KIND = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")


def initial(name: str, shape: Sequence[int], seed: int, stored: Callable[[str], Tensor]) -> Tensor:
    """The first values of the adapter's parameter `name`: whole, fp32, on the CPU, as peft begins.

    A function of (seed, name) alone: `lora_A` uniform (Kaiming with a = sqrt 5, as a linear layer's), `lora_B` zero,
    DoRA's magnitudes the norms of the rows of `stored("<path>.weight")`. ValueError for another kind of adapter.
    """
    match = _KIND.search(name)
    if match is None:
        raise ValueError(f"{name}: only adapters of linear layers (lora_A, lora_B and DoRA's magnitudes) can be begun")
    if match[1] == "lora_B":
        return torch.zeros(*shape)
    if match[1] == "lora_A":
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return nn.init.kaiming_uniform_(torch.empty(*shape), a=math.sqrt(5), generator=generator)
    norms = torch.linalg.norm(stored(f"{name[: match.start()]}.weight").float(), dim=1)
    assert norms.shape == tuple(shape), (name, norms.shape, shape)
    return norms


def lora_targets(model: nn.Module, family: Family, lora: Lora) -> list[str]:
    """Full paths of the layers that get adapters. ValueError when there are none."""
    paths = {id(module): path for path, module in model.named_modules()}
    head, linear = family.head(model), []
    for part in lora.parts:
        for root in family.parts(model)[part]:
            inside = (one for one in root.modules() if isinstance(one, nn.Linear) and one is not head)
            linear += [paths[id(one)] for one in inside]
    targets = sorted({path for path in linear if re.search(lora.targets, path)})
    if not targets:
        raise ValueError(f"lora.targets = {lora.targets!r}: matches no linear layer of {', '.join(lora.parts)}")
    return targets
