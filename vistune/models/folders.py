"""A model folder without its weights: what it says of a model, and writing one, beside and then renamed.

Knows folders and families; weights are read and written by others.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import logging

from vistune import chat
from vistune.images import Layout
from vistune.models import older
from vistune.models.families import Family, family_of

UNFINISHED = ".vistune-unfinished"


@dataclass(kw_only=True)
class Described:
    """What a folder says of a model, its weights apart. `template_name` is a key of `vistune.chat.TEMPLATES`.

    `origin` is what the way back to the format it came from needs (see `vistune.models.checkpoints`).
    """

    folder: Path
    family: Family
    config: PretrainedConfig
    generation: GenerationConfig
    tokenizer: Any
    template_name: str
    layout: Layout
    image_token_id: int
    origin: dict[str, Any] = field(default_factory=dict)
    start_end: bool = False
    """Whether an image stands between the tokens `<im_start>` and `<im_end>`."""

    @property
    def template(self) -> chat.Template:
        """The chat template with what stands around an image. ValueError when it takes nothing there."""
        chosen = chat.template(self.template_name)
        return chat.in_ends(chosen) if self.start_end else chosen

    @cached_property
    def encoder(self) -> chat.TextEncoder:
        """What makes ids of text; made once, since it reads the whole tokenizer."""
        return chat.TextEncoder(self.tokenizer, self.family.image_token)


def describe(
    folder: Path, *, template: str | None = None, image: str | None = None, options: Mapping[str, Any] | None = None
) -> Described:
    """What a folder of one of our families says. See `vistune.models.load.describe`, which takes other formats too."""
    raw = read_config(folder)
    family = family_of(raw, str(folder / "config.json"))
    refuse_unknown(options or {}, family)
    ours = raw.get("vistune", {})
    with quiet():
        config = family.config_class.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chosen = {**ours.get("options", {}), **(options or {})}
    family.configure(config, chosen)
    name = template or ours.get("template", family.template)
    chat.check_fits(chat.template(name), tokenizer)
    return Described(
        folder=folder,
        family=family,
        config=config,
        generation=read_generation(folder, config),
        tokenizer=tokenizer,
        template_name=name,
        layout=family.layout(config, family.read_processor(folder), image or ours.get("image"), chosen),
        image_token_id=check_image_token(folder, family, config, tokenizer),
        origin=ours.get("origin", {}),
        start_end=check_start_end(folder, bool(ours.get("start_end", False)), tokenizer),
    )


def check_start_end(folder: Path, said: bool, tokenizer: Any) -> bool:
    """Whether images stand between two tokens, as a folder says. ValueError when its tokenizer has not got them."""
    if said and (missing := [one for one in (chat.IMAGE_START, chat.IMAGE_END) if one not in tokenizer.get_vocab()]):
        raise ValueError(
            f"{folder}: its images stand between {chat.IMAGE_START} and {chat.IMAGE_END}, but its tokenizer has no "
            f"{missing[0]}; take the tokenizer that belongs to these weights"
        )
    return said


def refuse_unknown(options: Mapping[str, Any], family: Family) -> None:
    """ValueError for an option of `model.options` that the family does not know."""
    for key in options:
        if key not in family.options:
            known = ", ".join(f"{name} ({what})" for name, what in family.options.items()) or "none"
            raise ValueError(f"model.options.{key}: {family.name} has no such option; it has {known}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. ValueError when there is none or it is not JSON."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def read_generation(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """generation_config.json, or what config.json says where there is none."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def check_image_token(folder: Path, family: Family, config: Any, tokenizer: Any) -> int:
    """The id of the image's token. ValueError when tokenizer and config.json do not agree on it."""
    known, wanted = tokenizer.get_vocab(), config.image_token_id
    if (found := known.get(family.image_token)) != wanted:
        raise ValueError(
            f"{folder}: config.json says the image token is {wanted}, the tokenizer has "
            f"{family.image_token!r} = {found}; take the tokenizer that belongs to these weights"
        )
    return wanted


@contextmanager
def quiet() -> Iterator[None]:
    """Without `transformers`' bars and advice: what matters is checked and said by us."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """`<folder>.tmp` to write into; renamed to `folder` at the end, removed after an error.

    ValueError when `folder`, or one of the names beside it, holds something that is not ours.
    """
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if folder.exists() and not _ours(folder):
        raise ValueError(f"{folder}: exists and is not a vistune model folder; give another folder, or remove it")
    if new.exists():
        if not (new / UNFINISHED).exists():
            raise ValueError(f"{new}: is in the way and not ours; move it, or give another folder")
        shutil.rmtree(new)
    if old.exists() and not _ours(old):
        raise ValueError(f"{old}: is in the way and not ours; move it, or give another folder")
    new.mkdir(parents=True)
    (new / UNFINISHED).touch()
    try:
        yield new
        (new / UNFINISHED).unlink()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    return (folder / "config.json").exists() and "vistune" in read_config(folder)


def write_described(said: Described, folder: Path, card: str, dtype: str) -> None:
    """Everything of a model folder but the weights, whose commonest type is `dtype`."""
    family = said.family
    chat_template = chat.chat_template(said.template, said.tokenizer, family.image_token)
    with quiet():
        processor = family.processor(said.config, said.tokenizer, said.layout, chat_template)
        processor.save_pretrained(folder)
        # Readers older than the processor's own file look for this one.
        processor.image_processor.save_pretrained(folder)
        savable(said.generation).save_pretrained(folder)
        said.config.save_pretrained(folder)
    older.say_in_tokenizer(said.tokenizer, folder)
    older.say_in_processor(folder)
    config = read_config(folder)
    config["architectures"] = [family.model_class.__name__]
    options = family.options_of(said.config, said.layout)
    config["vistune"] = {"template": said.template_name, "image": getattr(said.layout, "mode", None)}
    config["vistune"] |= {"options": options} if options else {}
    config["vistune"] |= {"origin": said.origin} if said.origin else {}
    config["vistune"] |= {"start_end": True} if said.start_end else {}
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section is config or "dtype" in section:
            section["dtype"] = dtype
        section.pop("_name_or_path", None)  # where the parts lay on the machine that joined them
    older.say_in_config(config)
    family.complete(folder, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def savable(settings: GenerationConfig) -> GenerationConfig:
    """A copy that can be saved: Vicuna's greedy one carries sampling keys, which saving refuses."""
    settings = copy.deepcopy(settings)
    if not settings.do_sample:
        for key in _SAMPLING:
            if getattr(settings, key, None) is not None:
                setattr(settings, key, None)
    return settings
