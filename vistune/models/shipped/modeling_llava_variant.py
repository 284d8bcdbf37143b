"""LLaVA with what `transformers`' own Llava class cannot hold: other connectors (linear, any number of layers, none),
pictures at several scales (S2), MPT, a head with bias, towers with register tokens.

Needs torch and transformers alone: this very file is written into a model folder and opened there.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel


class LlavaVariantConfig(LlavaConfig):
    """As `LlavaConfig`, and

    connector_type: "linear", "mlpNx_gelu" (N linear layers, GELU between them) or "identity".
    s2_scales: sides in pixels at which a picture is seen, the smallest first (it is the vision model's own, and divides
        the others); None: one scale.
    head_bias: whether the language model's head has a bias.
    vision_feature_select_strategy: "default" keeps the patches alone, whatever tokens stand before them; "full" all.
    """

    model_type = "llava_variant"

    def __init__(self, connector_type="mlp2x_gelu", s2_scales=None, head_bias=False, **kwargs):
        super().__init__(**kwargs)
        self.connector_type = connector_type
        self.s2_scales = list(s2_scales) if s2_scales else None
        self.head_bias = head_bias


def depth(connector_type):
    """How many linear layers a connector has. ValueError for a type that is none."""
    if connector_type == "identity":
        return 0
    if connector_type == "linear":
        return 1
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", connector_type)
    if not match:
        raise ValueError(
            f"connector_type: {connector_type!r}; choose linear, mlpNx_gelu (such as mlp2x_gelu), identity"
        )
    return int(match[1])


def features_width(config):
    """Width of what the connector is given: of each chosen layer, at each scale."""
    layer = config.vision_feature_layer
    chosen = 1 if isinstance(layer, int) else len(layer)
    return config.vision_config.hidden_size * chosen * len(config.s2_scales or [1])


class Connector(nn.Sequential):
    """Linear layers at 0, 2, 4, ... with exact GELU between them."""

    def __init__(self, config):
        layers, text = depth(config.connector_type), config.text_config.hidden_size
        width = features_width(config)
        if layers == 0 and width != text:
            raise ValueError(
                f"connector_type 'identity' needs equal widths: vision gives {width}, language takes {text}"
            )
        modules: list[nn.Module] = []
        for number in range(layers):
            modules += [nn.GELU()] if number else []
            modules.append(nn.Linear(text if number else width, text))
        super().__init__(*modules)


def leading_tokens(vision_config):
    """Tokens before an image's patches: a class token, and registers."""
    kind = vision_config.model_type
    has_class = kind.startswith("clip") or kind.startswith("dinov2")
    return int(has_class) + getattr(vision_config, "num_register_tokens", 0)


def at_scales(see, pixels, scales):
    """S2: `see` (tiles [M, 3, s, s] -> [M, P, D], s = scales[0]) at every scale -> [N, P, D * len(scales)].

    A picture [N, 3, H, W] is resized to each scale and cut into tiles of the smallest; the tiles' features are laid
    back in their places and averaged down to the smallest scale's grid (Shi et al. 2024, "When do we not need larger
    vision models?").
    """
    count, found, grid = len(pixels), [], 0
    for scale in scales:
        tiles = scale // scales[0]
        sized = F.interpolate(pixels.float(), size=(scale, scale), mode="bicubic").to(pixels.dtype)
        # n c (i h) (j w) -> (i j n) c h w
        cut = sized.unflatten(3, (tiles, scales[0])).unflatten(2, (tiles, scales[0])).permute(2, 4, 0, 1, 3, 5)
        seen = see(cut.flatten(0, 2))
        side = round(seen.shape[1] ** 0.5)
        if side * side != seen.shape[1]:
            raise ValueError(f"s2_scales: {seen.shape[1]} features of a tile are no square; keep the patches alone")
        # (i j n) (h w) d -> n d (i h) (j w)
        laid = seen.unflatten(1, (side, side)).unflatten(0, (tiles, tiles, count)).permute(2, 5, 0, 3, 1, 4)
        laid = laid.flatten(4, 5).flatten(2, 3)
        grid = grid or side
        found.append(F.interpolate(laid.float(), size=(grid, grid), mode="area").to(seen.dtype))
    return torch.cat(found, dim=1).flatten(2).transpose(1, 2)


class LlavaVariantModel(LlavaModel):
    """As `LlavaModel`, with the connector that the config says."""

    config_class = LlavaVariantConfig

    def __init__(self, config):
        super(LlavaModel, self).__init__(config)  # not LlavaModel's own, which makes another connector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Connector(config)  # type: ignore[assignment]
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None, **kwargs
    ):
        """What the language model is given of images [N, 3, H, W]: `pooler_output` has [tokens, width] for each."""
        config = self.config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        skip = leading_tokens(config.vision_config) if strategy == "default" else 0

        def see(pixels):
            states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
            chosen = [layer] if isinstance(layer, int) else layer
            return torch.cat([states[one][:, skip:] for one in chosen], dim=-1)

        seen = at_scales(see, pixel_values, config.s2_scales) if config.s2_scales else see(pixel_values)
        features = self.multi_modal_projector(seen)
        each = list(features)  # as LlavaModel gives them
        return BaseModelOutputWithPooling(last_hidden_state=seen, pooler_output=each)  # type: ignore[arg-type]


class LlavaVariantForConditionalGeneration(LlavaForConditionalGeneration):
    """As `LlavaForConditionalGeneration`, around `LlavaVariantModel`."""

    config_class = LlavaVariantConfig

    def __init__(self, config):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LlavaVariantModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.head_bias)
        embedding = "wte" if text.model_type == "mpt" else "embed_tokens"
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{embedding}.weight"}
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)
