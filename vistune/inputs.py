"""A recipe's data: sources opened and transformed, indexed, and laid out as a plan. No weights are read.

What training, checking, showing and proving all begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vistune import chat, ranks
from vistune import recipe as recipes
from vistune.data.formats import Reader, open_source
from vistune.data.index import Index, build_index
from vistune.data.plan import Plan
from vistune.data.reading.metadataset import expand, is_metadataset
from vistune.data.shares import Share
from vistune.data.tokenize import Language
from vistune.data.transforms import apply
from vistune.images import FixedLayout
from vistune.models import hub
from vistune.models.families import families_of
from vistune.models.folders import Described, read_config
from vistune.models.load import describe
from vistune.native import NativeLayout, open_native
from vistune.recipe import Recipe, Source
from vistune.text_encoder import TextEncoder, open_encoder


@dataclass
class Data:
    """A recipe's data: readers, what turns rows into tokens, the index and the plan made of it."""

    readers: list[Reader]
    language: Language
    index: Index
    plan: Plan


def read(recipe: Recipe, model: Described, cache: Path) -> Data:
    """Open the sources, index them (rank 0; the others read its cache), and lay the plan.

    `cache` is where the index goes when the recipe names no place. Raises ValueError for what the user can mend.
    """
    cache = Path(recipe.data.cache) if recipe.data.cache else cache
    language = language_of(model)

    def open_all() -> tuple[list[Reader], Index]:
        readers = open_readers(recipe.data, cache)
        index = build_index(readers, language, recipe.data.length, cache=cache, workers=recipe.data.workers)
        return readers, index

    ranks.on_first(open_all)
    readers, index = open_all()
    return Data(readers, language, index, plan_of(recipe, index))


def read_plan(recipe: Recipe) -> Plan:
    """The plan that a run of the recipe will follow, its index made or found where the run keeps it."""
    return read(recipe, describe_model(recipe), Path(recipe.run) / "index").plan


def open_readers(data: recipes.Data, cache: Path | None) -> list[Reader]:
    """One reader for each of `sources_of(data)`."""
    return [open_reader(source, cache, data.workers) for source in sources_of(data)]


def open_reader(source: Source, cache: Path | None, workers: int = 0) -> Reader:
    """The source seen through its transforms."""
    reader = open_source(source.path, source.format, source.images, source.name, cache, source.options)
    return apply(reader, source.transforms, cache, workers=workers)


def sources_of(data: recipes.Data) -> list[Source]:
    """The recipe's sources, with the datasets that a blend file names in its place."""
    found = [part for source in data.sources for part in _parts(source)]
    if len({part.weight > 0 for part in found}) > 1:
        raise ValueError("data.sources: a blend has weights and other sources have none; give each source a weight")
    return found


def _parts(source: Source) -> list[Source]:
    if source.format != "energon" or not is_metadataset(source.path):
        return [source]
    if source.cap or source.expect:
        raise ValueError(f"{source.path}: cap and expect are for one data set, and this file blends several")
    return [
        source.model_copy(
            update={
                "path": part.path,
                "name": "",
                "options": {**source.options, **part.options()},
                "weight": part.weight * (source.weight or 1.0) if part.weight else source.weight,
                "epochs": source.epochs * (part.repetitions or 1.0),
            }
        )
        for part in expand(source.path, source.options.get("split", "train"))
    ]


def language_of(model: Described) -> Language:
    chat.check_fits(model.template, model.tokenizer)
    return Language(model.template, model.encoder, model.layout, model.image_token_id)


def plan_of(recipe: Recipe, index: Index) -> Plan:
    """The plan that the recipe asks for. Rank 0 works out what takes a pass over the index, the others map it."""
    plan = Plan(
        index,
        batch=recipe.train.batch,
        unit=recipe.train.unit,
        length=recipe.data.length,
        pack=recipe.data.pack,
        seed=recipe.train.seed,
        epochs=recipe.train.epochs,
        steps=recipe.train.steps,
        shares=[Share(epochs=s.epochs, weight=s.weight, cap=s.cap) for s in sources_of(recipe.data)],
        images_per_pack=recipe.data.images_per_pack,
        block=recipe.data.block,
        group=recipe.data.group,
        micro_batch=recipe.train.micro_batch,
        workers=recipe.data.workers,
    )
    ranks.on_first(plan.prepare)
    return plan


BUCKETS = 8
"""Lengths that the packs of compiled layers may have: each is a shape that kernels are chosen for."""


def pad_to(recipe: Recipe, device: str, packs: int) -> int:
    """What the tokens of `packs` packs in one row are padded to a multiple of, on a device of this type.

    The whole room makes every shape the same; 128 suits the kernels of accelerators. Compiled layers get few lengths:
    multiples of an eighth of the room.
    """
    room, least = recipe.data.length * packs, 1 if device == "cpu" else 128
    if recipe.data.pad == "length":
        return room
    if recipe.train.compile:
        return -(-room // (BUCKETS * least)) * least
    return least


def describe_model(recipe: Recipe) -> Described:
    """What the recipe's start folder says of the model, its weights apart."""
    said = recipe.model
    return describe(said.start, template=said.template, image=said.image, options=said.options)


@dataclass
class Target:
    """What a verb of `vistune data` was pointed at: a recipe's sources, or one data file."""

    readers: list[Reader]
    language: Language | None  # None for a data file without a tokenizer
    length: int
    expect: list[int] = field(default_factory=list)  # samples each source should have; 0: any number
    recipe: Recipe | None = None


def open_target(
    target: str,
    words: Sequence[str],
    *,
    format: str,
    images: Sequence[str],
    tokenizer: str,
    template: str,
    length: int,
    cache: Path | None = None,
) -> Target:
    """A recipe when `target` ends with .toml, else a data file or folder. Raises ValueError for what does not fit."""
    if target.endswith(".toml"):
        recipe = recipes.read(target, words)
        language = language_of(describe_model(recipe))
        expect = [source.expect for source in sources_of(recipe.data)]
        readers = open_readers(recipe.data, cache)
        return Target(readers, language, recipe.data.length, expect, recipe)
    if words:
        raise ValueError(f"{words[0]!r}: words lie over a recipe; {target} does not end in .toml")
    chosen = language_for(tokenizer, template) if tokenizer else None
    source = Source(path=target, format=format, images=list(images))
    return Target([open_reader(source, cache)], chosen, length)


def language_for(folder: str, template: str = "") -> Language:
    """Of a model's folder as it says; of a plain tokenizer's folder with LLaVA-1.5's pictures (336, 576 tokens).

    A folder with a Qwen2-VL image processor gets pictures at their own size, and template qwen2-vl if none is named.
    """
    model = hub.resolve(folder, "tokenizer")
    if (model / "config.json").exists() and families_of(read_config(model)):
        return language_of(describe(model, template=template or None))
    if (native := open_native(model)) is not None:
        return _native_language(model, native, template or "qwen2-vl")
    chosen = chat.template(template or "tokenizer")
    encoder = open_encoder(model)
    chat.check_fits(chosen, encoder.tokenizer)
    return Language(chosen, encoder, FixedLayout(), image_token_id=len(encoder.tokenizer))


def _native_language(folder: Path, layout: NativeLayout, template: str) -> Language:
    """The placeholder is the one that config.json numbers, else Qwen2-VL's by its name."""
    tokenizer = open_encoder(folder).tokenizer
    config = read_config(folder) if (folder / "config.json").exists() else {}
    token = tokenizer.convert_ids_to_tokens(config["image_token_id"]) if "image_token_id" in config else "<|image_pad|>"
    if token not in tokenizer.get_vocab():
        raise ValueError(f"tokenizer {folder}: it has no {token!r}, which stands for pieces of a picture")
    chosen = chat.template(template)
    chat.check_fits(chosen, tokenizer)
    return Language(chosen, TextEncoder(tokenizer, token), layout, tokenizer.convert_tokens_to_ids(token))
