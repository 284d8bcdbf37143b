"""LLaVA-OneVision-1.5's config.json, with the published names and fields. Needs transformers alone, and goes with the
model's file into the folders that vistune writes.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig


class RiceConfig(PretrainedConfig):
    """The vision tower and the merger. Beside the published fields: `pre_norm_eps` and `merger_norm_eps` (None: as
    `layer_norm_eps`), and `legacy_images`, the published code's shifted features of every picture after the first."""

    model_type = "rice_vit"
    base_config_key = "vision_config"

    def __init__(
        self,
        depth: int = 24,
        embed_dim: int = 1024,
        hidden_size: int = 1024,
        hidden_act: str = "gelu",
        intermediate_size: int = 4096,
        num_heads: int = 16,
        in_channels: int = 3,
        patch_size: int = 14,
        spatial_merge_size: int = 2,
        temporal_patch_size: int = 1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        text_hidden_size: int = 2560,
        pre_norm_eps: float | None = None,
        merger_norm_eps: float | None = None,
        legacy_images: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if hidden_act != "gelu":
            raise ValueError(f"vision_config.hidden_act is {hidden_act!r}; a RICE tower has gelu")
        if temporal_patch_size != 1:
            raise ValueError(f"vision_config.temporal_patch_size is {temporal_patch_size}; a RICE tower has 1")
        self.depth = depth
        self.embed_dim = embed_dim
        self.hidden_size = hidden_size
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.temporal_patch_size = temporal_patch_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.text_hidden_size = text_hidden_size
        self.pre_norm_eps = pre_norm_eps
        self.merger_norm_eps = merger_norm_eps
        self.legacy_images = legacy_images


QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "layer_types": None,
    "image_token_id": None,
    "video_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""The published fields and their defaults: Qwen3-4B-Instruct-2507."""


class LLaVAOneVision1_5_TextConfig(PretrainedConfig):
    """A Qwen3 language model by its published fields (`QWEN3_4B`) and `rope_theta`, `rope_scaling`."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        said = {name: kwargs.pop(name, default) for name, default in QWEN3_4B.items()}
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta, scaling = _rope(rope_theta, rope_scaling, rope_parameters)
        # Newer releases read the last of these, older ones the two published fields; they say the same.
        if not hasattr(PretrainedConfig, "rope_scaling"):
            self.rope_scaling = scaling
        self.rope_parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta}
        said["num_key_value_heads"] = said["num_key_value_heads"] or said["num_attention_heads"]
        said["sliding_window"] = said["sliding_window"] if said["use_sliding_window"] else None
        first = said["num_hidden_layers"] if said["sliding_window"] is None else said["max_window_layers"]
        said["layer_types"] = said["layer_types"] or [
            "sliding_attention" if i >= first else "full_attention" for i in range(said["num_hidden_layers"])
        ]
        for name, value in said.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As published: `rope_theta` and `rope_scaling`, which every release reads."""
        found = super().to_dict()
        scaling = {key: value for key, value in found.pop("rope_parameters", {}).items() if key != "rope_theta"}
        found["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
        return found


def _rope(
    theta: float | None, scaling: dict[str, Any] | None, both: dict[str, Any] | None
) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary positions, from the published fields or from the newer one that holds both."""
    given = dict(scaling or both or {})
    theta = theta or given.get("rope_theta") or 5000000.0
    given = {"rope_type" if key == "type" else key: value for key, value in given.items() if key != "rope_theta"}
    return float(theta), given if given.get("rope_type", "default") not in ("default", "mrope") else None


class Llavaonevision1_5Config(PretrainedConfig):
    """Vision and language together. The head is tied to the embedding only where the language model's part says so: a
    file without the flag is not tied, whatever the default of a release."""

    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": RiceConfig, "text_config": LLaVAOneVision1_5_TextConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vocab_size: int = 152064,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ):
        text: Any = _section(LLaVAOneVision1_5_TextConfig, text_config)
        tied = bool(text.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings)
        text.tie_word_embeddings = tied
        self.text_config = text
        self.vision_config: Any = _section(RiceConfig, vision_config)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vocab_size = vocab_size  # published, and larger than the embedding; nothing reads it
        super().__init__(**{"tie_word_embeddings": tied, **kwargs})
        self.tie_word_embeddings = tied


def _section(kind: type[PretrainedConfig], given: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    return kind(**{key: value for key, value in (given or {}).items() if key != "model_type"})
