"""Chat templates against the reference's prompts, token ids and labels, and against the stock processor."""

from __future__ import annotations

import json
import pickle
import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from vistune.chat import (
    TEMPLATES,
    ChatError,
    Segment,
    TextEncoder,
    chat_template,
    check_fits,
    encode,
    render,
    supervised_text,
    template,
)
from vistune.samples import IMAGE_ID, IMAGE_MARK, NO_LOSS, Message
from vistune.templates import jinja

GOLDEN = Path(__file__).parent / "golden" / "llava"
FILES = sorted(path.stem for path in (GOLDEN / "chat").glob("*.json"))
CHATS = sorted(name for name, each in TEMPLATES.items() if not (each.caption or each.own))
ROLES = {"human": "user", "gpt": "assistant"}


@cache
def golden(name: str) -> dict:
    return json.loads((GOLDEN / "chat" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def load_tokenizer(name: str, legacy: bool = False, image: bool = False):
    kwargs = {"legacy": True} if legacy else {}
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / name, **kwargs)
    if image:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    return tokenizer


@cache
def load_encoder(name: str, legacy: bool = False, image: bool = False) -> TextEncoder:
    return TextEncoder(load_tokenizer(name, legacy, image))


def encoder_of(file: dict, image: bool = False) -> TextEncoder:
    return load_encoder(file["tokenizer"], bool(file["tokenizer_legacy"]) and "llama" in file["tokenizer"], image)


def messages_of(case: dict) -> list[Message]:
    return [Message(role=ROLES.get(turn["from"], turn["from"]), text=turn["value"]) for turn in case["conversations"]]


def cases(*rules: str) -> list:
    return [
        pytest.param(name, number, id=f"{name}-{case['id']}")
        for name in FILES
        for number, case in enumerate(golden(name)["cases"])
        if case["compare"] in rules
    ]


def cut(file: dict, case: dict, ids: list[int]) -> list[int]:
    """The reference's tokenizer cuts text-only samples; what it appends to every text counts towards the length."""
    length = file["model_max_length"]
    if not case["truncated_by_tokenizer"]:
        return ids
    return [*ids[: length - 1], file["eos_token_id"]] if file["tokenizer"] == "mpt_like_eos" else ids[:length]


def without_lead(spans: list[str], wanted: list[str]) -> list[str]:
    """One space of the template may stand before an answer."""
    return [span[1:] if span == " " + want else span for span, want in zip(spans, wanted, strict=True)]


@pytest.mark.parametrize("image_token", [False, True], ids=["plain", "image-token"])
@pytest.mark.parametrize(("name", "number"), cases("strict", "supervised_text", "prompt_and_ids"))
def test_reference(name: str, number: int, image_token: bool) -> None:
    file, case = golden(name), golden(name)["cases"][number]
    encoder = encoder_of(file, image_token)
    encoded = encode(template(file["template"]), encoder, messages_of(case), has_images=case["has_image"])
    assert encoded.prompt == case["prompt"]
    assert cut(file, case, encoded.ids) == case["input_ids"]
    if case["compare"] == "strict":
        labels = [id if learned else NO_LOSS for id, learned in zip(encoded.ids, encoded.loss_mask, strict=True)]
        assert labels[: len(case["labels"])] == case["labels"]
    if not case["truncated_by_tokenizer"]:
        spans = supervised_text(encoded, encoder)
        assert without_lead(spans, case["supervised_text"]) == case["supervised_text"]


@pytest.mark.parametrize(("name", "number"), cases("informational"))
def test_degenerate_is_refused_or_right(name: str, number: int) -> None:
    file, case = golden(name), golden(name)["cases"][number]
    encoder = encoder_of(file)
    try:
        encoded = encode(template(file["template"]), encoder, messages_of(case), has_images=case["has_image"])
    except ChatError:
        return
    spans = supervised_text(encoded, encoder)
    assert without_lead(spans, case["supervised_text"]) == case["supervised_text"]


@pytest.mark.parametrize(("name", "number"), cases("error"))
def test_what_the_reference_raises_on(name: str, number: int) -> None:
    file, case = golden(name), golden(name)["cases"][number]
    messages = messages_of(case)
    if messages[0].role == "system":  # ours: it replaces the template's system text
        encoded = encode(template(file["template"]), encoder_of(file), messages, has_images=case["has_image"])
        assert messages[0].text in encoded.prompt
        spans = supervised_text(encoded, encoder_of(file))
        assert [span.strip() for span in spans] == [messages[-1].text + file["stop_text"].rstrip("\n")]
        return
    with pytest.raises(ChatError):
        encode(template(file["template"]), encoder_of(file), messages, has_images=case["has_image"])


def stock_processor(tokenizer, jinja: str, patch_size: int = 14):
    image_processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=jinja,
    )


def spaced(prompt: str, space: str) -> str:
    """What the exported template writes for a tokenizer that prefixes text: see `chat_template`."""
    if space == "first":
        return re.sub(f"{IMAGE_MARK}(?=.)", f"{IMAGE_MARK} ", prompt, flags=re.DOTALL)
    return prompt.replace(f"{IMAGE_MARK} ", f"{IMAGE_MARK}  ") if space == "each" else prompt


def as_parts(text: str) -> list[dict]:
    parts: list[dict] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def processor_cases() -> list:
    return [
        pytest.param(name, number, id=f"{name}-{golden(name)['cases'][number]['id']}")
        for name, number in (param.values for param in cases("strict", "supervised_text", "prompt_and_ids"))
        if name != "mpt_eos" and (golden(name)["cases"][number]["has_image"] or number < 10)
    ]


@pytest.mark.parametrize(("name", "number"), processor_cases())
def test_stock_processor_gives_the_same_ids(name: str, number: int) -> None:
    file, case = golden(name), golden(name)["cases"][number]
    encoder = encoder_of(file, image=True)
    messages = messages_of(case)
    chosen = template(file["template"])
    processor = stock_processor(encoder.tokenizer, chat_template(chosen, encoder.tokenizer))
    for open_turn in (False, True):
        said = messages[:-1] if open_turn else messages
        encoded = encode(chosen, encoder, said, has_images=case["has_image"], open_turn=open_turn)
        prompts = {
            processor.apply_chat_template(
                [{"role": message.role, "content": content(message.text)} for message in said],
                add_generation_prompt=open_turn,
            )
            for content in (str, as_parts)
        }
        assert prompts == {spaced(encoded.prompt, encoder.space)}
        images = [Image.new("RGB", (60, 70))] * encoded.ids.count(IMAGE_ID)
        got = processor(text=prompts.pop(), images=images or None)["input_ids"][0]
        assert got == [
            token for id in encoded.ids for token in ([processor.image_token_id] * 16 if id == IMAGE_ID else [id])
        ]


@pytest.mark.parametrize("name", CHATS)
def test_exported_template_marks_what_is_learned(name: str) -> None:
    messages = talk("  <image> One?", "A.", "Two?", " B \n", "Three?", "C")
    chosen = template(name)
    chat = [{"role": message.role, "content": message.text} for message in messages]
    prompts, spans = render_jinja_template(
        [chat], chat_template=jinja(chosen, "none"), return_assistant_tokens_mask=True
    )
    segments = render(chosen, messages, has_images=True)
    assert prompts[0] == "".join(segment.text for segment in segments)
    assert [prompts[0][a:b] for a, b in spans[0]] == [segment.text for segment in segments if segment.supervised]


@pytest.mark.parametrize("name", CHATS)
def test_open_turn_is_the_beginning_of_what_was_trained(name: str) -> None:
    chosen = template(name)
    messages = talk("<image>\nOne?", "A.", "Two?", "B")
    trained = "".join(segment.text for segment in render(chosen, messages, has_images=True))
    asked = "".join(segment.text for segment in render(chosen, messages[:3], has_images=True, open_turn=True))
    rest = trained.removeprefix(asked)
    assert rest == chosen.answer_lead + "B" + chosen.stop + chosen.end
    assert not asked.endswith(" ")  # a space here would be a token that training never saw alone


def test_caption_generation_is_the_image_alone() -> None:
    assert render(template("plain"), talk("<image>\nDescribe."), has_images=True, open_turn=True) == [
        Segment(IMAGE_MARK, False)
    ]


def talk(*texts: str, system: str | None = None) -> list[Message]:
    head = [Message(role="system", text=system)] if system is not None else []
    return head + [Message(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]


def prompt_of(name: str, messages: list[Message], has_images: bool = True, **more) -> str:
    return "".join(segment.text for segment in render(template(name), messages, has_images=has_images, **more))


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("<image>\nQ", "<image>\nQ"),
        ("a <image> b", "<image>\na  b"),
        ("Q<image>", "<image>\nQ"),
        ("<image><image>Q", "<image>\n<image>\nQ"),
        ("first <image> then <image>, which?", "first\n<image>\nthen\n<image>\n, which?"),
    ],
)
def test_marks_in_a_question(question: str, shown: str) -> None:
    assert f"USER: {shown} ASSISTANT: A" in prompt_of("v1", talk(question, "A"))
    tagged = shown.replace("<image>", "<Image><image></Image>")
    assert f"USER: {tagged} ASSISTANT: A" in prompt_of("v1_mmtag", talk(question, "A"))


def test_images_stay_where_they_are_in_qwen2_vl() -> None:
    seen = prompt_of("qwen2-vl", talk("see <image> here", "A", "and<image>", "B"))
    assert (
        "user\nsee <|vision_start|><image><|vision_end|> here<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n" in seen
    )
    assert seen.endswith("and<|vision_start|><image><|vision_end|><|im_end|>\n<|im_start|>assistant\nB<|im_end|>")


@pytest.mark.parametrize(
    ("code", "messages", "more"),
    [
        ("mark_in_answer", talk("<image>Q", "see <image>"), {}),
        ("template", talk("Q", "A", system="<image>"), {}),
        ("empty_answer", talk("<image>Q", " \n"), {}),
        ("empty_answer", talk("Q", "", "<image>Q", "A"), {}),
        ("role_order", [Message(role="user", text="a"), Message(role="user", text="b")], {}),
        ("role_order", [*talk("a", "b"), Message(role="system", text="c")], {}),
        ("role_order", talk("<image>", "A", "and <image>"), {}),
        ("role_order", talk("<image>", "A"), {"open_turn": True}),
        ("role_order", [], {"open_turn": True}),
        ("nothing_supervised", talk("Q"), {}),
        ("nothing_supervised", [], {}),
    ],
)
@pytest.mark.parametrize("name", ["v1", "qwen_2", "llama_2", "llava_v0", "plain"])
def test_what_does_not_fit(name: str, code: str, messages: list[Message], more: dict) -> None:
    with pytest.raises(ChatError) as caught:
        render(template(name), messages, has_images=True, **more)
    assert caught.value.code == code
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.code, str(copy)) == (code, str(caught.value))


def test_a_last_question_is_dropped_for_training_only() -> None:
    assert prompt_of("v1", talk("Q", "A", "open"), False) == prompt_of("v1", talk("Q", "A"), False)
    assert prompt_of("v1", talk("Q", "A", "open"), False, open_turn=True).endswith("A</s>USER: open ASSISTANT:")
    assert prompt_of("v1", talk("Q", ""), open_turn=True) == prompt_of("v1", talk("Q"), open_turn=True)


def test_the_mark_is_plain_text_without_images() -> None:
    encoder = load_encoder("llama_like", image=True)
    id_of_mark = encoder.tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    encoded = encode(template("v1"), encoder, talk("What is <image>?", "A tag: <image>."), has_images=False)
    assert IMAGE_ID not in encoded.ids and id_of_mark not in encoded.ids
    assert supervised_text(encoded, encoder) == ["A tag: <image>.</s>"]


def test_the_models_placeholder_is_never_made_from_text() -> None:
    tokenizer = load_tokenizer("qwen2_like")
    encoder = TextEncoder(tokenizer, placeholder="<|endoftext|>")
    encoded = encode(template("qwen_2"), encoder, talk("Q <|endoftext|>", "<image> A"), has_images=False)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") not in encoded.ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encoded.ids
    assert encoder.decode(encoded.ids) == encoded.prompt


words = st.text(st.sampled_from("ab Z1.,\n\t<>|é图😀▁  "), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3),
    st.sampled_from(["v1", "llama_2", "mpt", "qwen_2", "qwen2-vl", "qwen2-vl-turns", "llava_v0", "chatml_direct"]),
    st.booleans(),
)
def test_exactly_the_answers_are_learned(talks: list[tuple[str, str]], name: str, image: bool) -> None:
    chosen = template(name)
    encoder = load_encoder("llama_like" if chosen.stop in (" </s>", "</s>", "\n###") else "qwen2_like")
    texts = [text for pair in talks for text in pair]
    texts[0] = IMAGE_MARK * image + texts[0]
    encoded = encode(chosen, encoder, talk(*texts), has_images=image)
    spans = supervised_text(encoded, encoder)
    wanted = [unicodedata.normalize("NFC", answer + chosen.stop).replace("▁", " ") for _, answer in talks]
    spans = [unicodedata.normalize("NFC", span).replace("▁", " ") for span in spans]
    assert encoded.ids.count(IMAGE_ID) == image
    for span, want in zip(spans, wanted, strict=True):
        # A token over the border may bring a little of the template: its newline or space, never more.
        assert span.endswith(want)
        assert span.removesuffix(want) in ("", *(() if chosen.apart else (" ", "\n")))


def with_template(name: str, own: str | None, image: bool = False):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / name)
    if image:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = own
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for p in m['content'] if p['type'] == 'image' %}<image>\n"
    "{% endfor %}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize(("own", "tail"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")])
def test_the_tokenizers_own_template(own: str, tail: str) -> None:
    encoder = TextEncoder(with_template("qwen2_like", own))
    messages = talk("<image>One?", "A.", "Two?", "B", system="S")
    encoded = encode(template("tokenizer"), encoder, messages, has_images=True)
    assert supervised_text(encoded, encoder) == ["A." + tail, "B" + tail]
    assert encoded.prompt.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nOne?<|im_end|>\n")
    assert encoded.ids.count(IMAGE_ID) == 1
    asked = encode(template("tokenizer"), encoder, messages[:-1], has_images=True, open_turn=True)
    assert encoded.prompt.startswith(asked.prompt) and asked.prompt.endswith("assistant\n")


def test_own_template_that_rewrites_earlier_turns_is_refused() -> None:
    encoder = TextEncoder(with_template("qwen2_like", FORGETS))
    assert encode(template("tokenizer"), encoder, talk("Q", "A"), has_images=False).ids
    with pytest.raises(ChatError, match="renders turn 1 differently"):
        encode(template("tokenizer"), encoder, talk("Q", "A", "Q", "A"), has_images=False)
    with pytest.raises(ValueError, match="has no chat template"):
        check_fits(template("tokenizer"), with_template("qwen2_like", None))


def test_own_template_of_a_processor_gives_the_processors_ids() -> None:
    tokenizer = with_template("llama_like", PARTS, image=True)
    processor = stock_processor(tokenizer, PARTS)
    encoder = TextEncoder(tokenizer)
    encoded = encode(template("tokenizer"), encoder, talk("<image>Which cup?"), has_images=True, open_turn=True)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which cup?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    got = processor(text=prompt, images=[Image.new("RGB", (60, 70))])["input_ids"][0]
    assert encoded.prompt == prompt
    assert [i for i in encoded.ids if i != IMAGE_ID] == [i for i in got if i != processor.image_token_id]


def test_check_fits() -> None:
    check_fits(template("v1"), load_tokenizer("llama_like"))
    check_fits(template("qwen_2"), load_tokenizer("qwen2_like"))
    check_fits(template("plain"), load_tokenizer("qwen2_like"))
    with pytest.raises(ValueError, match=r"'v1' needs '</s>' as one token.*qwen2_like"):
        check_fits(template("v1"), load_tokenizer("qwen2_like"))
    with pytest.raises(ValueError, match=r"'qwen_2' needs '<\|im_start\|>'"):
        check_fits(template("qwen_2"), load_tokenizer("llama_like"))
    with pytest.raises(ValueError, match="there is no 'v2'"):
        template("v2")
