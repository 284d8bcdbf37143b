"""The recipe of the published mixture: its counts, its rules, and that small sources go through it from end to end."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from test_annotations import (
    GQA,
    IMAGE_DATA,
    INSTANCES,
    OCRVQA,
    REFS,
    REGIONS,
    TEXTCAPS,
    VQA_ANNOTATIONS,
    VQA_QUESTIONS,
)

from tests.data.small import make_language
from vistune.chat import encode
from vistune.data.formats import FORMATS, open_source
from vistune.data.tokenize import check_marks
from vistune.data.transforms import TRANSFORMS, apply
from vistune.recipe import Recipe, Source, dump, read
from vistune.samples import Sample

RECIPES = Path(__file__).parents[2] / "recipes" / "llava_1_5"
PUBLISHED = {
    "llava_instruct": 157_712,
    "sharegpt": 40_688,
    "vqav2": 82_783,
    "gqa": 72_140,
    "okvqa": 8_998,
    "ocrvqa": 80_000,
    "aokvqa": 66_160,
    "textcaps": 21_953,
    "refcoco": 48_447,
    "visual_genome": 86_417,
}
AOKVQA = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": str(number),
        "question": f"What is number {number}?",
        "choices": ["one", "two", "three", "four"],
        "correct_choice_idx": number,
        "direct_answers": ["one"],
        "difficult_direct_answer": False,
        "rationales": ["It is."],
    }
    for number in range(2)
]
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SEEN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus"}]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read(RECIPES / "mix665k.toml")


@pytest.fixture
def readers(recipe, tmp_path, monkeypatch) -> dict[str, Any]:
    """The recipe's sources, made up: a few rows each, at the paths that it names."""
    monkeypatch.chdir(tmp_path)
    sources = {source.name: source for source in recipe.data.sources}
    ocr = {"data": [{"image_id": "b4c4d2ad3d4f0e0a", "ocr_tokens": ["CATS"], "ocr_info": []}]}
    sizes = [IMAGE_DATA[0] | {"image_id": number, "url": f"https://x/VG_100K/{number}.jpg"} for number in (1, 3)]
    contents: dict[str, Any] = {
        sources["llava_instruct"].path: [{"id": "0", "image": "1.jpg", "conversations": SEEN}],
        sources["sharegpt"].path: [{"id": "a", "conversations": TALK}, {"id": "b", "conversations": TALK[:1]}],
        sources["vqav2"].path: VQA_QUESTIONS,
        sources["vqav2"].options["annotations"]: VQA_ANNOTATIONS,
        sources["gqa"].path: GQA,
        sources["okvqa"].path: VQA_QUESTIONS,
        sources["okvqa"].options["annotations"]: VQA_ANNOTATIONS,
        sources["ocrvqa"].path: {key: row for key, row in OCRVQA.items() if key != "B00"},
        sources["aokvqa"].path: AOKVQA,
        sources["textcaps"].path: TEXTCAPS,
        sources["textcaps"].options["ocr"]: ocr,
        sources["refcoco"].path: None,
        "playground/data/refer/refcoco/instances.json": INSTANCES,
        "playground/data/refer/refcocog/instances.json": INSTANCES,
        sources["visual_genome"].path: REGIONS,
        sources["visual_genome"].options["image_data"]: sizes,
        "playground/data/coco/train2017/none.json": {},
    }
    for path, content in contents.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, content)) if path.endswith(".jsonl") else json.dumps(content)
        Path(path).write_text(text, encoding="utf-8")
    for path in (sources["refcoco"].path, *sources["refcoco"].options["also"]):
        Path(path).write_bytes(pickle.dumps([*REFS[:1] * 6], 2))

    def opened(source: Source) -> Any:
        cache = tmp_path / "cache"
        reader = open_source(source.path, source.format, source.images, source.name, cache, source.options)
        return apply(reader, source.transforms, cache)

    return {name: opened(source) for name, source in sources.items()}


def samples_of(reader: Any) -> list[Sample]:
    return [reader[row] for row in range(len(reader))]


def texts(sample: Sample) -> list[str]:
    return [message.text for message in sample.messages]


def test_the_counts_are_the_published_ones(recipe):
    assert {source.name: source.expect for source in recipe.data.sources} == PUBLISHED
    assert sum(PUBLISHED.values()) == 665_298
    assert {source.format for source in recipe.data.sources} <= set(FORMATS)
    assert {step["do"] for source in recipe.data.sources for step in source.transforms} <= set(TRANSFORMS)


def test_all_but_the_data_is_the_second_stage(recipe, tmp_path):
    other = read(RECIPES / "7b_instruct.toml")
    ours, theirs = recipe.model_dump(), other.model_dump()
    for tree in (ours, theirs):
        tree["data"].pop("sources")
        tree.pop("name"), tree.pop("run")
    assert ours == theirs
    (tmp_path / "again.toml").write_text(dump(recipe), encoding="utf-8")
    assert read(tmp_path / "again.toml").data == recipe.data


def test_every_source_gives_what_the_rules_say(readers):
    counts = {name: len(reader) for name, reader in readers.items()}
    assert counts == {
        "llava_instruct": 1,
        "sharegpt": 1,  # one of two is invalid
        "vqav2": 2,  # three questions about two pictures
        "gqa": 2,
        "okvqa": 2,
        "ocrvqa": 1,  # of split 1
        "aokvqa": 4,  # two questions about one picture, four options
        "textcaps": 1,  # two captions of one picture
        "refcoco": 4,  # twelve expressions of one picture, in each of two sets
        "visual_genome": 2,
    }
    template, encoder = make_language().template, make_language().encoder
    for name, reader in readers.items():
        for sample in samples_of(reader):
            check_marks(sample)
            assert sample.source == name and len(sample.images) == (name != "sharegpt")
            assert any(encode(template, encoder, sample.messages, has_images=bool(sample.images)).loss_mask)


def test_the_prompts_are_the_published_ones(readers):
    short = "\nAnswer the question using a single word or phrase."
    first, _ = samples_of(readers["vqav2"])
    assert texts(first) == [
        f"<image>\nWhat is this photo taken looking through?{short}",
        "Net",
        "What position is this man playing?",
        "Pitcher",
    ]
    book = texts(readers["ocrvqa"][0])
    assert book[0] == f"<image>\nWho wrote this book?{short}" and book[2] == "What is the title of this book?"
    letters = "Answer with the option's letter from the given choices directly."
    for sample in samples_of(readers["aokvqa"]):
        assert texts(sample)[::2] == [
            f"{mark}What is number {number}?\nA. one\nB. two\nC. three\nD. four\n{letters}"
            for number, mark in ((0, "<image>\n"), (1, ""))
        ]
        assert texts(sample)[1::2] == ["A", "B"]
    caption = "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: CATS"
    assert texts(readers["textcaps"][0])[0] == caption
    regions = [text for sample in samples_of(readers["refcoco"]) for text in texts(sample)[::2]]
    assert all(text.removeprefix("<image>\n").startswith("Please provide ") for text in regions)
    assert [len(sample.messages) // 2 for sample in samples_of(readers["refcoco"])] == [9, 3, 9, 3]
