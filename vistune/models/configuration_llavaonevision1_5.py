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


class LLaVAOneVision1_5_TextConfig(PretrainedConfig):
    """A Qwen3 language model by its published fields. Defaults: Qwen3-4B-Instruct-2507."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2560,
        intermediate_size: int = 9728,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 262144,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        max_window_layers: int = 36,
        layer_types: list[str] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.rope_theta, scaling = _rope(rope_theta, rope_scaling, rope_parameters)
        # Newer releases read the last of these, older ones the two published fields; they say the same.
        if not hasattr(PretrainedConfig, "rope_scaling"):
            self.rope_scaling = scaling
        self.rope_parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.use_sliding_window = use_sliding_window
        self.sliding_window = sliding_window if use_sliding_window else None
        self.max_window_layers = max_window_layers
        windowed = self.sliding_window is not None
        self.layer_types = layer_types or [
            "sliding_attention" if windowed and i >= max_window_layers else "full_attention"
            for i in range(num_hidden_layers)
        ]
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        ids = {name: kwargs.pop(name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids.values()
        self.tie_word_embeddings = tie_word_embeddings

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
