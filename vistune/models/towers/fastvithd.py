"""FastViTHD, the vision tower of FastVLM: from pixels to a map of features, in its inference form (branches folded).

The tensors have the names of timm's fastvit_mci3, under which stock model folders store them; neither timm nor
torchvision is needed. Shapes: N images, C channels, H x W a map. Knows nothing of connectors or language models.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

STRIDE = 64
"""Pixels to a side of one token: 4 in the stem, 2 before each of four stages."""
ARCHITECTURE = "fastvit_mci3"
HEAD = 32
"""Channels of an attention head."""
WIDER, FINAL, SQUEEZED = 4, 2, 16
"""The feed-forward part is 4 times as wide as its stage, the last map twice, and its gate sees a 16th of that."""
_DEPTHS, _WIDTHS = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)


@dataclass(frozen=True)
class Sizes:
    """Blocks and channels of the five stages; the defaults are mobileclip_l's, which all published FastVLM use."""

    depths: tuple[int, ...] = _DEPTHS
    widths: tuple[int, ...] = _WIDTHS

    @property
    def features(self) -> int:
        """Channels of the last map: 3,072 of mobileclip_l."""
        return FINAL * self.widths[-1]

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """What a `timm_wrapper` config says. ValueError for another tower, or for one that is not in inference form."""
        if config.architecture.partition(".")[0] != ARCHITECTURE:
            raise ValueError(f"vision_config.architecture is {config.architecture!r}; FastVLM's is {ARCHITECTURE!r}")
        said: Mapping[str, Any] = config.model_args or {}
        if unknown := sorted(said.keys() - {"layers", "embed_dims", "inference_mode"}):
            raise ValueError(f"vision_config.model_args: {', '.join(unknown)}; only layers and embed_dims can be said")
        if not said.get("inference_mode", False):
            raise ValueError(
                "vision_config.model_args.inference_mode is not true: a tower with unfolded branches; fold them first "
                "(timm.utils.reparameterize_model), then save it with inference_mode = true"
            )
        sizes = cls(tuple(said.get("layers", _DEPTHS)), tuple(said.get("embed_dims", _WIDTHS)))
        if len(sizes.depths) != 5 or len(sizes.widths) != 5:
            raise ValueError(f"vision_config.model_args: five layers and five embed_dims are needed, not {said}")
        if getattr(config, "hidden_size", sizes.features) != sizes.features:
            raise ValueError(
                f"vision_config.hidden_size is {config.hidden_size}; these embed_dims give {sizes.features}"
            )
        return sizes


class Norm(nn.BatchNorm2d):
    """Batch normalization over [N,C,H,W]. Its statistics follow the data only while its weight learns.

    A frozen tower is thus the same in training as in evaluation. In half precision the sums stay fp32.
    """

    def train(self, mode: bool = True) -> Norm:
        return super().train(mode and self.weight is not None and self.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        held: Any = (self.running_mean, self.running_var, self.num_batches_tracked)
        weight, bias, mean, var = (x.float() for x in (self.weight, self.bias, *held[:2]))
        if not self.training:
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        # Copies move, both times: selective recomputing wants no operator in backward that forward did not have.
        mean, var = mean.clone(), var.clone()
        out = F.batch_norm(input, mean, var, weight, bias, True, self.momentum or 0.0, self.eps)
        again = torch._C._current_graph_task_id() != -1  # run again by a backward pass: this batch is counted already
        if not again:
            held[0].copy_(mean)
            held[1].copy_(var)
            held[2].add_(1)
        return out


class Conv(nn.Module):
    """A convolution whose branches are folded into one, then a gate where there is one, then GELU unless told not to.

    Stem, patch embedding, token mixing, positions and the last map: all are this.
    """

    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool, gate: int = 0
    ):
        super().__init__()
        self.reparam_conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups)
        self.se = Gate(outside, gate) if gate else None
        self.act = nn.GELU() if act else None

    def forward(self, map: Tensor) -> Tensor:
        map = self.reparam_conv(map)
        map = self.se(map) if self.se is not None else map
        return self.act(map) if self.act is not None else map


class Gate(nn.Module):
    """Squeeze and excitation: every channel scaled by what the means of all say."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, map: Tensor) -> Tensor:
        means = map.mean((2, 3), keepdim=True)
        return map * self.fc2(F.relu(self.fc1(means))).sigmoid()


class Scale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, map: Tensor) -> Tensor:
        return map * self.gamma


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of [N,C,H,W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Depthwise(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.bn = Norm(channels)

    def forward(self, map: Tensor) -> Tensor:
        return self.bn(self.conv(map))


class FeedForward(nn.Module):
    """A 7 x 7 convolution of each channel, then two layers at every place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _Depthwise(channels)
        self.fc1 = nn.Conv2d(channels, WIDER * channels, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(WIDER * channels, channels, 1)

    def forward(self, map: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(map))))


class Attention(nn.Module):
    """Every place of a map sees every other of the same image."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, map: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C,H,W]."""
        places = map.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(places).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.proj(seen.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(map.shape)


class ConvBlock(GradientCheckpointingLayer):
    """A block of the first three stages."""

    def __init__(self, channels: int):
        super().__init__()
        self.token_mixer = Conv(channels, channels, 3, groups=channels, act=False)
        self.mlp = FeedForward(channels)
        self.layer_scale = Scale(channels)

    def forward(self, map: Tensor) -> Tensor:
        map = self.token_mixer(map)
        return map + self.layer_scale(self.mlp(map))


class AttentionBlock(GradientCheckpointingLayer):
    """A block of the last two stages."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, eps=1e-5)
        self.token_mixer = Attention(channels)
        self.layer_scale_1 = Scale(channels)
        self.mlp = FeedForward(channels)
        self.layer_scale_2 = Scale(channels)

    def forward(self, map: Tensor) -> Tensor:
        map = map + self.layer_scale_1(self.token_mixer(self.norm(map)))
        return map + self.layer_scale_2(self.mlp(map))


class _Halving(nn.Module):
    """Half the side, more channels."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.proj = nn.Sequential(
            Conv(inside, outside, 7, 2, groups=inside, act=True), Conv(outside, outside, 1, act=True)
        )

    def forward(self, map: Tensor) -> Tensor:
        return self.proj(map)


class Stage(nn.Module):
    """Halving (but for the first), positions (in the last two), blocks."""

    def __init__(self, index: int, sizes: Sizes):
        super().__init__()
        width, attends = sizes.widths[index], index >= 3
        self.downsample = _Halving(sizes.widths[index - 1], width) if index else None
        self.pos_emb = Conv(width, width, 7, groups=width, act=False) if attends else None
        block = AttentionBlock if attends else ConvBlock
        self.blocks = nn.ModuleList(block(width) for _ in range(sizes.depths[index]))

    def forward(self, map: Tensor) -> Tensor:
        map = self.downsample(map) if self.downsample is not None else map
        map = self.pos_emb(map) if self.pos_emb is not None else map
        for block in self.blocks:
            map = block(map)
        return map


class FastViTHD(nn.Module):
    """[N,3,H,W] with values in 0..1, H and W multiples of 64 -> [N, features, H/64, W/64]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, last = sizes.widths[0], sizes.widths[-1]
        self.stem = nn.Sequential(
            Conv(3, width, 3, 2, act=True),
            Conv(width, width, 3, 2, groups=width, act=True),
            Conv(width, width, 1, act=True),
        )
        self.stages = nn.ModuleList(Stage(index, sizes) for index in range(5))
        squeezed = sizes.features // SQUEEZED
        self.final_conv = Conv(last, sizes.features, 3, groups=last, act=True, gate=squeezed)

    def forward(self, pixels: Tensor) -> Tensor:
        map = self.stem(pixels)
        for stage in self.stages:
            map = stage(map)
        return self.final_conv(map)


class Tower(nn.Module):
    """What stands where `transformers` would put timm's model: same names of tensors, same answer."""

    def __init__(self, config: Any):
        super().__init__()
        self.timm_model = FastViTHD(Sizes.of(config))

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The last map, [N, features, H/64, W/64], as `last_hidden_state`."""
        # Channels last: 5.6 s became 3.9 s for 1,024 pixels on two CPU cores, and features come out row by row.
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        return BaseModelOutputWithPooling(last_hidden_state=self.timm_model(pixels))


def see(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Features of images [N,3,H,W] -> [N, H/64 * W/64, features], row by row; without gradient when nothing in `tower`
    learns. ValueError for sides that are no multiples of 64."""
    height, width = pixels.shape[-2:]
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"FastViTHD: {width} x {height} pixels; both sides must be multiples of {STRIDE}")
    learning = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learning):
        return tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)


def operations(tower: FastViTHD, side: int) -> dict[str, Any]:
    """Forward operations of one image of `side` pixels: (products, attention) in their order, of "stem", of each of
    "stages", and of "last". `tower` is on the meta device; a multiply-add counts 2."""
    found: dict[str, list[tuple[int, int]]] = {}

    def count(module: Any, given: tuple[Tensor, ...], out: Tensor, path: str) -> None:
        seen = found.setdefault(path, [])
        if isinstance(module, Attention):
            seen.append((0, 4 * out.shape[2:].numel() ** 2 * out.shape[1]))
        elif isinstance(module, nn.Conv2d):
            seen.append((2 * out.shape[2:].numel() * module.weight.numel(), 0))
        elif isinstance(module, nn.Linear):
            seen.append((2 * out.shape[1] * module.weight.numel(), 0))

    paths = ["stem", *(f"stages.{i}" for i in range(len(tower.stages))), "final_conv"]
    counted = [(path, module) for path in paths for module in tower.get_submodule(path).modules()]
    hooks = [module.register_forward_hook(functools.partial(count, path=path)) for path, module in counted]
    tower.eval()(torch.empty(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return {"stem": found[paths[0]], "stages": [found[path] for path in paths[1:-1]], "last": found[paths[-1]]}
