"""A model folder to a model and back. What a folder is, its config.json says; everything is checked on the way in.

Knows folders and families, nothing of training.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from vistune import chat
from vistune.images import Layout
from vistune.models import weights
from vistune.models.families import Family, family_of
from vistune.samples import IMAGE_MARK

UNFINISHED = ".vistune-unfinished"


@dataclass
class Described:
    """What a folder says of a model, its weights apart. `template_name` is a key of `vistune.chat.TEMPLATES`."""

    folder: Path
    family: Family
    tokenizer: Any
    processor: Any
    template_name: str
    layout: Layout
    image_token_id: int

    @cached_property
    def encoder(self) -> chat.TextEncoder:
        """What makes ids of text; made once, since it reads the whole tokenizer."""
        return chat.TextEncoder(self.tokenizer)


@dataclass
class Loaded(Described):
    """A model with everything that goes with it."""

    model: PreTrainedModel


def load(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, template: str | None = None, image: str | None = None
) -> Loaded:
    """Open a model folder on the CPU, in evaluation mode.

    `template` and `image` ("square", "pad") override what the folder says. Raises ValueError for missing, extra or
    mis-shaped weights, for values that are not finite, and for a template or tokenizer that does not fit.
    """
    folder = Path(folder)
    family = family_of(read_config(folder), str(folder / "config.json"))
    model = read_model(family.model_class, folder, dtype)
    said = describe(folder, template=template, image=image)
    return Loaded(**vars(said), model=model)


def describe(folder: Path | str, *, template: str | None = None, image: str | None = None) -> Described:
    """All of `load` but the weights: what is needed to read data as the model will see it. Raises ValueError."""
    folder = Path(folder)
    raw = read_config(folder)
    family = family_of(raw, str(folder / "config.json"))
    ours = raw.get("vistune", {})
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    name = template or ours.get("template", "tokenizer")
    chat.check_fits(chat.template(name), tokenizer)
    return Described(
        folder=folder,
        family=family,
        tokenizer=tokenizer,
        processor=processor,
        template_name=name,
        layout=family.layout(config, processor, image or ours.get("image")),
        image_token_id=_image_token(folder, config, tokenizer),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. ValueError when there is none or it is not JSON."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def read_model(
    model_class: Any, folder: Path, dtype: torch.dtype | str, *, extra: str | None = None, finite: bool = True
) -> PreTrainedModel:
    """`from_pretrained` that refuses what it would repair in silence. `extra`: a pattern of weights to leave out.

    `finite=False` leaves it to the caller to look for values that are not.
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
    _refuse(folder, "missing", list(info["missing_keys"]))
    _refuse(folder, "not of this model", unexpected)
    _refuse(folder, "of another shape than config.json says", shapes)
    if finite:
        _refuse(folder, "not finite (NaN or infinity)", nonfinite(model))
    return model.eval()


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        shown = "\n  ".join(sorted(names)[:10])
        raise ValueError(f"{folder}: {len(names)} weights are {what}. The first:\n  {shown}")


def nonfinite(model: nn.Module) -> list[str]:
    """Parameters and buffers that hold a NaN or an infinity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]


def _image_token(folder: Path, config: Any, tokenizer: Any) -> int:
    token = getattr(tokenizer, "image_token", None) or IMAGE_MARK
    found, wanted = tokenizer.convert_tokens_to_ids(token), config.image_token_id
    if found != wanted:
        raise ValueError(
            f"{folder}: config.json says the image token is {wanted}, the tokenizer has {token!r} = {found}"
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


def save(
    loaded: Loaded,
    folder: Path | str,
    *,
    frozen_from: Path | None,
    card: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a stock model folder, beside and then renamed, so that it is never half there.

    A tensor that still equals the one in `frozen_from` (in the type it was held in) is copied from there: same bytes,
    same type. The others are written as `dtype`, or as they are. ValueError when `folder` holds something else.
    """
    folder = Path(folder)
    with _beside(folder) as beside:
        tensors = _tensors(loaded, frozen_from, dtype)
        types: Counter[str] = Counter()
        weights.write(beside, _counted(tensors, types), shard_bytes)
        _write_rest(loaded, beside, card, types.most_common(1)[0][0])


def check_save(loaded: Loaded, folder: Path | str) -> None:
    """Write a folder without its weights, open it, remove it: what would fail at the end fails now."""
    folder = Path(folder)
    with _beside(folder) as beside:
        _write_rest(loaded, beside, "", "float32")
        with quiet():
            AutoProcessor.from_pretrained(beside, local_files_only=True)
        type(loaded.model.config).from_pretrained(beside, local_files_only=True)
    shutil.rmtree(folder)


def stored_tensors(folder: Path, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """What gives a model folder's tensor by its name in `model`, as it lies on disk."""
    stored = weights.Stored(Path(folder))
    names = {_plain(name): name for name in stored.files}

    def read(name: str) -> Tensor:
        return stored[names[_plain(name)]]

    return read


def _plain(name: str) -> str:
    """A tensor's name without the levels in which the layouts of different versions differ."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "vision_model"))


def _tensors(loaded: Loaded, frozen_from: Path | None, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Names on disk and tensors, in the model's order; tied weights once."""
    start = weights.Stored(Path(frozen_from)) if frozen_from else None
    names = {_plain(name): name for name in start.files} if start else {}
    seen: set[int] = set()
    for name, tensor in loaded.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        before = start[names[_plain(name)]] if start and _plain(name) in names else None
        held = tensor.detach().cpu()
        if before is not None and before.shape == held.shape and torch.equal(before.to(held.dtype), held):
            yield loaded.family.stored_name(name), before
        else:
            yield loaded.family.stored_name(name), held.to(dtype) if dtype else held


def _counted(tensors: Iterator[tuple[str, Tensor]], types: Counter[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        types[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        yield name, tensor


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """`<folder>.tmp` to write into; renamed to `folder` at the end, removed after an error."""
    beside, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if folder.exists() and not _ours(folder):
        raise ValueError(f"{folder}: exists and is not a vistune model folder; give another folder, or remove it")
    if beside.exists():
        if not (beside / UNFINISHED).exists():
            raise ValueError(f"{beside}: is in the way and not ours; move it, or give another folder")
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    (beside / UNFINISHED).touch()
    try:
        yield beside
        (beside / UNFINISHED).unlink()
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    return (folder / "config.json").exists() and "vistune" in read_config(folder)


def _write_rest(loaded: Loaded, folder: Path, card: str, dtype: str) -> None:
    """Everything but the weights."""
    template = chat.template(loaded.template_name)
    with quiet():
        processor = loaded.family.processor(
            loaded.model.config, loaded.tokenizer, loaded.layout, chat.chat_template(template, loaded.tokenizer)
        )
        processor.save_pretrained(folder)
        # Readers older than the processor's own file look for this one.
        processor.image_processor.save_pretrained(folder)
        generation_config(loaded.model).save_pretrained(folder)
        loaded.model.config.save_pretrained(folder)
    config = read_config(folder)
    config["architectures"] = [loaded.family.model_class.__name__]
    config["vistune"] = {"template": loaded.template_name, "image": getattr(loaded.layout, "mode", None)}
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section is config or "dtype" in section:
            section["dtype"] = dtype
        section.pop("_name_or_path", None)  # where the parts lay on the machine that joined them
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config(model: Any) -> GenerationConfig:
    """A copy of the model's that can be saved: Vicuna's greedy one carries sampling keys, which saving refuses."""
    settings = copy.deepcopy(model.generation_config)
    if not settings.do_sample:
        for key in _SAMPLING:
            if getattr(settings, key, None) is not None:
                setattr(settings, key, None)
    return settings
