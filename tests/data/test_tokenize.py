"""Tokens of a sample against the reference's ids and labels, expansion of images, and what is cut to fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import GOLDEN, IMAGE_TOKEN, make_language, turns
from vistune.chat import encode
from vistune.data.formats import open_source
from vistune.data.tokenize import tokenize
from vistune.samples import IMAGE_ID, NO_LOSS, Image, Message, Sample, SampleError


def sample(*texts: str, images: int = 0, path: str = __file__) -> Sample:
    messages = tuple(Message(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts))
    return Sample(id="x", source="s", row=3, messages=messages, images=(Image(path=path),) * images)


def code_of(error) -> str:
    assert error.value.fault.row == 3
    return error.value.fault.code


@pytest.mark.parametrize(
    ("file", "template"), [("v1", "v1"), ("plain", "plain"), ("qwen_2", "qwen_2"), ("llama_2", "llama_2")]
)
def test_equals_the_reference(write_rows, pictures, file, template):
    """Read from a file, tokenized, and every image folded back into one id: the strict cases, ids and labels."""
    golden = json.loads((GOLDEN / "chat" / f"{file}.json").read_text(encoding="utf-8"))
    # A picture that is named and not shown is a fault here; the reference trains its text.
    # Of texts above the reference's length of 1024 only one that is a single round is cut where the reference cuts.
    cases = [
        case
        for case in golden["cases"]
        if case["compare"] == "strict"
        and "flag_no_token" not in case["id"]
        and (not case["truncated_by_tokenizer"] or "very_long_text_single" in case["id"])
    ]
    rows = [
        {"id": case["id"], "conversations": case["conversations"]} | ({"image": "a.png"} if case["has_image"] else {})
        for case in cases
    ]
    reader = open_source(str(write_rows(rows)), images=str(pictures))
    language = make_language(golden["tokenizer"], template)
    compared = 0
    for row, case in enumerate(cases):
        try:
            tokens = tokenize(reader[row], language, 1024 if case["truncated_by_tokenizer"] else 100_000)
        except SampleError as error:
            assert error.fault.code == "mark_without_image"  # several marks for one picture: the reference drops some
            continue
        labels = np.where(tokens.loss_mask, tokens.ids, NO_LOSS)
        drop = [start + i for start, count in tokens.images for i in range(1, count)]
        ids = np.delete(np.where(tokens.ids == IMAGE_TOKEN, IMAGE_ID, tokens.ids), drop)
        assert ids.tolist() == case["input_ids"], case["id"]
        assert np.delete(labels, drop).tolist() == case["labels"], case["id"]
        compared += 1
    assert compared >= 20


def test_images_become_their_placeholders(language):
    tokens = tokenize(sample("<image>\n<image>\nBoth?", "Yes", "And <image>?", "No", images=3), language, 500)
    assert [count for _, count in tokens.images] == [4, 4, 4]
    for start, count in tokens.images:
        assert (tokens.ids[start : start + count] == IMAGE_TOKEN).all()
        assert not tokens.loss_mask[start : start + count].any()
    assert (tokens.ids == IMAGE_TOKEN).sum() == 12
    assert (tokens.ids.dtype, tokens.loss_mask.dtype, tokens.shortened) == (np.int32, np.bool_, False)


def test_placeholders_follow_the_size_when_the_layout_wants_it(pictures):
    language = make_language(needs_size=True)
    tokens = tokenize(sample("<image>\nWhat?", "Red", images=1, path=str(pictures / "b.jpg")), language, 500)
    assert [count for _, count in tokens.images] == [6]


@pytest.mark.parametrize(("name", "code"), [("nowhere.png", "image_missing"), ("empty.jpg", "image_broken")])
def test_an_image_is_looked_at_but_not_decoded(pictures, language, name, code):
    bad = sample("<image>\nWhat?", "Red", images=1, path=str(pictures / name))
    with pytest.raises(SampleError) as error:
        tokenize(bad, language, 500)
    assert code_of(error) == code and error.value.fault.path == str(pictures / name)
    assert tokenize(bad, language, 500, look=False).images
    torn = sample("<image>\nWhat?", "Red", images=1, path=str(pictures / "torn.jpg"))
    assert tokenize(torn, language, 500).images


def test_a_header_that_is_none_is_a_fault(tmp_path):
    path = tmp_path / "no.jpg"
    path.write_bytes(b"not a picture")
    with pytest.raises(SampleError) as error:
        tokenize(sample("<image>\nWhat?", "Red", images=1, path=str(path)), make_language(needs_size=True), 500)
    assert code_of(error) == "image_broken"


@pytest.mark.parametrize(
    ("texts", "images", "code"),
    [
        (("Hi", ""), 0, "empty_answer"),
        (("Hi", "   "), 0, "empty_answer"),
        (("<image>\nHi", "Here: <image>"), 1, "mark_in_answer"),
        (("Hi", "Hello"), 1, "image_without_mark"),
        (("<image> <image>", "Hello"), 1, "mark_without_image"),
        (("Hi",), 0, "nothing_supervised"),
    ],
)
def test_conversations_that_do_not_fit(language, texts, images, code):
    with pytest.raises(SampleError) as error:
        tokenize(sample(*texts, images=images), language, 500)
    assert code_of(error) == code


def test_roles_out_of_order(language):
    messages = (Message(role="user", text="A"), Message(role="user", text="B"), Message(role="assistant", text="C"))
    with pytest.raises(SampleError) as error:
        tokenize(Sample(id="x", source="s", row=3, messages=messages), language, 500)
    assert code_of(error) == "role_order"


def test_the_plain_template_wants_a_captioned_image():
    with pytest.raises(SampleError) as error:
        tokenize(sample("Hi", "Hello"), make_language(name="plain"), 500)
    assert code_of(error) == "template"


def test_a_long_sample_loses_whole_rounds(language):
    texts = ("<image>\nOne?", "First.", "Two?", "Second.", "And <image>?", "Third.")
    long = sample(*texts, images=2)
    whole = tokenize(long, language, 500)
    two = encode(language.template, language.encoder, long.messages[:4], has_images=True)
    for length in (len(two.ids) + 3, len(whole.ids) - 1):
        tokens = tokenize(long, language, length)
        assert tokens.shortened and len(tokens.images) == 1
        assert tokens.ids.tolist() == whole.ids[: len(two.ids) + 3].tolist()  # an image is 4 placeholders, not 1 id
    assert len(tokenize(long, language, len(two.ids) + 2).ids) < len(two.ids)
    assert not tokenize(long, language, len(whole.ids)).shortened


def test_a_first_round_that_is_too_long_loses_the_end_of_its_answer(language):
    whole = tokenize(sample("Say it.", "word " * 50), language, 500)
    for texts in (("Say it.", "word " * 50), ("Say it.", "word " * 50, "Again?", "No.")):
        tokens = tokenize(sample(*texts), language, 60)
        assert tokens.shortened and tokens.ids.tolist() == whole.ids[:60].tolist()
        assert tokens.supervised == whole.loss_mask[:60].sum() > 0
    with pytest.raises(SampleError) as error:
        tokenize(sample("Say it. " * 50, "Done."), language, 60)
    assert code_of(error) == "nothing_supervised"


def test_an_image_is_never_cut(language):
    long = sample("Before the picture come words.\n<image>", "Red", images=1)
    end = sum(tokenize(long, language, 500).images[0])
    for length in range(1, end):
        with pytest.raises(SampleError) as error:
            tokenize(long, language, length)
        assert code_of(error) == "image_does_not_fit"
    with pytest.raises(SampleError) as error:
        tokenize(long, language, end)
    assert code_of(error) == "nothing_supervised"


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 25), st.integers(0, 2)), min_size=1, max_size=5),
    length=st.integers(1, 250),
    chosen=st.sampled_from([("llama_like", "v1"), ("qwen2_like", "qwen2-vl"), ("qwen2_like", "qwen2-vl-turns")]),
)
def test_what_is_kept_is_a_beginning_with_whole_images(rounds, length, chosen):
    """These templates render each round after the ones before it, so shortening must give a beginning of the whole."""
    texts = [t for asked, said, n in rounds for t in ("<image>" * n + "why " * asked, "so " * said + "end")]
    full = sample(*texts, images=sum(n for _, _, n in rounds))
    whole = tokenize(full, make_language(*chosen), 100_000)
    try:
        tokens = tokenize(full, make_language(*chosen), length)
    except SampleError as error:
        first_image = sum(whole.images[rounds[0][2] - 1]) if rounds[0][2] else 0
        first_answer = int(np.argmax(whole.loss_mask))
        assert error.fault.code == ("image_does_not_fit" if first_image > length else "nothing_supervised")
        assert length <= max(first_image, first_answer)
        return
    assert 0 < len(tokens.ids) <= length
    assert tokens.ids.tolist() == whole.ids[: len(tokens.ids)].tolist()
    assert tokens.loss_mask.tolist() == whole.loss_mask[: len(tokens.ids)].tolist()
    assert tokens.images == whole.images[: len(tokens.images)]
    assert (tokens.ids == IMAGE_TOKEN).sum() == 4 * len(tokens.images)
    assert tokens.supervised > 0 and tokens.shortened == (len(whole.ids) > length)


def test_pictures_in_answers_count_where_the_template_has_them():
    texts = ("Draw <image>", "this: <image> and <image> done", "More", "<image>")
    for name in ("qwen2-vl", "qwen2-vl-turns"):
        language = make_language("qwen2_like", name)
        tokens = tokenize(sample(*texts, images=4), language, 500)
        assert len(tokens.images) == 4 and not tokens.loss_mask[tokens.ids == IMAGE_TOKEN].any()
        learned = language.encoder.decode(tokens.ids[tokens.loss_mask].tolist())
        assert learned == "this:  and  done<|im_end|><|im_end|>"
        for images, code in ((3, "mark_without_image"), (5, "image_without_mark")):
            with pytest.raises(SampleError) as error:
                tokenize(sample(*texts, images=images), language, 500)
            assert code_of(error) == code
        # The answer would be cut in its second picture.
        with pytest.raises(SampleError) as error:
            tokenize(sample(*texts, images=4), language, sum(tokens.images[2]) - 1)
        assert code_of(error) == "image_does_not_fit"
        assert len(tokenize(sample(*texts, images=4), language, sum(tokens.images[2]) + 1).images) == 3
    with pytest.raises(SampleError) as error:
        tokenize(sample("Draw", "<image>", images=1), make_language("qwen2_like", "qwen_2"), 500)
    assert code_of(error) == "image_without_mark"


def test_an_empty_answer_is_when_to_stop():
    language = make_language("qwen2_like", "qwen2-vl")
    tokens = tokenize(sample("Anything to add?", ""), language, 500)
    assert language.encoder.decode(tokens.ids[tokens.loss_mask].tolist()) == "<|im_end|>"
    with pytest.raises(SampleError) as error:
        tokenize(sample("Anything to add?", ""), make_language("qwen2_like", "qwen_2"), 500)
    assert code_of(error) == "empty_answer"


def test_rows_of_a_file_keep_their_turns(write_rows, language):
    reader = open_source(str(write_rows([{"conversations": turns("Hi", "Hello")}])))
    assert tokenize(reader[0], language, 100).supervised > 1
