"""What an original LLaVA checkpoint has beside its own tensors: a vision tower's folder, a tokenizer that knows where
pictures stand, small files. Knows nothing of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AddedToken, AutoTokenizer, PretrainedConfig

from vistune import chat, console
from vistune.models import hub, older, weights
from vistune.models.checkpoints import llava_names
from vistune.models.families import Family
from vistune.models.fit import COMPUTED
from vistune.models.folders import (
    Described,
    quiet,
    read_config,
    read_generation,
    refuse_unknown,
    savable,
)
from vistune.models.towers import clip
from vistune.models.weights import Entry
from vistune.samples import IMAGE_MARK

FILE = "file:"
"""Before the name of a small file that is kept byte for byte."""
STEP = 64
"""A vocabulary has a multiple of so many rows."""
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_ONE_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# The tower that nearly every published checkpoint names, for those that hold its weights: what its folder says.
_KNOWN = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
_KNOWN_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass(frozen=True)
class Vision:
    """A vision tower's folder: what it says, and its weights, by the original's names."""

    config: PretrainedConfig
    processor: dict[str, Any]
    tensors: Callable[[], dict[str, Entry]]


def vision(raw: Mapping[str, Any], places: Sequence[Path], given: Path | None, *, inside: bool) -> Vision:
    """The tower that config.json names: `given`, or in or beside one of `places` (the checkpoint, its base), or as the
    path says, or from the hub's cache. ValueError with all that was tried; a checkpoint that holds the tower (`inside`)
    needs only what is known of OpenAI's CLIP.
    """
    name = str(raw.get("mm_vision_tower") or raw.get("vision_tower") or "")
    tried = [given] if given else _candidates(name, places)
    folder = next((path for path in tried if (path / "config.json").is_file()), None) or (
        None if given else hub.cached(name)
    )
    if folder is not None:
        return _read(folder)
    if inside and Path(name).name in _KNOWN:
        return _known(_KNOWN[Path(name).name])
    named = ", ".join(dict.fromkeys(str(path) for path in tried))
    raise ValueError(
        f"{places[0]}: config.json names the vision tower {name!r}, which is not at {named} nor in the hub's cache; "
        f"give its folder with --base, or fetch it where there is a network: "
        f"vistune fetch {name} --out {Path(name).name}"
    )


def _candidates(name: str, places: Sequence[Path]) -> list[Path]:
    if not name:
        return []
    near = [place / path for place in places for path in (Path(name).name, name)]
    return [*near, *(place.resolve().parent / name for place in places), Path(name).expanduser()]


def _read(folder: Path) -> Vision:
    """A tower's own folder, or that of a model which it is a part of."""
    said = read_config(folder)
    inner = said.get("vision_config", said)
    kind = inner.get("model_type") or said.get("model_type", "")
    kind = _ONE_HALF.get(kind, kind)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"vision: {folder} is a {kind!r}, which transformers does not know")
    left_out = {"model_type", "architectures", "transformers_version", "torch_dtype", "_name_or_path"}
    config: Any = CONFIG_MAPPING[kind](**{key: value for key, value in inner.items() if key not in left_out})
    return Vision(config, clip.read_image_processor(folder), lambda: _tower(folder))


def _tower(folder: Path) -> dict[str, Entry]:
    """The tower's weights by the original's names; the text half of a two-tower model is left out."""
    found = weights.found(folder)
    halves = any(name.startswith("vision_model.") for name in found)
    chosen = {name: one for name, one in found.items() if not halves or name.startswith("vision_model.")}
    prefix = f"model.{llava_names.VISION}"
    return {prefix + name: entry for name, entry in chosen.items() if not COMPUTED.search(name)}


def _known(size: int) -> Vision:
    """OpenAI's CLIP ViT-L/14, as its folder says it."""
    sizes: dict[str, Any] = {**_KNOWN_SIZES, "image_size": size, "patch_size": 14, "projection_dim": 768}
    processor = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size,
    }
    return Vision(CONFIG_MAPPING["clip_vision_model"](**sizes), processor, dict)


def write_tower(tensors: Mapping[str, Entry], said: Described, folder: Path) -> None:
    """A folder of the tower's own, as `transformers` and the original open it. `tensors` by the original's names; none
    when they lie elsewhere."""
    folder.mkdir(parents=True)
    with quiet():
        said.config.vision_config.save_pretrained(folder)
        processor = said.family.processor(said.config, said.tokenizer, said.layout, None)
        processor.image_processor.save_pretrained(folder)
    if tensors:
        weights.write(folder, {name.partition(llava_names.VISION)[2]: entry for name, entry in tensors.items()})


def tokenizer(folder: Path, text: PretrainedConfig, start_end: bool = False) -> tuple[Any, int]:
    """The tokenizer of `folder` with a token for the image, and that token's id. ValueError when there is none.

    `start_end`: with the two around it as well, which a first stage adds and does not save.
    """
    try:
        # Told what kind of text it is for: it does not know what LLaVA's own config.json says. Of tokenizer.model alone
        # a Mistral's would be made without the space before a text; what Mistral took is a Llama's.
        bare = text.model_type == "mistral" and not (folder / "tokenizer.json").exists()
        told = CONFIG_MAPPING["llama"]() if bare else text
        with quiet():
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, config=told)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder}: no tokenizer can be opened in it ({reason})") from error
    for token in (*((chat.IMAGE_START, chat.IMAGE_END) if start_end else ()), IMAGE_MARK):
        if token not in found.get_vocab():
            found.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    if found.pad_token is None:
        found.pad_token = found.unk_token or found.eos_token
    return found, found.convert_tokens_to_ids(IMAGE_MARK)


def described(
    *,
    folder: Path,
    family: Family,
    config: Any,
    tokenizer: Any,
    processor: dict[str, Any],
    template: str,
    image: str | None,
    options: dict[str, Any],
    generation: Path,
    start_end: bool = False,
) -> Described:
    """What a folder of `family` would say of such a model. ValueError for a template or an option that does not fit."""
    refuse_unknown(options, family)
    chosen = chat.template(template)
    chat.check_fits(chat.in_ends(chosen) if start_end else chosen, tokenizer)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    family.configure(config, options)
    laid = {"pinpoints": config.image_grid_pinpoints} if family.name == "llava_next" else options
    layout: Any = family.layout(config, processor, image, laid)
    if family.name != "llava_next":
        config.image_seq_length = layout.tokens(layout.size, layout.size)
    return Described(
        folder=folder,
        family=family,
        config=config,
        generation=read_generation(generation, config.text_config),
        tokenizer=tokenizer,
        template_name=template,
        layout=layout,
        image_token_id=config.image_token_id,
        start_end=start_end,
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file. ValueError when it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def small_files(folder: Path) -> dict[str, Entry]:
    """The bytes of tokenizer and generation settings as they lie in `folder`, by names under which they are kept."""
    files = (folder / name for name in ("generation_config.json", *TOKENIZER_FILES))
    return {FILE + file.name: weights.file_bytes(file) for file in files if file.exists()}


def write_small(said: Described, files: Mapping[str, Entry], config: Mapping[str, Any], folder: Path) -> None:
    """Everything but the weights: the small files that came with a checkpoint, as they were, or the model's own."""
    names = {name.removeprefix(FILE) for name in files}
    for name in names:
        (folder / name).write_bytes(files[FILE + name].read().numpy().tobytes())
    with quiet():
        if "generation_config.json" not in names:
            savable(said.generation).save_pretrained(folder)
        if not names & set(TOKENIZER_FILES):
            said.tokenizer.save_pretrained(folder)
            older.say_in_tokenizer(said.tokenizer, folder)
            older.say_in_merges(folder)
            pieces = said.config.text_config.model_type in ("llama", "mistral")
            if pieces and not (folder / older.SENTENCEPIECE).exists():
                console.warn(
                    "the original code opens tokenizer.model, which this model does not have: copy the language "
                    "model's own beside the weights for it (vistune does without)"
                )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
