"""Prompts to new tokens: what a model is given for a conversation with pictures, and what it says to several at once,
through the stock `generate`. Knows nothing of who asks, or of what is done with the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vistune import chat, images
from vistune.models.load import Loaded
from vistune.samples import IMAGE_ID, IMAGE_MARK, Image, Message
from vistune.speech import stop_ids

PATIENCE = 16
"""Steps between looks at whether half of the rows have ended; those are then taken out of the batch."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an answer is drawn. `temperature` 0 is greedy, and then `top_p` and `seed` say nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Shown:
    """A picture as the model takes it: pixels as its layout prepares them (uint8), the number of its tokens, and what
    the layout says of it (`Layout.grid`)."""

    pixels: Tensor
    tokens: int
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model takes it: ids with every image expanded; the pixels of each image as its layout prepares
    them (uint8), and what the layout says of it (`Layout.grid`)."""

    ids: list[int]
    pixels: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class New:
    """What a model said to one prompt: ids up to what ended it, that included; `margin` is the smallest gap between the
    two best logits of its steps (infinite where nothing was compared)."""

    ids: list[int] = field(default_factory=list)
    margin: float = math.inf


def shown(loaded: Loaded, picture: Image) -> Shown:
    """Raises ImageError."""
    opened, layout = images.open_image(picture), loaded.layout
    pixels = torch.from_numpy(layout.prepare(opened))
    return Shown(pixels, layout.tokens(*opened.size), layout.grid(*opened.size))


def marked(text: str, pictures: Sequence[Image]) -> str:
    """`text` with a mark for each picture that has none, in front, one a line."""
    missing = len(pictures) - text.count(IMAGE_MARK)
    return f"{IMAGE_MARK}\n" * max(missing, 0) + text


def asked(loaded: Loaded, messages: Sequence[Message], pictures: int) -> list[int]:
    """The ids of a conversation whose last turn is a question, with `IMAGE_ID` for each of its pictures. ValueError
    when marks and pictures do not match."""
    marks = sum(message.text.count(IMAGE_MARK) for message in messages)
    if pictures and marks != pictures:
        raise ValueError(f"{pictures} images for {marks} {IMAGE_MARK} in the conversation; give one for each")
    return chat.encode(loaded.template, loaded.encoder, messages, has_images=bool(pictures), open_turn=True).ids


def laid(loaded: Loaded, ids: Sequence[int], seen: Sequence[Shown]) -> Prompt:
    """The prompt of `asked` ids with these pictures in their places."""
    each, expanded = iter(seen), []
    for one in ids:
        expanded += [loaded.image_token_id] * next(each).tokens if one == IMAGE_ID else [one]
    return Prompt(expanded, [one.pixels for one in seen], [one.grid for one in seen if one.grid is not None])


def prompt(loaded: Loaded, messages: Sequence[Message], pictures: Sequence[Image]) -> Prompt:
    """The prompt of a conversation whose last turn is a question. ValueError when marks and images do not match, or an
    image cannot be read."""
    ids = asked(loaded, messages, len(pictures))
    return laid(loaded, ids, [shown(loaded, picture) for picture in pictures])


@torch.no_grad()
def decode(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    streamer: BaseStreamer | None = None,
    endless: bool = False,
    told: Event | None = None,
    alike: bool = False,
) -> list[New]:
    """New ids of each prompt. Rows that have ended leave the batch when half of them have; what the others say does not
    depend on it. `endless`: nothing but the number of tokens ends an answer; `told` ends all of them. `alike`: every
    rank calls this, and runs the model as often as the others do, as one whose weights lie in shards must.
    """
    found, left = [New() for _ in prompts], list(range(len(prompts)))
    given: dict[str, Any] = together(loaded, prompts)
    while left:
        start = given["input_ids"].shape[1]
        shrinks = _can_shrink(loaded) and not alike
        stop = _Stop(loaded, start, len(left), endless=endless, told=told, shrinks=shrinks)
        watch = _Margins(stop)
        budget = settings.max_new_tokens - len(found[left[0]].ids)
        out = _generate(loaded, given, settings, budget, streamer, stop, watch, alike)
        for row, (new, margin) in enumerate(zip(out.sequences[:, start:].tolist(), watch.least.tolist(), strict=True)):
            found[left[row]].ids += new[: stop.ended.get(row)]
            found[left[row]].margin = min(found[left[row]].margin, margin)
        kept = [row for row in range(len(left)) if row not in stop.ended]
        if alike or not kept or out.sequences.shape[1] - start >= budget or (told and told.is_set()):
            break
        left = [left[row] for row in kept]
        given = _fewer(out, given["attention_mask"], kept)
    return found


def _generate(
    loaded: Loaded,
    given: dict[str, Any],
    settings: Settings,
    tokens: int,
    streamer: BaseStreamer | None,
    stop: _Stop,
    watch: _Margins,
    alike: bool,
) -> Any:
    model: Any = loaded.model
    greedy = settings.temperature <= 0
    ends = {"eos_token_id": None} if stop.endless else {}
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    if not greedy:
        how |= {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    with nullcontext() if greedy else _drawn(settings.seed):
        return model.generate(
            **given,
            **how,
            **ends,
            max_new_tokens=tokens,
            pad_token_id=_pad(loaded),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([watch] if greedy else []),
            return_dict_in_generate=True,
            synced_gpus=alike,
        )


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def together(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """One batch of prompts as the class's own forward takes it, padded on the left."""
    return _rows(loaded, prompts) | _pixels(loaded, prompts)


def _rows(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Ids of all prompts, padded on the left, and where they are not padding."""
    device: Any = loaded.model.device
    longest, pad = max(len(p.ids) for p in prompts), _pad(loaded)
    ids = [[pad] * (longest - len(p.ids)) + p.ids for p in prompts]
    seen = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(seen, device=device)}


def _pixels(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The images of all prompts as the class's own forward takes them."""
    model: Any = loaded.model
    if not any(p.pixels for p in prompts):
        return {}
    pixels = [images.normalize(one.to(model.device), loaded.layout, model.dtype) for p in prompts for one in p.pixels]
    inputs = loaded.family.inputs(pixels, [grid for p in prompts for grid in p.grids])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _can_shrink(loaded: Loaded) -> bool:
    """Whether rows can be taken out on the way: not of a cache that was made for so many rows, as a static one is."""
    return getattr(loaded.model.generation_config, "cache_implementation", None) in (None, "dynamic")


def _fewer(out: Any, seen: Tensor, kept: list[int]) -> dict[str, Any]:
    """What `generate` takes to go on with some of the rows: what it read is in its cache, but for the last token."""
    rows = torch.tensor(kept, device=seen.device)
    out.past_key_values.batch_select_indices(rows)
    ids = out.sequences[rows]
    new = seen.new_ones(len(kept), ids.shape[1] - seen.shape[1])
    attended = torch.cat([seen[rows], new], 1)
    return {"input_ids": ids, "attention_mask": attended, "past_key_values": out.past_key_values}


def _pad(loaded: Loaded) -> int:
    """Never seen, so any id but the image's will do."""
    pad = loaded.tokenizer.pad_token_id
    return pad if pad is not None else 0


class _Stop(StoppingCriteria):
    """Ends a row whose last token ends an answer or whose text holds the template's stop string, and all of them when
    told to, or when half have ended and the rest shall go on without them. `ended`: rows and their new tokens."""

    def __init__(self, loaded: Loaded, start: int, rows: int, *, endless: bool, told: Event | None, shrinks: bool):
        self.start, self.rows, self.told, self.shrinks = start, rows, told, shrinks and rows > 1
        self.endless, self.tokenizer = endless, loaded.tokenizer
        self.stop = "" if endless else loaded.template.stop_string
        self.ends = set() if endless else stop_ids(loaded)
        self.ended: dict[int, int] = {}
        self.reach = 2 * len(self.stop.encode()) + 8  # tokens in which a stop string that just ended lies for certain

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        count = input_ids.shape[1] - self.start
        last = input_ids[:, self.start :][:, -self.reach :].tolist()
        for row, ids in enumerate(last):
            if row not in self.ended and self._ends(ids):
                self.ended[row] = count
        whole = bool(self.told and self.told.is_set()) or (self._looks(count) and 2 * len(self.ended) >= self.rows)
        ended = [whole or row in self.ended for row in range(self.rows)]
        return torch.tensor(ended, device=input_ids.device)

    def _looks(self, count: int) -> bool:
        return self.shrinks and count % PATIENCE == 0

    def _ends(self, ids: list[int]) -> bool:
        if ids[-1] in self.ends:
            return True
        return bool(self.stop) and self.stop in self.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


class _Margins(LogitsProcessor):
    """Changes nothing; remembers for each row that has not ended the smallest gap between its two best logits."""

    def __init__(self, stop: _Stop):
        self.stop = stop
        self.least = torch.full((stop.rows,), math.inf)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().topk(2).values
        self.least = self.least.to(scores.device)
        going = torch.ones(self.stop.rows, dtype=torch.bool)
        going[list(self.stop.ended)] = False
        gap = (best[:, 0] - best[:, 1]).where(going.to(scores.device), math.inf)
        self.least = torch.minimum(self.least, gap)
        return scores
