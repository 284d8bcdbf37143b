"""LLaVA-OneVision-1.5 at its real sizes, on the meta device: names, shapes and counts."""

from __future__ import annotations

import re

import pytest
import torch

from vistune.models.families import family
from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config
from vistune.models.shipped.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration

ONE = family("onevision15")

# Published: sizes of the language models (Qwen3's own configs), rope bases, text_hidden_size.
SIZES = {
    "4b": {"text": {}, "layers": 36, "width": 2560, "theta": 5e6},
    "8b": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "rope_theta": 1e6},
        "layers": 36,
        "width": 4096,
        "theta": 1e6,
    },
    "14b": {
        "text": {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "rope_theta": 1e6,
        },
        "layers": 40,
        "width": 5120,
        "theta": 1e6,
    },
}
CONNECTOR = {"4b": 27_271_680, "8b": 33_564_672}
"""4b: published, counted in a user's log. 8b: published as 33.57 M; the exact number is derived."""
TOWER = 24 * (12 * 1024**2 + 13 * 1024) + 3 * 14 * 14 * 1024 + 2 * 1024
"""Derived, 302,913,536 (published: 0.3 B): 24 blocks, patches, the norm before; the class token's 1,056 apart."""
LANGUAGE = {"4b": 4_411_424_256, "8b": 8_190_735_360}
"""Derived from Qwen3's sizes with a head of its own; Qwen3-8B is published as 8.2 B, and 4B as 4.0 B with a tied head
(4,411,424,256 less 388,956,160)."""


def model(size: str) -> LLaVAOneVision1_5_ForConditionalGeneration:
    said = SIZES[size]
    config = Llavaonevision1_5Config(text_config=said["text"], vision_config={"text_hidden_size": said["width"]})
    with torch.device("meta"):
        return LLaVAOneVision1_5_ForConditionalGeneration(config)


def count(modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_counts(size: str) -> None:
    parts = ONE.parts(model(size))
    assert count(parts["connector"]) == CONNECTOR[size]
    assert count(parts["vision"]) == TOWER
    assert count(parts["language"]) == LANGUAGE[size]


@pytest.mark.parametrize(("size", "tensors"), [("4b", 698), ("8b", 698), ("14b", 742)])
def test_the_published_names(size: str, tensors: int) -> None:
    """698 tensors: published for 36 layers; 742 derived, 11 more a layer."""
    made, said = model(size), SIZES[size]
    stored = {ONE.stored_name(name): tuple(value.shape) for name, value in made.state_dict().items()}
    assert len(stored) == tensors and made.config.text_config.rope_theta == said["theta"]
    width = said["width"]
    block = {"attn.proj": (1024, 1024), "attn.qkv": (3072, 1024), "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
    wanted = {
        "visual.patch_embed.proj.weight": (1024, 3, 14, 14),
        "visual.class_embedding": (1024,),
        "visual.class_pos_emb": (1, 32),
        "visual.merger.mlp.0.weight": (4096, 4096),
        "visual.merger.mlp.0.bias": (4096,),
        "visual.merger.mlp.2.weight": (width, 4096),
        "visual.merger.mlp.2.bias": (width,),
        "model.embed_tokens.weight": (151936, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (151936, width),
    }
    norms = ["visual.pre_layernorm", "visual.merger.ln_q"]
    for i in range(24):
        norms += [f"visual.blocks.{i}.norm1", f"visual.blocks.{i}.norm2"]
        for leaf, shape in block.items():
            wanted |= {f"visual.blocks.{i}.{leaf}.weight": shape, f"visual.blocks.{i}.{leaf}.bias": shape[:1]}
    wanted |= {f"{norm}.{leaf}": (1024,) for norm in norms for leaf in ("weight", "bias")}
    language = {re.sub(r"layers\.\d+", "layers.N", name) for name in stored.keys() - wanted.keys()}
    assert language == {
        f"model.layers.N.{leaf}.weight"
        for leaf in (
            *("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        )
    }
    assert {name: stored[name] for name in wanted} == wanted
    assert len(stored) == len(wanted) + 11 * said["layers"]


def test_one_step_of_the_4b_in_operations() -> None:
    """A row of 8,192 tokens with a picture of 560 x 560: between 6 and 8 operations a weight and token."""
    config = Llavaonevision1_5Config()
    grids = torch.tensor([(1, 40, 40)])
    flops = ONE.flops(config, lengths=[8192], images=1, supervised=8192, grids=grids)
    rough = 6 * (LANGUAGE["4b"] - 388_956_160) * 8192 + 6 * TOWER * 1600 + 6 * CONNECTOR["4b"] * 400
    assert 1.0 < flops / rough < 1.3
