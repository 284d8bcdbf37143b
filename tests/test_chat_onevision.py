"""LLaVA-OneVision-1.5: token ids, labels and grids of its task encoder, case by case; and its stock chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vistune.chat import ChatError, TextEncoder, chat_template, check_fits, encode, template
from vistune.data.checking.show import labels
from vistune.data.formats import open_source
from vistune.data.packing import best_fit
from vistune.data.tokenize import Language, Tokens, tokenize
from vistune.data.transforms import apply
from vistune.images import image_size
from vistune.native import NativeLayout
from vistune.samples import IMAGE_ID, IMAGE_MARK, NO_LOSS, Image, Message, Sample, SampleError
from vistune.text_encoder import open_encoder

GOLDEN = Path(__file__).parent / "golden" / "onevision15"
PROCESSOR = json.loads((GOLDEN / "processor" / "preprocessor_config.json").read_text())
CASES = {case["id"]: case for case in json.loads((GOLDEN / "labels.json").read_text())["cases"]}
STREAMED = json.loads((GOLDEN / "webdataset" / "expected.json").read_text())
PAD = "<|image_pad|>"
LENGTH = 4096


@cache
def encoder() -> TextEncoder:
    return open_encoder(GOLDEN / "processor", PAD)


@cache
def language(name: str) -> Language:
    """As the reference lays it out: conversations with turns have their pictures capped at 512 pixels."""
    layout = NativeLayout.from_processor(PROCESSOR, image_resolution=512 if name == "qwen2-vl-turns" else None)
    check_fits(template(name), encoder().tokenizer)
    return Language(template(name), encoder(), layout, encoder().tokenizer.convert_tokens_to_ids(PAD))


def messages(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    head = [Message(role="system", text=system)] if system is not None else []
    return (*head, *(Message(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)))


def sample(said: tuple[Message, ...], images: list[str | None] | list[Image]) -> Sample:
    """A null in a row that must have a picture is a picture that is nowhere."""
    found = [one if isinstance(one, Image) else Image(path=str(GOLDEN / one) if one else "") for one in images]
    return Sample(id="x", source="golden", row=0, messages=said, images=tuple(found))


@dataclass
class Rows:
    """A reader of given samples."""

    samples: list[Sample]
    name: str = "golden"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Sample:
        return self.samples[row]

    def fingerprint(self) -> str:
        return ""


def cleaned(case: dict[str, Any], one: Sample) -> list[Sample]:
    """What the reference does with a single question before it trains it: no empty answer, and none too long."""
    most = case["args"].get("training_rice_vl_max_answer_length", 4096)
    steps = [{"do": "drop_invalid", "drops": ["empty_turn"]}, {"do": "cut_answers", "characters": most}]
    reader = apply(Rows([one]), steps)
    if not len(reader):
        raise ValueError("left out")
    return [reader[0]]


def samples(case: dict[str, Any]) -> tuple[str, list[Sample]]:
    """Template and samples that stand for what the reference's task encoder was given. More than one are a pack."""
    given, args = case["input"], case["args"]
    if case["path"].startswith("captioning"):
        return "qwen2-vl-caption", [sample(messages(IMAGE_MARK, given["caption"]), [given["image"]])]
    if case["path"].startswith("multimixqa"):
        said = [Message(role=message["role"], text=message["content"]) for message in given["messages"]]
        system = [] if given["system"] is None else [Message(role="system", text=given["system"])]
        return "qwen2-vl-turns", [sample((*system, *said), given["images"] or [])]
    if case["path"].startswith("packed"):
        name = "qwen2-vl" if "OFFLINE_PACKING_VQA" in case["env"] else "qwen2-vl-caption"
        rows = zip(given["prompts"], given["captions"], given["images"], strict=True)
        return name, [sample(messages(prompt, caption), [image]) for prompt, caption, image in rows]
    if case["path"].startswith("pretrain"):
        name = "qwen2-vl-caption-question" if args.get("add_question_in_pretrain") else "qwen2-vl-caption"
        return name, [sample(messages(given["context"], given["answers"]), [given["image"]])]
    one = sample(messages(given["context"], given["answers"]), [given["image"]])
    return "qwen2-vl", cleaned(case, one) if case["path"].startswith("vqa_sft") else [one]


def labelled(tokens: Tokens) -> list[int]:
    return [id if learned else NO_LOSS for id, learned in zip(tokens.ids.tolist(), tokens.loss_mask, strict=True)]


def ids_and_labels(name: str, parts: list[Sample]) -> tuple[list[int], list[int], list[int]]:
    """Ids and labels of the samples end to end, and where each begins and ends."""
    made = [tokenize(part, language(name), LENGTH) for part in parts]
    ends = [sum(len(one.ids) for one in made[:i]) for i in range(len(made) + 1)]
    return [id for one in made for id in one.ids.tolist()], [id for one in made for id in labelled(one)], ends


def of_status(*status: str) -> list[str]:
    return [name for name, case in CASES.items() if case["status"] in status]


def test_all_cases_are_asked() -> None:
    assert len(CASES) == 52
    assert set(of_status("ok", "reference_wrong", "reference_wrong_semantics", "raises")) == set(CASES)


@pytest.mark.parametrize("id", [name for name in of_status("ok") if name != "vqa_no_image_tag"])
def test_ids_and_labels_are_the_references(id: str) -> None:
    case = CASES[id]
    name, parts = samples(case)
    ids, learned, ends = ids_and_labels(name, parts)
    assert ids == case["token_ids"]
    assert learned == case["labels"]
    assert ends == case.get("cu_lengths", [0, len(ids)])
    grids = [language(name).layout.grid(*image_size(image)) for part in parts for image in part.images]
    assert [list(grid or ()) for grid in grids] == (case["grid_thw"] or [])


def test_a_picture_without_a_place_is_no_matter_of_the_chat() -> None:
    """The reference trains the text and drops the picture; here the row is set aside before it comes that far."""
    case = CASES["vqa_no_image_tag"]
    name, (one,) = samples(case)
    encoded = encode(template(name), encoder(), one.messages, has_images=True)
    assert encoded.ids == case["token_ids"] and labels(encoded) == case["labels"]
    with pytest.raises(SampleError, match="image_without_mark"):
        tokenize(one, language(name), LENGTH)


@pytest.mark.parametrize("id", of_status("reference_wrong", "reference_wrong_semantics"))
def test_where_the_reference_is_wrong(id: str) -> None:
    case = CASES[id]
    name, parts = samples(case)
    ids, learned, _ = ids_and_labels(name, parts)
    if "correct_labels" not in case:  # a last question without an answer is dropped
        assert (
            encoder().decode(ids) == encode(template(name), encoder(), parts[0].messages[:2], has_images=False).prompt
        )
        assert encoder().decode([id for id in learned if id != NO_LOSS]) == "Hello<|im_end|>"
        return
    assert ids == case["token_ids"]
    for position, (id_, label, wanted) in enumerate(zip(ids, learned, case["correct_labels"], strict=True)):
        over_the_border = position in case.get("straddling_token_positions", [])
        assert label == wanted or (over_the_border and label == id_)


@pytest.mark.parametrize("id", [name for name in of_status("raises") if name != "pack_overflow"])
def test_what_the_reference_raises_on(id: str) -> None:
    with pytest.raises(ValueError):
        ids_and_labels(*samples(CASES[id]))


def test_spaces_after_a_full_stop_do_not_save_its_sentence() -> None:
    reader = apply(Rows([sample(messages("Q", "A. B. C"), [])]), [{"do": "cut_answers", "characters": 6}])
    assert reader[0].messages[1].text == "A."


def test_no_pack_overflows() -> None:
    case = CASES["pack_overflow"]
    ids, _, ends = ids_and_labels(*samples(case))
    most = case["args"]["seq_length"]
    lengths = [end - start for start, end in pairwise(ends)]
    assert len(ids) > most >= max(lengths)
    packs = best_fit(np.array(lengths), most, np.zeros(len(lengths), np.int64), 0)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= most for pack in packs)


@cache
def on_disk(dataset: str) -> dict[str, list[Sample]]:
    """Samples by the key of what they were written as; the members of a pack, which are samples here, in order."""
    reader = open_source(str(GOLDEN / "webdataset" / dataset), format="energon")
    found: dict[str, list[Sample]] = {}
    for one in (reader[row] for row in range(len(reader))):
        found.setdefault(one.id.rpartition("/")[2].partition("#")[0], []).append(one)
    return found


@pytest.mark.parametrize(
    ("dataset", "name", "encoded"),
    [
        ("packed", "qwen2-vl-caption", "encoded_caption_mode"),
        ("packed", "qwen2-vl", "encoded_vqa_mode"),
        ("mixqa", "qwen2-vl-turns", "encoded"),
    ],
)
def test_what_lies_on_disk(dataset: str, name: str, encoded: str) -> None:
    assert set(on_disk(dataset)) == set(STREAMED[dataset]) and len(on_disk(dataset)) == 12
    for key, parts in on_disk(dataset).items():
        wanted = STREAMED[dataset][key][encoded]
        ids, learned, ends = ids_and_labels(name, parts)
        assert (ids, learned) == (wanted["tokens"], wanted["labels"]), key
        assert ends == wanted.get("cu_lengths", [0, len(ids)])
        grids = [language(name).layout.grid(*image_size(image)) for part in parts for image in part.images]
        assert [list(grid or ()) for grid in grids] == (wanted["image_grid_thw"] or [])


def stock(prompt: str, tokens: list[int]) -> list[int]:
    """What the stock processor does with a rendered prompt: each placeholder becomes as many as its image takes."""
    counts = iter(tokens)
    expanded = re.sub(re.escape(PAD), lambda _: PAD * next(counts), prompt)
    return encoder().tokenizer(expanded, add_special_tokens=False)["input_ids"]


TALKS = [
    (messages("<image>\nWhat?", "A cat."), 1),
    (messages("Hi", "Hello", "see <image> and <image>", "B", system="Be brief."), 2),
    (messages("Draw", "this: <image> done", "More<image>", "No"), 2),
    (messages("Q", "A", "Q2", ""), 0),
]


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2-vl-turns"])
@pytest.mark.parametrize(("talk", "images"), TALKS)
@pytest.mark.parametrize("open_turn", [False, True])
def test_the_exported_template_gives_these_ids(
    name: str, talk: tuple[Message, ...], images: int, open_turn: bool
) -> None:
    said = talk[:-1] if open_turn else talk
    encoded = encode(template(name), encoder(), said, has_images=bool(images), open_turn=open_turn)
    chat = [{"role": message.role, "content": message.text} for message in said]
    jinja = chat_template(template(name), encoder().tokenizer, PAD)
    prompts, spans = render_jinja_template(
        [chat], chat_template=jinja, add_generation_prompt=open_turn, return_assistant_tokens_mask=True
    )
    counts = [3, 5][: encoded.ids.count(IMAGE_ID)]
    shown = iter(counts)
    pad = encoder().tokenizer.convert_tokens_to_ids(PAD)
    wanted = [token for id in encoded.ids for token in ([pad] * next(shown) if id == IMAGE_ID else [id])]
    assert stock(prompts[0], counts) == wanted
    learned = "".join(prompts[0][start:end] for start, end in spans[0])
    assert learned == encoder().decode([id for id in labels(encoded) if id != NO_LOSS])


@pytest.mark.parametrize(("talk", "images"), TALKS[:2])
def test_asking_is_what_the_published_template_writes(talk: tuple[Message, ...], images: int) -> None:
    published = (GOLDEN / "processor" / "chat_template.jinja").read_text(encoding="utf-8")
    chat = [
        {"role": message.role, "content": message.text.replace(IMAGE_MARK, f"<|vision_start|>{PAD}<|vision_end|>")}
        for message in talk[:-1]
    ]
    wanted = render_jinja_template([chat], chat_template=published, add_generation_prompt=True)[0][0]
    encoded = encode(template("qwen2-vl"), encoder(), talk[:-1], has_images=bool(images), open_turn=True)
    assert encoded.prompt.replace(IMAGE_MARK, PAD) == wanted


@pytest.mark.parametrize("name", ["qwen2-vl-caption", "qwen2-vl-caption-question"])
def test_exported_captions(name: str) -> None:
    said = messages("<image>\nWhat?", "A cat.")
    encoded = encode(template(name), encoder(), said, has_images=True)
    chat = [{"role": message.role, "content": message.text} for message in said]
    jinja = chat_template(template(name), encoder().tokenizer, PAD)
    prompts, spans = render_jinja_template([chat], chat_template=jinja, return_assistant_tokens_mask=True)
    assert prompts[0] == encoded.prompt.replace(IMAGE_MARK, PAD)
    learned = "".join(prompts[0][start:end] for start, end in spans[0])
    assert learned == encoder().decode([id for id in labels(encoded) if id != NO_LOSS])


def test_what_captions_refuse() -> None:
    for said, code in (
        (messages("What?", "A cat."), "image_without_mark"),
        (messages("<image>", "see <image>"), "mark_in_answer"),
        (messages("<image>", "A", "<image>", "B"), "template"),
    ):
        with pytest.raises(ChatError) as caught:
            encode(template("qwen2-vl-caption"), encoder(), said, has_images=True)
        assert caught.value.code == code


def test_no_token_spans_question_and_answer_when_they_are_apart() -> None:
    said = messages("Q", "\n\nNo")
    together, apart = (
        encode(template(name), encoder(), said, has_images=False) for name in ("qwen2-vl", "qwen2-vl-turns")
    )
    assert together.prompt == apart.prompt and together.ids != apart.ids
    assert encoder().decode(together.ids) == encoder().decode(apart.ids) == apart.prompt
    assert encoder().decode([id for id in labels(apart) if id != NO_LOSS]) == "\n\nNo<|im_end|>"
    # The token that spans both is learned as it is, the template's line end with it.
    assert encoder().decode([id for id in labels(together) if id != NO_LOSS]) == "\n\n\nNo<|im_end|>"
