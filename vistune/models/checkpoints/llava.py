"""LLaVA's original checkpoints, whole: language model, connector and often the vision tower in one state dict.

Knows the folder; names and config.json are `llava_names`' and `llava_config`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistune.models import weights
from vistune.models.checkpoints import Checkpoint, llava_config, llava_names, llava_parts
from vistune.models.checkpoints.hf import KEPT
from vistune.models.fit import COMPUTED
from vistune.models.folders import read_config
from vistune.models.load import commonest_type
from vistune.models.weights import Entry

ADAPTER, PROJECTOR = "adapter_config.json", "mm_projector.bin"
ADAPTERS = ("llava-lora", "llava-adapter")


class OriginalLlava:
    """See `vistune.models.checkpoints.Format`."""

    name = "llava"
    holds = "an original LLaVA checkpoint, whole (config.json with mm_vision_tower, pytorch_model*.bin or safetensors)"

    def recognises(self, folder: Path) -> str:
        if not (folder / "config.json").is_file() or (folder / ADAPTER).exists():
            return ""
        if (folder / PROJECTOR).exists() and not weights.has_weights(folder):
            return ""
        return llava_config.recognise(read_config(folder))

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        """`base`: the vision tower's folder, where it is not where config.json says."""
        raw = read_config(folder)
        ours = raw.pop("vistune", {})
        tensors = weights.found(folder)
        kept = {name: entry for name, entry in tensors.items() if COMPUTED.search(name)}
        whole = Original(
            folder=folder,
            raw=raw,
            tensors={name: entry for name, entry in tensors.items() if name not in kept},
            tokenizer=folder,
            vision=base,
            ours=ours,
        )
        found = whole.open(self.name, self.recognises(folder), **said)
        found.said.origin |= {
            self.name: {
                "config": raw,
                "weights": "safetensors" if any(folder.glob("*.safetensors")) else "bin",
                "rows": whole.rows,
                "vision": "inside" if whole.vision_inside else "beside",
                "kept": list(kept),
            }
        }
        found.kept |= kept | (weights.safetensors(folder / KEPT) if (folder / KEPT).exists() else {})
        return found

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """The tower lies inside the weights when it came from there, else in a folder of its own inside `folder`,
        which in both cases says what it is."""
        llava_config.refuse_what_does_not_fit(checkpoint.said.config, checkpoint.said.family)
        origin = origin_of(checkpoint)
        config = config_of(checkpoint, origin)
        tensors = tensors_of(checkpoint, config.get("mm_projector_type", "linear"), origin.get("rows"))
        tower = {} if origin.get("vision") == "inside" else _taken(tensors, llava_names.is_vision)
        ours, others = _divided(checkpoint, origin)
        files = {name: ours.pop(name) for name in list(ours) if name.startswith(llava_parts.FILE)}
        writer = weights.write_pickles if origin.get("weights") == "bin" else weights.write
        writer(folder, dict(sorted((tensors | ours).items())))
        if others:
            weights.write_file(folder / KEPT, others)
        where = Path(config.setdefault("mm_vision_tower", llava_config.TOWER)).name
        llava_parts.write_tower(tower, checkpoint.said, folder / where)
        llava_parts.write_small(checkpoint.said, files, config, folder)


@dataclass(kw_only=True)
class Original:
    """A whole model by the original's names, wherever its tensors came from."""

    folder: Path
    raw: dict[str, Any]
    """config.json."""
    tensors: dict[str, Entry]
    tokenizer: Path
    vision: Path | None
    """The tower's folder when it is given; None: where config.json says."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """What vistune has said in config.json."""
    rows: int = 0
    """Of the vocabulary, before room was made for the image's token."""

    @property
    def vision_inside(self) -> bool:
        return any(llava_names.is_vision(name) for name in self.tensors)

    def open(self, format: str, why: str, *, template: str | None, image: str | None, options: Any) -> Checkpoint:
        """A checkpoint in the names of the family that holds such a model. ValueError for what is not whole."""
        family = llava_config.family_of(self.raw)
        vision = llava_parts.vision(self.raw, (self.folder, self.tokenizer), self.vision, inside=self.vision_inside)
        tensors = dict(self.tensors)
        if not self.vision_inside:
            tensors |= vision.tensors()
        named = {llava_names.published(name, family): entry for name, entry in tensors.items()}
        text = llava_config.text_config(self.raw)
        start_end = bool(self.raw.get("mm_use_im_start_end"))
        tokenizer, image_token = llava_parts.tokenizer(self.tokenizer, text, start_end)
        self.rows = self._grow(named, family, text, tokenizer, image_token)
        config = llava_config.to_family(self.raw, family, vision.config, text, image_token)
        said = llava_parts.described(
            folder=self.folder,
            family=family,
            config=config,
            tokenizer=tokenizer,
            processor=vision.processor,
            template=template or self.ours.get("template") or llava_config.template(self.raw),
            image=image or llava_config.image_mode(self.raw),
            options={**self.ours.get("options", {}), **(options or {})},
            generation=self.tokenizer,
            start_end=start_end,
        )
        said.origin |= self.ours.get("origin", {})
        return Checkpoint(
            format=format, why=why, said=said, tensors=named, kept=llava_parts.small_files(self.tokenizer)
        )

    def _grow(self, named: dict[str, Entry], family: Any, text: Any, tokenizer: Any, image_token: int) -> int:
        """Room for the image's token in embedding and head, a multiple of 64 rows. Returns how many rows there were."""
        embedding, head = (family.stored_name(name) for name in (_embedding(text, family), "lm_head.weight"))
        if embedding not in named:
            raise ValueError(f"{self.folder}: the language model's embedding is missing ({embedding})")
        rows = named[embedding].shape[0]
        words = len(tokenizer) - (image_token >= rows)
        if words > rows:
            raise ValueError(
                f"{self.folder}: the tokenizer of {self.tokenizer} has {words} tokens, the embedding {rows} rows; "
                "take the tokenizer that belongs to these weights"
            )
        if rows != text.vocab_size:  # left as it is, for the check of shapes to name
            return rows
        text.vocab_size = -(-max(rows, len(tokenizer)) // llava_parts.STEP) * llava_parts.STEP
        # A head that only the two tokens around images are missing from is that of the language model alone.
        heads = (rows, rows - 2) if self.raw.get("mm_use_im_start_end") else (rows,)
        for name, fitting in ((embedding, (rows,)), (head, heads)):
            if name in named and named[name].shape[0] in fitting:
                named[name] = weights.grown(named[name], text.vocab_size)
        return rows


def _embedding(text: Any, family: Any) -> str:
    return "model.language_model.wte.weight" if text.model_type == "mpt" else family.embedding


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of the original; a model made of an adapter has the adapter's config.json and no more."""
    origin = checkpoint.said.origin
    if OriginalLlava.name in origin:
        return origin[OriginalLlava.name]
    made_of = next((origin[name] for name in ADAPTERS if name in origin and "rows" in origin[name]), None)
    if made_of is None:
        return {}
    _, architecture = llava_config.CLASSES[checkpoint.said.config.text_config.model_type]
    return {"config": {**made_of["config"], "architectures": [architecture]}, "rows": made_of["rows"]}


def config_of(checkpoint: Checkpoint, origin: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the original: the very one that came, or one that is made; with what its words cannot say."""
    said = checkpoint.said
    config = dict(origin.get("config") or {})
    if not config:
        config = llava_config.to_original(said, commonest_type(checkpoint.tensors))
    elif llava_config.image_mode(config) != getattr(said.layout, "mode", None) and said.family.name != "llava_next":
        config |= llava_config.image_keys(said.config, said.layout)
    extra: dict[str, Any] = {}
    if said.template_name != llava_config.template(config):
        extra["template"] = said.template_name
    if options := said.family.options_of(said.config, said.layout):
        extra["options"] = options
    if others := {name: one for name, one in said.origin.items() if name != OriginalLlava.name}:
        extra["origin"] = others
    return config | ({"vistune": extra} if extra else {})


def tensors_of(checkpoint: Checkpoint, connector: str, rows: int | None) -> dict[str, Entry]:
    """A model's tensors by the original's names, the vocabulary cut to the `rows` that it had there."""
    config: Any = checkpoint.said.config
    mpt = config.text_config.model_type == "mpt"
    named = {
        llava_names.original(name, connector=connector, root="transformer" if mpt else "model"): entry
        for name, entry in checkpoint.tensors.items()
    }
    for name in ("transformer.wte.weight" if mpt else "model.embed_tokens.weight", "lm_head.weight"):
        if rows and name in named:
            named[name] = named[name].rows(rows)
    return named


def _taken(tensors: dict[str, Entry], wanted: Any) -> dict[str, Entry]:
    """Those that are `wanted`, taken out of `tensors`."""
    return {name: tensors.pop(name) for name in list(tensors) if wanted(name)}


def _divided(checkpoint: Checkpoint, origin: Mapping[str, Any]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """What is kept, this format's own and other formats'."""
    names = set(origin.get("kept", ()))
    own = {name: one for name, one in checkpoint.kept.items() if name in names or name.startswith(llava_parts.FILE)}
    return own, {name: one for name, one in checkpoint.kept.items() if name not in own}


FORMAT = OriginalLlava()
