"""LLaVA-OneVision-1.5's stage-0 folder: a RICE tower (in the layout of MLCD) and a Qwen3, joined tensor by tensor.

Nothing of a model's size is held while it is written. Knows both layouts' names; what it did is proved by
`vistune.models.proving.verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vistune import chat, console
from vistune.images import CLIP_MEAN, CLIP_STD, three
from vistune.models import weights
from vistune.models.families import family
from vistune.models.fit import EXTRA, MISSING, SHAPES, expected, refuse
from vistune.models.folders import (
    Described,
    beside,
    quiet,
    read_config,
    read_generation,
    write_described,
)
from vistune.models.load import Loaded, build, commonest_type
from vistune.models.weights import Entry, held, joined
from vistune.native import NativeLayout

VISION = "mlcd_vision_model"
"""The model_type of a folder with a RICE tower."""

MIN_PIXELS, MAX_PIXELS = 56 * 56, 1600 * 1600
"""Of the published stage-0 folder (reference: merge_model.py)."""

DEVIATION = 0.02  # of a fresh connector's weights, as published; biases 0, norm 1 and 0
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")

_ENDS = {
    "visual.class_embedding": ("embeddings.class_embedding",),
    "visual.class_pos_emb": ("class_pos_emb",),
    "visual.patch_embed.proj.weight": ("embeddings.patch_embedding.weight",),
    "visual.pre_layernorm.weight": ("pre_layrnorm.weight",),
    "visual.pre_layernorm.bias": ("pre_layrnorm.bias",),
}
_BLOCK = {
    "norm1": ("layer_norm1",),
    "norm2": ("layer_norm2",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_PREFIX = "vision_model."
_UNUSED = re.compile(r"^post_layernorm\.(weight|bias)$")
"""The published model takes what the last block gives."""
_COMPUTED = re.compile(r"inv_freq$|position_ids$")
_CONNECTOR = re.compile(r"(?:^|\.)(?:mm_projector|visual\.merger)\.(ln_q|mlp\.0|mlp\.2)\.(weight|bias)$")
_NOT_OURS = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def assemble_onevision15(
    vision: Path | str,
    language: Path | str,
    out: Path | str,
    *,
    connector: Path | str | None = None,
    template: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tie: bool | None = None,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    image_resolution: int | None = None,
) -> Loaded:
    """Write the stage-0 folder `out` and return what is in it.

    `vision`: the folder of an MLCDVisionModel; `language`: of a Qwen3ForCausalLM, whose tokenizer has the pictures'
    tokens. `connector`: a file with `mm_projector.*` (safetensors or torch), or a OneVision folder; None: fresh, from
    `seed`. `template` None: the family's. `dtype` None: each part keeps its own, but fp16 becomes fp32, since the
    tower's activations can leave fp16's range. `tie` None: the head is tied to the embedding as the language model
    says; the published 4B is untied, though its Qwen3 is tied. Raises ValueError, which names the weight of the source
    that is at fault; `out` is untouched.
    """
    vision, language, out = Path(vision), Path(language), Path(out)
    tensors = {**read_vision(vision, dtype), **_read_language(language, dtype, tie)}
    said = _describe(vision, language, out, template, "lm_head.weight" not in tensors)
    said.layout = NativeLayout(
        min_pixels=min_pixels, max_pixels=max_pixels, image_resolution=image_resolution, **_colours(vision)
    )
    wanted = expected(said)
    part_type = tensors["model.embed_tokens.weight"].dtype
    merger = {name: shape for name, shape in wanted.items() if name.startswith("visual.merger.")}
    tensors |= _fresh(merger, part_type, seed) if connector is None else _read_connector(Path(connector), dtype, merger)
    _check_shapes(tensors, wanted, said.config.tie_word_embeddings, f"{vision} and {language}")
    with beside(out) as new:
        weights.write(new, {name: tensors[name] for name in wanted if name in tensors}, note="assembling")
        write_described(said, new, _card(vision, language, connector), commonest_type(tensors))
    source = weights.stored(out)
    model = build(said.family, said.config, source, "auto", str(out))
    model.generation_config = said.generation
    return Loaded(**vars(said), model=model, source=source)


def vision_names(layers: int) -> dict[str, tuple[str, ...]]:
    """The tower's published names, and the weights of MLCD that each is made of, end to end. 293 for 24 layers."""
    names: dict[str, tuple[str, ...]] = dict(_ENDS)
    for layer in range(layers):
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                parts = tuple(f"encoder.layers.{layer}.{part}.{kind}" for part in theirs)
                names[f"visual.blocks.{layer}.{ours}.{kind}"] = parts
    return names


def read_vision(folder: Path, dtype: torch.dtype | None, *, finite: bool = True) -> dict[str, Entry]:
    """The tower's tensors by their published names, not read yet. ValueError for missing and unknown weights, and, on
    reading, for values that are not finite; each names the source's weight and what it belongs to."""
    config = _vision_config(folder)
    stored = weights.stored(folder)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in stored) else ""
    given = {name.removeprefix(prefix): entry for name, entry in stored.items()}
    table = vision_names(config["num_hidden_layers"])
    missing = [(prefix + part, ours) for ours, parts in table.items() for part in parts if part not in given]
    refuse(folder, {MISSING: [f"{part}, of which {ours} would be made" for part, ours in missing]})
    used = {part for parts in table.values() for part in parts}
    dropped = sorted(name for name in given if _UNUSED.search(name))
    extra = sorted(given.keys() - used - set(dropped))
    refuse(folder, {"not of this tower": [prefix + name for name in extra if not _COMPUTED.search(name)]})
    if dropped and finite:
        console.say(f"vision: {', '.join(prefix + name for name in dropped)} left out: the model has no such layer")

    def part(name: str, ours: str) -> Entry:
        return _cast(given[name], dtype, f"{folder}: {prefix}{name}", ours if finite else None)

    return {ours: _joined([part(name, ours) for name in parts]) for ours, parts in table.items()}


def _joined(parts: list[Entry]) -> Entry:
    return parts[0] if len(parts) == 1 else joined(parts)


def _cast(entry: Entry, dtype: torch.dtype | None, where: str, becomes: str | None) -> Entry:
    """As `dtype`, and checked when it is read: ValueError for NaN and infinity. `becomes` None: not checked."""
    wanted = torch.float32 if dtype is None and entry.dtype == torch.float16 else dtype
    cast = entry.cast(wanted)

    def read() -> Tensor:
        value = cast.read()
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            before = int((~torch.isfinite(entry.read())).sum())
            cause = (
                "the file is damaged, fetch it again" if before else f"{cast.dtype} is too narrow, take a wider dtype"
            )
            raise ValueError(
                f"{where}: {count} of its {value.numel()} values are NaN or infinite, so {becomes} would be; {cause}"
            )
        return value

    return cast if becomes is None else Entry(cast.dtype, cast.shape, read)


def _read_language(folder: Path, dtype: torch.dtype | None, tie: bool | None) -> dict[str, Entry]:
    """Qwen3's tensors: its names are the published ones."""
    config = _language_config(folder)
    found = {
        name: _cast(entry, dtype, f"{folder}: {name}", name)
        for name, entry in weights.stored(folder).items()
        if not _COMPUTED.search(name)
    }
    if "model.embed_tokens.weight" not in found:
        refuse(folder, {MISSING: ["model.embed_tokens.weight"]})
    embedding = found["model.embed_tokens.weight"]
    head = found.pop("lm_head.weight", embedding)  # where it is not stored it is the embedding
    same = head is embedding or (head.shape == embedding.shape and torch.equal(head.read(), embedding.read()))
    if tie and not same:
        raise ValueError("tie: the language model's head differs from its embedding; tying would lose it")
    tied = same and bool(config.get("tie_word_embeddings")) if tie is None else tie
    if not tied:
        found["lm_head.weight"] = head
    return found


def _fresh(merger: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, Entry]:
    """A connector that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in merger.items():
        value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        if "ln_q" not in name and name.endswith("weight"):
            value = torch.randn(shape, generator=generator) * DEVIATION
        made[name] = held(value.to(dtype))
    return made


def _read_connector(source: Path, dtype: torch.dtype | None, merger: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """From `mm_projector.*` or `visual.merger.*`, under any prefix. ValueError for one of another size or kind."""
    if source.is_dir():
        file = next((source / name for name in ("mm_projector.safetensors", "mm_projector.bin")), source)
        source = file if file.exists() else source
    if not source.exists():
        raise ValueError(f"connector: {source}: no such file or folder")
    if source.is_dir():
        stored = weights.stored(source)
    elif source.suffix == ".safetensors":
        stored = weights.safetensors(source)
    else:
        stored = {name: held(value) for name, value in weights.pickled(source).items() if isinstance(value, Tensor)}
    found = {
        f"visual.merger.{match[1]}.{match[2]}": _cast(entry, dtype, f"{source}: {name}", f"visual.merger.{match[1]}")
        for name, entry in stored.items()
        if (match := _CONNECTOR.search(name))
    }
    for name, shape in merger.items():
        if name not in found or found[name].shape != shape:
            there = list(found[name].shape) if name in found else "not there"
            raise ValueError(f"connector: {source}: {name} is {there}; these parts need {list(shape)}")
    return found


def _vision_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if (kind := config.get("model_type")) != VISION:
        raise ValueError(f"vision: {folder} is a {kind!r}; a RICE tower is a {VISION!r}")
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    for key, value, needed in (
        ("hidden_act", config.get("hidden_act", "gelu"), "gelu"),
        ("rope_theta", theta, 10000.0),
    ):
        if value != needed:
            raise ValueError(f"vision: {folder}: {key} is {value!r}; a RICE tower has {needed!r}")
    return config


def _language_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if (kind := config.get("model_type")) != "qwen3":
        why = "it has a mixture of experts" if "moe" in str(kind) else "the published class has Qwen3 inside"
        raise ValueError(f"language: {folder} is a {kind!r}; LLaVA-OneVision-1.5 takes a qwen3 ({why})")
    return config


def _describe(vision: Path, language: Path, out: Path, template: str | None, tied: bool) -> Described:
    """What the folder says; its layout is the family's default."""
    onevision, tower, text = family("onevision15"), _vision_config(vision), _language_config(language)
    make: Any = onevision.config_class
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True)
    ids = _token_ids(tokenizer, language, text["vocab_size"])
    name = template or onevision.template
    chat.check_fits(chat.template(name), tokenizer)
    config = make(
        text_config={key: value for key, value in text.items() if key not in _NOT_OURS} | {"tie_word_embeddings": tied},
        vision_config={
            "depth": tower["num_hidden_layers"],
            "embed_dim": tower["hidden_size"],
            "hidden_size": tower["hidden_size"],
            "intermediate_size": tower["intermediate_size"],
            "num_heads": tower["num_attention_heads"],
            "in_channels": tower.get("num_channels", 3),
            "patch_size": tower["patch_size"],
            "layer_norm_eps": tower.get("layer_norm_eps", 1e-5),
            "initializer_range": tower.get("initializer_range", 0.02),
            "text_hidden_size": text["hidden_size"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    return Described(
        folder=out,
        family=onevision,
        config=config,
        generation=read_generation(language, config),
        tokenizer=tokenizer,
        template_name=name,
        layout=NativeLayout(),
        image_token_id=ids["<|image_pad|>"],
    )


def _token_ids(tokenizer: Any, folder: Path, rows: int) -> dict[str, int]:
    """The ids of the pictures' tokens by their names. The vocabulary is never grown: these tokens are Qwen3's own."""
    known = tokenizer.get_vocab()
    for token in TOKENS:
        if token not in known:
            raise ValueError(f"language: {folder}: the tokenizer lacks {token}; take the tokenizer of a Qwen3")
    if (top := max(known.values())) >= rows:
        raise ValueError(f"language: {folder}: the tokenizer has id {top}, but the embedding {rows} rows")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in known else tokenizer.eos_token
    return {token: known[token] for token in TOKENS}


def _colours(vision: Path) -> dict[str, Any]:
    """Mean and deviation of the pixels that the tower was trained with."""
    file = vision / "preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"mean": three(said.get("image_mean", CLIP_MEAN)), "std": three(said.get("image_std", CLIP_STD))}


def _check_shapes(tensors: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]], tied: bool, where: str) -> None:
    needed = {name for name in wanted if not (tied and name == "lm_head.weight")}
    both = [(name, tensors[name].shape, wanted[name]) for name in needed & tensors.keys()]
    shapes = [f"{name} is {list(have)}, not {list(want)}" for name, have, want in both if have != want]
    missing, extra = needed - tensors.keys(), tensors.keys() - wanted.keys()
    refuse(where, {MISSING: missing, EXTRA: extra, SHAPES: shapes})


def _card(vision: Path, language: Path, connector: Path | str | None) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        "# An assembled vision-language model, before training\n\n"
        f"- vision: `{vision.name}`\n- language: `{language.name}`\n"
        f"- connector: {f'`{Path(connector).name}`' if connector else 'fresh'}\n"
    )
