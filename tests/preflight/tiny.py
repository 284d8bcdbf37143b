"""A tiny LLaVA of the counting tests: its config, recipes over it, and micro-batches."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from vistune import recipe as recipes
from vistune.images import FixedLayout
from vistune.models.families import family
from vistune.preflight.counting import Micro
from vistune.preflight.presets import Subject

SIDE, PATCH = 32, 8
EACH = (SIDE // PATCH) ** 2


def subject(language: int = 3, vision: int = 3) -> Subject:
    """Pictures of 16 tokens."""
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=vision,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=language,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return Subject(
        name="tiny",
        family=family("llava"),
        config=LlavaConfig(vision_config=tower, text_config=text, image_token_index=500),
        layout=FixedLayout(size=SIDE, resize=SIDE, patch=PATCH),
        found="made here",
    )


def recipe(**sections: dict[str, Any]) -> recipes.Recipe:
    """A recipe whose model and data are nowhere; `sections` lie over it."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "run": "runs/tiny",
        "model": {"start": "nowhere"},
        "data": {"sources": [{"path": "nowhere.json"}], "length": 256},
        "learn": {"connector": 1e-3},
    }
    for section, values in sections.items():
        tree[section] = values if section == "learn" else tree.get(section, {}) | values
    return recipes.build(tree, "tiny")


def micro(packs: int = 1) -> Micro:
    """Packs of 256 tokens: three pictures, and padding at the end."""
    return Micro(lengths=(80, 90, 60, 26) * packs, supervised=70 * packs, pixels=(3 * packs, 3, SIDE, SIDE))
