"""What an engine is given is what one-request `generate` is given; and what is too long is refused before any work."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.each_family import each_family, folders_in
from tests.serve.served import picture, shows
from tests.tiny import GOLDEN
from vistune import generate
from vistune.decoding import Settings
from vistune.generate import Chat
from vistune.models.load import load
from vistune.samples import IMAGE_ID, IMAGE_MARK, Image, Message
from vistune.serve.interface import preparing, wire
from vistune.serve.interface.preparing import Order, prepare, prepare_prompt
from vistune.serve.interface.turns import conversation
from vistune.serve.limits import Limits
from vistune.serve.pictures.media import Media
from vistune.serve.refused import Refused

LIMITS = Limits()
SHOWN = [picture(0), picture(1, (56, 56)), picture(2, (30, 90))]
ANSWER = {"role": "assistant", "content": "A cup."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def loaded(start):
    return load(start)


def order(tokens=8, **more):
    return Order(settings=Settings(max_new_tokens=tokens), **more)


def taken(*pictures):
    media = Media(LIMITS)
    return [media.check(one, "x") for one in pictures]


def turns(*messages):
    return conversation(wire.read(json.dumps({"messages": messages}).encode()), LIMITS)


@each_family
def test_the_prompt_is_that_of_one_request(folders, name):
    model = load(folders(name))
    asked = turns(shows("What is it?", *SHOWN[:2]), ANSWER, shows("And this one?", SHOWN[2]))
    work = prepare(model, asked, taken(*SHOWN), order())
    one = generate.prompt(
        model,
        [
            Message(role="user", text=f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhat is it?"),
            Message(role="assistant", text="A cup."),
            Message(role="user", text=f"{IMAGE_MARK}\nAnd this one?"),
        ],
        [Image(data=data) for data in SHOWN],
    )
    assert work.ids == one.ids and model.image_token_id in work.ids
    assert all(torch.equal(ours.pixels, theirs) for ours, theirs in zip(work.pictures, one.pixels, strict=True))
    assert [one.grid for one in work.pictures if one.grid] == one.grids
    assert len(set(work.digests)) == 3 and work.nbytes > sum(one.pixels.nbytes for one in work.pictures)


def test_as_a_chat_asks(loaded, monkeypatch):
    """`Chat.ask` puts pictures first, as clients' parts do."""
    seen = []
    monkeypatch.setattr(
        generate, "_stream", lambda loaded, made, settings: (seen.append(made.ids), iter(["A cup."]))[1]
    )
    chat = Chat(loaded)
    for text, pictures in (("What is it?", SHOWN[:1]), ("Sure?", []), ("And these?", SHOWN[1:])):
        list(chat.ask(text, [Image(data=data) for data in pictures]))
    asked = turns(
        shows("What is it?", SHOWN[0]),
        ANSWER,
        {"role": "user", "content": "Sure?"},
        ANSWER,
        shows("And these?", *SHOWN[1:]),
    )
    assert prepare(loaded, asked, taken(*SHOWN), order()).ids == seen[-1]
    assert prepare(loaded, asked[:1], taken(SHOWN[0]), order()).ids == seen[0]


def test_text_alone_may_have_a_mark(loaded):
    asked = turns({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {IMAGE_MARK}?"})
    work = prepare(loaded, asked, [], order())
    assert work.ids == generate.prompt(loaded, asked, []).ids and loaded.image_token_id not in work.ids


def test_what_is_too_long_is_known_before_a_picture_is_decoded(loaded, monkeypatch):
    monkeypatch.setattr(preparing, "shown", lambda *_: pytest.fail("decoded"))
    asked = turns(shows("What is it?", SHOWN[0]))
    for context in (10, 40, 66):
        with pytest.raises(Refused, match="context is") as found:
            prepare(loaded, asked, taken(SHOWN[0]), order(8, context=context))
        assert (found.value.status, found.value.code) == (400, "context_length_exceeded")


def test_the_answer_gets_what_the_context_leaves(loaded):
    asked = turns(shows("What is it?", SHOWN[0]))
    length = len(prepare(loaded, asked, taken(SHOWN[0]), order()).ids)
    assert prepare(loaded, asked, taken(SHOWN[0]), order(8, context=length + 8)).settings.max_new_tokens == 8
    fits = prepare(loaded, asked, taken(SHOWN[0]), order(500, context=length + 3, fits=True))
    assert fits.settings.max_new_tokens == 3
    with pytest.raises(Refused, match="context is"):
        prepare(loaded, asked, taken(SHOWN[0]), order(500, context=length, fits=True))


def test_a_book_is_refused_before_it_is_tokenized(loaded, monkeypatch):
    monkeypatch.setattr(loaded.encoder, "encode", lambda *_, **__: pytest.fail("tokenized"))
    with pytest.raises(Refused, match="text alone"):
        prepare(loaded, turns({"role": "user", "content": "the red cup " * 100_000}), [], order(context=2048))


def test_spaces_are_not_counted_by_the_character(loaded):
    asked = turns({"role": "user", "content": " " * 3000 + "Hi"})
    length = len(generate.prompt(loaded, asked, []).ids)
    assert prepare(loaded, asked, [], order(8, context=length + 8)).ids == generate.prompt(loaded, asked, []).ids


def test_no_text_is_taken_for_a_picture(folders):
    model = load(folders("onevision15"))
    token = model.family.image_token
    assert token != IMAGE_MARK
    with pytest.raises(Refused) as found:
        prepare(model, turns(shows(f"What is {token}?", SHOWN[1])), taken(SHOWN[1]), order())
    assert (found.value.status, found.value.code) == (400, "picture_mark")
    work = prepare(model, turns({"role": "user", "content": f"What is {token}?"}), [], order())
    assert model.image_token_id not in work.ids


def test_a_picture_that_breaks_off_is_named(loaded):
    whole = taken(picture(0, (200, 200)))[0]
    broken = type(whole)(
        image=Image(data=(whole.image.data or b"")[:500]), digest=whole.digest, width=whole.width, height=whole.height
    )
    with pytest.raises(Refused) as found:
        prepare(loaded, turns(shows("a", SHOWN[0], SHOWN[1])), [*taken(SHOWN[0]), broken], order(params=("one", "two")))
    assert (found.value.status, found.value.param, found.value.code) == (400, "two", "picture_broken")


def test_a_header_that_lies_is_refused(folders):
    model = load(folders("llava_next"))
    honest = taken(SHOWN[2])[0]
    lies = type(honest)(image=honest.image, digest=honest.digest, width=400, height=20)
    with pytest.raises(Refused, match="header"):
        prepare(model, turns(shows("a", SHOWN[2])), [lies], order())


def test_nothing_is_decoded_for_who_has_gone_or_is_late(loaded):
    told = threading.Event()
    told.set()
    asked = turns(shows("a", SHOWN[0]))
    with pytest.raises(Refused) as found:
        prepare(loaded, asked, taken(SHOWN[0]), order(told=told))
    assert found.value.status == 499
    with pytest.raises(Refused) as found:
        prepare(loaded, asked, taken(SHOWN[0]), order(until=time.monotonic() - 1))
    assert found.value.code == "deadline"


def test_many_threads_at_once(loaded, monkeypatch):
    """An encoder remembers what stands before the first picture, so one thread at a time may use it."""
    asked = [turns({"role": "system", "content": f"Rule {i}."}, shows(f"What {i}?", SHOWN[0])) for i in range(12)]
    alone = [prepare(loaded, one, taken(SHOWN[0]), order()).ids for one in asked]
    encode, inside = loaded.encoder.encode, threading.Lock()

    def watched(*args, **more):
        assert inside.acquire(blocking=False), "two threads in the encoder"
        try:
            time.sleep(0.001)
            return encode(*args, **more)
        finally:
            inside.release()

    monkeypatch.setattr(loaded.encoder, "encode", watched)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: prepare(loaded, one, taken(SHOWN[0]), order()).ids, asked))
    assert found == alone


def test_order_of_turns_is_named(loaded):
    with pytest.raises(Refused) as found:
        prepare(loaded, [Message(role="assistant", text="Hi")], [], order())
    assert (found.value.status, found.value.code) == (400, "role_order")


def golden_prompts():
    cases = json.loads((GOLDEN / "llava" / "chat" / "v1.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if case["compare"] == "strict" and not case["truncated_by_tokenizer"]]


def test_templated_prompts_are_tokenized_as_the_original_does(loaded):
    tried = 0
    for case in golden_prompts():
        prompt, pictures = case["prompt"], case["prompt"].count(IMAGE_MARK) if case["has_image"] else 0
        if not case["has_image"] and IMAGE_MARK in prompt:
            continue  # the original's worker would take it for a picture as well
        work = prepare_prompt(loaded, prompt, taken(*SHOWN[:1]) * pictures, order())
        placed = [loaded.image_token_id] * 16
        wanted = [id for one in case["input_ids"] for id in (placed if one == IMAGE_ID else [one])]
        assert work.ids == wanted, case["id"]
        tried += 1
    assert tried > 25


def test_as_many_marks_as_pictures(loaded):
    for prompt, pictures in (("a", SHOWN[:1]), (IMAGE_MARK, []), (IMAGE_MARK * 2, SHOWN[:1])):
        with pytest.raises(Refused, match="in the prompt"):
            prepare_prompt(loaded, prompt, taken(*pictures), order())
    with pytest.raises(Refused, match="context is"):
        prepare_prompt(loaded, IMAGE_MARK, taken(SHOWN[0]), order(context=20))
