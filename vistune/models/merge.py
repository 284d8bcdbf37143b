"""What learned, laid into the model it lies on: adapters folded into their weights, the rest in its place; and adapters
in peft's files. One tensor is in memory at a time. Knows nothing of runs (see `vistune.train.keeping.merge`).
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune.models import checkpoints, weights
from vistune.models.checkpoints import Checkpoint, hf
from vistune.models.fit import HEAD, Given, match, plain, skeleton, ties
from vistune.models.folders import beside
from vistune.models.weights import Entry
from vistune.recipe import Lora

ADAPTER_CONFIG, LEARNED = "adapter_config.json", "learned.safetensors"
"""peft's description of an adapter; and beside it what else learned, whole tensors by their names in the model."""
_PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""In one of which an adapter's tensors are."""
_OTHER = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
_LORA = re.compile(r"\.(lora_[A-Za-z_]+)(?:\.default)?(\.\w+)?$")


@dataclass(kw_only=True)
class Learned:
    """What training left: for each adapted layer its adapter's tensors, and the tensors that learned whole."""

    config: Any = None
    """peft's LoraConfig; None without adapters."""
    adapters: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """By the layer's path in the model, then `lora_A`, `lora_B`, `lora_magnitude_vector`."""
    whole: dict[str, Entry] = field(default_factory=dict)


def bring_library() -> None:
    """Import peft, which takes seconds, now rather than in the midst of something."""
    importlib.import_module("peft")


def is_adapter(folder: Path) -> bool:
    """Whether peft, or a run of ours, wrote an adapter here."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path) -> Learned:
    """An adapter folder in peft's layout. ValueError for what is not LoRA, or whose start cannot be told."""
    from peft import LoraConfig, PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} is not of an adapter that peft knows ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: an adapter of type {config.peft_type}; only LoRA can be merged")
    if isinstance(config.init_lora_weights, str):
        raise ValueError(
            f"{folder}: init_lora_weights is {config.init_lora_weights!r}, which changes the base too; "
            "save it with peft's path_initial_model_for_weight_conversion first, which makes a plain LoRA of it"
        )
    if other := [key for key in _OTHER if getattr(config, key, None)]:
        raise ValueError(f"{folder}: {other[0]} makes another computation of it than a sum; only plain LoRA and DoRA")
    file = next((folder / name for name in FILES if (folder / name).exists()), None)
    if file is None:
        raise ValueError(f"{folder}: holds neither {' nor '.join(FILES)}; copy the adapter again")
    found = weights.safetensors(file) if file.suffix == ".safetensors" else _held(weights.pickled(file))
    learned = sort({name.removeprefix(_PREFIX): entry for name, entry in found.items()}, config)
    if (folder / LEARNED).exists():
        learned.whole |= weights.safetensors(folder / LEARNED)
    return learned


def write_adapter(folder: Path, learned: Learned, base: str) -> None:
    """Write the adapters into `folder` as peft does (adapter_config.json, adapter_model.safetensors), `base` being what
    they lie on; and what else learned (a connector, say), which peft has no place for, in a file beside."""
    config = copy.copy(learned.config)
    config.base_model_name_or_path, config.target_modules = base, sorted(learned.adapters)
    config.save_pretrained(str(folder))
    pairs = {
        f"{_PREFIX}{path}.{kind}" + ("" if kind == "lora_magnitude_vector" else ".weight"): entry
        for path, parts in learned.adapters.items()
        for kind, entry in parts.items()
    }
    weights.write_file(folder / FILES[0], pairs)
    if learned.whole:
        weights.write_file(folder / LEARNED, learned.whole)


def lora_config(lora: Lora, targets: list[str]) -> Any:
    """A recipe's `lora` table as peft says it."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def _held(tensors: Mapping[str, Any]) -> dict[str, Entry]:
    return {name: weights.held(tensor) for name, tensor in tensors.items()}


def sort(tensors: Mapping[str, Entry], config: Any) -> Learned:
    """Adapters' tensors by the layer they belong to, apart from those that learned whole; names as in the model."""
    learned = Learned(config=config)
    for name, entry in tensors.items():
        if match := _LORA.search(name):
            if match[1] not in ("lora_A", "lora_B", "lora_magnitude_vector") or match[2] == ".bias":
                raise ValueError(f"adapter: {name}: only lora_A, lora_B and DoRA's magnitudes can be merged")
            learned.adapters.setdefault(name[: match.start()], {})[match[1]] = entry
        else:
            learned.whole[name.replace(".base_layer.", ".")] = entry  # a bias of an adapted layer
    for path, parts in learned.adapters.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"adapter: {path} has {', '.join(sorted(parts))}; lora_A and lora_B belong together")
        if config.use_dora != ("lora_magnitude_vector" in parts):
            raise ValueError(f"adapter: {path}: use_dora is {config.use_dora}, but its tensors say otherwise")
    return learned


def fold(weight: Tensor, adapter: Mapping[str, Tensor], config: Any, path: str) -> Tensor:
    """The weight [out, in] of the layer at `path` with its adapter in it: summed by peft in fp32, in the weight's type.

    On the CPU, so that a run's own model and one that is merged later have the same bits.
    """
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to("cpu", torch.float32, copy=True), requires_grad=False)
    layer = around(plain, adapter, config, path)
    layer.merge()
    return layer.get_base_layer().weight.data.to(weight.dtype)


def around(linear: nn.Linear, adapter: Mapping[str, Tensor], config: Any, path: str) -> Any:
    """peft's layer around `linear`, which stands at `path` in its model, with the adapter's values in fp32 on the CPU.
    Nothing of `linear` changes, but that its weight has no gradient."""
    from peft import inject_adapter_in_model
    from peft.utils.other import get_pattern_key

    box = nn.Module()
    box.layer = linear
    one = copy.copy(config)
    # A layer may have a rank and an alpha of its own.
    one.r = adapter["lora_A"].shape[0]
    alphas = config.alpha_pattern or {}
    one.lora_alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    one.rank_pattern, one.alpha_pattern, one.modules_to_save, one.bias = {}, {}, None, "none"
    one.target_modules, one.exclude_modules, one.layers_to_transform, one.layers_pattern = {"layer"}, None, None, None
    inject_adapter_in_model(one, box, low_cpu_mem_usage=True)
    layer: Any = box.layer
    for name, tensor in adapter.items():
        value = tensor.detach().to("cpu", torch.float32)
        getattr(layer, name)["default"].weight = nn.Parameter(value, requires_grad=False)
    return layer


def merge(base: Path, out: Path, learned: Learned, note: str, **said: Any) -> Path:
    """Write the model folder `out`: the model of `base` (any format) with what `learned` holds in it.

    `said`: template, image and options of `vistune.models.load.load`. ValueError, before anything is written, for a
    tensor that the base does not have or has in another shape.
    """
    card = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
    return write(checkpoints.read(base, **said), out, learned, f"{card}# {out.name}\n\n{note}\n", base)


def write(found: Checkpoint, out: Path, learned: Learned, card: str, base: Path) -> Path:
    """Write the model folder `out`: `found`, read from `base`, with what `learned` holds in it.

    Adapted weights keep the base's type; what learned whole keeps its own, or the base's bytes where nothing changed.
    """
    found = replace(found, tensors=merged(found, learned, base))
    found = replace(found, tensors=_published(found, f"{base} ({found.format})"))
    with beside(out) as new:
        hf.FORMAT.write(found, new)
        (new / "README.md").write_text(card, encoding="utf-8")
    return out


def _published(found: Checkpoint, where: str) -> dict[str, Entry]:
    """The tensors in the model's order, by the names that its family publishes."""
    family, config, given = found.said.family, copy.deepcopy(found.said.config), Given(found.tensors)
    tied = given.name(family.stored_name(HEAD)) is None and ties(config)
    there = match(family, skeleton(family, config), given, tied, where)
    return {family.stored_name(name): found.tensors[stored] for name, stored in there.items()}


def merged(found: Checkpoint, learned: Learned, base: Path) -> dict[str, Entry]:
    """The base's tensors, each with what `learned` has for it. ValueError for what does not fit."""
    tensors = _untied(found)
    names, missing, shapes = _names(found), [], []

    def match(name: str, wanted: tuple[int, ...]) -> str | None:
        stored = names.get(plain(name))
        if stored is None or stored not in tensors:
            missing.append(name)
        elif tensors[stored].shape != wanted:
            shapes.append(f"{stored} is {list(tensors[stored].shape)}, the adapter is for {list(wanted)}")
        else:
            return stored
        return None

    for path, adapter in learned.adapters.items():
        wanted = (adapter["lora_B"].shape[0], adapter["lora_A"].shape[1])
        if (stored := match(f"{path}.weight", wanted)) is not None:
            tensors[stored] = _folded(tensors[stored], adapter, learned.config, path)
    for name, entry in learned.whole.items():
        if (stored := match(name, entry.shape)) is not None:
            tensors[stored] = _changed(tensors[stored], entry)
    for what, bad in (("are not in it", missing), ("have another shape", shapes)):
        if bad:
            raise ValueError(
                f"base {base} ({found.format}) is not what this was trained from: {len(bad)} tensors {what}:\n  "
                + "\n  ".join(sorted(bad)[:10])
            )
    return tensors


def _names(found: Checkpoint) -> dict[str, str]:
    """Names in the model, and those of other layouts, to the names on disk."""
    family = found.said.family
    model = skeleton(family, copy.deepcopy(found.said.config))
    stored = {plain(name): name for name in found.tensors}
    ours = {plain(name): plain(family.stored_name(name)) for name in model.state_dict()}
    return stored | {name: stored[there] for name, there in ours.items() if there in stored}


def _untied(found: Checkpoint) -> dict[str, Entry]:
    """The tensors, without a head that is only the embedding again: it follows the embedding."""
    family, tensors = found.said.family, dict(found.tensors)
    stored = {plain(name): name for name in tensors}
    head, embedding = (stored.get(plain(family.stored_name(n))) for n in ("lm_head.weight", family.embedding))
    if not (head and embedding and found.said.config.tie_word_embeddings):
        return tensors
    same = tensors[head].shape == tensors[embedding].shape and torch.equal(
        tensors[head].read(), tensors[embedding].read()
    )
    return {name: entry for name, entry in tensors.items() if not (same and name == head)}


def _folded(before: Entry, adapter: Mapping[str, Entry], config: Any, path: str) -> Entry:
    def read() -> Tensor:
        return fold(before.read(), {name: one.read() for name, one in adapter.items()}, config, path)

    return replace(before, read=read)


def _changed(before: Entry, after: Entry) -> Entry:
    """`after`, or `before` when that holds the same values (in the type that training held them in)."""
    if before.dtype == after.dtype:
        return after
    value = after.read()
    return before if torch.equal(before.read().to(value.dtype), value) else after
