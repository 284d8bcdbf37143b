"""What is measured on a GPU: models of real shapes, and what a step of each case is. Knows no contender's code.

Sizes are those of the published folders (CLIP ViT-L/14-336, Vicuna, RICE, Qwen3, FastViTHD, Qwen2); every case has a
tiny twin of the same families, with which the same code runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Tree = dict[str, Any]

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
QWEN2_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
FASTVITHD = {"hidden_size": 3072, "model_args": {"inference_mode": True}}

TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
TINY_CLIP = CLIP_L | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
}
TINY_RICE = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "text_hidden_size": 32,
}
TINY_FASTVITHD = {
    "hidden_size": 256,
    "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 64, 128]},
}


@dataclass(frozen=True)
class Shape:
    """A model: its family, the sizes of its language model and its tower, the side of a picture (0: native)."""

    family: str
    text: Tree
    vision: Tree
    side: int = 336


SHAPES = {
    "llava-7b": Shape("llava", VICUNA_7B, CLIP_L),
    "llava-13b": Shape("llava", VICUNA_13B, CLIP_L),
    "onevision-4b": Shape("onevision15", {}, {"text_hidden_size": 2560}, side=0),
    "fastvlm-1.5b": Shape("fastvlm", QWEN2_1_5B, FASTVITHD, side=1024),
}
TINY = {
    "llava-7b": Shape("llava", TINY_TEXT, TINY_CLIP, side=56),
    "llava-13b": Shape("llava", TINY_TEXT, TINY_CLIP, side=56),
    "onevision-4b": Shape("onevision15", TINY_TEXT | {"head_dim": 16}, TINY_RICE, side=0),
    "fastvlm-1.5b": Shape("fastvlm", TINY_TEXT | {"tie_word_embeddings": True}, TINY_FASTVITHD, side=256),
}


@dataclass(frozen=True)
class Case:
    """One row. `recipe` is laid over what all cases share; `padded` is how many samples the stock stack takes in one
    forward, 0 where `transformers` has no class that trains the model without timm."""

    name: str
    says: str
    shape: str
    data: str  # "captions" or "talks"
    learn: tuple[str, ...]
    padded: int
    recipe: Tree = field(default_factory=dict)
    lora: int = 0


CASES = (
    Case(
        "7b_stage2_lora",
        "LLaVA-1.5 7B, stage 2, LoRA r = 128",
        "llava-7b",
        "talks",
        ("connector", "language"),
        padded=8,
        lora=128,
        recipe={"train": {"batch": 8, "unit": "packs", "micro_batch": 4}, "data": {"length": 2048}},
    ),
    Case(
        "7b_stage2",
        "LLaVA-1.5 7B, stage 2, full",
        "llava-7b",
        "talks",
        ("connector", "language"),
        padded=8,
        recipe={
            "train": {"batch": 8, "unit": "packs", "micro_batch": 4, "precision": "bf16_stochastic"},
            "data": {"length": 2048},
        },
    ),
    Case(
        "7b_stage1",
        "LLaVA-1.5 7B, stage 1",
        "llava-7b",
        "captions",
        ("connector",),
        padded=16,
        recipe={"train": {"batch": 32, "micro_batch": 4}, "data": {"length": 2048}},
    ),
    Case(
        "13b_stage1",
        "LLaVA-1.5 13B, stage 1, 32 samples a step",
        "llava-13b",
        "captions",
        ("connector",),
        padded=8,
        recipe={"train": {"batch": 32, "micro_batch": 1}, "data": {"length": 2048}},
    ),
    Case(
        "onevision_4b_stage1",
        "LLaVA-OneVision-1.5 4B, stage 1, packs of 32k",
        "onevision-4b",
        "captions",
        ("connector",),
        padded=0,
        recipe={
            "train": {"batch": 1, "unit": "packs", "micro_batch": 1, "checkpointing": "selective"},
            "data": {"length": 32768},
        },
    ),
    Case(
        "fastvlm_1_5b_stage2",
        "FastVLM 1.5B, stage 2, everything learns",
        "fastvlm-1.5b",
        "talks",
        ("vision", "connector", "language"),
        padded=0,
        recipe={
            "train": {"batch": 4, "unit": "packs", "micro_batch": 1, "checkpointing_vision": "full"},
            "data": {"length": 4096},
        },
    ),
)
TEMPLATES = {
    ("llava", "captions"): "plain",
    ("llava", "talks"): "v1",
    ("onevision15", "captions"): "qwen2-vl",
    ("fastvlm", "talks"): "qwen_2",
}


def named(name: str, tiny: bool) -> Case:
    """The case, or its tiny twin. ValueError lists the names."""
    found = next((case for case in CASES if case.name == name), None)
    if found is None:
        raise ValueError(f"there is no case {name!r}; there are {', '.join(case.name for case in CASES)}")
    if not tiny:
        return found
    packs = found.recipe["train"].get("unit") == "packs"
    train = found.recipe["train"] | {"batch": 2 if packs else 4, "micro_batch": 2, "precision": "fp32"}
    recipe = {"train": train, "data": {"length": 1024 if packs else 512}}
    return replace(found, recipe=recipe, padded=min(found.padded, 2), lora=min(found.lora, 4))


def shape(case: Case, tiny: bool) -> Shape:
    return (TINY if tiny else SHAPES)[case.shape]


def recipe(case: Case, tiny: bool, *, start: str, data: str, images: str, run: str, cache: str, steps: int) -> Tree:
    """The case as a recipe. Rates are low and constant: the weights are random, and only losses are compared."""
    family = shape(case, tiny).family
    rate = 1e-3 if tiny else 1e-5
    said: Tree = {
        "name": case.name,
        "run": run,
        "model": {"start": start, "template": TEMPLATES[family, case.data]},
        "data": {"sources": [{"path": data, "images": images}], "cache": cache, "workers": 0 if tiny else 12},
        "learn": dict.fromkeys(case.learn, rate),
        "lora": {"r": case.lora, "alpha": 2.0 * case.lora} if case.lora else {},
        "optimizer": {"schedule": "constant", "warmup": 0, "clip": 1.0},
        "train": {"steps": steps, "device": "cpu" if tiny else "cuda", "precision": "bf16"},
        "checkpoint": {"every": 1_000_000},
        "log": {"every": 1_000_000},
    }
    for section, values in case.recipe.items():
        said[section] = said.get(section, {}) | values
    return said
