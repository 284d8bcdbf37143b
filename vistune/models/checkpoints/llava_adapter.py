"""What LLaVA's first stage leaves: the connector alone, `mm_projector.bin`, beside a config.json that names the rest.

The file is a pickle and is read without unpickling anything but tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vistune.models import families, weights
from vistune.models.checkpoints import Checkpoint, llava, llava_config, llava_names, llava_parts
from vistune.models.folders import describe, read_config
from vistune.models.weights import Entry


class FirstStage:
    """See `vistune.models.checkpoints.Format`."""

    name = "llava-adapter"
    holds = "the connector of an original LLaVA's first stage (mm_projector.bin and config.json); needs a base"

    def recognises(self, folder: Path) -> str:
        if folder.is_file():
            return "a pickle with mm_projector's tensors" if _is_connector(folder) else ""
        if not (folder / llava.PROJECTOR).is_file() or weights.has_weights(folder) or (folder / llava.ADAPTER).exists():
            return ""
        said = llava_config.recognise(read_config(folder)) if (folder / "config.json").is_file() else ""
        return f"{llava.PROJECTOR}, and {said}" if said else ""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        """`base`: the language model's folder, or a whole model in which the connector takes its place."""
        file = folder / llava.PROJECTOR if folder.is_dir() else folder
        raw = _config(file.parent, base)
        tensors = weights.of_file(file)
        whole = on_base(raw, base, file.parent, f"{folder} ({self.name})")
        whole.tensors = placed(whole.tensors, tensors, f"base {base}")
        found = whole.open(self.name, self.recognises(folder), **said)
        found.said.origin |= {self.name: {"config": raw, "names": list(tensors), "rows": whole.rows}}
        return found

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """The connector of any LLaVA model; the newline of tiles with it, as the original saves it nowhere else."""
        llava_config.refuse_what_does_not_fit(checkpoint.said.config, checkpoint.said.family)
        origin = checkpoint.said.origin.get(self.name, {})
        config = {key: value for key, value in llava.config_of(checkpoint, origin).items() if key != "vistune"}
        config |= {} if origin else {"tune_mm_mlp_adapter": True}
        tensors = llava.tensors_of(checkpoint, config.get("mm_projector_type", "linear"), origin.get("rows"))
        names = origin.get("names") or [name for name in tensors if _first_stage(name)]
        if absent := [name for name in names if name not in tensors]:
            raise ValueError(f"{checkpoint.said.folder}: has no {absent[0]}; a connector of none is no adapter")
        if not names:
            raise ValueError(f"{checkpoint.said.folder}: its connector has no weights, so there is nothing to write")
        weights.write_pickle(folder / llava.PROJECTOR, {name: tensors[name] for name in names})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _first_stage(name: str) -> bool:
    return llava_names.is_connector(name) or name.endswith(llava_names.NEWLINE)


def _is_connector(file: Path) -> bool:
    if file.suffix not in (".bin", ".pt", ".pth"):
        return False
    return any(llava_names.is_connector(name) for name in weights.pickled(file) if isinstance(name, str))


def _config(folder: Path, base: Path | None) -> dict[str, Any]:
    """config.json beside the connector, or that of a base which is an original LLaVA itself."""
    for place in (folder, base):
        if place is not None and (place / "config.json").is_file() and llava_config.recognise(read_config(place)):
            return read_config(place)
    raise ValueError(
        f"{folder}: no config.json of LLaVA's beside {llava.PROJECTOR}, which names its vision tower; put it there"
    )


def on_base(raw: dict[str, Any], base: Path | None, folder: Path, who: str) -> llava.Original:
    """The model that an adapter in `folder`, whose config.json is `raw`, lies on: a language model, or a whole LLaVA in
    the original's format or ours. ValueError when there is none."""
    if base is None:
        named = raw.get("_name_or_path") or "the language model it was trained on"
        raise ValueError(f"{who}: is only a part of a model; give the other with --base (config.json names {named})")
    config = read_config(base)
    if families.families_of(config):
        tensors, vision = _of_model_folder(base, raw)
        return llava.Original(folder=folder, raw=raw, tensors=tensors, tokenizer=base, vision=vision)
    tensors = {name: one for name, one in weights.found(base).items() if not llava.COMPUTED.search(name)}
    if llava_config.recognise(config) and not any(llava_names.is_vision(name) for name in tensors):
        # Its tower is where its own config.json says.
        tensors |= llava_parts.vision(config, (base,), None, inside=False).tensors()
    return llava.Original(folder=folder, raw=raw, tensors=tensors, tokenizer=base, vision=None)


def _of_model_folder(base: Path, raw: dict[str, Any]) -> tuple[dict[str, Entry], Path | None]:
    """Tensors of one of our folders by the original's names; and the folder itself, whose processor is the tower's."""
    said = describe(base)
    llava_config.refuse_what_does_not_fit(said.config, said.family)
    whole = Checkpoint(format="hf", why="", said=said, tensors=weights.stored(base))
    return llava.tensors_of(whole, llava_config.connector_type(raw), raw.get("vocab_size")), base


def _takes_place(name: str, old: Entry, new: Entry) -> bool:
    """Shapes agree; a connector may be of another kind, an embedding have the two tokens around images besides."""
    if llava_names.is_connector(name) or old.shape == new.shape:
        return True
    return name.endswith("embed_tokens.weight") and new.shape == (old.shape[0] + 2, *old.shape[1:])


def placed(tensors: dict[str, Entry], adapter: dict[str, Entry], where: str) -> dict[str, Entry]:
    """`tensors` with those of `adapter` in their place. ValueError for one of another shape, and which."""
    wrong = [
        f"{name} is {list(tensors[name].shape)}, the adapter's is {list(entry.shape)}"
        for name, entry in adapter.items()
        if name in tensors and not _takes_place(name, tensors[name], entry)
    ]
    if wrong:
        raise ValueError(f"{where} does not match: {len(wrong)} tensors.\n  " + "\n  ".join(wrong[:10]))
    old = {name: one for name, one in tensors.items() if not llava_names.is_connector(name)}
    connected = any(llava_names.is_connector(name) for name in adapter)
    return (old if connected else tensors) | adapter


FORMAT = FirstStage()
