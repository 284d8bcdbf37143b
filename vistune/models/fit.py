"""Whether tensors are those of a model, by names and shapes alone, and which is which.

Knows families by their protocol; reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vistune.models.checkpoints import Checkpoint
from vistune.models.families import Family
from vistune.models.folders import Described, quiet
from vistune.models.weights import Entry

COMPUTED = re.compile(r"rotary_emb\.inv_freq$|position_ids$|masked_bias$|\.attn\.bias$")
"""Buffers that older files carry and that every model computes by itself."""

HEAD = "lm_head.weight"
"""Of every family, in the model."""

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


class Given:
    """Stored tensors, found by the names that the family publishes, or by those of other versions' layouts."""

    def __init__(self, tensors: Mapping[str, Entry]):
        self.tensors = tensors
        self.names = {plain(name): name for name in tensors}

    def name(self, published: str) -> str | None:
        return published if published in self.tensors else self.names.get(plain(published))

    def get(self, published: str) -> Entry | None:
        name = self.name(published)
        return None if name is None else self.tensors[name]


def match(family: Family, model: nn.Module, given: Given, tied: bool, where: str) -> dict[str, str]:
    """The stored name of each of the model's tensors, by its name in the model; of a head that is `tied` to the
    embedding, none.

    ValueError, with the first ten and their count, for tensors that the model lacks, has besides, or has in another
    shape.
    """
    found, missing, shapes = {}, [], []
    for name, tensor in model.state_dict(keep_vars=True).items():
        published = family.stored_name(name)
        stored = given.name(published)
        if tied and name == HEAD:
            continue
        if stored is None:
            missing.append(published)
        elif given.tensors[stored].shape != tuple(tensor.shape):
            shapes.append(f"{stored} is {list(given.tensors[stored].shape)}, not {list(tensor.shape)}")
        if stored is not None:
            found[name] = stored
    used = {*found.values(), given.name(family.stored_name(HEAD)) if tied else None}
    extra = [name for name in given.tensors if name not in used and not COMPUTED.search(name)]
    refuse(where, {MISSING: missing, EXTRA: extra, SHAPES: shapes})
    return found


def check(found: Checkpoint, where: str) -> None:
    """`match`, of the model that a checkpoint says it is. A head that is not there is tied if config.json says so."""
    family, given = found.said.family, Given(found.tensors)
    tied = given.name(family.stored_name(HEAD)) is None and ties(found.said.config)
    match(family, skeleton(family, found.said.config), given, tied, where)


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
