"""`vistune data show --json` against the golden chat cases, as a user runs it."""

import json

import pytest

from tests.tiny import GOLDEN, TOKENIZERS
from vistune import cli

CHAT = GOLDEN / "llava" / "chat"


def shown(capsys, *arguments: str) -> list[dict]:
    assert cli._run(["data", "show", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["v1", "llama_2", "qwen_2", "mpt_eos", "plain"])
def test_strict_cases_hold(name, tmp_path, capsys):
    golden = json.loads((CHAT / f"{name}.json").read_text())
    cases = [c for c in golden["cases"] if c["compare"] == "strict" and not c["truncated_by_tokenizer"]]
    rows = [
        {"id": c["id"], "conversations": c["conversations"], **({"image": "x.png"} if c["has_image"] else {})}
        for c in cases
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    tokenizer = str(TOKENIZERS / golden["tokenizer"])
    for case, row in zip(
        cases, shown(capsys, str(file), "--tokenizer", tokenizer, "--template", golden["template"]), strict=True
    ):
        assert row["id"] == case["id"] and row["prompt"] == case["prompt"]
        assert row["ids"] == case["input_ids"] and row["labels"] == case["labels"]
        for span, wanted in zip(row["supervised_text"], case["supervised_text"], strict=True):
            assert span in (wanted, " " + wanted)  # the space before an answer is learned with it


def test_a_faulty_row_is_named_and_the_rest_is_shown(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    good = {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    bad = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}
    file.write_text(json.dumps(bad) + "\n" + json.dumps(good) + "\n")
    rows = shown(capsys, str(file), "--tokenizer", str(TOKENIZERS / "qwen2_like"), "--template", "qwen_2")
    assert rows[0]["fault"] == "empty_answer" and rows[1]["supervised_text"] == ["Hello<|im_end|>\n"]


def test_the_terminal_shows_the_same_text(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    file.write_text(json.dumps({"id": "a", "image": "x.png", "conversations": turns}) + "\n")
    arguments = ["data", "show", str(file), "--tokenizer", str(TOKENIZERS / "llama_like"), "--template", "v1"]
    assert cli._run(arguments) == 0
    assert "USER: <image>\nWhat? ASSISTANT: A cup.</s>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--template", "v2"], "v2"),
        (["--template", "qwen_2"], "needs '<|im_start|>' as one token"),
        (["--tokenizer", "/nowhere"], "tokenizer: /nowhere: no such folder"),
        (["--format", "lava"], "llava_json"),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(change, message, tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text("[]")
    arguments = ["--tokenizer", str(TOKENIZERS / "llama_like"), "--template", "v1"]
    assert cli._run(["data", "show", str(file), *arguments, *change]) == 2
    assert message in capsys.readouterr().err
