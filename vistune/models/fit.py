"""Whether tensors are those of a model, by names and shapes alone.

Knows families by their protocol; reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vistune.models.checkpoints import Checkpoint
from vistune.models.families import Family
from vistune.models.folders import Described, quiet

COMPUTED = re.compile(r"rotary_emb\.inv_freq$|position_ids$|masked_bias$|\.attn\.bias$")
"""Buffers that older files carry and that every model computes by itself."""


MISSING, EXTRA = "missing", "not of this model"
SHAPES, NONFINITE = "of another shape than config.json says", "not finite (NaN or infinity)"
"""What can be wrong with weights."""


def plain(name: str) -> str:
    """A tensor's name without the levels in which the layouts of different versions differ."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "vision_model"))


def skeleton(family: Family, config: PretrainedConfig) -> PreTrainedModel:
    """The family's model with parameters that take no memory, and with its computed buffers."""
    with quiet(), no_init_weights(), init_empty_weights(include_buffers=False):
        return family.model_class(config)


def expected(said: Described) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model with this config."""
    tensors = skeleton(said.family, said.config).state_dict()
    return {said.family.stored_name(name): tuple(tensor.shape) for name, tensor in tensors.items()}


def check(found: Checkpoint, where: str) -> None:
    """ValueError, with the first ten and their count, for tensors that the family's model lacks, has besides, or has in
    another shape. No tensor is read."""
    wanted = {plain(name): (name, shape) for name, shape in expected(found.said).items()}
    given = {plain(name): (name, entry.shape) for name, entry in found.tensors.items() if not COMPUTED.search(name)}
    head = plain(found.said.family.stored_name("lm_head.weight"))
    missing = [name for key, (name, _) in wanted.items() if key not in given and key != head]
    extra = [name for key, (name, _) in given.items() if key not in wanted]
    shapes = [
        f"{name} is {list(given[key][1])}, not {list(shape)}"
        for key, (name, shape) in wanted.items()
        if key in given and given[key][1] != shape
    ]
    if head in wanted and head not in given and not ties(found.said.config):
        missing.append(wanted[head][0])
    refuse(where, {MISSING: missing, EXTRA: extra, SHAPES: shapes})


def refuse(where: Path | str, kinds: Mapping[str, Iterable[str]]) -> None:
    """ValueError when any of `kinds` (what is wrong: the weights with which it is) has a name."""
    wrong = [
        f"{len(names)} weights are {what}. The first:\n  " + "\n  ".join(sorted(names)[:10])
        for what, names in ((what, list(names)) for what, names in kinds.items())
        if names
    ]
    if wrong:
        raise ValueError(f"{where}: " + "\n".join(wrong))


def ties(config: Any) -> bool:
    """Whether config.json ties the head to the embedding, in whichever section."""
    sections = (config, getattr(config, "text_config", config))
    return any(getattr(section, "tie_word_embeddings", False) for section in sections)
