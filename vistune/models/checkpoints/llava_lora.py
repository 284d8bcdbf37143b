"""What LLaVA's LoRA training leaves: peft's adapter, and beside it `non_lora_trainables.bin` with what learned whole.

Read onto its base it gives the merged model, one weight at a time, and keeps the pair, so that it can be written again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vistune.models import merge, weights
from vistune.models.checkpoints import Checkpoint, hf, llava, llava_config, llava_names
from vistune.models.checkpoints.llava_adapter import on_base, placed
from vistune.models.families import Family
from vistune.models.folders import Described, read_config
from vistune.models.weights import Entry

OTHERS = "non_lora_trainables.bin"
_PREFIX = "base_model.model."
_PICTURES = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "square",
    "mm_use_im_start_end": False,
    "s2": False,
}
"""How a picture becomes embeddings, in config.json's words, and what the original takes where one is not said."""


class LoraPair:
    """See `vistune.models.checkpoints.Format`."""

    name = "llava-lora"
    holds = f"an original LLaVA LoRA (adapter_config.json, adapter_model.*, {OTHERS}, config.json); needs a base"

    def recognises(self, folder: Path) -> str:
        if not (folder / llava.ADAPTER).is_file():
            return ""
        if (folder / OTHERS).is_file():
            return f"{llava.ADAPTER} and {OTHERS}"
        said = llava_config.recognise(read_config(folder)) if (folder / "config.json").is_file() else ""
        return f"{llava.ADAPTER}, and {said}" if said else ""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        """`base`: the language model's folder, or a whole LLaVA. What is merged keeps the base's type."""
        _refuse_half(folder)
        raw, adapter = read_config(folder), _adapter_file(folder)
        others = weights.of_file(folder / OTHERS)
        whole = on_base(raw, base, folder, f"{folder} ({self.name})")
        whole.tensors = placed(whole.tensors, _plain(others), f"base {base}")
        found = whole.open(self.name, self.recognises(folder), **said)
        assert base is not None
        learned = _renamed(merge.read_adapter(folder), found.said.family)
        found.tensors = merge.merged(found, learned, base)
        pair = weights.of_file(adapter)
        found.kept |= pair | others
        found.said.origin |= {
            self.name: {
                "config": raw,
                "adapter_config": llava.llava_parts.read_json(folder / llava.ADAPTER),
                "file": adapter.name,
                "others": list(others),
                "rows": whole.rows,
                "marks": _marks(found.tensors, learned, found.said.family),
            }
        }
        return found

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        llava_config.refuse_what_does_not_fit(checkpoint.said.config, checkpoint.said.family)
        origin = checkpoint.said.origin.get(self.name, {})
        pair = {name: entry for name, entry in checkpoint.kept.items() if name.startswith("base_model.")}
        if not origin or not pair:
            raise ValueError(
                f"{checkpoint.said.folder}: a whole model, in which no LoRA can be told from what it lies on; give the "
                "folder of the run that trained it (with adapter/ in it), or use --to llava"
            )
        for name, mark in origin.get("marks", {}).items():
            if name not in checkpoint.tensors or _mark(checkpoint.tensors[name]) != mark:
                raise ValueError(
                    f"{checkpoint.said.folder}: {name} has changed since the LoRA pair that came with it was merged, "
                    "so the pair is no longer this model's; use --to llava"
                )
        others = {name: pair.pop(name) for name in origin["others"]}
        file = folder / origin["file"]
        (weights.write_file if file.suffix == ".safetensors" else weights.write_pickle)(file, pair)
        weights.write_pickle(folder / OTHERS, others)
        for name, said in ((llava.ADAPTER, origin["adapter_config"]), ("config.json", origin["config"])):
            text = json.dumps(said, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def learned(folder: Path, said: Described) -> merge.Learned:
    """The pair by the names of a model in memory, to be laid beside that instead of a base of its own. ValueError when
    the pair is not whole, or its config.json says that pictures reach the language model otherwise than here."""
    _refuse_half(folder)
    llava_config.refuse_what_does_not_fit(said.config, said.family)
    here, raw = llava_config.to_original(said, ""), read_config(folder)
    otherwise = [
        f"{key} is {raw.get(key, unsaid)!r} instead of {here.get(key, unsaid)!r}"
        for key, unsaid in _PICTURES.items()
        if (raw.get(key) or unsaid) != (here.get(key) or unsaid)
    ]
    if otherwise:
        raise ValueError(f"{folder}: was trained on a model that sees otherwise than {said.folder}: {otherwise[0]}")
    found = merge.read_adapter(folder)
    found.whole |= _plain(weights.of_file(folder / OTHERS))
    return _renamed(found, said.family)


def _refuse_half(folder: Path) -> None:
    if missing := [name for name in (OTHERS, "config.json") if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder}: has an adapter but no {' and no '.join(missing)}; the original writes them at the end of a "
            "run alone, so take the run's own folder, not a checkpoint inside it"
        )


def _marks(tensors: Mapping[str, Entry], learned: merge.Learned, family: Family) -> dict[str, str]:
    """Marks by which a model is known in which nothing has learned since: of the first weight that was adapted, and of
    the connector's last."""
    names = [family.stored_name(f"{path}.weight") for path in list(learned.adapters)[:1]]
    names += [name for name in tensors if "multi_modal_projector." in name and name.endswith("weight")][-1:]
    return {name: _mark(tensors[name]) for name in names}


def _mark(entry: Entry) -> str:
    value = entry.read().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(value.numpy().data).hexdigest()[:16]


def _adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: {llava.ADAPTER} is there, but no adapter_model.safetensors and no adapter_model.bin")


def _plain(others: Mapping[str, Entry]) -> dict[str, Entry]:
    """What learned whole, by the names of the model without its wrappers: one level may stand there twice."""
    names = {name: name.removeprefix("base_model.") for name in others}
    twice = any(name.startswith("model.model.") for name in names.values())
    return {(plain.removeprefix("model.") if twice else plain): others[name] for name, plain in names.items()}


def _renamed(learned: merge.Learned, family: Family) -> merge.Learned:
    """The same, by the names of the family's model in memory."""
    learned.adapters = {llava_names.in_model(path, family): one for path, one in learned.adapters.items()}
    learned.whole = {llava_names.in_model(name, family): one for name, one in learned.whole.items()}
    return learned


def is_run(folder: Path) -> bool:
    """Whether a LoRA run of vistune's ended here."""
    return (folder / "adapter" / llava.ADAPTER).is_file() and (folder / "model" / "config.json").is_file()


def of_run(run: Path, base: Path | None, **said: Any) -> Checkpoint:
    """A run's model with its adapter as the pair that this format writes. `base`: the language model that the pair will
    be laid on, whose rows config.json then says; None: those before the image's token was added."""
    found = hf.FORMAT.read(run / "model", base=None, **said)
    llava_config.refuse_what_does_not_fit(found.said.config, found.said.family)
    learned = merge.read_adapter(run / "adapter")
    made = llava.config_of(found, llava.origin_of(found))
    config = {key: value for key, value in made.items() if key != "vistune"}
    config |= {"vocab_size": _rows(found, base), "tune_mm_mlp_adapter": False}
    mpt = found.said.config.text_config.model_type == "mpt"
    names = {"connector": config["mm_projector_type"], "root": "transformer" if mpt else "model"}
    pair = {
        f"{_PREFIX}{llava_names.original(f'{path}.weight', **names).removesuffix('.weight')}.{_leaf(kind)}": entry
        for path, parts in learned.adapters.items()
        for kind, entry in parts.items()
    }
    others = {_PREFIX + llava_names.original(name, **names): one for name, one in learned.whole.items()}
    adapter = learned.config.to_dict()
    adapter |= {
        "target_modules": sorted({re.sub(r"\.lora_\w+(\.\w+)?$", "", name.removeprefix(_PREFIX)) for name in pair}),
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM",
    }
    found.kept |= pair | others
    found.said.origin |= {
        LoraPair.name: {
            "config": config,
            "adapter_config": json.loads(json.dumps(adapter, default=_json)),
            "file": "adapter_model.safetensors",
            "others": list(others),
        }
    }
    return found


def _rows(found: Checkpoint, base: Path | None) -> int:
    """Of the vocabulary that the pair's base has."""
    if base is not None:
        return llava_config.text_rows(read_config(base))
    token, rows = found.said.image_token_id, found.said.config.text_config.vocab_size
    came = llava.origin_of(found).get("rows")
    # The image's token is the last one; a vocabulary that just holds it was grown for it.
    return came or (token if rows == -(-(token + 1) // llava.llava_parts.STEP) * llava.llava_parts.STEP else rows)


def _leaf(kind: str) -> str:
    return kind if kind == "lora_magnitude_vector" else f"{kind}.weight"


def _json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


FORMAT = LoraPair()
