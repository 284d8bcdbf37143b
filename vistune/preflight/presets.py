"""The models that preflight knows without a folder, and what a folder that has only its config.json says.

Sizes are those of the published parts (each config.json of openai/clip-vit-large-patch14-336, lmsys/vicuna-7b-v1.5 and
-13b-v1.5, Qwen/Qwen3-4B-Instruct-2507 and -8B-Base, DeepGlint-AI/rice-vit-large-patch14-560, Qwen/Qwen2-*).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    FastVlmConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from vistune.anyres import AnyresLayout, standard_pinpoints
from vistune.images import FixedLayout, Layout
from vistune.models import hub
from vistune.models.families import Family, family, family_of
from vistune.models.folders import Described, quiet, read_config
from vistune.models.load import describe
from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config
from vistune.models.towers import clip
from vistune.native import NativeLayout


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is counted: its config, how it takes pictures, and where both were found (a sentence).
    `described` is all that a folder says, where there is a whole one."""

    name: str
    family: Family
    config: PretrainedConfig
    layout: Layout
    found: str
    described: Described | None = None


# Width, of the feed-forward, layers, heads, heads of keys, vocabulary, whether the head is tied to the embedding.
_TEXT: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "vicuna-7b": (4096, 11008, 32, 32, 32, 32064, False),
    "vicuna-13b": (5120, 13824, 40, 40, 40, 32064, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32064, False),
    "yi-34b": (7168, 20480, 60, 56, 8, 64064, False),
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
}
_KINDS = {"vicuna": LlamaConfig, "yi": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def _said(name: str) -> dict[str, Any]:
    width, wide, layers, heads, keys, vocabulary, tied = _TEXT[name]
    return {
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _text(name: str) -> PretrainedConfig:
    more = {"sliding_window": None} if name.startswith("mistral") else {}
    return _KINDS[name.split("-")[0]](**_said(name), **more)


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava(text: str) -> PretrainedConfig:
    return LlavaConfig(vision_config=_clip(), text_config=_text(text), image_token_index=32000)


def _next(text: str) -> PretrainedConfig:
    points = [list(each) for each in standard_pinpoints(336)]
    return LlavaNextConfig(
        vision_config=_clip(), text_config=_text(text), image_token_index=32000, image_grid_pinpoints=points
    )


def _onevision(text: str) -> PretrainedConfig:
    said = _said(text) | {"head_dim": 128}
    return Llavaonevision1_5Config(text_config=said, vision_config={"text_hidden_size": said["hidden_size"]})


def _fastvlm(text: str) -> PretrainedConfig:
    config = FastVlmConfig(text_config=_text(text), tie_word_embeddings=_TEXT[text][-1])
    config.image_seq_length = 256  # 1,024 pixels, as published
    return config


PRESETS: dict[str, tuple[str, Callable[[str], PretrainedConfig], str]] = {
    # name: family, how its config is made, its language model
    "llava-1.5-7b": ("llava", _llava, "vicuna-7b"),
    "llava-1.5-13b": ("llava", _llava, "vicuna-13b"),
    "llava-1.6-vicuna-7b": ("llava_next", _next, "vicuna-7b"),
    "llava-1.6-vicuna-13b": ("llava_next", _next, "vicuna-13b"),
    "llava-1.6-mistral-7b": ("llava_next", _next, "mistral-7b"),
    "llava-1.6-34b": ("llava_next", _next, "yi-34b"),
    "llava-onevision-1.5-4b": ("onevision15", _onevision, "qwen3-4b"),
    "llava-onevision-1.5-8b": ("onevision15", _onevision, "qwen3-8b"),
    "fastvlm-0.5b": ("fastvlm", _fastvlm, "qwen2-0.5b"),
    "fastvlm-1.5b": ("fastvlm", _fastvlm, "qwen2-1.5b"),
    "fastvlm-7b": ("fastvlm", _fastvlm, "qwen2-7b"),
}


def preset(name: str) -> Subject:
    """A model of the table. ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    kind, make, text = PRESETS[name]
    config = make(text)
    return Subject(
        name=name,
        family=family(kind),
        config=config,
        layout=plain_layout(kind, config),
        found=f"the sizes of {name}, from a table: no folder was read",
    )


def named(start: str) -> str | None:
    """The preset that a start folder or hub id speaks of by its name ("runs/llava-1.5-13b/stage0"), if any."""
    parts = [part.lower().removesuffix("-hf") for part in re.split(r"[/\\]", start)]
    return next((part for part in reversed(parts) if part in PRESETS), None)


def find(
    start: str, *, template: str | None = None, image: str | None = None, options: dict[str, Any] | None = None
) -> Subject:
    """The model that a run would start from: a whole folder, one with config.json alone, a hub id in the local cache,
    or a preset by the folder's name. No weight is read. ValueError when it is none of them."""
    if start in PRESETS:
        return preset(start)
    folder = Path(start)
    if not folder.exists() and (kept := hub.cached(start)) is not None:
        folder = kept
    if folder.exists():
        folder = folder / "model" if (folder / "model" / "config.json").exists() else folder
        if _only_config(folder):
            return bare(folder)
        said = describe(str(folder), template=template, image=image, options=options)
        return Subject(
            name=start,
            family=said.family,
            config=said.config,
            layout=said.layout,
            found=f"{folder}: its config.json; no weights were read",
            described=said,
        )
    if (name := named(start)) is not None:
        return preset(name)
    raise ValueError(
        f"model {start}: no such folder, and no preset of that name. Give a folder with a config.json, or one of "
        f"{', '.join(PRESETS)} with --model"
    )


def _only_config(folder: Path) -> bool:
    """Whether a folder holds a config.json and nothing that makes tokens or pixels."""
    others = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "preprocessor_config.json")
    return (folder / "config.json").exists() and not any((folder / name).exists() for name in others)


def bare(folder: Path) -> Subject:
    """The model of a folder with a config.json alone; pictures as its family takes them by default."""
    one = family_of(read_config(folder), str(folder / "config.json"))
    with quiet():
        config = one.config_class.from_pretrained(folder, local_files_only=True)
    return Subject(
        name=str(folder),
        family=one,
        config=config,
        layout=plain_layout(one.name, config),
        found=f"{folder}: config.json alone",
    )


def plain_layout(kind: str, config: Any) -> Layout:
    """How a family takes pictures where no image processor says it."""
    if kind == "onevision15":
        return NativeLayout(patch=config.vision_config.patch_size, merge=config.vision_config.spatial_merge_size)
    if kind == "fastvlm":
        side = round(config.image_seq_length**0.5) * 64
        return FixedLayout(mode="pad", size=side, resize=side, patch=64)
    vision = config.vision_config
    if kind == "llava_next":
        points = tuple((high, wide) for high, wide in config.image_grid_pinpoints)
        return AnyresLayout(size=vision.image_size, patch=vision.patch_size, pinpoints=points)
    side = vision.image_size
    return FixedLayout(size=side, resize=side, patch=vision.patch_size, extra_tokens=clip.extra_tokens(config))
