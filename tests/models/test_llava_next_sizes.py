"""LLaVA-1.6 at its real sizes, without weights: how many parameters, and under which names they lie on disk.

The connectors' counts are published; the sums are derived from the parts' published sizes.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from vistune.models.families import family

NEXT = family("llava_next")
TOWER = 303_507_456  # CLIP ViT-L/14 at 336, all 24 layers
LANGUAGES = {
    "vicuna-7b": {},
    "vicuna-13b": {"hidden": 5120, "inner": 13824, "layers": 40, "heads": 40},
    "mistral-7b": {"kind": "mistral", "inner": 14336, "kv": 8},
    "34b": {"hidden": 7168, "inner": 20480, "layers": 60, "heads": 56, "kv": 8, "words": 64_000},
}
CONNECTORS = {"vicuna-7b": 20_979_712, "vicuna-13b": 31_467_520, "mistral-7b": 20_979_712, "34b": 58_734_592}
LANGUAGE_MODELS = {"vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320, "34b": 34_388_917_248}
"""Llama-2's and Yi's published counts, before the vocabulary grows by 64 rows for `<image>`, in and out."""
TOTALS = {
    "vicuna-7b": 7_063_431_168,
    "vicuna-13b": 13_351_499_776,
    "mistral-7b": 7_566_747_648,
    "34b": 34_752_083_968,
}


def sizes(kind="llama", hidden=4096, inner=11008, layers=32, heads=32, kv=None, words=32_000):
    """The text config, and its parameters counted by hand with the vocabulary padded for `<image>`."""
    rows, kv = words + 64, kv or heads
    text = transformers.AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=rows,
    )
    width = hidden // heads
    layer = 2 * hidden * hidden + 2 * hidden * kv * width + 3 * hidden * inner + 2 * hidden
    return text, layers * layer + 2 * rows * hidden + hidden


def tower_names():
    yield from (
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
    )
    inner = [f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")]
    inner += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    both = [f"encoder.layers.{i}.{one}" for i in range(24) for one in inner] + ["pre_layrnorm", "post_layernorm"]
    yield from (f"{one}.{kind}" for one in both for kind in ("weight", "bias"))


def published_names(layers):
    yield "image_newline"
    yield from (f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))
    yield from (f"vision_tower.vision_model.{name}" for name in tower_names())
    yield from (f"language_model.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head"))
    inner = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    inner += ["input_layernorm", "post_attention_layernorm"]
    yield from (f"language_model.model.layers.{i}.{one}.weight" for i in range(layers) for one in inner)


@pytest.mark.parametrize("name", LANGUAGES)
def test_parameters_and_names_of_the_real_sizes(name):
    text, language = sizes(**LANGUAGES[name])
    config = transformers.LlavaNextConfig(text_config=text)
    with torch.device("meta"):
        model = NEXT.model_class(config)
    counted = {
        part: sum(p.numel() for module in modules for p in module.parameters())
        for part, modules in NEXT.parts(model).items()
    }
    assert counted == {"vision": TOWER, "connector": CONNECTORS[name] + text.hidden_size, "language": language}
    assert sum(counted.values()) == TOTALS[name]
    if name in LANGUAGE_MODELS:
        assert language == LANGUAGE_MODELS[name] + 2 * 64 * text.hidden_size
    stored = [NEXT.stored_name(one) for one in model.state_dict()]
    assert len(stored) == len(set(stored)) == 396 + 9 * text.num_hidden_layers + 3
    assert set(stored) == set(published_names(text.num_hidden_layers))
