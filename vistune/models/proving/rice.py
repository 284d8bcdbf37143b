"""The proof for a RICE tower: inside LLaVA-OneVision-1.5 it computes what the stock MLCDVisionModel computes.

Two pictures of odd shapes go through the stock tower one by one and through ours together, so a mix-up of pictures
shows. Shapes: R rows, which are a class token and then the patches of each picture; C the tower's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vistune.models.assembling.onevision15 import read_vision
from vistune.models.load import read_model
from vistune.models.proving.report import TOLERANCE, Row, difference
from vistune.models.weights import Entry

GRIDS = ((6, 8), (4, 10))
"""Rows and columns of patches of the two pictures."""


def compare_vision(folder: Path, tensors: Mapping[str, Entry], tower: Any) -> list[Row]:
    """Two rows: every weight of `tensors` (by published names) against the source in `folder`, then what every block
    of `tower` gives. ValueError for a source that is not whole."""
    rows = [_compare_weights(folder, tensors)]
    source: Any = read_model(transformers.MLCDVisionModel, folder, tower.dtype, finite=False)
    rows.append(_compare_states(source, tower))
    del source
    return rows


def _compare_weights(folder: Path, tensors: Mapping[str, Entry]) -> Row:
    worst, wrong = 0.0, ""
    wanted = read_vision(folder, None, finite=False)
    for name, entry in wanted.items():
        if name not in tensors:
            return Row("vision", "weights", len(wanted), float("nan"), f"{name} is missing in the assembled model")
        ours, theirs = tensors[name].read(), entry.read()
        if not torch.equal(ours, theirs.to(ours.dtype)):
            worst = max(worst, difference(theirs, ours))
            wrong = wrong or f"{name} differs; likely cause: other weights, or a cast between the two"
    return Row("vision", "weights", len(wanted), worst, wrong)


def _compare_states(source: Any, tower: Any) -> Row:
    size, merge = tower.config.patch_size, tower.config.spatial_merge_size
    noise = torch.Generator().manual_seed(0)
    pictures = [torch.randn(3, rows * size, columns * size, generator=noise).to(tower.dtype) for rows, columns in GRIDS]
    theirs = [_states(source.encoder.layers, lambda p=p: source(p[None])) for p in pictures]
    expected = [
        torch.cat(each) for each in zip(*(map(_merged(merge, grid), one) for grid, one in _pairs(theirs)), strict=True)
    ]
    patches = torch.cat([_patches(picture, size, merge) for picture in pictures])
    grids = torch.tensor([[1, *grid] for grid in GRIDS])
    ours = _states(tower.blocks, lambda: tower(patches, grids))
    tolerance, worst = TOLERANCE.get(tower.dtype, 1e-5), 0.0
    for depth, (one, other) in enumerate(zip(expected, ours, strict=True)):
        found = difference(one, other)
        worst = max(worst, found)
        if not found <= tolerance:  # also when it is NaN
            return Row("vision", "hidden states", len(ours), found, _cause(depth, one, other, source, tower))
    return Row("vision", "hidden states", len(ours), worst)


def _pairs(states: list[list[Tensor]]) -> Any:
    return zip(GRIDS, states, strict=True)


def _states(layers: nn.ModuleList, forward: Any) -> list[Tensor]:
    """What the first layer gets and what each gives: [R, C] each."""
    found: list[Tensor] = []
    hooks = [layers[0].register_forward_pre_hook(lambda module, given: found.append(given[0]))]
    hooks += [layer.register_forward_hook(lambda module, given, output: found.append(output)) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [each[0] if isinstance(each, tuple) else each for each in found]


def _merged(merge: int, grid: tuple[int, int]) -> Any:
    """Rows in the order of the stock tower, [1, R, C], in that of ours: the patches of a token together."""
    rows, columns = grid

    def order(state: Tensor) -> Tensor:
        state = state.flatten(0, -2)
        cells = state[1:].view(rows // merge, merge, columns // merge, merge, -1).transpose(1, 2)
        return torch.cat([state[:1], cells.reshape(rows * columns, -1)])

    return order


def _patches(picture: Tensor, size: int, merge: int) -> Tensor:
    """[3, H, W] -> [P, 3 * size * size], the patches of a token together."""
    step = size * merge
    cut = picture.unflatten(1, (-1, merge, size)).unflatten(4, (-1, merge, size))
    assert cut.shape[1] == picture.shape[1] // step
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * size * size)


def _cause(depth: int, one: Tensor, other: Tensor, source: Any, tower: Any) -> str:
    where = "pre_layernorm" if depth == 0 else f"visual.blocks.{depth - 1}"
    for name, state in (("the source's", one), ("the assembled model's", other)):
        if not torch.isfinite(state).all():
            return (
                f"{where}: {name} output is not finite; likely cause: {state.dtype} is too narrow, or the weights are"
            )
    wanted = {"num_attention_heads": "num_heads", "layer_norm_eps": "layer_norm_eps", "hidden_act": "hidden_act"}
    keys = [key for key, ours in wanted.items() if getattr(source.config, key) != getattr(tower.config, ours)]
    cause = f"config keys differ: {', '.join(keys)}" if keys else "its weights differ, see the row above"
    return f"{where}: outputs differ; likely cause: {cause}"
