"""MPT over a pack, or over rows that go on: ALiBi and causal attention inside each sample, through the stock blocks.

MPT has no rotary positions and no attention that `transformers` lets one replace. Knows nothing of pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptAttention

from vistune.models.attention.rows import Places


@dataclass(frozen=True)
class _Pack:
    """The samples of a pack as runs of equal length (length, count), and the bias [H,L,L] of each length."""

    runs: tuple[tuple[int, int], ...]
    biases: dict[int, Tensor]


@dataclass(frozen=True)
class _Rows:
    """Rows that go on: where keys and values lie, and the bias [n,H,c,L] of their new positions."""

    kv: Any
    bias: Tensor


class PackedMptAttention(MptAttention):
    """The stock attention, which inside a pack attends in each sample by itself, and in rows in each row."""

    @torch.compiler.disable  # it would be compiled anew for every pack's lengths
    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, _Rows):
            return self.out_proj(self._in_rows(hidden_states, attention_mask)), None
        if not isinstance(attention_mask, _Pack):
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask, **kwargs)
        mixed = self._mixed(hidden_states)
        sizes = [length * count for length, count in attention_mask.runs]
        outs = [
            self._inside(piece, *run, attention_mask)
            for run, piece in zip(attention_mask.runs, mixed[0].split(sizes), strict=True)
        ]
        return self.out_proj(torch.cat(outs).to(mixed.dtype).unsqueeze(0)), None

    def _mixed(self, hidden: Tensor) -> Tensor:
        mixed = self.Wqkv(hidden)
        return mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv) if self.clip_qkv else mixed

    def _in_rows(self, hidden: Tensor, rows: _Rows) -> Tensor:
        """[n, c, D] -> [n, c, D]. The bias is added in fp32, as it is in packs."""
        heads = self._mixed(hidden).unflatten(2, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        key, value = rows.kv.update(*heads[1:], self.layer_idx)
        scores = (heads[0] @ key.transpose(2, 3)).float() * self.softmax_scale + rows.bias
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)

    def _inside(self, mixed: Tensor, length: int, count: int, pack: _Pack) -> Tensor:
        """`count` samples of `length` tokens: [count * length, 3 * D] -> [count * length, D]. In fp32: half precision
        rounds the bias of a far key too much."""
        q, k, v = mixed.float().view(count, length, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        dropout = self.attn_dropout_p if self.training else 0.0
        with torch.autocast(mixed.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, pack.biases[length], dropout, scale=self.softmax_scale)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


def hidden(language: Any, embeds: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states of a stock `MptModel` over a pack: [T, D] -> [T, D].

    ValueError for a sample longer than its `max_seq_len`, which the stock class cannot read either.
    """
    kept = [length for length in lengths if length]
    if (longest := max(kept, default=0)) > language.config.max_seq_len:
        raise ValueError(
            f"a sample has {longest} tokens, this MPT was made for {language.config.max_seq_len} "
            "(text_config.max_seq_len); lower data.length"
        )
    _replace_attention(language)
    runs = tuple((length, len(list(run))) for length, run in itertools.groupby(kept))
    pack = _Pack(runs, {length: _bias(language, length, embeds.device) for length in set(kept)})
    states = embeds.unsqueeze(0)
    for block in language.blocks:
        states = block(states, None, pack)[0]
    return language.norm_f(states).squeeze(0)


def go_on(language: Any, embeds: Tensor, kv: Any, places: Places) -> Tensor:
    """As `vistune.models.language.go_on`."""
    _replace_attention(language)
    away = (places.positions.unsqueeze(2) - torch.arange(places.seen, device=embeds.device)).unsqueeze(1)
    one_away = language.build_mpt_alibi_tensor(language.num_heads, 2, device=embeds.device)[:, :, :1].float()
    rows = _Rows(kv, (one_away * away).masked_fill(away < 0, float("-inf")))
    states = embeds
    for block in language.blocks:
        states = block(states, None, rows)[0]
    return language.norm_f(states)


def _replace_attention(language: Any) -> None:
    for block in language.blocks:
        if type(block.attn) is MptAttention:
            block.attn.__class__ = PackedMptAttention


def _bias(language: Any, length: int, device: torch.device) -> Tensor:
    """[H,L,L] fp32: minus slope times distance, minus infinity for keys that come later."""
    alibi = language.build_mpt_alibi_tensor(language.num_heads, length, device=device).float()
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return alibi.expand(-1, length, -1).masked_fill(later, float("-inf"))
