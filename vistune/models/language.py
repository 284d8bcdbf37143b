"""A causal language model inside a vision-language model: its forward over a pack, or over rows that go on, and the
operations that takes.

Shapes: T tokens of a pack, D the language model's width. Knows no family and nothing of what pictures are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models import attention, mpt
from vistune.models.flops import Piece, causal_pairs, learns, linear_weights


def hidden(language: Any, embeds: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states of a stock language model over a pack: [T, D], positions [T] -> [T, D].

    Its attention must be `attention.NAME` (`attention.use`); samples of `lengths` tokens do not see each other.
    """
    out = language(
        # Not a view as unsqueeze gives: a compiled first layer would be another function than those after it.
        inputs_embeds=torch.ops.aten._unsafe_view(embeds, [1, *embeds.shape]),
        position_ids=positions.unsqueeze(0),
        attention_mask=attention.no_mask(embeds),
        use_cache=False,
        segments=attention.segments(lengths, embeds.device),
    )
    return out.last_hidden_state.squeeze(0)


def go_on(language: Any, embeds: Tensor, kv: Any, places: attention.Places) -> Tensor:
    """Last hidden states of a stock language model over new positions of several rows: [n, c, D] -> [n, c, D].

    Its attention must be `attention.NAME`. `kv` (`vistune.models.kv.Kv`) is told of the `places` already; what stands
    in padding comes back, and means nothing.
    """
    if language.config.model_type == "mpt":
        return mpt.go_on(language, embeds, kv, places)
    out = language(
        inputs_embeds=embeds,
        position_ids=places.positions,
        attention_mask=attention.no_mask(embeds),
        past_key_values=kv,
        use_cache=True,
        places=places,
    )
    return out.last_hidden_state


def placeholders(ids: Tensor, token: int, expected: int, what: str) -> Tensor | None:
    """Positions of `token` in `ids` [T], or None when none are expected. The host does not wait for an accelerator.

    `what` says in an error what `expected` is made of ("3 images of 16 tokens"). Raises ValueError.
    """
    mask = ids == token
    if ids.device.type == "cpu":
        where = mask.nonzero().squeeze(1)
        if len(where) != expected:
            raise ValueError(
                f"{len(where)} image placeholders (id {token}) in the pack, but {what}; the data must lay {expected}"
            )
        return where if expected else None
    if expected == 0:
        return None
    torch._assert_async(mask.sum() == expected)
    return torch.nonzero_static(mask, size=expected).squeeze(1)


def splice(embeds: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """`embeds` [T, D] with `features` [places, D] at the positions `where`."""
    return embeds.index_copy(0, where, features.to(embeds.dtype))


def weights(language: Any, head: nn.Linear) -> dict[str, Any]:
    """Weights of the linear layers, as `pieces` takes them: "language" a pair for each layer, "head"."""
    return {"language": [layer_weights(layer) for layer in layers(language)], "head": head.weight.numel()}


def layers(language: Any) -> nn.ModuleList:
    """The layers of a stock language model."""
    return language.layers if hasattr(language, "layers") else language.blocks  # MPT's word


def layer_weights(layer: nn.Module) -> tuple[int, int]:
    """Weights of a transformer layer's linear layers before its attention, and after it."""
    inputs = {path for path, _ in layer.named_modules() if path.rpartition(".")[2] in _ATTENTION_INPUTS}
    before = sum(linear_weights(layer.get_submodule(path)) for path in inputs)
    return before, linear_weights(layer) - before


# Of CLIP, Llama and their like; of Phi-3 and its like; of MPT; of older DINOv2.
_ATTENTION_INPUTS = frozenset(["q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "Wqkv", "query", "key", "value"])


def pieces(
    text: Any, weights: dict[str, Any], lengths: Sequence[int], supervised: int, learn: Collection[str]
) -> list[Piece]:
    """The language model's part of a forward pass, embedding to head; `text` its config, `weights` from `weights`."""
    tokens = sum(lengths)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    scores = 4 * causal_pairs(lengths, window) * text.num_attention_heads * width
    rest, layers = learns(learn, "language", text.num_hidden_layers)
    embedding = rest or "language.embedding" in learn
    found = [Piece(learns=embedding)]  # a look-up
    for (inputs, others), learning in zip(weights["language"], layers, strict=True):
        found += layer_pieces(2 * tokens * inputs, scores, 2 * tokens * others, learning)
    tied = embedding and bool(getattr(text, "tie_word_embeddings", False))
    return [*found, Piece(2 * supervised * weights["head"], learns=rest or tied)]


def layer_pieces(inputs: int, scores: int, others: int, learning: bool) -> list[Piece]:
    """A layer: it begins with a norm, whose weights learn with it."""
    return [Piece(learns=learning), Piece(inputs, scores, learning), Piece(others, learns=learning)]
