"""How likely an answer is: in every family and template, in batches, against the encoding that training learns from."""

from __future__ import annotations

import pytest
import torch

from tests.each_family import each_family, folders_in
from tests.made import noise_in
from vistune import chat, decoding
from vistune.evaluate.likelihood import Likelihood, likelihoods
from vistune.models.load import Loaded, load
from vistune.samples import IMAGE_MARK, Image, Message

SIZES = [(70, 40), (56, 56), (30, 90)]
ANSWERS = ["red", "It is a small cat, I think", "no", "Seven of them"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Image]:
    return noise_in(tmp_path_factory.mktemp("pictures"), SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("families"))


def asked(pictures: list[Image]) -> list[tuple[list[Message], list[Image], str]]:
    """One picture, two, another, and none; after an exchange, in one case."""
    one, two = f"{IMAGE_MARK}\nWhat is it?", f"{IMAGE_MARK}\nAnd this?\n{IMAGE_MARK}"
    before = [Message(role="user", text=one), Message(role="assistant", text="A thing")]
    return [
        ([Message(role="user", text=one)], pictures[:1], ANSWERS[0]),
        ([Message(role="user", text=two)], pictures[:2], ANSWERS[1]),
        ([*before, Message(role="user", text="Is that so?")], pictures[2:], ANSWERS[2]),
        ([Message(role="user", text="How many are there?")], [], ANSWERS[3]),
    ]


def learned(loaded: Loaded, messages: list[Message], seen: list[Image], answer: str) -> Likelihood:
    """The same of what training learns of the answer: its last span, but for what ends it; alone, without padding."""
    whole = [*messages, Message(role="assistant", text=answer)]
    encoded = chat.encode(loaded.template, loaded.encoder, whole, has_images=bool(seen))
    end = max(i for i, one in enumerate(encoded.loss_mask) if one) + 1
    start = max(i for i in range(end) if not encoded.loss_mask[i]) + 1
    span = encoded.ids[start:end]
    count = next(n for n in range(1, len(span) + 1) if loaded.encoder.decode(span[:n]).strip() == answer)
    laid = decoding.laid(loaded, encoded.ids[: start + count], [decoding.shown(loaded, one) for one in seen])
    with torch.no_grad():
        logits = loaded.model(**decoding.together(loaded, [laid])).logits[0, -count - 1 : -1]
    scores, tokens = logits.double().log_softmax(-1), torch.tensor(span[:count])
    return Likelihood(scores.gather(-1, tokens[:, None]).sum().item(), bool((scores.argmax(-1) == tokens).all()))


def check(loaded: Loaded, given: list[tuple[list[Message], list[Image], str]]) -> None:
    expected = [learned(loaded, *one) for one in given]
    for batch in (1, 4):
        found = likelihoods(loaded, given, batch)
        assert [one.greedy for one in found] == [one.greedy for one in expected]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=2e-3)


@each_family
def test_every_family_and_batch_gives_what_training_learns(name, folder, pictures) -> None:
    check(load(folder(name)), asked(pictures))


@pytest.mark.parametrize("template", ["v0", "llava_v0", "v1_mmtag", "llama_2", "mistral_instruct", "tokenizer"])
def test_every_template_puts_the_answer_where_training_has_it(template, folder, pictures) -> None:
    check(load(folder("llava"), template=template), asked(pictures))


def test_a_caption_stands_behind_its_picture(folder, pictures) -> None:
    loaded = load(folder("llava"), template="plain")
    check(loaded, [([Message(role="user", text=IMAGE_MARK)], pictures[:1], one) for one in ANSWERS])


def test_nothing_is_not_asked(folder, pictures) -> None:
    loaded = load(folder("llava"))
    assert likelihoods(loaded, []) == []
    with pytest.raises(ValueError, match="an answer without text has no likelihood"):
        likelihoods(loaded, [(asked(pictures)[0][0], pictures[:1], " \n")])
