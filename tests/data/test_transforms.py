"""Transforms: what each does to rows, that nothing is lost or doubled, and that marks and pictures agree."""

from __future__ import annotations

import json
import pickle
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import make_language
from vistune.data.tokenize import check_marks, tokenize
from vistune.data.transforms import TRANSFORMS, apply, build, register
from vistune.data.transforms.choose import DROPS, Reason
from vistune.data.transforms.step import Step
from vistune.data.transforms.texts import INSTRUCTIONS
from vistune.samples import Fault, Image, Message, Sample, SampleError

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15" / "labels.json"


@dataclass
class Made:
    """A reader of made-up samples; None is a row that cannot be read."""

    samples: list[Sample | None]
    name: str = "made"
    reads: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Sample:
        self.reads += 1
        sample = self.samples[row]
        if sample is None:
            raise SampleError(Fault(source=self.name, row=row, id="broken", code="row_unreadable", reason="torn"))
        return sample

    def fingerprint(self) -> str:
        return repr(self.samples)


def talk(*texts: str, image: str | None = None, row: int = 0, system: str = "", **notes: Any) -> Sample:
    turns = [Message(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    if image and turns:
        turns[0] = Message(role="user", text=f"<image>\n{turns[0].text}".rstrip("\n"))
    head = [Message(role="system", text=system)] if system else []
    images = (Image(path=image),) if image else ()
    return Sample(id=f"id{row}", source="made", row=row, messages=(*head, *turns), images=images, notes=dict(notes))


def made(*samples: Sample | None) -> Made:
    numbered = [
        None if sample is None else Sample(**{**_fields(sample), "row": row, "id": f"id{row}"})
        for row, sample in enumerate(samples)
    ]
    return Made(numbered)


def _fields(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in ("id", "source", "row", "messages", "images", "notes")}


def texts(sample: Sample) -> list[str]:
    return [message.text for message in sample.messages]


def everything(reader: Any) -> list[Sample]:
    return [reader[row] for row in range(len(reader))]


def step(do: str, **options: Any) -> dict[str, Any]:
    return {"do": do, **options}


# ---- one by one -------------------------------------------------------------------------------------------------


def test_rows_of_a_picture_become_one_conversation_with_one_mark():
    reader = made(
        talk("Who?", "Ann", image="a"),
        talk("Where?", "Rome", image="b"),
        talk("When?", "Now", image="a"),
        talk("Hi", "Ho"),
    )
    merged = everything(apply(reader, [step("merge_by_image")]))
    assert [texts(sample) for sample in merged] == [
        ["<image>\nWho?", "Ann", "When?", "Now"],
        ["<image>\nWhere?", "Rome"],
        ["Hi", "Ho"],
    ]
    assert [sample.row for sample in merged] == [0, 1, 2]
    assert [sample.notes["rows"] for sample in merged] == [(0, 2), (1,), (3,)]
    assert merged[0].images == (Image(path="a"),) and merged[0].id == "id0"


def test_merging_stops_at_the_most_rounds_and_keeps_systems_and_notes_apart():
    reader = made(*[talk(f"q{i}", f"a{i}", image="a", kind=i % 2) for i in range(5)])
    three = everything(apply(reader, [step("merge_by_image", rounds=2)]))
    assert [texts(sample)[::2] for sample in three] == [["<image>\nq0", "q1"], ["<image>\nq2", "q3"], ["<image>\nq4"]]
    apart = everything(apply(reader, [step("merge_by_image", apart="kind")]))
    assert [sample.notes["rows"] for sample in apart] == [(0, 2, 4), (1, 3)]
    two = made(talk("q", "a", image="a", system="Be brief."), talk("q", "a", image="a"))
    assert len(apply(two, [step("merge_by_image")])) == 2


def test_a_mark_that_stood_in_a_later_question_moves_to_the_first():
    odd = Sample(
        id="x",
        source="made",
        row=0,
        messages=(
            Message(role="user", text="Hello"),
            Message(role="assistant", text="Hi"),
            Message(role="user", text="What is this? <image>"),
            Message(role="assistant", text="A cat"),
        ),
        images=(Image(path="a"),),
    )
    (merged,) = everything(apply(made(odd, talk("Why?", "So", image="a")), [step("merge_by_image")]))
    assert texts(merged) == ["<image>\nHello", "Hi", "What is this?", "A cat", "Why?", "So"]


def test_pictures_that_are_bytes_are_known_by_their_bytes():
    def of(data: bytes) -> Sample:
        plain = talk("q", "a", image="x")
        return Sample(**{**_fields(plain), "images": (Image(data=data),)})

    merged = apply(made(of(b"1"), of(b"2"), of(b"1")), [step("merge_by_image")])
    assert [sample.notes["rows"] for sample in everything(merged)] == [(0, 2), (1,)]


def test_faulty_rows_stay_rows_and_name_the_row_of_the_file():
    reader = made(talk("q", "a", image="a"), None, talk("q", "b", image="a"))
    for steps, row in (
        ([step("merge_by_image")], 1),
        ([step("split_turns", rounds=5), step("shorten", words=3)], 1),
        ([step("drop_invalid")], 1),
        ([step("per_image", n=1)], 1),
        ([step("sample", n=3), step("repeat_choices")], 1),
        ([step("prompt", form="short")], 1),
        ([step("caption_to_conversation"), step("cut_answers")], 1),
    ):
        derived = apply(reader, steps)
        faults = {}
        for number in range(len(derived)):
            try:
                assert derived[number].row == number
            except SampleError as error:
                faults[number] = error.fault
        assert list(faults) == [row], steps
        fault = faults[row]
        assert (fault.row, fault.id, fault.code) == (row, "broken", "row_unreadable")
        assert fault.reason == "torn (row 1 of the file)"


def test_what_a_step_cannot_work_on_is_a_fault_that_names_step_and_row():
    reader = made(talk("q", "a", image="a"), talk("q", "b", image="a"))
    derived = apply(reader, [step("sample", n=2), step("prompt", form="letter")])
    with pytest.raises(
        SampleError, match=r"made:1 \(id id1\): row_unreadable: prompt: note choices .*row 1 of the file"
    ):
        derived[1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"do": "merge"}], r"made: there is no transform 'merge'.* Transforms: .*merge_by_image"),
        ([{"n": 3}], r"names no transform"),
        ([step("sample")], r"transform 'sample': option n is missing"),
        ([step("sample", n=0)], r"transform 'sample': option n = 0: .*greater than or equal to 1"),
        ([step("sample", n="3")], r"transform 'sample': option n = '3'"),
        ([step("sample", n=1, sed=1)], r"transform 'sample' has no option sed \(= 1\); it takes n, seed"),
        ([step("prompt", form="long")], r"option form = 'long'"),
        ([step("shorten")], r"transform 'shorten': .*either characters or words"),
        ([step("shorten", words=1, characters=1)], r"either characters or words"),
        ([step("drop_invalid", drops=["ugly"])], r"option drops.0 = 'ugly'"),
        ([step("caption_to_conversation", instructions=[])], r"option instructions = \[\]"),
        ([step("caption_to_conversation", instructions=["<image>\nSay"])], r"is no instruction"),
        ([step("split_turns", rounds=1)], r"option rounds = 1"),
    ],
)
def test_wrong_options_name_transform_option_and_value(steps, message):
    with pytest.raises(ValueError, match=message):
        apply(made(talk("q", "a")), steps)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'sample' is registered twice"):
        register("sample")(type("Other", (Step,), {}))
    assert TRANSFORMS["sample"].do == "sample"


def test_segments_have_fewer_rounds_and_show_the_picture_again():
    rounds = [text for i in range(7) for text in (f"q{i}", f"a{i}")]
    reader = made(talk(*rounds, image="a", system="Be brief."), talk("x", "y"))
    parts = everything(apply(reader, [step("split_turns", rounds=4)]))
    assert [texts(part)[1::2] for part in parts[:3]] == [
        ["<image>\nq0", "q1", "q2"],
        ["<image>\nq3", "q4", "q5"],
        ["<image>\nq6"],
    ]
    assert [part.id for part in parts] == ["id0", "id0/1", "id0/2", "id1"]
    assert all(texts(part)[0] == "Be brief." for part in parts[:3]) and texts(parts[3]) == ["x", "y"]


def test_a_segment_shows_the_pictures_that_were_shown_before():
    two = Sample(
        id="x",
        source="made",
        row=0,
        messages=tuple(
            Message(role=("user", "assistant")[i % 2], text=text)
            for i, text in enumerate(["<image>\nfirst", "a", "second", "b", "<image>\nthird", "c"])
        ),
        images=(Image(path="1"), Image(path="2")),
    )
    parts = everything(apply(made(two), [step("split_turns", rounds=2)]))
    assert [texts(part)[0] for part in parts] == ["<image>\nfirst", "<image>\nsecond", "<image>\n<image>\nthird"]
    assert [len(part.images) for part in parts] == [1, 1, 2]


def test_choices_are_repeated_and_rotated_so_that_the_right_one_stands_everywhere_once():
    choices = ["dog", "cat", "cow", "hen"]
    reader = made(talk("What?", "cow", image="a", choices=choices, answer=2), talk("Why?", "So"))
    plain = everything(apply(reader, [step("repeat_choices")]))
    assert len(plain) == 5 and all(sample.notes["choices"] == choices for sample in plain[:4])
    rotated = everything(apply(reader, [step("repeat_choices", rotate=True), step("sample", n=4)]))
    turned = everything(apply(reader, [step("repeat_choices", rotate=True)]))[:4]
    assert [sample.notes["answer"] for sample in turned] == [0, 1, 2, 3]
    assert all(sample.notes["choices"][sample.notes["answer"]] == "cow" for sample in turned)
    assert {tuple(sample.notes["choices"]) for sample in turned} == {tuple(choices[i:] + choices[:i]) for i in range(4)}
    assert len(rotated) == 4 and len({sample.id for sample in plain}) == 5


def test_aokvqa_as_published_gives_one_conversation_a_picture_and_repetition():
    options = {"choices": ["x", "y", "z", "w"], "answer": 1}
    reader = made(talk("One?", "y", image="a", **options), talk("Two?", "y", image="a", **options))
    steps = [step("repeat_choices"), step("prompt", form="letter"), step("merge_by_image", apart="repeat")]
    merged = everything(apply(reader, steps))
    asked = "\nA. x\nB. y\nC. z\nD. w\nAnswer with the option's letter from the given choices directly."
    assert len(merged) == 4
    assert all(texts(sample) == [f"<image>\nOne?{asked}", "B", f"Two?{asked}", "B"] for sample in merged)
    with pytest.raises(SampleError, match="rotate them before the step 'prompt'"):
        apply(reader, [step("prompt", form="letter"), step("repeat_choices", rotate=True)])[0]


def test_a_sample_is_seeded_ordered_and_never_more_than_there_is(capsys):
    reader = made(*[talk(f"q{i}", "a") for i in range(50)])
    first, again, other = (
        [sample.notes["rows"][0] for sample in everything(apply(reader, [step("sample", n=20, seed=seed)]))]
        for seed in (1, 1, 2)
    )
    assert first == again == sorted(set(first)) and len(first) == 20 and first != other
    assert len(apply(reader, [step("sample", n=60)])) == 50
    assert "there are 50 rows" in capsys.readouterr().err


def test_at_most_n_of_a_picture():
    reader = made(*[talk(f"q{i}", "a", image="abc"[i % 3]) for i in range(30)], talk("t", "u"), None, talk("t", "u"))
    derived = apply(reader, [step("per_image", n=4)])
    kept = [derived[row] for row in range(len(derived)) if row != len(derived) - 2]
    counts = Counter(sample.images[0].path if sample.images else "" for sample in kept)
    assert counts == {"a": 4, "b": 4, "c": 4, "": 2}
    rows = [sample.notes["rows"][0] for sample in kept]
    assert rows == sorted(rows) and derived.left_out == {"more of the same picture": 18}


INVALID = {
    "too_short": [talk("Hello?"), talk()],
    "first_turn": [Sample(id="", source="made", row=0, messages=(Message(role="assistant", text="Hi"),) * 2)],
    "role_order": [Sample(id="", source="made", row=0, messages=(Message(role="user", text="Hi"),) * 2)],
    "empty_turn": [talk("Hello", " \n"), talk("", "Hi")],
    "markup": [talk("Hi", "<div class='markdown prose'>Hello</div>"), talk("a &nbsp; b", "c"), talk("x<br/>y", "z")],
    "page_remains": [
        talk("Hi", "2 / 3\n\nHello"),
        talk("Hi", "Copy1234 chars / 200 words"),
        talk("Hi", "bashCopy code"),
    ],
    "special_tokens": [talk("Hi", "Hello</s>"), talk("<|im_start|>user", "x")],
}
VALID = [
    talk("How do I make a list in HTML?", "So:\n```html\n<ul><li>one</li></ul>\n```\nor `<br>`."),
    talk("Is 1 < 2 and 3 > 2?", "Yes: 1 < 2."),
    talk("Hi", "Hello", "Bye", "See you", system="Be brief."),
    talk("What is 3 / 4?", "0.75"),
    talk("One", "Two", "Three"),
]


def test_invalid_conversations_are_dropped_counted_and_named(capsys):
    samples = [sample for group in INVALID.values() for sample in group]
    reader = made(*VALID, *samples, VALID[0])
    derived = apply(reader, [step("drop_invalid")])
    assert [sample.notes["rows"][0] for sample in everything(derived)] == list(range(len(VALID)))
    wanted = {reason: len(group) for reason, group in INVALID.items()} | {"duplicate": 1}
    assert derived.left_out == wanted
    said = capsys.readouterr().out
    assert f"drop_invalid leaves out {len(samples) + 1} of {len(reader)} rows" in said and "role_order 1" in said


def test_the_same_words_about_another_picture_are_no_duplicate():
    reader = made(*[talk("What is it?", "A cat", image=image) for image in "abab"], talk("What is it?", "A cat"))
    derived = apply(reader, [step("drop_invalid")])
    assert [sample.notes["rows"] for sample in everything(derived)] == [(0,), (1,), (4,)]


def test_what_is_dropped_can_be_chosen():
    reader = made(*VALID, talk("Who made you?", "OpenAI did."), None)
    assert len(apply(reader, [step("drop_invalid", words=["openai"])])) == len(VALID) + 1
    assert len(apply(reader, [step("drop_invalid", drops=["unreadable"])])) == len(VALID) + 1
    only = apply(reader, [step("drop_invalid", drops=["no_answer"])])
    assert len(only) == len(reader) and set(DROPS) >= set(INVALID)
    with pytest.raises(ValueError, match="leaves out every one of its 1 rows"):
        apply(made(talk("Hello?")), [step("drop_invalid")])


def test_text_conversations_are_shortened_at_a_round_and_pictures_left_alone():
    long = ["one two", "three four", "five six", "seven eight", "nine"]
    reader = made(talk(*long), talk(*long[:4], image="a"), talk("a b c d e f", "g h"))
    short = everything(apply(reader, [step("shorten", words=7)]))
    assert [len(sample.messages) for sample in short] == [2, 4, 2]
    assert [len(s.messages) for s in everything(apply(reader, [step("shorten", characters=36)]))] == [5, 4, 2]
    assert [len(s.messages) for s in everything(apply(reader, [step("shorten", characters=35)]))] == [2, 4, 2]


def test_short_answers_are_asked_for_in_the_first_question():
    reader = made(talk("Who?", "ann", image="a"), talk("Where?", "rome", image="a"))
    (sample,) = everything(apply(reader, [step("merge_by_image"), step("prompt", form="short")]))
    assert texts(sample) == [
        "<image>\nWho?\nAnswer the question using a single word or phrase.",
        "Ann",
        "Where?",
        "Rome",
    ]
    (every,) = everything(
        apply(reader, [step("merge_by_image"), step("prompt", form="short", where="every", tidy=False)])
    )
    assert texts(every)[2:] == ["Where?\nAnswer the question using a single word or phrase.", "rome"]


def test_captions_come_with_what_ocr_read():
    reader = made(talk("", "A stop sign", image="a", ocr_tokens=["STOP", "ALL"]), talk("", "A cat", image="b"))
    first, second = (texts(s) for s in everything(apply(reader, [step("prompt", form="caption")])))
    asked = "<image>\nProvide a one-sentence caption for the provided image."
    assert first == [f"{asked}\nReference OCR token: STOP, ALL", "A stop sign"]
    assert second == [asked, "A cat"]
    assert texts(apply(reader, [step("prompt", form="caption", ocr=False)])[0])[0] == asked


def test_boxes_are_shares_of_the_padded_square():
    notes = {"phrase": "yellow flowers", "box": (64, 0, 320, 240), "width": 640, "height": 480}
    reader = made(talk("", "yellow flowers", image="a", **notes))
    region = texts(apply(reader, [step("prompt", form="region")])[0])
    assert region == [
        "<image>\nPlease provide a short description for this region: [0.1, 0.12, 0.5, 0.5].",
        "Yellow flowers.",
    ]
    box = texts(apply(reader, [step("prompt", form="box", square=False)])[0])
    asked = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: yellow flowers."
    assert box == [asked, "[0.1, 0.0, 0.5, 0.5]"]
    many = made(*[talk("", "x", image="a", **notes) for _ in range(40)])
    forms = Counter(
        "short description" in texts(s)[0] for s in everything(apply(many, [step("prompt", form="region_or_box")]))
    )
    assert 8 < forms[True] < 32


def test_captions_become_conversations_with_an_instruction_by_chance():
    reader = made(*[talk("", f"caption {i}", image="a") for i in range(60)])
    told = everything(apply(reader, [step("caption_to_conversation", seed=3)]))
    assert told == everything(apply(reader, [step("caption_to_conversation", seed=3)]))
    asked = [texts(sample)[0] for sample in told]
    assert {text.replace("<image>", "").strip() for text in asked} <= set(INSTRUCTIONS)
    assert len(set(asked)) > 10 and 10 < sum(text.startswith("<image>\n") for text in asked) < 50
    assert [texts(sample)[1] for sample in told] == [f"caption {i}" for i in range(60)]
    own = apply(reader, [step("caption_to_conversation", instructions=["Say it."], mark="after")])
    assert texts(own[0])[0] == "Say it.\n<image>"


CUT = [case for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"] if case["id"].startswith("vqa_trunc_")]


@pytest.mark.parametrize("case", CUT, ids=lambda case: case["id"])
def test_answers_are_cut_as_the_reference_cuts_them(case):
    limit = case["args"]["training_rice_vl_max_answer_length"]
    reader = made(talk("Q?", case["input"]["answers"], image="a"))
    answer = texts(apply(reader, [step("cut_answers", characters=limit)])[0])[1]
    assert f"{answer}<|im_end|>" == case["supervised_spans"][0]
    assert len(CUT) == 4


EVERY_STEP = [
    step("merge_by_image", apart="kind"),
    step("split_turns", rounds=2),
    step("repeat_choices"),
    step("repeat_choices", rotate=True),
    step("sample", n=2),
    step("per_image", n=1),
    step("drop_invalid", drops=["no_answer"]),
    step("shorten", words=2),
    step("cut_answers", characters=2),
    *[step("prompt", form=form) for form in ("short", "letter", "caption", "region", "box", "region_or_box")],
    step("caption_to_conversation"),
]
ODD: list[Any] = [None, 3, -1, 1e400, float("nan"), True, "text", "", [], [1, 2, 3, 4], [None] * 4, {}, ["x", "y"]]
NOTES = ("rows", "rounds", "choices", "answer", "ocr_tokens", "box", "width", "height", "phrase", "repeat", "kind")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(NOTES), st.sampled_from(ODD), max_size=8), min_size=2, max_size=4),
    st.lists(st.sampled_from(EVERY_STEP), min_size=1, max_size=3),
)
def test_odd_notes_of_a_file_give_faults_and_nothing_worse(notes, steps):
    reader = made(*[talk("Who? Where?", "A cat. A dog.", "Why?", "So.", image="a", **each) for each in notes])
    derived = apply(reader, steps)
    for row in range(len(derived)):
        try:
            check_marks(derived[row])
        except SampleError as error:
            assert error.fault.row == row and "of the file)" in error.fault.reason


# ---- what the docs say ------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs" / "mixing.md"


def test_the_docs_name_every_transform_option_and_reason():
    text = DOCS.read_text(encoding="utf-8")
    for name, kind in TRANSFORMS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert [option for option in kind.model_fields if f"`{option}" not in row] == [], name
    assert [reason for reason in get_args(Reason) if f"| `{reason}` |" not in text] == []
    assert "one of eleven of our own" in text and len(INSTRUCTIONS) == 11


def test_the_examples_of_the_docs_are_taken():
    examples = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("{ do = ")]
    steps = [tomllib.loads(f"step = {line}")["step"] for line in examples]
    assert {build(each, "docs").do for each in steps} == set(TRANSFORMS)


# ---- tables, caches, processes ----------------------------------------------------------------------------------


def test_tables_are_kept_and_follow_source_and_options(tmp_path):
    reader = made(*[talk(f"q{i}", "a", image="ab"[i % 2]) for i in range(6)])
    first = apply(reader, [step("merge_by_image")], tmp_path)
    before, reader.reads = everything(first), 0
    again = apply(reader, [step("merge_by_image")], tmp_path)
    assert reader.reads == 0 and again.fingerprint() == first.fingerprint() and everything(again) == before
    assert isinstance(again._table.parents.base, np.memmap) and len(list(tmp_path.iterdir())) == 1
    sent = pickle.loads(pickle.dumps(again))
    assert everything(sent) == before and sent.fingerprint() == first.fingerprint()
    other = apply(reader, [step("merge_by_image", rounds=2)], tmp_path)
    assert other.fingerprint() != first.fingerprint()
    changed = apply(made(talk("q", "a", image="a")), [step("merge_by_image")], tmp_path)
    assert len(changed) == 1 and changed.fingerprint() != first.fingerprint()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_steps_without_a_table_look_at_nothing():
    reader = made(*[talk("q", "a", image="a")] * 5)
    apply(reader, [step("prompt", form="short"), step("shorten", words=5), step("cut_answers"), step("sample", n=2)])
    assert reader.reads == 0
    assert apply(reader, []) is reader


def test_a_table_is_the_same_from_any_number_of_workers():
    reader = made(*[talk(f"q{i}", "a", image=str(i % 999)) for i in range(9000)])
    steps = [step("per_image", n=3), step("merge_by_image")]
    alone, helped = apply(reader, steps), apply(reader, steps, workers=2)
    assert len(alone) == len(helped) == 999
    assert np.array_equal(alone._table.parents, helped._table.parents)


def test_out_of_range_is_an_index_error():
    derived = apply(made(talk("q", "a")), [step("merge_by_image")])
    for row in (-1, 1):
        with pytest.raises(IndexError):
            derived[row]


def test_the_result_is_trained_on_as_any_sample(pictures):
    image = str(pictures / "a.png")
    reader = made(*[talk(f"What is {i}?", f"It is {i}", image=image) for i in range(3)])
    derived = apply(reader, [step("merge_by_image"), step("prompt", form="short")])
    tokens = tokenize(derived[0], make_language(), 512)
    assert len(tokens.images) == 1 and tokens.supervised > 6


# ---- nothing lost, nothing doubled ------------------------------------------------------------------------------

CONVERSATIONS = st.lists(
    st.one_of(
        st.none(),
        st.tuples(st.integers(1, 7), st.sampled_from(["a", "b", "c", None]), st.sampled_from(["", "Be brief."])),
    ),
    min_size=1,
    max_size=12,
)


def of_shape(shapes: list[Any]) -> Made:
    samples: list[Sample | None] = []
    for row, shape in enumerate(shapes):
        if shape is None:
            samples.append(None)
            continue
        rounds, image, system = shape
        said = [text for i in range(rounds) for text in (f"q{row}.{i}", f"a{row}.{i}")]
        choices = {"choices": list("wxyz")[: 1 + row % 4], "answer": 0} if row % 3 else {}
        samples.append(talk(*said, image=image, system=system, **choices))
    return made(*samples)


def rounds_of_rows(reader: Any) -> Counter[tuple[str, str, str]]:
    """(picture, question, answer) of every round, and a faulty row by the row of the file."""
    found: Counter[tuple[str, str, str]] = Counter()
    for row in range(len(reader)):
        try:
            sample = reader[row]
        except SampleError as error:
            found["", "fault", error.fault.reason.removesuffix(")").split("row ")[-1]] += 1
            continue
        check_marks(sample)
        turns = [message.text for message in sample.messages if message.role != "system"]
        picture = sample.images[0].path if sample.images else ""
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            found[picture, question.removeprefix("<image>\n"), answer] += 1
    return found


def faultless(counts: Counter[tuple[str, str, str]]) -> Counter[tuple[str, str, str]]:
    return Counter({key: count for key, count in counts.items() if key[1] != "fault"})


@settings(max_examples=40, deadline=None)
@given(CONVERSATIONS, st.integers(0, 4), st.integers(2, 5))
def test_merging_and_splitting_lose_and_double_nothing(shapes, most, fewer):
    reader = of_shape(shapes)
    before = rounds_of_rows(reader)
    merged = apply(reader, [step("merge_by_image", rounds=most)])
    split = apply(merged, [step("split_turns", rounds=fewer)])
    assert faultless(rounds_of_rows(merged)) == faultless(rounds_of_rows(split)) == faultless(before)
    bad = shapes.count(None)
    for derived in (merged, split):
        counts = rounds_of_rows(derived)
        assert sum(count for key, count in counts.items() if key[1] == "fault") == bad
    for row in range(len(split)):
        try:
            assert sum(message.role == "assistant" for message in split[row].messages) < fewer
        except SampleError:
            assert bad
    pictures = [shape[1:] for shape in shapes if shape is not None and shape[1] is not None]
    if not most:
        alone = sum(shape is None or shape[1] is None for shape in shapes)
        assert len(merged) == len(set(pictures)) + alone


@settings(max_examples=40, deadline=None)
@given(CONVERSATIONS, st.booleans())
def test_repeating_gives_each_row_as_often_as_it_has_options(shapes, rotate):
    reader = of_shape(shapes)
    wanted = Counter({row: max(1, (1 + row % 4) * bool(row % 3)) for row, shape in enumerate(shapes) if shape})
    derived = apply(reader, [step("repeat_choices", rotate=rotate)])
    seen: Counter[int] = Counter()
    for row in range(len(derived)):
        try:
            sample = derived[row]
        except SampleError:
            continue
        seen.update(sample.notes["rows"])
        if "choices" in sample.notes:
            assert sample.notes["choices"][sample.notes["answer"]] == "w"
    assert seen == wanted
