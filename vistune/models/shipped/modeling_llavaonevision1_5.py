"""LLaVA-OneVision-1.5 as a class of `transformers`: RICE vision, patch merger, Qwen3. It trains in vistune and goes
into the folders that vistune writes; beside its config's file it needs torch and transformers alone.

Shapes: P patches of all pictures, S segments (a picture, or one frame of a video), R = P + S rows inside the tower, C
the tower's width, D the language model's. Names in memory are the published names on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config, RiceConfig

OTHER_NAMES = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
"""How newer files of the published code call the same weights."""


class RicePatchEmbed(nn.Module):
    """Patches [P, channels * side * side] -> [P, C]. Kept as the convolution it was; applied as the product it is."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, kernel_size=side, stride=side, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class RiceAttention(nn.Module):
    """Attention inside each segment, in both directions."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_heads
        self.scaling = (config.embed_dim // config.num_heads) ** -0.5
        self.is_causal = False
        self.num_key_value_groups = 1
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], lengths: Sequence[int], **how: Any) -> Tensor:
        """`how` is what an attention needs that does a row of segments in one call; empty: each run by itself."""
        heads = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        query, key = (_rotate(each, *rotary) for each in heads[:2])
        more: dict[str, Any] = {"attention_mask": None, "scaling": self.scaling, "dropout": 0.0, "is_causal": False}
        attend = _interface(self.config)
        if how:
            out = attend(self, query[None], key[None], heads[2][None], **more, **how)[0][0]
        else:
            out = _by_run(lambda *each: attend(self, *each, **more)[0], (query, key, heads[2]), lengths)
        return self.proj(out.flatten(1))


def _interface(config: Any) -> Callable[..., Any]:
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation or "sdpa", eager_attention_forward)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **_: Any
) -> tuple[Any, Any]:
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def _by_run(attend: Callable[..., Tensor], heads: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Neighbours of equal length attend as one batch, so nothing is padded: each of `heads` [H, R, d] -> [R, H, d]."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    split = [each.split([length * count for length, count in runs], 1) for each in heads]
    outs = []
    for (length, count), *three in zip(runs, *split, strict=True):
        outs.append(attend(*(each.unflatten(1, (count, length)).transpose(0, 1) for each in three)).flatten(0, 1))
    return torch.cat(outs)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, R, d] turned by its positions, in fp32."""
    exact = heads.float()
    first, second = exact.chunk(2, -1)
    return (exact * cos + torch.cat([-second, first], -1) * sin).to(heads.dtype)


class RiceMlp(nn.Module):
    def __init__(self, config: RiceConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class RiceBlock(GradientCheckpointingLayer):
    def __init__(self, config: RiceConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = RiceAttention(config)
        self.mlp = RiceMlp(config)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], lengths: Sequence[int], **how: Any) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), rotary, lengths, **how)
        return hidden + self.mlp(self.norm2(hidden))


class RicePatchMerger(nn.Module):
    """Every `spatial_merge_size` squared patches, which lie together, become one token: [P, C] -> [P / 4, D]."""

    def __init__(self, config: RiceConfig):
        super().__init__()
        eps = config.layer_norm_eps if config.merger_norm_eps is None else config.merger_norm_eps
        self.joined = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, config.text_hidden_size)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden).view(-1, self.joined))


class RicePreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RiceBlock", "Qwen3DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Everything that a checkpoint may lack: nothing is ever left as the memory happened to be."""
        config: Any = getattr(self.config, "vision_config", self.config)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, config.initializer_range)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RiceTransformerPretrainedModel):
            nn.init.normal_(module.class_embedding, 0.0, config.initializer_range)
            nn.init.normal_(module.class_pos_emb, 0.0, config.initializer_range)
        else:
            super()._init_weights(module)


class RiceTransformerPretrainedModel(RicePreTrainedModel):
    """The tower and its merger. A class token goes before the patches of every segment, and is taken off at the end;
    its place is not a position but learned angles. There is no position table and no norm after the last block."""

    config_class = RiceConfig

    def __init__(self, config: RiceConfig):
        super().__init__(config)
        self.patch_embed = RicePatchEmbed(config)
        self.class_embedding = nn.Parameter(torch.zeros(config.embed_dim))
        self.class_pos_emb = nn.Parameter(torch.zeros(1, config.embed_dim // config.num_heads // 2))
        eps = config.layer_norm_eps if config.pre_norm_eps is None else config.pre_norm_eps
        self.pre_layernorm = nn.LayerNorm(config.embed_dim, eps=eps)
        self.blocks = nn.ModuleList([RiceBlock(config) for _ in range(config.depth)])
        self.merger = RicePatchMerger(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **how: Any) -> Tensor:
        """Patches [P, 588] and their grids [N, 3] (frames, rows, columns) -> [P / 4, D]."""
        return self.merger(self.encode(pixel_values, grid_thw, **how))

    def encode(self, pixel_values: Tensor, grid_thw: Tensor, **how: Any) -> Tensor:
        """What the merger is given: [P, C]. ValueError when patches and grids do not match."""
        grids = [tuple(grid) for grid in grid_thw.tolist()]
        sizes = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        if sum(sizes) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} patches, but their grids {grids} are of {sum(sizes)}")
        lengths = [1 + size for size in sizes]
        hidden = _with_class(self.class_embedding[None], self.patch_embed(pixel_values), sizes)
        angles = _with_class(self.class_pos_emb.float(), self.angles(grids, hidden.device), sizes).repeat(1, 2)
        rotary = angles.cos(), angles.sin()
        how = how or _one_call(self.config, lengths, hidden.device)
        hidden = self.pre_layernorm(hidden)
        runs = [] if how else lengths  # a compiled block would be made anew for other numbers
        for block in self.blocks:
            hidden = block(hidden, rotary, runs, **how)
        if self.config.legacy_images:
            return hidden[1 : 1 + sum(sizes)]
        return torch.cat(
            [each for length, each in zip(lengths, hidden.split(lengths), strict=True) for each in [each[1:]]]
        )

    def angles(self, grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
        """Angles of the patches, by row and column within their picture: fp32 [P, d / 2]. Made anew each time, so that
        no loader can leave them unset."""
        places = torch.cat([_places(*grid, self.config.spatial_merge_size) for grid in grids]).to(device)
        width = self.config.embed_dim // self.config.num_heads // 2
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return (places.float()[:, :, None] * (1.0 / 10000.0**steps)).flatten(1)


def _with_class(token: Tensor, patches: Tensor, sizes: Sequence[int]) -> Tensor:
    """`token` [1, C] before each segment of `patches` [P, C]: [R, C]."""
    return torch.cat([row for segment in patches.split(list(sizes)) for row in (token, segment)])


def _places(frames: int, rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of each patch, in the order in which the merger takes them: int64 [P, 2], on the host."""
    grid = torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))
    cells = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return cells.reshape(-1, 2).repeat(frames, 1)


def _one_call(config: Any, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a flash attention takes to do all segments at once; nothing for the others."""
    if "flash" not in (config._attn_implementation or ""):
        return {}
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


class LLaVAOneVision1_5_ForConditionalGeneration(RicePreTrainedModel, GenerationMixin):
    """Pictures' and frames' features in the places of their tokens, then Qwen3 with plain positions."""

    config_class = Llavaonevision1_5Config
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any):
        super().__init__(config)
        self.visual = RiceTransformerPretrainedModel._from_config(config.vision_config)
        self.model = Qwen3Model._from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel`'s; takes both of the published ways to call the weights."""
        kwargs.setdefault("key_mapping", OTHER_NAMES)
        found: Any = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model._weight_conversions = None  # else saving would turn the mapping round
        return found

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Ids [B, T], patches [P, 588] and grids [N, 3] of all rows end to end -> logits [B, T, vocabulary]."""
        kwargs.pop("return_dict", None)
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            embeds = self._spliced(embeds, input_ids, self.config.image_token_id, pixel_values, image_grid_thw)
        if pixel_values_videos is not None:
            embeds = self._spliced(embeds, input_ids, self.config.video_token_id, pixel_values_videos, video_grid_thw)
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _spliced(self, embeds: Tensor, ids: Tensor | None, token: int, pixels: Tensor, grids: Tensor | None) -> Tensor:
        """`embeds` with the features of `pixels` where `ids` have `token`. ValueError when they are not as many."""
        if ids is None or grids is None:
            raise ValueError("pixels need input_ids, which say where they go, and their grids (image_grid_thw)")
        features = self.visual(pixels, grids)
        places = ids == token
        if (found := int(places.sum())) != len(features):
            raise ValueError(f"{found} tokens {token} for pictures of {len(features)} tokens; lay one for each")
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    def prepare_inputs_for_generation(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Pictures belong to the first step: afterwards the cache holds what became of them."""
        parent: Any = super()
        found = parent.prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            found.update(pixel_values=None, pixel_values_videos=None)
        return found

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Several answers to one prompt: each row's pictures are repeated with the row."""
        held = {name: kwargs.pop(name) for names in _PICTURES for name in names[:2] if kwargs.get(name) is not None}
        for pixels, grids, token in _PICTURES if expand_size > 1 and input_ids is not None else ():
            if pixels in held:
                tokens = (input_ids == getattr(self.config, token)).sum(1).tolist()
                merged = self.config.vision_config.spatial_merge_size**2
                held[pixels], held[grids] = _repeated(held[pixels], held[grids], tokens, merged, expand_size)
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs | held


_PICTURES = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)


def by_row(pixels: Tensor, grids: Tensor, tokens: Sequence[int], merged: int) -> list[tuple[Tensor, Tensor]]:
    """Patches and grids of each row, of rows that have so many `tokens`, `merged` patches to each."""
    ends = (grids.prod(1) // merged).cumsum(0).tolist()
    splits = [ends.index(end) + 1 if end else 0 for end in itertools.accumulate(tokens)]
    counts = [after - before for before, after in itertools.pairwise([0, *splits])]
    patches = [count * merged for count in tokens]
    return list(zip(pixels.split(patches), grids.split(counts), strict=True))


def _repeated(pixels: Tensor, grids: Tensor, tokens: Sequence[int], merged: int, times: int) -> tuple[Tensor, Tensor]:
    """Patches and grids with those of every row `times` times in a row."""
    chosen = [row for row in by_row(pixels, grids, tokens, merged) for _ in range(times)]
    return torch.cat([each for each, _ in chosen]), torch.cat([each for _, each in chosen])
