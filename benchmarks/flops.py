"""Useful FLOPs of one training step: what the loss and its gradients need, whoever computes it.

The head counts on supervised rows only, vision layers behind the chosen one do not count, attention is causal in the
language model and full in vision, a multiply-add is two. Padding and recomputation are not useful.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stages import LORA, Stage, learns


def step_flops(config: dict[str, Any], samples: Iterable[tuple[int, int, int]], stage: Stage) -> float:
    """FLOPs of a step over `samples` of (tokens, supervised, images); `config` is the model folder's config.json.

    What is frozen in the language model needs its forward and the gradient of its inputs, since the connector before it
    learns; vision needs its forward. Adapters need all three, of their own weights.
    """
    text, vision = config["text_config"], config["vision_config"]
    language = learns(stage)
    adapters = _adapter_weights(text) if language == "adapters" else 0
    total = 0.0
    for tokens, supervised, images in samples:
        matmuls = 2 * tokens * _language_weights(text)
        scores = 2 * tokens * tokens * text["hidden_size"] * text["num_hidden_layers"]  # half of 4 n^2 d
        head = 2 * supervised * text["hidden_size"] * text["vocab_size"]
        total += (matmuls + head) * (3 if language == "all" else 2) + scores * 3 + 6 * tokens * adapters
        total += images * (_vision(config, vision) + _connector(config, text, vision))
    return total


def _language_weights(text: dict[str, Any]) -> int:
    """Weights of the linear layers of the whole stack, head and embedding apart."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    width = text.get("head_dim") or hidden // heads
    attention = hidden * width * (2 * heads + 2 * text.get("num_key_value_heads", heads))
    return text["num_hidden_layers"] * (attention + 3 * hidden * text["intermediate_size"])


def _adapter_weights(text: dict[str, Any]) -> int:
    """Weights of the adapters beside those layers: rank times inputs and outputs of each."""
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    width = text.get("head_dim") or hidden // heads
    kv = width * text.get("num_key_value_heads", heads)
    ends = 2 * (hidden + width * heads) + 2 * (hidden + kv) + 3 * (hidden + inner)
    return text["num_hidden_layers"] * LORA.r * ends


def _layers_used(config: dict[str, Any], vision: dict[str, Any]) -> int:
    chosen = config["vision_feature_layer"]
    return vision["num_hidden_layers"] + 1 + chosen if chosen < 0 else chosen


def _patches(vision: dict[str, Any]) -> int:
    return (vision["image_size"] // vision["patch_size"]) ** 2


def _vision(config: dict[str, Any], vision: dict[str, Any]) -> float:
    """Forward of one image; frozen, so nothing goes backward."""
    hidden, positions = vision["hidden_size"], _patches(vision) + 1
    layer = 2 * positions * (4 * hidden**2 + 2 * hidden * vision["intermediate_size"]) + 4 * positions**2 * hidden
    patch = 2 * _patches(vision) * 3 * vision["patch_size"] ** 2 * hidden
    return patch + layer * _layers_used(config, vision)


def _connector(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> float:
    """Forward, gradient of the weights, and of the second layer's input, of one image."""
    first, second = vision["hidden_size"] * text["hidden_size"], text["hidden_size"] ** 2
    return 2 * _patches(vision) * (2 * first + 3 * second)
