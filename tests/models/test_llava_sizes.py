"""LLaVA-1.5 in its real sizes, on the meta device: parameters and names of tensors."""

from __future__ import annotations

import pytest
import torch
import transformers

from vistune.models.families.llava import FAMILY

SIZES = {
    # model: (width, layers, heads, feed-forward), parameters, tensors
    "7b": ((4096, 32, 32, 11008), 7_063_427_072, 686),
    "13b": ((5120, 40, 40, 13824), 13_351_494_656, 758),
}
"""Derived: 7.06 and 13.35 billion parameters as published, with the vocabulary of 32,064 that llava-hf's folders have;
tensors are 391 of the vision tower, 4 of the connector, 9 a layer of the language model and 3 beside."""

CONNECTOR = {"7b": 20_979_712, "13b": 31_467_520}
"""Derived; 7B's is the published file's 42 MB in half precision."""


def real(size: str) -> torch.nn.Module:
    (width, layers, heads, wide), _, _ = SIZES[size]
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32064,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    with torch.device("meta"):
        return FAMILY.model_class(config)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_names(size):
    (_, layers, _, _), parameters, tensors = SIZES[size]
    model = real(size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    connector = FAMILY.parts(model)["connector"][0]
    assert sum(p.numel() for p in connector.parameters()) == CONNECTOR[size]
    names = [FAMILY.stored_name(name) for name in model.state_dict()]
    assert len(set(names)) == len(names) == tensors == 391 + 4 + 9 * layers + 3
    for name in (
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        f"language_model.model.layers.{layers - 1}.mlp.down_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ):
        assert name in names
