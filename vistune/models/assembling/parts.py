"""The parts that a model is assembled of, read whole or refused: vision towers and language models.

Knows folders, the hub's local cache and which towers and language models can be used; nothing of how they are joined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vistune.models.folders import quiet, read_config
from vistune.models.load import read_model

# What a folder's model_type may be: the class of its vision half, and of its image processor. Processors by name, those
# on Pillow: the automatic one asks for torchvision in some releases.
VISION = {
    "clip": ("CLIPVisionModel", transformers.CLIPImageProcessorPil),
    "clip_vision_model": ("CLIPVisionModel", transformers.CLIPImageProcessorPil),
    "siglip": ("SiglipVisionModel", transformers.SiglipImageProcessorPil),  # fixed-size SigLIP 2 calls itself so too
    "siglip_vision_model": ("SiglipVisionModel", transformers.SiglipImageProcessorPil),
    "dinov2": ("Dinov2Model", transformers.BitImageProcessorPil),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", transformers.BitImageProcessorPil),
}

_OTHER_HALF = r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias)|position_ids$"


def read_vision(folder: Path, dtype: torch.dtype | str, *, finite: bool = True) -> tuple[Any, Any]:
    """The vision tower and its image processor, from its own folder or from the two-tower model's."""
    kind = read_config(folder).get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"vision: {folder} is a {kind!r}, a NaFlex tower: it takes patches of pictures of any shape together with "
            "their sizes, and LLaVA gives it squares of one size. Take the SigLIP 2 of a fixed resolution, whose "
            "config.json says 'siglip' (siglip2-so400m-patch14-384 and the like)"
        )
    if kind not in VISION:
        raise ValueError(f"vision: {folder} is a {kind!r}; a vision tower can be one of {', '.join(VISION)}")
    model_class, pixels_class = VISION[kind]
    model = read_model(getattr(transformers, model_class), folder, dtype, extra=_OTHER_HALF, finite=finite)
    with quiet():
        try:
            pixels = pixels_class.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"vision: {folder} has no usable preprocessor_config.json ({error})") from error
    return model, pixels


def read_language(folder: Path, dtype: torch.dtype | str, *, finite: bool = True) -> tuple[Any, Any]:
    """The causal language model and its tokenizer. ValueError for one that cannot be trained in packs."""
    read_config(folder)
    model: Any = read_model(AutoModelForCausalLM, folder, dtype, extra=r"rotary_emb\.inv_freq$", finite=finite)
    head = getattr(model, "lm_head", None)
    known = hasattr(model, "model") and hasattr(model.model, "embed_tokens") and hasattr(model.model, "layers")
    if not isinstance(head, nn.Linear) or not (known or model.config.model_type == "mpt"):
        raise ValueError(
            f"language: {folder} is a {type(model).__name__}; it must have `model.embed_tokens`, `model.layers` and a "
            "linear `lm_head` (Llama, Mistral, Qwen2, Qwen3, Phi, SmolLM and the like), or be an MPT"
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def inside(language: Any) -> Any:
    """A causal language model without its head."""
    return language.transformer if language.config.model_type == "mpt" else language.model
