"""The stages' adapters as peft's own users get them, and a way to let them begin with given values."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from stages import LORA


def config() -> LoraConfig:
    """Adapters beside every linear layer of the language model, the connector in full."""
    return LoraConfig(
        r=LORA.r,
        lora_alpha=LORA.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=LORA.targets,
        modules_to_save=[LORA.connector],
        task_type="CAUSAL_LM",
    )


def begin_with(model: Any, path: str) -> None:
    """Give the adapters of a `PeftModel` the values in `path`, by the names of the model inside."""
    values = load_file(path)
    mine = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if ".lora_" in name}
    if set(mine) != set(values):
        raise RuntimeError(f"{path}: other adapters; only in one of both: {sorted(set(mine) ^ set(values))[:4]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(values[name])
