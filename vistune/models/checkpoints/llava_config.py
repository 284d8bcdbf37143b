"""What the config.json of an original LLaVA checkpoint says, as a family's config, and the way back.

Knows the original's keys; reads no tensor. Source of the keys: LLaVA's own code and its published folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from vistune.models import families, older
from vistune.models.families import Family, llava_next
from vistune.models.folders import Described
from vistune.models.towers import clip

# The language models that the original has a class for (Qwen2's is of its successors), and the class.
CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
    "qwen2": ("llava_qwen2", "LlavaQwen2ForCausalLM"),
}
TOWER = "vision_tower"
"""What the tower's folder is called in a checkpoint that did not come with a name for it."""

# The chat template of a folder, which the original guesses from the folder's name; here the language model decides.
TEMPLATES = {"llama": "v1", "mistral": "mistral_instruct", "mpt": "mpt", "qwen2": "qwen_2"}

_OURS = re.compile(r"(un)?freeze_|image_|mm_|s2|tokenizer_|tune_|use_mm_|vision_|vistune$")
_NOT_THE_LANGUAGES = {"_name_or_path", "architectures", "auto_map", "model_type", "transformers_version"}


def recognise(config: Mapping[str, Any]) -> str:
    """What in a config.json is LLaVA's own; empty when nothing is. FastVLM writes the same keys, for another tower."""
    if "vision_config" in config or "mobileclip" in str(config.get("mm_vision_tower", "")).lower():
        return ""
    if config.get("mm_vision_tower"):
        return f"config.json: mm_vision_tower is {config['mm_vision_tower']!r}"
    wanted = [name for name in config.get("architectures") or [] if re.fullmatch(r"(?i)llava\w*ForCausalLM", name)]
    return f"config.json: architectures has {wanted[0]}" if wanted else ""


def language_kind(raw: Mapping[str, Any]) -> str:
    """The model_type of the language model inside. ValueError for one that is unknown."""
    said = " ".join([str(raw.get("model_type", "")), *(raw.get("architectures") or [])]).lower()
    rest = said.replace("llava", "").strip()
    for kind, mark in (("mpt", "mpt"), ("mistral", "mistral"), ("qwen2", "qwen(?!3)"), ("llama", "llama|^$")):
        if re.search(mark, rest):
            return kind
    raise ValueError(f"config.json: model_type {raw.get('model_type')!r}; known are {', '.join(CLASSES)} inside LLaVA")


def template(raw: Mapping[str, Any]) -> str:
    """The chat template, where nobody says one: "plain" for what only a first stage has trained."""
    if raw.get("tune_mm_mlp_adapter"):
        return "plain"
    if language_kind(raw) == "llama" and raw.get("vocab_size") == 64000:  # Yi, as in LLaVA-1.6 34B
        return "chatml_direct"
    return TEMPLATES[language_kind(raw)]


def image_mode(raw: Mapping[str, Any]) -> str | None:
    """ "pad", "square", or None for tiles. ValueError for what belongs to LLaVA's successors."""
    if llava_next.is_original(raw):
        return None
    said = raw.get("image_aspect_ratio") or "square"
    if said not in ("square", "pad"):
        raise ValueError(f"config.json: image_aspect_ratio is {said!r}; square, pad and anyres can be read")
    return said


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that holds such a model."""
    if llava_next.is_original(raw):
        return families.family("llava_next")
    stock = connector_type(raw) == "mlp2x_gelu" and language_kind(raw) != "mpt" and not raw.get("s2")
    return families.family("llava" if stock else "llava_variant")


def connector_type(raw: Mapping[str, Any]) -> str:
    """The kind of connector; the original takes a linear one when nothing is said."""
    return raw.get("mm_projector_type") or "linear"


def to_family(
    raw: Mapping[str, Any], family: Family, vision: PretrainedConfig, text: PretrainedConfig, image_token: int
) -> PretrainedConfig:
    """The config of the family's model around its parts'. ValueError for what the family does not compute."""
    if family.name == "llava_next":
        return llava_next.config_from_original(raw, vision_config=vision, text_config=text, image_token_id=image_token)
    said: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token,
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _strategy(raw, vision, family),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }
    if family.name == "llava_variant":
        said |= {"connector_type": connector_type(raw), "s2_scales": _scales(raw)}
    return family.config_class(**said)


def text_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The language model's own part of config.json."""
    kept = {key: value for key, value in raw.items() if not _OURS.match(key) and key not in _NOT_THE_LANGUAGES}
    return CONFIG_MAPPING[language_kind(raw)](**kept)


def text_rows(config: Mapping[str, Any]) -> int:
    """Rows of the vocabulary that a config.json says, of a language model or of a model around one."""
    return int(config.get("text_config", config)["vocab_size"])


def _strategy(raw: Mapping[str, Any], vision: PretrainedConfig, family: Family) -> str:
    select = raw.get("mm_vision_select_feature") or "patch"
    if select not in ("patch", "cls_patch"):
        raise ValueError(f"config.json: mm_vision_select_feature is {select!r}; patch and cls_patch are known")
    has_class = vision.model_type.startswith("clip") or family.name == "llava_variant"
    return "default" if select == "patch" and has_class else "full"


def _scales(raw: Mapping[str, Any]) -> list[int] | None:
    if not raw.get("s2"):
        return None
    return sorted(int(scale) for scale in str(raw.get("s2_scales", "336,672,1008")).split(","))


def refuse_what_does_not_fit(config: PretrainedConfig, family: Family) -> None:
    """ValueError for a model that the original has no words for."""
    if family.name not in ("llava", "llava_next", "llava_variant"):
        raise ValueError(f"a {family.name} model cannot be written as an original LLaVA checkpoint")
    text, vision = config.text_config.model_type, config.vision_config.model_type
    if text not in CLASSES:
        raise ValueError(f"the original LLaVA has no class around a {text}, only {', '.join(CLASSES)}; use --to hf")
    if not vision.startswith(("clip", "siglip_")):
        raise ValueError(f"the original LLaVA reads CLIP and SigLIP, no {vision} vision tower; use --to hf")
    if getattr(config, "head_bias", False):
        raise ValueError("the original LLaVA's head has no bias, this model's has one; use --to hf")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"the original LLaVA takes one vision layer, not {config.vision_feature_layer}; use --to hf")


def to_original(said: Described, dtype: str) -> dict[str, Any]:
    """config.json as the original's own code reads it, for a model that did not come from such a file."""
    config: Any = said.config
    text, scales = config.text_config, getattr(config, "s2_scales", None)
    model_type, architecture = CLASSES[text.model_type]
    raw = _flat(text) | {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": dtype,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_mm_proj": True,
        "mm_projector_type": getattr(config, "connector_type", "mlp2x_gelu"),
        "mm_hidden_size": config.vision_config.hidden_size * len(scales or [1]),
        "mm_vision_tower": TOWER,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if _keeps_class(config) else "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": said.start_end,
        "mm_use_im_patch_token": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": getattr(text, "max_position_embeddings", 2048),
    }
    if scales:
        raw |= {"s2": True, "s2_scales": ",".join(str(scale) for scale in scales)}
    return raw | image_keys(config, said.layout)


def _flat(text: PretrainedConfig) -> dict[str, Any]:
    """The language model's keys as older releases of `transformers` spell them."""
    everybodys = PretrainedConfig().to_dict().keys() | {"rope_parameters", "model_type"}
    raw = {key: value for key, value in text.to_dict().items() if key not in everybodys}
    raw |= {key: getattr(text, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return raw | older.angles(text.to_dict(), kind="type")


def image_keys(config: Any, layout: Any) -> dict[str, Any]:
    """How pictures become pixels, in the original's words."""
    return llava_next.to_original(config) if config.model_type == "llava_next" else {"image_aspect_ratio": layout.mode}


def _keeps_class(config: Any) -> bool:
    return clip.class_tokens(config) > 0 and config.vision_feature_select_strategy == "full"
