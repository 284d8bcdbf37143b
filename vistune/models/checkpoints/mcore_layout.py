"""How Megatron core lays out LLaVA-OneVision-1.5: tensor names, how rows are interleaved, what each rank holds.

Pure functions of tensors and names; knows nothing of files. Shapes: R rows, C columns, T ranks of tensor parallelism.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistune.models.weights import Entry, held

VOCABULARY_STEP = 128
"""Rows of embedding and head are padded to a multiple of this, times the ranks of tensor parallelism."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the layout depends on. `groups` are the key-value heads."""

    layers: int
    heads: int
    groups: int
    vision_layers: int
    vision_heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Of a model's config (that of `families.onevision15`)."""
        text, vision = config.text_config, config.vision_config
        return cls(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            groups=text.num_key_value_heads,
            vision_layers=vision.depth,
            vision_heads=vision.num_heads,
            vocabulary=text.vocab_size,
        )

    def padded(self, ranks: int) -> int:
        step = VOCABULARY_STEP * ranks
        return -(-self.vocabulary // step) * step


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of the model that one pipeline rank holds (one of several pieces, when they are interleaved)."""

    layers: range
    first: bool
    last: bool


def stages(counts: Sequence[int]) -> list[Stage]:
    """The pieces of a pipeline in the order of the layers, `counts[i]` layers each."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [
        Stage(range(start, start + count), i == 0, i == len(counts) - 1)
        for i, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]


# How a tensor of theirs is made of ours, and how it is divided over tensor-parallel ranks.
# One share: (our tensors, rank, ranks, sizes) -> what the rank holds.
# The way back: (all shares, sizes) -> our tensors.
Share = Callable[[Sequence[Tensor], int, int, Sizes], Tensor]
Whole = Callable[[Sequence[Tensor], Sizes], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way of interleaving and dividing, both ways."""

    name: str
    share: Share
    whole: Whole


def _pad(rows: Tensor, sizes: Sizes, ranks: int) -> Tensor:
    """The last row is repeated."""
    new = sizes.padded(ranks) - len(rows)
    return torch.cat([rows, rows[-1:].expand(new, *rows.shape[1:])]) if new else rows


def _grouped(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """q, k, v -> for every key-value head: its query heads, its key head, its value head."""
    split = [part.unflatten(0, (sizes.groups, -1)) for part in parts]
    return torch.cat(split, 1).flatten(0, 1)


def _ungrouped(rows: Tensor, sizes: Sizes) -> Sequence[Tensor]:
    split = rows.unflatten(0, (sizes.groups, sizes.heads // sizes.groups + 2, -1))
    query, key, value = split[:, :-2], split[:, -2], split[:, -1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def _per_head(rows: Tensor, sizes: Sizes) -> Tensor:
    """[q; k; v] -> for every head: its query, key and value rows."""
    return rows.unflatten(0, (3, sizes.vision_heads, -1)).transpose(0, 1).flatten(0, 2)


def _from_heads(rows: Tensor, sizes: Sizes) -> Tensor:
    return rows.unflatten(0, (sizes.vision_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _gate_up(shares: Sequence[Tensor], sizes: Sizes) -> Sequence[Tensor]:
    """Every rank has its rows of the gate above its rows of the other."""
    return [torch.cat(halves) for halves in zip(*(share.chunk(2) for share in shares), strict=True)]


COPY = Kind("the same on every rank", lambda p, r, n, s: p[0], lambda p, s: [p[0]])
ROWS = Kind("rows divided", lambda p, r, n, s: p[0].chunk(n)[r], lambda p, s: [torch.cat(list(p))])
COLUMNS = Kind("columns divided", lambda p, r, n, s: p[0].chunk(n, 1)[r], lambda p, s: [torch.cat(list(p), 1)])
VOCABULARY = Kind(
    "padded rows divided",
    lambda p, r, n, s: _pad(p[0], s, n).chunk(n)[r],
    lambda p, s: [torch.cat(list(p))[: s.vocabulary]],
)
GROUPED = Kind(
    "by key-value head, divided",
    lambda p, r, n, s: _grouped(p, s).chunk(n)[r],
    lambda p, s: _ungrouped(torch.cat(list(p)), s),
)
PER_HEAD = Kind(
    "by head, divided",
    lambda p, r, n, s: _per_head(p[0], s).chunk(n)[r],
    lambda p, s: [_from_heads(torch.cat(list(p)), s)],
)
GATE_UP = Kind("gate above up, on every rank", lambda p, r, n, s: torch.cat([each.chunk(n)[r] for each in p]), _gate_up)

_LAYER: list[tuple[str, str, Kind]] = [
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", COPY),
    (
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "self_attention.linear_qkv.weight",
        GROUPED,
    ),
    ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", COPY),
    ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", COPY),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", COLUMNS),
    ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", COPY),
    ("mlp.gate_proj.weight mlp.up_proj.weight", "mlp.linear_fc1.weight", GATE_UP),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", COLUMNS),
]
_BLOCK: list[tuple[str, str, Kind]] = [
    ("norm1.weight", "self_attention.linear_qkv.layer_norm_weight", COPY),
    ("norm1.bias", "self_attention.linear_qkv.layer_norm_bias", COPY),
    ("attn.qkv.weight", "self_attention.linear_qkv.weight", PER_HEAD),
    ("attn.qkv.bias", "self_attention.linear_qkv.bias", PER_HEAD),
    ("attn.proj.weight", "self_attention.linear_proj.weight", COLUMNS),
    ("attn.proj.bias", "self_attention.linear_proj.bias", COPY),
    ("norm2.weight", "mlp.linear_fc1.layer_norm_weight", COPY),
    ("norm2.bias", "mlp.linear_fc1.layer_norm_bias", COPY),
    ("mlp.fc1.weight", "mlp.linear_fc1.weight", ROWS),
    ("mlp.fc1.bias", "mlp.linear_fc1.bias", ROWS),
    ("mlp.fc2.weight", "mlp.linear_fc2.weight", COLUMNS),
    ("mlp.fc2.bias", "mlp.linear_fc2.bias", COPY),
]
_VISION_ENDS = [f"pre_layernorm.{each}" for each in ("weight", "bias")]
_VISION_ENDS = ["patch_embed.proj.weight", "class_embedding", "class_pos_emb", *_VISION_ENDS]
_MERGER = {"ln_q": "layernorm", "mlp.0": "linear_fc1", "mlp.2": "linear_fc2"}

# Modules that Transformer Engine gives an `_extra_state`, by the end of their names.
_STATEFUL = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of ours (published names) that make one of theirs."""

    ours: tuple[str, ...]
    theirs: str
    kind: Kind


def rules(sizes: Sizes, stage: Stage) -> Iterator[Rule]:
    """What one piece of a pipeline holds. Layers count from the piece's first; vision is in the first piece."""
    if stage.first:
        yield Rule(("model.embed_tokens.weight",), "language_model.embedding.word_embeddings.weight", VOCABULARY)
    for local, layer in enumerate(stage.layers):
        for ours, theirs, kind in _LAYER:
            names = tuple(f"model.layers.{layer}.{name}" for name in ours.split())
            yield Rule(names, f"language_model.decoder.layers.{local}.{theirs}", kind)
    if stage.last:
        yield Rule(("model.norm.weight",), "language_model.decoder.final_layernorm.weight", COPY)
        yield Rule(("lm_head.weight",), "language_model.output_layer.weight", VOCABULARY)
    if stage.first:
        yield from _vision_rules(sizes)


def _vision_rules(sizes: Sizes) -> Iterator[Rule]:
    for layer in range(sizes.vision_layers):
        for ours, theirs, kind in _BLOCK:
            yield Rule((f"visual.blocks.{layer}.{ours}",), f"vision_model.decoder.layers.{layer}.{theirs}", kind)
    for ours, theirs in _MERGER.items():
        for each in ("weight", "bias"):
            yield Rule((f"visual.merger.{ours}.{each}",), f"adapter.{theirs}.{each}", COPY)
    for name in _VISION_ENDS:
        yield Rule((f"visual.{name}",), f"vision_model.{name}", COPY)


def extra_states(names: Sequence[str]) -> list[str]:
    """Names under which Transformer Engine looks for a state of its own."""
    return [name.removesuffix("weight") + "_extra_state" for name in names if name.endswith(_STATEFUL)]


def share(
    rule: Rule, ours: Mapping[str, Entry], rank: int, ranks: int, sizes: Sizes, padding: Entry | None = None
) -> Entry:
    """What tensor-parallel rank `rank` of `ranks` holds of a rule. `padding`: rows to pad with, where they fit."""
    parts = [ours[name] for name in rule.ours]
    if padding is not None and sizes.padded(ranks) == sizes.vocabulary + padding.shape[0]:
        return _made([*parts, padding], lambda parts: torch.cat(list(parts)).chunk(ranks)[rank])
    return _made(parts, lambda parts: rule.kind.share(parts, rank, ranks, sizes))


def padding(rule: Rule, shares: Sequence[Entry], sizes: Sizes) -> Entry | None:
    """The rows beyond the vocabulary, when they are not the last one repeated (the head's learn, if unseen)."""
    if rule.kind is not VOCABULARY or sum(each.shape[0] for each in shares) <= sizes.vocabulary:
        return None
    starts = itertools.accumulate((each.shape[0] for each in shares), initial=0)
    rows = torch.cat(
        [each.read()[max(0, sizes.vocabulary - 1 - start) :] for start, each in zip(starts, shares, strict=False)]
    )
    return None if torch.equal(rows[1:], rows[:1].expand_as(rows[1:])) else held(rows[1:].clone())


def whole(rule: Rule, shares: Sequence[Entry], sizes: Sizes) -> dict[str, Entry]:
    """Our tensors of a rule, from what every rank holds. ValueError, on reading, when ranks disagree on a copy."""
    if rule.kind is COPY:
        return {rule.ours[0]: _agreed(rule.theirs, shares)}
    return {name: _part(rule.kind, shares, i, sizes) for i, name in enumerate(rule.ours)}


def _part(kind: Kind, shares: Sequence[Entry], index: int, sizes: Sizes) -> Entry:
    return _made(shares, lambda parts: kind.whole(parts, sizes)[index])


def _agreed(name: str, shares: Sequence[Entry]) -> Entry:
    def read() -> Tensor:
        first, *others = (each.read() for each in shares)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"{name}: the ranks do not hold the same; are they of one checkpoint?")
        return first

    return Entry(shares[0].dtype, shares[0].shape, read)


def _made(parts: Sequence[Entry], function: Callable[[Sequence[Tensor]], Tensor]) -> Entry:
    """An entry computed from others when it is read; its shape is found without data. ValueError for mixed types."""
    if len(types := {part.dtype for part in parts}) > 1:
        raise ValueError(f"tensors that become one are of several types: {', '.join(map(str, types))}; cast them first")
    empty = function([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
    return Entry(empty.dtype, tuple(empty.shape), lambda: function([part.read() for part in parts]).contiguous())
