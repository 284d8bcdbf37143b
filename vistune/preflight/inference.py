"""What a model takes of a card while it answers: weights as they are held (bf16, 8 bits, NF4), the cache of keys and
values, and the activations of reading the question, counted by running it on a GPU that is not there.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vistune import console
from vistune.images import normalize
from vistune.models import quantize
from vistune.models.fit import skeleton
from vistune.preflight import counting, presets, steps
from vistune.preflight.counting import FEW, ROOM, WEIGHTS, Bytes, Micro, depths, shallow
from vistune.preflight.parts import CONTEXT, FRAGMENTS, SETTLED, WORKSPACE
from vistune.preflight.presets import Subject
from vistune.preflight.pretend import pretended, rounded
from vistune.preflight.sizes import GB, GIB, Card, card
from vistune.recipe import Data, Learn, Model, Rate, Recipe, Source

KINDS = ("none", "8bit", "4bit")
NAMES = {"none": "bf16", "8bit": "8 bits", "4bit": "NF4"}
CACHE, ACTIVATIONS = "key-value cache", "activations"


@dataclass(frozen=True, kw_only=True)
class Answering:
    """What one model takes in one kind: `parts` in bytes, whose sum is `torch.cuda.max_memory_allocated`'s; `needed`
    with the context and what the allocator cannot give; `tokens` of each of `batch` dialogues."""

    subject: Subject
    kind: str
    card: Card
    tokens: int
    images: int
    batch: int
    parts: Bytes
    needed: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.card.memory

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.subject.name,
            "quantize": self.kind,
            "fits": self.fits,
            "peak_gb": self.parts.total() / GB,
            "peak_gib": self.parts.total() / GIB,
            "needed_gb": self.needed / GB,
            "needed_gib": self.needed / GIB,
            "parts_gb": {name: size / GB for name, size in self.parts.items()},
            "tokens": self.tokens,
            "images": self.images,
            "batch": self.batch,
        }


def check(
    models: Sequence[str], *, gpu: str, kinds: str = "", length: int = 2048, images: int = -1, batch: int = 1
) -> list[Answering]:
    """Every model (a folder, a hub id in the cache, a preset) in every kind, or in the one that is named, with `batch`
    dialogues of `length` tokens and `images` pictures each. ValueError for an unknown kind or model."""
    if kinds and kinds not in KINDS:
        raise ValueError(f"--quantize {kinds}: choose {', '.join(KINDS)}, or leave it out to see all")
    bought, found = card(gpu), []
    for name in models:
        subject = presets.find(name)
        count = images if images >= 0 else 1
        each = steps.typical_tokens(subject.layout, length)
        if count * each > length:
            raise ValueError(f"--images {count}: pictures of {each} tokens leave no room in {length} tokens")
        one = steps.micro(subject.layout, _recipe(name, length), [length], 1, [each] * count)
        for kind in [kinds] if kinds else KINDS:
            found.append(answering(subject, kind, bought, one, batch))
    return found


def _recipe(start: str, length: int) -> Recipe:
    """A recipe that only says how long a row is."""
    learn = Learn(root={"connector": Rate(lr=1e-3)})
    data = Data(sources=[Source(path="none")], length=max(8, length))
    return Recipe(model=Model(start=start), data=data, learn=learn)


def answering(subject: Subject, kind: str, bought: Card, one: Micro, batch: int) -> Answering:
    """One model in one kind. The dialogues are read one after another; their keys and values stay."""
    tokens = sum(one.lengths)
    activations = _prefill(subject, kind, one)
    parts = Counter({WEIGHTS: weights(subject, kind), CACHE: batch * cache(subject.config, tokens)})
    parts += Counter({ACTIVATIONS: activations, ROOM: WORKSPACE})
    allowance = FRAGMENTS * (parts.total() - parts[WEIGHTS]) + SETTLED * parts[WEIGHTS]
    needed = parts.total() + CONTEXT + round(allowance)
    return Answering(
        subject=subject,
        kind=kind,
        card=bought,
        tokens=tokens,
        images=one.images,
        batch=batch,
        parts=parts,
        needed=needed,
    )


def weights(subject: Subject, kind: str) -> int:
    """Bytes of the model's weights and buffers as they are held."""
    model = _outline(subject, kind, subject.config)
    tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    return sum(rounded(one.nbytes) for one in tensors.values())


def _outline(subject: Subject, kind: str, config: Any) -> Any:
    with counting.no_library():
        model = skeleton(subject.family, config)
        if kind != "none":
            quantize.lay(model, subject.family, kind)
    for module in model.modules():
        if not hasattr(module, "pieces"):
            _lower(module)
    if config.tie_word_embeddings:
        head: Any = subject.family.head(model)
        head.weight = model.get_input_embeddings().weight
    return model.eval()


def _lower(module: nn.Module) -> None:
    for name, held in module._parameters.items():
        if held is not None and held.is_floating_point():
            module._parameters[name] = nn.Parameter(held.to(torch.bfloat16), requires_grad=False)


def cache(config: Any, tokens: int) -> int:
    """Bytes of the keys and values of one dialogue, bf16; layers with a sliding window keep no more than that."""
    text = copy.deepcopy(config.text_config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or tokens
    kept = sum(min(tokens, window) if "sliding" in kind else tokens for kind in kinds)
    return 2 * 2 * heads * width * kept


def _prefill(subject: Subject, kind: str, one: Micro) -> int:
    """The most that reading one dialogue takes beside weights and cache. A layer lets go of what it made."""
    config = shallow(subject.config, min(FEW, depths(subject.config)[0]), min(FEW, depths(subject.config)[1]))
    model = _outline(subject, kind, config)
    with pretended() as ledger, counting.no_library(), torch.no_grad():
        with ledger.doing(WEIGHTS):
            counting.place(model)
        ground = ledger.total
        ledger.again()
        batch = one.batch()
        pixels = None if batch.pixels is None else normalize(batch.pixels, subject.layout, torch.bfloat16)
        family = subject.family
        model.train()  # quantised layers then turn their matrices back, which is the most that either way takes
        hidden = family.hidden(model, batch.ids, batch.positions, batch.lengths, pixels, batch.grids)
        family.head(model)(hidden[-1:]).float()
        return ledger.peak - ground


def show(answers: list[Answering]) -> None:
    """A row for each model and kind."""
    rows = [
        (
            answer.subject.name,
            NAMES[answer.kind],
            *(f"{answer.parts[name] / GIB:,.2f}" for name in (WEIGHTS, CACHE, ACTIVATIONS)),
            f"{answer.parts.total() / GB:,.2f}",
            f"{answer.parts.total() / GIB:,.2f}",
            f"{answer.needed / GIB:,.2f}",
            f"{answer.needed / answer.card.memory:.0%}",
            "yes" if answer.fits else "NO",
        )
        for answer in answers
    ]
    one = answers[0]
    title = f"answering, {one.batch} x {one.tokens:,} tokens, {one.images} pictures each, on {one.card.name}"
    columns = ("model", "held as", "weights GiB", "cache GiB", "activations GiB", "peak GB", "peak GiB", "needed GiB")
    console.table(title, (*columns, "of the card", "fits"), rows)
    for answer in answers:
        if answer.kind == one.kind:
            console.say(f"{answer.subject.name}: {answer.subject.found}")
