"""Raw annotation files in the layouts their authors publish them in, made up and small."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_scienceqa_format import PROBLEMS
from vistune.data.formats import open_source
from vistune.data.reading.json_members import BadRow, Lookup, Rows, find_members
from vistune.data.tokenize import check_marks
from vistune.data.transforms import apply
from vistune.samples import Sample, SampleError

VQA_QUESTIONS = {
    "info": {"description": "This is v2.0 of the VQA dataset.", "url": "http://visualqa.org"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 262146, "question": "What color is the snow?", "question_id": 262146000},
    ],
}


def ten(*answers: str, raw: bool = False) -> list[dict[str, Any]]:
    filled = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
        | ({"raw_answer": f"{answer}ing"} if raw else {})
        for number, answer in enumerate(filled)
    ]


VQA_ANNOTATIONS = {
    "info": {},
    "annotations": [  # in another order than the questions
        {
            "question_type": "what color is the",
            "multiple_choice_answer": "white",
            "answers": ten("blue", "white"),
            "image_id": 262146,
            "answer_type": "other",
            "question_id": 262146000,
        },
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": ten("netting", "mesh", "net"),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        },
        {
            "question_type": "what",
            "answers": ten(*["pitcher"] * 5, *["catcher"] * 5),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752001,
        },
    ],
}


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def said(sample: Sample) -> list[str]:
    return [message.text for message in sample.messages]


def checked(reader: Any, folder: Path) -> list[Sample]:
    samples = [reader[row] for row in range(len(reader))]
    for row, sample in enumerate(samples):
        check_marks(sample)
        assert (sample.row, sample.source) == (row, reader.name)
        assert all(Path(image.path).is_relative_to(folder) for image in sample.images)
    assert [pickle.loads(pickle.dumps(reader))[row] for row in range(len(reader))] == samples
    return samples


def test_vqav2_pairs_questions_with_the_answer_of_most(write, tmp_path):
    options = {"annotations": write("v2_mscoco_train2014_annotations.json", VQA_ANNOTATIONS)}
    path = write("v2_OpenEnded_mscoco_train2014_questions.json", VQA_QUESTIONS)
    reader = open_source(path, "vqav2", str(tmp_path), "vqa", tmp_path / "cache", options)
    samples = checked(reader, tmp_path)
    assert [said(sample)[1] for sample in samples] == ["net", "pitcher", "white"]
    assert said(samples[0])[0] == "<image>\nWhat is this photo taken looking through?"
    assert samples[0].images[0].path == str(tmp_path / "coco/train2017/000000458752.jpg")
    assert samples[0].id == "458752000" and samples[0].notes["image_id"] == "458752"
    merged = apply(reader, [{"do": "merge_by_image"}, {"do": "prompt", "form": "short"}])
    assert [len(merged[row].messages) for row in range(len(merged))] == [4, 2]


def test_okvqa_has_its_answers_twice(write, tmp_path):
    annotations = {"annotations": [row | {"answers": ten("race", raw=True)} for row in VQA_ANNOTATIONS["annotations"]]}
    for row in annotations["annotations"]:
        row.pop("multiple_choice_answer", None)
    companion = write("mscoco_train2014_annotations.json", annotations)
    path = write("OpenEnded_mscoco_train2014_questions.json", VQA_QUESTIONS)
    plain = open_source(path, "okvqa", options={"annotations": companion})
    raw = open_source(path, "okvqa", options={"annotations": companion, "text": "raw_answer"})
    assert {said(sample)[1] for sample in checked(plain, tmp_path)} == {"race"}
    assert said(raw[0])[1] == "raceing" and raw.fingerprint() != plain.fingerprint()


GQA = {
    "07333408": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (722332)"}],
        "entailed": ["07333405"],
        "equivalent": ["07333408"],
        "question": "What is on the white wall?",
        "imageId": "2375429",
        "isBalanced": True,
        "groups": {"global": "", "local": "14-wall_on,s"},
        "answer": "pipe",
        "semanticStr": "select: wall (722332)->filter color: white [0]",
        "annotations": {"answer": {"0": "722335"}, "question": {"4:6": "722332"}, "fullAnswer": {"1": "722335"}},
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
        "fullAnswer": "The pipe is on the wall.",
    },
    "n1": {"question": 'Is it "a} cat"?', "imageId": "n578233", "answer": "no", "fullAnswer": "No, it is not."},
}


def test_gqa_is_an_object_of_questions(write, tmp_path):
    path = write("train_balanced_questions.json", GQA)
    first, second = checked(open_source(path, "gqa", cache=tmp_path / "cache"), tmp_path)
    assert (first.id, second.id) == ("07333408", "n1")
    assert said(first) == ["<image>\nWhat is on the white wall?", "pipe"]
    assert second.images[0].path.endswith("gqa/images/n578233.jpg")
    assert said(open_source(path, "gqa", options={"text": "fullAnswer"})[1])[1] == "No, it is not."
    with pytest.raises(ValueError, match="option text of format 'gqa' is 'full'; it may be answer, fullAnswer"):
        open_source(path, "gqa", options={"text": "full"})


def test_aokvqa_has_choices(write, tmp_path):
    rows = [
        {
            "split": "train",
            "image_id": 299207,
            "question_id": "22MexNkBPpdZGX6sxbxVBH",
            "question": "What is the man by the bags awaiting?",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "correct_choice_idx": 3,
            "direct_answers": ["ride", "ride", "bus", "taxi"],
            "difficult_direct_answer": False,
            "rationales": ["A train would not be on the street."],
        },
        {"image_id": 1, "question_id": "q", "question": "?", "choices": ["a"], "correct_choice_idx": 4},
    ]
    reader = open_source(write("aokvqa_v1p0_train.json", rows), "aokvqa", str(tmp_path))
    assert said(reader[0]) == ["<image>\nWhat is the man by the bags awaiting?", "cab"]
    lettered = apply(reader, [{"do": "prompt", "form": "letter"}])
    assert said(lettered[0]) == [
        "<image>\nWhat is the man by the bags awaiting?\nA. skateboarder\nB. train\nC. delivery\nD. cab\n"
        "Answer with the option's letter from the given choices directly.",
        "D",
    ]
    with pytest.raises(SampleError, match=r":1 \(id q\): row_unreadable: correct_choice_idx is 4"):
        reader[1]


OCRVQA = {
    "0439873819": {
        "imageURL": "http://ecx.images-amazon.com/images/I/51.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?", "Is this a comedy book?"],
        "answers": ["Ann Author", "A Book", "No"],
        "title": "A Book",
        "authorName": "Ann Author",
        "genre": "Travel",
        "split": 1,
    },
    "076": {"imageURL": "x.gif", "questions": ["Q?"], "answers": ["A"], "split": 3},
    "B00": {"imageURL": "x.jpg", "questions": ["Q?", "R?"], "answers": ["A"], "split": 1},
}


def test_ocrvqa_is_an_object_of_books(write, tmp_path):
    path = write("dataset.json", OCRVQA)
    reader = open_source(path, "ocrvqa", cache=tmp_path / "cache")
    assert len(reader) == 2 and len(open_source(path, "ocrvqa", options={"split": "all"})) == 3
    book = reader[0]
    assert said(book)[:3] == ["<image>\nWho wrote this book?", "Ann Author", "What is the title of this book?"]
    assert book.images[0].path.endswith("ocr_vqa/images/0439873819.jpg") and book.notes["genre"] == "Travel"
    with pytest.raises(SampleError, match=r"\(id B00\): row_unreadable: it has 2 questions and 1 answers"):
        reader[1]
    with pytest.raises(ValueError, match="none of its 3 rows has split = 2"):
        open_source(path, "ocrvqa", options={"split": "val"})


TEXTCAPS = {
    "dataset_type": "train",
    "dataset_name": "textcaps",
    "dataset_version": "0.1",
    "data": [
        {
            "caption_str": caption,
            "caption_tokens": caption.split(),
            "reference_strs": ["one", "two"],
            "image_id": "b4c4d2ad3d4f0e0a",
            "image_classes": ["Book"],
            "flickr_original_url": "https://farm.staticflickr.com/1.jpg",
            "image_width": 1024,
            "image_height": 768,
            "set_name": "train",
            "caption_id": number,
            "image_path": "train/b4c4d2ad3d4f0e0a.jpg",
        }
        for number, caption in enumerate(["A book about cats.", "A thick book."])
    ],
}


@pytest.mark.parametrize("words_only", [False, True])
def test_textcaps_with_and_without_what_ocr_read(write, tmp_path, words_only):
    found = {"ocr_info": [{"word": word, "bounding_box": {"width": 0.1}} for word in ("CATS", "AND", "ME")]}
    tokens = {} if words_only else {"ocr_tokens": ["CATS", "AND", "ME"]}
    ocr = {"data": [{"image_id": "x", "ocr_tokens": []}, {"image_id": "b4c4d2ad3d4f0e0a", **found, **tokens}]}
    path = write("TextCaps_0.1_train.json", TEXTCAPS)
    with_ocr = open_source(path, "textcaps", options={"ocr": write("ocr.json", ocr)})
    first, _ = checked(with_ocr, tmp_path)
    assert said(first) == ["<image>", "A book about cats."]
    assert first.notes["ocr_tokens"] == ["CATS", "AND", "ME"] and first.notes["width"] == 1024
    assert first.images[0].path.endswith("textvqa/train_images/b4c4d2ad3d4f0e0a.jpg")
    asked = said(apply(with_ocr, [{"do": "per_image", "n": 1}, {"do": "prompt", "form": "caption"}])[0])[0]
    assert asked.endswith("\nReference OCR token: CATS, AND, ME")
    assert "ocr_tokens" not in open_source(path, "textcaps")[0].notes


REGIONS = [
    {
        "regions": [
            {
                "region_id": 1382,
                "width": 82,
                "height": 139,
                "image_id": 1,
                "phrase": "the clock is green in colour",
                "y": 57,
                "x": 421,
            },
            {"region_id": 1383, "width": 10, "height": 20, "image_id": 1, "phrase": "a [odd}", "y": 0, "x": 0},
        ],
        "id": 1,
    },
    {"regions": [], "id": 2},
    {"regions": [{"region_id": 7, "width": 9, "height": 9, "image_id": 3, "phrase": "x", "y": 1, "x": 1}], "id": 3},
]
IMAGE_DATA = [
    {
        "width": 800,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        "height": 600,
        "image_id": 1,
        "coco_id": None,
        "flickr_id": None,
    }
]


def test_visual_genome_knows_folders_and_sizes_from_image_data(write, tmp_path):
    options = {"image_data": write("image_data.json", IMAGE_DATA)}
    path = write("region_descriptions.json", REGIONS)
    reader = open_source(path, "visual_genome", str(tmp_path), cache=tmp_path / "cache", options=options)
    assert len(reader) == 3
    first = reader[0]
    assert first.images[0].path == str(tmp_path / "vg/VG_100K_2/1.jpg") and said(first)[0] == "<image>"
    assert first.notes["box"] == (421, 57, 503, 196) and (first.notes["width"], first.notes["height"]) == (800, 600)
    assert said(reader[1])[1] == "a [odd}"
    box = said(apply(reader, [{"do": "prompt", "form": "box"}])[0])
    assert box[1] == "[0.53, 0.2, 0.63, 0.37]"  # (57 + 100) / 800, (196 + 100) / 800: padded above and below
    with pytest.raises(
        SampleError, match=r"\(id 7\): row_unreadable: .*image_data.json has no row with image_id = '3'"
    ):
        reader[2]


REFS = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 0,
        "image_id": 581857,
        "split": "train",
        "category_id": 1,
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady with the blue shirt"},
            {"tokens": ["lady"], "raw": "lady", "sent_id": 1, "sent": "lady with back to us"},
        ],
    },
    {
        "sent_ids": [2],
        "ann_id": 99,
        "ref_id": 1,
        "image_id": 581857,
        "split": "testA",
        "category_id": 1,
        "sentences": [{"tokens": ["man"], "raw": "man", "sent_id": 2, "sent": "man"}],
    },
]
INSTANCES = {
    "images": [{"id": 581857, "width": 640, "height": 427, "file_name": "COCO_train2014_000000581857.jpg"}],
    "annotations": [
        {"id": 1719310, "image_id": 581857, "bbox": [103.93, 299.99, 134.22, 177.42], "segmentation": [[1, 2, 3, 4]]}
    ],
    "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
}


@pytest.mark.parametrize("protocol", [0, 2, 4, "json"])
def test_refcoco_from_the_pickle_or_json(write, tmp_path, protocol):
    path = tmp_path / ("refs(unc).json" if protocol == "json" else "refs(unc).p")
    path.write_bytes(json.dumps(REFS).encode() if protocol == "json" else pickle.dumps(REFS, protocol))
    options = {"instances": write("instances.json", INSTANCES)}
    reader = open_source(str(path), "refcoco", str(tmp_path), options=options)
    first, second = checked(reader, tmp_path)
    assert [said(sample)[1] for sample in (first, second)] == ["the lady with the blue shirt", "lady with back to us"]
    assert first.notes["box"] == pytest.approx((103.93, 299.99, 238.15, 477.41))
    assert (first.notes["width"], first.notes["height"]) == (640, 427)
    assert first.images[0].path.endswith("coco/train2017/000000581857.jpg") and first.id == "0"
    other = tmp_path / "refcocog" / "refs(umd).p"
    other.parent.mkdir()
    other.write_bytes(pickle.dumps(REFS[:1]))
    write("refcocog/instances.json", INSTANCES)
    both = open_source(str(path), "refcoco", str(tmp_path), options={"also": [str(other)]})
    assert [sample.notes["set"] for sample in checked(both, tmp_path)] == [tmp_path.name] * 2 + ["refcocog"] * 2
    assert len(apply(both, [{"do": "merge_by_image", "apart": "set"}])) == 2
    tests = open_source(str(path), "refcoco", str(tmp_path), options=options | {"split": "test"})
    with pytest.raises(SampleError, match="the instances file has no 99"):
        tests[0]
    with pytest.raises(ValueError, match=r"no reference of it is of split 'val'; there are testA, train"):
        open_source(str(path), "refcoco", str(tmp_path), options=options | {"split": "val"})


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm-was-done",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_that_would_run_code_is_refused(write, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    options = {"instances": write("instances.json", INSTANCES)}
    for name, content in (("a.p", [Harm()]), ("b.p", [np.float64(1.0)]), ("c.p", [Path("x")])):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(
            ValueError, match=r"\.p: it cannot be read: it holds .* Save the list of references as JSON"
        ):
            open_source(str(tmp_path / name), "refcoco", options=options)
    assert not (tmp_path / "harm-was-done").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x04N.", b"(lp0\n", b"cos\nsystem\n", b"\x80\x05\x95" + b"\xff" * 8]
)
def test_torn_pickles_are_errors_that_name_the_file(write, tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p: it (cannot be read|holds)"):
        open_source(str(tmp_path / "refs.p"), "refcoco", options={"instances": write("instances.json", INSTANCES)})


@pytest.mark.parametrize("lines", [False, True])
def test_sharegpt_is_read_as_it_lies_there(write, tmp_path, lines):
    rows = [
        {"id": "QWJhYvA_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "empty", "conversations": []},
        {"id": "x", "items": [{"from": "chatgpt", "value": "I"}, {"from": "user", "value": "You"}]},
        {"id": "odd", "conversations": [{"from": "tool", "value": "7"}]},
    ]
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    reader = open_source(write("sg_90k_part1.json", text), "sharegpt")
    assert [len(reader[row].messages) for row in range(3)] == [2, 0, 2]
    assert reader[2].messages[0].role == "assistant" and reader[0].id == "QWJhYvA_0"
    with pytest.raises(SampleError, match=r"\(id odd\): role_order: turn 0 is from 'tool'"):
        reader[3]
    valid = apply(reader, [{"do": "drop_invalid"}])
    assert valid[0].notes["rows"] == (0,) and valid.left_out == {"too_short": 1, "first_turn": 1}


# ---- what they share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("vqav2", {}, "option annotations of format 'vqav2' is missing"),
        ("vqav2", {"annotations": "nowhere.json"}, "nowhere.json: the file cannot be opened"),
        ("visual_genome", {}, "option image_data of format 'visual_genome' is missing"),
        ("gqa", {"annotations": "x"}, "format 'gqa' has no option 'annotations'"),
        ("textcaps", {}, r"there is nothing at data\[\*\]; is it the file of another data set"),
        ("ocrvqa", {"split": 1}, "option split of format 'ocrvqa' is 1"),
        ("aokvqa", {"picture": ""}, "option picture of format 'aokvqa' is ''"),
    ],
)
def test_wrong_options_and_files_are_named(write, format, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(write("some.json", GQA), format, options=options)


def test_a_key_that_is_missing_or_odd_is_a_fault_of_its_row(write, tmp_path):
    rows = {
        "a": {"question": "Q?", "answer": "A"},
        "b": {"question": 3, "imageId": "1", "answer": "A"},
        "c": [1],
        "d": {},
    }
    reader = open_source(write("questions.json", rows), "gqa")
    for row, (id, reason) in enumerate(
        [
            ("a", "imageId is missing; there are question, answer"),
            ("b", "question is 3, expected str"),
            ("c", r"\[1\] is no object"),
            ("d", "imageId is missing; there are no keys"),
        ]
    ):
        with pytest.raises(SampleError, match=rf"questions.json:{row} \(id {id}\): row_unreadable: {reason}"):
            reader[row]
    with pytest.raises(SampleError, match="does not fit the pattern"):
        open_source(write("one.json", {"a": GQA["n1"]}), "gqa", options={"picture": "{id:012}.jpg"})[0]


def test_places_and_keys_are_kept_and_follow_the_file(write, tmp_path):
    cache = tmp_path / "cache"
    companion = write("annotations.json", VQA_ANNOTATIONS)
    path = write("questions.json", VQA_QUESTIONS)
    first = open_source(path, "vqav2", cache=cache, options={"annotations": companion})
    kept = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = open_source(path, "vqav2", cache=cache, options={"annotations": companion})
    assert kept == {file: file.stat().st_mtime_ns for file in cache.iterdir()} and len(kept) == 3
    assert again.fingerprint() == first.fingerprint() and again[0] == first[0]
    write("annotations.json", VQA_ANNOTATIONS | {"info": {"date": "later"}})
    assert (
        open_source(path, "vqav2", cache=cache, options={"annotations": companion}).fingerprint() != first.fingerprint()
    )


def test_files_behind_a_uri_are_read_too(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/vg/questions.json", json.dumps(GQA).encode())
    reader = open_source("memory://vg/questions.json", "gqa", str(tmp_path))
    assert said(reader[0])[1] == "pipe" and len(reader) == 2
    with pytest.raises(ValueError, match=r"memory://vg/none\.json: the file cannot be opened"):
        open_source("memory://vg/none.json", "gqa", str(tmp_path))


MUTATED = {
    "gqa": (GQA, {}),
    "aokvqa": ([{"image_id": 1, "question_id": "q", "question": "?", "choices": ["a"], "correct_choice_idx": 0}], {}),
    "ocrvqa": (OCRVQA, {}),
    "textcaps": (TEXTCAPS, {"ocr": {"data": [{"image_id": "b4c4d2ad3d4f0e0a", "ocr_tokens": ["A"]}]}}),
    "vqav2": (VQA_QUESTIONS, {"annotations": VQA_ANNOTATIONS}),
    "okvqa": (VQA_QUESTIONS, {"annotations": VQA_ANNOTATIONS}),
    "visual_genome": (REGIONS, {"image_data": IMAGE_DATA}),
    "refcoco": (REFS, {"instances": INSTANCES}),
    "scienceqa": (PROBLEMS, {}),
    "sharegpt": ([{"id": "a", "conversations": [{"from": "human", "value": "Hi"}]}], {}),
}
SWAPS = [b"null", b"[]", b"{}", b'"\\ud800"', b"1e999", b"9" * 400, b"NaN", b"true", b"-1", b"", b'"', b"}"]
SWAPS += [b'"a/../b"', b'"\\u0000"', b'"\xff"', b"[" * 9999]
VALUE = re.compile(rb'"[^"]*"|\d+|true|null')


@pytest.mark.parametrize("format", MUTATED)
def test_mutated_files_give_faults_and_errors_and_nothing_worse(tmp_path, format):
    main, companions = MUTATED[format]
    texts = {"main": json.dumps(main).encode()} | {key: json.dumps(value).encode() for key, value in companions.items()}
    options = {key: str(tmp_path / f"{key}.json") for key in companions}
    chance = random.Random(format)
    told = 0
    for _ in range(150):
        hit = chance.choice(list(texts))
        for key, text in texts.items():
            if key == hit:
                at = chance.choice(list(VALUE.finditer(text)))
                text = text[: at.start()] + chance.choice(SWAPS) + text[at.end() :]
            (tmp_path / f"{key}.json").write_bytes(text)
        try:
            reader = open_source(str(tmp_path / "main.json"), format, options=options)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            told += 1
            continue
        for row in range(len(reader)):
            try:
                sample = reader[row]
            except SampleError as error:
                assert error.fault.row == row
                told += 1
                continue
            assert all(isinstance(message.text, str) for message in sample.messages)
            "".join(message.text for message in sample.messages).encode()
    assert told > 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("   ", "it is no JSON object or list"),
        ('{"questions": [{"a": 1}, {"b"', "torn: the file ends at byte 29"),
        ('{"questions": [{"a": 1}}', r"at byte 23 '}' closes what is not open"),
        ('{"questions": []}', r"there is nothing at questions\[\*\]"),
        ("]", r"closes what is not open"),
    ],
)
def test_files_that_cannot_be_scanned(write, text, message):
    with pytest.raises(ValueError, match=message):
        find_members(write("x.json", text), ("questions", "*"))


def test_a_lookup_refuses_rows_without_its_key(write):
    path = write("x.json", {"data": [{"id": 1}, {"id": "b"}, {"name": 2}]})
    with pytest.raises(ValueError, match=r"x\.json: row 2: id is missing"):
        Lookup(path, ("data", "*"), "id", None)
    good = Lookup(write("y.json", {"data": [{"id": 1, "v": 5}, {"id": "b"}]}), ("data", "*"), "id", None)
    assert good.get("1")["v"] == good.get(1)["v"] == 5
    with pytest.raises(BadRow, match="no row with id = 'c'"):
        good.get("c")


LEAF = st.none() | st.integers() | st.text(max_size=6) | st.sampled_from(['"', "\\", "]}", "{[", '\\"', 'a": {'])
NODE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("rows"), inner, max_size=3)
    ),
    max_leaves=10,
)
ROW = st.dictionaries(st.text(max_size=3), NODE, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "rows "]), NODE, max_size=3),
    st.lists(ROW, min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=4), ROW, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
)
@pytest.mark.slow
def test_members_are_found_as_json_finds_them(tmp_path_factory, around, rows, members, ascii, indent):
    path = tmp_path_factory.getbasetemp() / "members.json"
    whole = {**around, "rows": rows, "z": [{"rows": rows}, {"rows": []}, {"other": rows}], "named": members}
    path.write_bytes(json.dumps(whole, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass"))

    def read(*place: str) -> list[Any]:
        found = Rows(str(path), place, None)
        return [found[number] for number in range(len(found))]

    assert read("rows", "*") == [("", row) for row in rows]
    assert read("z", "*", "rows", "*") == [("", row) for row in rows]
    assert read("named", "*") == list(members.items())
