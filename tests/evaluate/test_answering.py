"""Many questions at once: every family answers in batches what it answers alone, and bad questions are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.each_family import each_family, folders_in
from tests.made import noise_in
from vistune import asking, decoding
from vistune.decoding import PATIENCE, Prompt, Settings, decode, marked, prompt
from vistune.evaluate.answering import Local, Said, is_near_tie
from vistune.evaluate.items import Question
from vistune.generate import Chat
from vistune.models.load import load
from vistune.samples import Image, Message
from vistune.speech import stop_ids

TOKENS = 24
SIZES = [(70, 40), (56, 56), (30, 90), (200, 64)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return noise_in(tmp_path_factory.mktemp("pictures"), SIZES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = folders_in(tmp_path_factory.mktemp("families"))
    loaded = {}

    def give(name):
        if name not in loaded:
            loaded[name] = load(folder(name))
        return loaded[name]

    return give


def questions(pictures):
    """Of unequal lengths and kinds: one picture, another, none; and two in the midst of the text."""
    some = [
        Question(id=0, text="How many?", images=(pictures[0],)),
        Question(id=1, text="A much longer question about nothing at all, is it not so, my friend?"),
        Question(id=2, text="Which is it, this one here or the other one there?", images=(pictures[1],)),
        Question(id=3, text="Hello"),
        Question(id=4, text="And this?", images=(pictures[2],)),
        Question(id=5, text="What of this wide one?", images=(pictures[3],)),
        Question(id=6, text="Is <image> like <image>?", images=(pictures[0], pictures[2])),
        Question(id=7, text="How many are there in it?", images=(pictures[0],)),
    ]
    return some


def told(loaded, asked, batch, tokens=TOKENS) -> list[Said]:
    found = dict(Local(loaded, batch).answer(asked, tokens))
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


@each_family
def test_a_batch_says_what_each_question_alone_is_told(name, model, pictures):
    loaded, asked = model(name), questions(pictures)
    alone = told(loaded, asked, 1)
    by_chat = "".join(Chat(loaded).ask(asked[0].text, asked[0].images, max_new_tokens=TOKENS))
    assert alone[0].text == by_chat
    assert len({one.text for one in alone}) > 4 and not any(one.error for one in alone)
    certain = [i for i, one in enumerate(alone) if not is_near_tie(one.margin)]
    assert len(certain) >= len(asked) - 2
    for batch in (3, 8):
        together = told(loaded, asked, batch)
        for i in certain:
            assert (together[i].text, together[i].tokens) == (alone[i].text, alone[i].tokens)
            assert together[i].margin == pytest.approx(alone[i].margin, abs=2e-3)


@each_family
def test_rows_that_have_ended_leave_the_batch_and_the_others_do_not_notice(name, model, pictures, monkeypatch):
    """One id in sixteen ends an answer here, so that answers are of 1 to 64 tokens."""
    loaded, asked = model(name), questions(pictures)
    ends = stop_ids(loaded) | set(range(3, loaded.model.lm_head.weight.shape[0], 16))
    monkeypatch.setattr(decoding, "stop_ids", lambda loaded: ends)
    rows = []
    hook = loaded.model.lm_head.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    prompts = [prompt(loaded, [Message(role="user", text=marked(q.text, q.images))], q.images) for q in asked]
    settings = Settings(max_new_tokens=4 * PATIENCE)
    together = decode(loaded, prompts, settings)
    hook.remove()
    alone = [decode(loaded, [one], settings)[0] for one in prompts]
    lengths = [len(one.ids) for one in alone]
    assert min(lengths) <= PATIENCE < max(lengths), "this test needs rows of unequal length"
    assert rows[0] == len(asked) and rows[-1] < len(asked), "no row left the batch"
    for one, other in zip(together, alone, strict=True):
        if not is_near_tie(other.margin):
            assert one.ids == other.ids


def test_a_picture_asked_about_again_is_read_once_and_the_next_ones_ahead_of_the_model(model, pictures, monkeypatch):
    loaded, read, decoded = model("llava"), [], []
    shown, decode = asking.shown, asking.decode
    monkeypatch.setattr(asking, "shown", lambda loaded, one: (read.append(one.path), shown(loaded, one))[1])

    def counting(loaded, prompts, given):
        decoded.append((len(prompts), len(read)))
        return decode(loaded, prompts, given)

    monkeypatch.setattr(asking, "decode", counting)
    monkeypatch.setattr(asking, "AHEAD", 1)
    asked = [(f"How many {'x' * (i // 4)}?", [pictures[i % 4]]) for i in range(16)]
    answers = list(asking.answers(loaded, asked, 2, 4))
    assert sorted(at for at, _ in answers) == list(range(16)) and len(read) == 4
    assert [size for size, _ in decoded] == [4, 4, 4, 4]
    monkeypatch.setattr(asking, "HELD", 0)
    monkeypatch.setattr(asking, "THREADS", 1)
    read.clear()
    list(asking.answers(loaded, asked, 2, 4))
    assert 4 < len(read) <= 16  # nothing is remembered beyond what waits


def test_long_questions_first_and_in_windows(model, monkeypatch):
    loaded, lengths = model("llava"), []
    decode = asking.decode

    def watching(loaded, prompts, given):
        lengths.append([len(one.ids) for one in prompts])
        return decode(loaded, prompts, given)

    monkeypatch.setattr(asking, "decode", watching)
    monkeypatch.setattr(asking, "WINDOW", 6)
    asked = [("word " * (i * 5 % 11 + 1), []) for i in range(11)]
    assert sorted(at for at, _ in asking.answers(loaded, asked, 1, 2)) == list(range(11))
    assert [len(batch) for batch in lengths] == [2, 2, 2, 2, 2, 1]
    for window in (lengths[:3], lengths[3:]):
        flat = [length for batch in window for length in batch]
        assert flat == sorted(flat, reverse=True)


@each_family
def test_a_question_that_cannot_be_asked_is_named_and_the_others_are(name, model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0].path).read_bytes()[:60])
    asked = [
        Question(id=0, text="This?", images=(Image(path=str(broken)),)),
        Question(id=1, text="This?", images=(pictures[0],)),
        Question(id=2, text="<image> and <image>?", images=(pictures[0],)),
        Question(id=3, text="This?", images=(Image(path=str(tmp_path / "none.png")),)),
    ]
    found = told(model(name), asked, 4, 3)
    assert "broken.png" in found[0].error and "1 images for 2" in found[2].error and "none.png" in found[3].error
    assert found[1].text == told(model(name), asked[1:2], 1, 3)[0].text and not found[1].error
    assert found[1].tokens and found[1].margin is not None and found[0].margin is None


def test_a_question_too_large_for_the_memory_is_said(model, monkeypatch):
    def full(loaded, prompts, given):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(asking, "decode", full)
    with pytest.raises(ValueError, match="out of memory over one question of"):
        list(asking.answers(model("llava"), [("a", []), ("b", [])], 2, 2))


def test_margins_are_the_gap_between_the_two_best(model, pictures):
    loaded = model("llava")
    made = prompt(loaded, [Message(role="user", text=marked("How many?", pictures[:1]))], pictures[:1])
    new = decode(loaded, [made], Settings(max_new_tokens=3))[0]
    gaps = []
    for length in range(len(new.ids)):
        longer = Prompt([*made.ids, *new.ids[:length]], made.pixels, made.grids)
        with torch.no_grad():
            best = loaded.model(**decoding.together(loaded, [longer])).logits[0, -1].topk(2)
        assert best.indices[0] == new.ids[length]
        gaps.append((best.values[0] - best.values[1]).item())
    assert new.margin == pytest.approx(min(gaps), abs=1e-4)
