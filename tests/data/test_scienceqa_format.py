"""ScienceQA's problems as training rows, in the prompts that LLaVA's ScienceQA data is made with."""

from __future__ import annotations

import json

import pytest

from vistune.data.formats import open_source
from vistune.data.formats.scienceqa import PROMPTS

PROBLEMS = {
    "1": {
        "question": "Which is farthest north?",
        "choices": ["Maine", "Ohio"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "lecture": "Maps have  four directions.",
        "solution": "Maine lies highest.",
        "split": "train",
    },
    "2": {
        "question": "Which is a gas?",
        "choices": ["ice", "steam", "water"],
        "answer": 1,
        "hint": "Think of heat.",
        "image": None,
        "lecture": "",
        "solution": "",
        "split": "train",
    },
    "3": {"question": "?", "choices": ["a"], "answer": 0, "hint": "", "image": None, "split": "test"},
}


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))

    def opened(**options):
        return open_source(str(tmp_path / "problems.json"), "scienceqa", str(tmp_path / "train"), options=options)

    return opened


def turns(sample):
    return [message.text for message in sample.messages]


def test_the_published_training_prompt(reader, tmp_path):
    rows = reader()
    assert len(rows) == 2  # the training split
    assert turns(rows[0]) == [
        "Which is farthest north?\nContext: N/A\nOptions: (A) Maine (B) Ohio\n<image>",
        "LECTURE: Maps have four directions.\nSOLUTION: Maine lies highest.\n###\nANSWER: A.",
    ]
    assert rows[0].images[0].path == str(tmp_path / "train" / "1" / "image.png")
    assert turns(rows[1]) == [
        "Which is a gas?\nContext: Think of heat.\nOptions: (A) ice (B) steam (C) water",
        "###\nANSWER: B.",
    ]
    assert not rows[1].images and rows[1].notes["answer"] == 1


@pytest.mark.parametrize(
    ("prompt", "question", "answer"),
    [
        ("CQM-A", "Context: N/A\nQuestion: Which is farthest north?\nOptions: (A) Maine (B) Ohio", "The answer is A."),
        (
            "QCLM-ELA",
            "Which is farthest north?\nContext: N/A\nBECAUSE: Maps have four directions.\nOptions: (A) Maine (B) Ohio",
            "Maine lies highest. Maps have four directions. The answer is A.",
        ),
        (  # with one letter LLaVA gives the other text
            "QCML-AL",
            "Which is farthest north?\nContext: N/A\nOptions: (A) Maine (B) Ohio\nBECAUSE: Maps have four directions.",
            "The answer is A. BECAUSE: Maine lies highest.",
        ),
    ],
)
def test_other_prompts(reader, prompt, question, answer):
    assert turns(reader(prompt=prompt)[0]) == [f"{question}\n<image>", answer]


def test_reasons_that_are_not_there_are_not_announced(reader):
    for prompt in PROMPTS:
        question, answer = turns(reader(prompt=prompt)[1])
        assert not question.endswith("BECAUSE:") and not answer.endswith("BECAUSE:")
        assert "B" in answer and "  " not in question


def test_splits_and_wrong_options(reader):
    assert len(reader(split="test")) == 1 and len(reader(split="trainval")) == 2
    with pytest.raises(ValueError, match="option prompt of format 'scienceqa' is 'QCX-A'; it is one of CQM"):
        reader(prompt="QCX-A")
