"""A model on disk to a model in memory and back. What it is, its files say; everything is checked on the way in.

Knows folders, families and what the checkpoint formats give; nothing of training.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from vistune import console
from vistune.models import checkpoints, weights
from vistune.models.families import Family
from vistune.models.fit import EXTRA, HEAD, MISSING, NONFINITE, SHAPES, Given, match, refuse, skeleton, ties
from vistune.models.folders import Described, beside, quiet, write_described
from vistune.models.weights import Entry

Place = Callable[[Family, PreTrainedModel, str, Tensor], None]
"""Puts a value that was read at its name in the model: as it is, or quantised."""


@dataclass(kw_only=True)
class Loaded(Described):
    """A model with everything that goes with it. `source` has its tensors as they lie on disk, by their names there;
    `where` is what errors call it."""

    model: PreTrainedModel
    source: Mapping[str, Entry]
    where: str = "model"


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | str = torch.float32,
    template: str | None = None,
    image: str | None = None,
    options: Mapping[str, Any] | None = None,
    base: Path | str | None = None,
    place: Place | None = None,
) -> Loaded:
    """Open a model on the CPU, in evaluation mode: a model folder, or a checkpoint in any format of `checkpoints`.

    `template`, `image` ("square", "pad") and the family's `options` override what the folder says; `base` is the other
    half of a checkpoint that is only an adapter. `dtype` "auto" keeps every tensor's own; `place` may hold a
    tensor otherwise than it was read (`vistune.models.quantize`). Raises ValueError for missing, extra or mis-shaped
    weights, for values that are not finite, and for a template or tokenizer that does not fit.
    """
    found = checkpoints.read(folder, base=base, template=template, image=image, options=options)
    said, where = found.said, _where(folder, found)
    model = build(said.family, said.config, found.tensors, dtype, where, place=place)
    model.generation_config = said.generation
    return Loaded(**vars(said), model=model, source=found.tensors, where=where)


def outline(
    folder: Path | str,
    *,
    template: str | None = None,
    image: str | None = None,
    options: Mapping[str, Any] | None = None,
    base: Path | str | None = None,
) -> Loaded:
    """All of `load` but the values: the parameters are fp32 on the meta device and take no memory, the buffers that a
    model computes by itself are there. `vistune.models.filling` gives it memory and values.

    Raises ValueError as `load` does, for values that are not finite apart, which nobody has read yet.
    """
    found = checkpoints.read(folder, base=base, template=template, image=image, options=options)
    said, where = found.said, _where(folder, found)
    model, _ = _empty(said.family, said.config, Given(found.tensors), where)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    _tie(said.family, model)
    model.config.dtype = torch.float32
    model.generation_config = said.generation
    return Loaded(**vars(said), model=model.eval(), source=found.tensors, where=where)


def _where(folder: Path | str, found: checkpoints.Checkpoint) -> str:
    return f"{folder} ({found.format}: {found.why})"


def describe(
    folder: Path | str,
    *,
    template: str | None = None,
    image: str | None = None,
    options: Mapping[str, Any] | None = None,
    base: Path | str | None = None,
) -> Described:
    """All of `load` but the weights: what is needed to read data as the model will see it. Raises ValueError."""
    return checkpoints.read(folder, base=base, template=template, image=image, options=options).said


def build(
    family: Family,
    config: PretrainedConfig,
    tensors: Mapping[str, Entry],
    dtype: torch.dtype | str,
    where: str,
    *,
    finite: bool = True,
    place: Place | None = None,
) -> PreTrainedModel:
    """The family's model, filled from `tensors` one by one. ValueError, with `where`, for what does not fit.

    The head is tied to the embedding when config.json says so and none is stored, or one that equals it; never when
    that would lose a head. `finite=False` leaves it to the caller to look for values that are not.
    """
    given = Given(tensors)
    model, found = _empty(family, config, given, where)
    bad = []
    for name, stored in found.items():
        value = _owned(given.tensors[stored], dtype)
        if finite and value.is_floating_point() and not torch.isfinite(value).all():
            bad.append(stored)
        (place or as_read)(family, model, name, value)
    refuse(where, {NONFINITE: bad})
    _tie(family, model)
    model.config.dtype = dtype if isinstance(dtype, torch.dtype) else next(model.parameters()).dtype
    return model.eval()


def _empty(
    family: Family, config: PretrainedConfig, given: Given, where: str
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model without memory, which `given` is seen to fit, and the stored name of each of its tensors. What
    config.json says of the head is made true first."""
    _decide_tie(family, config, given)
    model = skeleton(family, config)
    return model, match(family, model, given, config.tie_word_embeddings, where)


def _tie(family: Family, model: PreTrainedModel) -> None:
    if model.config.tie_word_embeddings:
        family.head(model).weight = model.get_input_embeddings().weight  # type: ignore[assignment]


def _decide_tie(family: Family, config: PretrainedConfig, given: Given) -> None:
    head, embedding = (given.get(family.stored_name(name)) for name in (HEAD, family.embedding))
    said = ties(config)
    if head is None or embedding is None:
        tied = head is None and said  # where it does not say so, a head is missing
    else:
        tied = said and head.shape == embedding.shape and torch.equal(head.read(), embedding.read())
        if said and not tied:
            console.warn("config.json ties the head to the embedding, but a head of its own is stored: it is kept")
    config.tie_word_embeddings = tied
    if (text := getattr(config, "text_config", None)) is not None:
        text.tie_word_embeddings = tied


def _owned(entry: Entry, dtype: torch.dtype | str) -> Tensor:
    """The tensor in memory of its own: what was read may be a view of a file."""
    value = entry.read()
    wanted = dtype if isinstance(dtype, torch.dtype) and value.is_floating_point() else value.dtype
    return value.to(wanted, copy=True, memory_format=torch.contiguous_format)


def as_read(family: Family, model: nn.Module, name: str, value: Tensor) -> None:
    """See `Place`: the value itself."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[leaf] = value


def read_model(
    model_class: Any, folder: Path, dtype: torch.dtype | str, *, extra: str | None = None, finite: bool = True
) -> PreTrainedModel:
    """`from_pretrained` of a part (a tower, a language model) that refuses what it would repair in silence.

    `extra`: a pattern of weights to leave out. `finite=False` leaves it to the caller to look for values that are not.
    """
    with quiet():
        try:
            model, info = model_class.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: {error}") from error
    unexpected = [key for key in info["unexpected_keys"] if not (extra and re.search(extra, key))]
    shapes = [f"{key} is {list(have)}, not {list(want)}" for key, have, want in info["mismatched_keys"]]
    bad = nonfinite(model) if finite else []
    refuse(folder, {MISSING: info["missing_keys"], EXTRA: unexpected, SHAPES: shapes, NONFINITE: bad})
    return model.eval()


def nonfinite(model: nn.Module) -> list[str]:
    """Parameters and buffers that hold a NaN or an infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def save(
    loaded: Loaded,
    folder: Path | str,
    *,
    frozen_from: Mapping[str, Entry] | None = None,
    card: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a model folder, beside and then renamed, so that it is never half there.

    A tensor that still equals the one in `frozen_from` (in the type it was held in) is copied from there: same bytes,
    same type. The others are written as `dtype`, or as they are. ValueError when `folder` holds something else, and for
    a quantised model: what its weights were is not in it any more.
    """
    if whole := [name for name, weight in loaded.model.named_parameters() if not weight.is_floating_point()]:
        raise ValueError(f"{folder}: {len(whole)} weights are quantised ({whole[0]}, ...); save the model unquantised")
    with beside(Path(folder)) as new:
        tensors = _tensors(loaded, frozen_from or {}, dtype)
        weights.write(new, tensors, shard_bytes)
        write_described(loaded, new, card, commonest_type(tensors))


def commonest_type(tensors: Mapping[str, Entry]) -> str:
    """The type that most values have, as config.json spells it."""
    types: Counter[str] = Counter()
    for entry in tensors.values():
        types[str(entry.dtype).removeprefix("torch.")] += torch.Size(entry.shape).numel()
    return types.most_common(1)[0][0]


def check_save(loaded: Described, folder: Path | str) -> None:
    """Write a folder without its weights, open it, remove it: what would fail at the end fails now."""
    folder = Path(folder)
    with beside(folder) as new:
        write_described(loaded, new, "", "float32")
        loaded.family.read_processor(new)
        with quiet():
            AutoTokenizer.from_pretrained(new, local_files_only=True)
            loaded.family.config_class.from_pretrained(new, local_files_only=True)
    shutil.rmtree(folder)


def stored_tensors(loaded: Loaded) -> Callable[[str], Tensor]:
    """What gives a tensor by its name in the model, as it lies on disk."""
    given = Given(loaded.source)

    def read(name: str) -> Tensor:
        entry = given.get(loaded.family.stored_name(name))
        assert entry is not None, name
        return entry.read()

    return read


def _tensors(loaded: Loaded, frozen_from: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, Entry]:
    """Names on disk and tensors, in the model's order; tied weights once."""
    given = Given(frozen_from)
    seen: set[int] = set()
    found = {}
    for name, tensor in loaded.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        stored = loaded.family.stored_name(name)
        before, ours = given.get(stored), tensor.detach().cpu()
        same = before is not None and before.shape == ours.shape and torch.equal(before.read().to(ours.dtype), ours)
        found[stored] = before if before is not None and same else weights.held(ours).cast(dtype)
    return found
