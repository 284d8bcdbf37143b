"""How likely a model finds a given answer: for tasks that rank answers instead of reading one.

Knows prompts and logits, not where the answers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistune import chat, decoding
from vistune.models.load import Loaded
from vistune.samples import Image, Message


class Likelihood(NamedTuple):
    """The sum of the log-probabilities of an answer's tokens, and whether greedy decoding would say just them."""

    logprob: float
    greedy: bool


class _Continued(NamedTuple):
    prompt: decoding.Prompt
    tokens: int  # how many at its end are the answer's


def likelihoods(
    loaded: Loaded, asked: Sequence[tuple[Sequence[Message], Sequence[Image], str]], batch: int = 8
) -> list[Likelihood]:
    """Of each answer, given the conversation before it with its pictures; what ends an answer is not part of it.

    Spaces around an answer are the template's business and are left out. ValueError for an empty answer.
    """
    made = [_continued(loaded, *one) for one in asked]
    order = sorted(range(len(made)), key=lambda i: len(made[i].prompt.ids), reverse=True)
    found: list[Likelihood | None] = [None] * len(made)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, one in zip(chosen, _together(loaded, [made[i] for i in chosen]), strict=True):
            found[i] = one
    return [one for one in found if one is not None]


def _continued(loaded: Loaded, messages: Sequence[Message], pictures: Sequence[Image], answer: str) -> _Continued:
    """The prompt with the answer behind it, where it stands when the model is trained."""
    said, template, seen = answer.strip(), loaded.template, bool(pictures)
    if not said:
        raise ValueError("an answer without text has no likelihood")
    whole = [*messages, Message(role="assistant", text=said)]
    segments = chat.render(template, whole, has_images=seen, tokenizer=loaded.encoder.tokenizer)
    asked = chat.render(template, messages, has_images=seen, tokenizer=loaded.encoder.tokenizer, open_turn=True)
    text, before = ("".join(segment.text for segment in some) for some in (segments, asked))
    assert text.startswith(before), (text, before)
    end = text.index(said, len(before)) + len(said)
    cuts = [place for place in accumulate(len(segment.text) for segment in segments) if place < end]
    ids, _, ends = loaded.encoder.encode(
        text[:end], has_images=seen, whole=template.own, cuts=cuts if template.apart else ()
    )
    prompt = decoding.laid(loaded, ids.tolist(), [decoding.shown(loaded, picture) for picture in pictures])
    return _Continued(prompt, int((ends > len(before)).sum()))


@torch.no_grad()
def _together(loaded: Loaded, some: Sequence[_Continued]) -> list[Likelihood]:
    """One pass over all of them, padded on the left, so that the answers end together; logits for these alone."""
    given = decoding.together(loaded, [one.prompt for one in some])
    longest = max(one.tokens for one in some)
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model: Any = loaded.model
    logits: Tensor = model(**given, position_ids=positions, logits_to_keep=longest + 1, use_cache=False).logits
    scores = logits[:, :-1].float().log_softmax(-1)
    wanted = given["input_ids"][:, -longest:]
    each = scores.gather(-1, wanted[..., None])[..., 0]
    best = scores.argmax(-1) == wanted
    return [
        Likelihood(each[i, -one.tokens :].sum().item(), bool(best[i, -one.tokens :].all()))
        for i, one in enumerate(some)
    ]
