"""Asking: the stock generate's tokens, streamed and in batches; several turns, several images."""

from __future__ import annotations

from queue import Queue

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from tests.tiny import tiny_language, tiny_vision
from vistune import generate
from vistune.generate import Chat, Settings, Terminal, answer_batch, prompt
from vistune.models.assemble import assemble
from vistune.models.load import load
from vistune.samples import Image, Message


@pytest.fixture(scope="module", params=[("llama", "v1"), ("qwen2", "qwen_2")])
def folder(request, tmp_path_factory):
    language, template = request.param
    path = tmp_path_factory.mktemp(language)
    tiny_vision(path / "vision")
    tiny_language(path / "language", language)
    assemble(path / "vision", path / "language", path / "model", template=template)
    return path / "model"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    made = []
    for i, size in enumerate([(70, 40), (56, 56), (30, 90)]):
        noise = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(path / f"{i}.png")
        made.append(Image(path=str(path / f"{i}.png")))
    return made


def stock_answer(folder, messages, pictures, tokens):
    """Through transformers alone: the folder's own processor, chat template and class."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    opened = [PIL.Image.open(picture.path) for picture in pictures] or None
    asked = processor(text=text, images=opened, return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    new = out[0, asked["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_greedy_answers_are_the_stock_ones(folder, pictures):
    text = "What is there, and how many?"
    content = [{"type": "image"}, {"type": "text", "text": "\n" + text}]
    expected = stock_answer(folder, [{"role": "user", "content": content}], pictures[:1], 12)
    pieces = list(Chat(load(folder)).ask(text, pictures[:1], max_new_tokens=12))
    assert "".join(pieces) == expected
    assert len(expected) > 4 and len(pieces) > 1


def test_several_turns_and_images(folder, pictures):
    talk = Chat(load(folder))
    first = "".join(talk.ask("And this? <image> Or <image>?", pictures[:2], max_new_tokens=6))
    second = "".join(talk.ask("What of this one?", pictures[2:], max_new_tokens=6))
    assert [m.role for m in talk.messages] == ["user", "assistant"] * 2 and len(talk.pictures) == 3
    asked = prompt(talk.loaded, [*talk.messages[:2], talk.messages[2]], pictures)
    assert asked.ids.count(talk.loaded.image_token_id) == 3 * 16
    assert first == talk.messages[1].text and second == talk.messages[3].text


def test_batches_give_what_single_questions_give(folder, pictures):
    loaded = load(folder)
    questions = [("How many?", pictures[:1]), ("A much longer question about nothing at all, is it not?", [])]
    questions += [("Which is it?", pictures[1:]), ("Hello", [])]
    alone = ["".join(Chat(loaded).ask(text, seen, max_new_tokens=8)) for text, seen in questions]
    assert answer_batch(loaded, questions, max_new_tokens=8, batch=3) == alone


def test_sampling_follows_the_seed_and_leaves_the_global_one(folder):
    talk = [Chat(load(folder)) for _ in range(3)]
    state = torch.random.get_rng_state()
    answers = [
        "".join(one.ask("Hi", max_new_tokens=8, temperature=1.5, seed=seed))
        for one, seed in zip(talk, (1, 1, 2), strict=True)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_answer_ends_at_the_templates_stop(folder):
    """A head that says the stop after three tokens: nothing after it is said."""
    loaded = load(folder)
    stop = loaded.tokenizer.convert_tokens_to_ids("</s>" if loaded.template_name == "v1" else "<|im_end|>")
    steps = []

    def force(module, inputs, logits):
        steps.append(1)
        if len(steps) == 4:
            logits[..., stop] = 1e4
        return logits

    loaded.model.lm_head.register_forward_hook(force)
    whole = "".join(Chat(loaded).ask("Hi", max_new_tokens=50))
    assert len(steps) == 4
    assert "</s>" not in whole and "<|im_end|>" not in whole


@pytest.mark.parametrize("spoken", ["<0x24>", "<0x24> <0xF0> <0xF0>", "<0xE4> <0xBD> <0xA0> ▁red <0x24> <0xC3>"])
def test_pieces_join_to_the_whole_answer_also_of_single_bytes(folder, spoken, monkeypatch):
    """Bytes that are no character together are each shown as one that is not: a byte is settled by what follows it."""
    loaded = load(folder)
    if "<0x24>" not in loaded.tokenizer.get_vocab():
        pytest.skip("this tokenizer has no tokens for single bytes")
    ids = loaded.tokenizer.convert_tokens_to_ids(["▁red", *spoken.split(), "▁cup"])
    queue: Queue = Queue()
    for one in (*ids, None):
        queue.put(one)
    whole = loaded.tokenizer.decode(ids).strip()
    assert "".join(generate._readable(loaded, queue)) == whole


def test_closing_the_stream_ends_the_generation(folder):
    loaded, steps = load(folder), []
    loaded.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    talk = Chat(loaded)
    answer = talk.ask("Hi", max_new_tokens=400)
    next(answer)
    answer.close()
    assert len(steps) < 400 and not talk.messages


def test_what_does_not_fit_is_said(folder, pictures, capsys):
    loaded = load(folder)
    with pytest.raises(ValueError, match="1 images for 2"):
        next(Chat(loaded).ask("<image> <image>", pictures[:1]))
    with pytest.raises(ValueError, match="no such file"):
        next(Chat(loaded).ask("this?", [Image(path="/nowhere.png")]))
    with pytest.raises(ValueError, match="1 images for 0"):
        prompt(loaded, [Message(role="user", text="this?")], pictures[:1])
    talk = Terminal(Chat(loaded), Settings(max_new_tokens=3), [])
    talk.hear("/image /nowhere.png")
    assert "no such file" in capsys.readouterr().err
    talk.hear(f"/image {pictures[0].path}")
    talk.hear("What?")
    assert len(talk.chat.pictures) == 1 and not talk.waiting
    talk.hear("/new")
    assert not talk.chat.messages
