"""assemble, convert, merge and chat from the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.made import made_recipe
from tests.tiny import GOLDEN, tiny_language
from vistune import cli
from vistune.train import stage

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The original's folders beside one another, with the tokenizer that transformers 5 reads."""
    return shutil.copytree(ORIGINAL, tmp_path_factory.mktemp("original") / "all")


def run(*words: object) -> int:
    return cli._run([str(word) for word in words])


def test_an_original_checkpoint_is_converted_proved_and_asked(original, tmp_path, capsys):
    source, out = original / "llava-mlp2x_gelu", tmp_path / "model"
    assert run("convert", source, out, "--verify", "--json") == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert done["format"] == "llava" and done["to"] == "hf" and done["report"]["ok"]
    assert "mm_vision_tower" in said.err and len(done["report"]["rows"]) == 7
    answers = []
    for model in (source, out):
        assert run("chat", model, "--ask", "What is it?", "--max-new-tokens", 5, "--temperature", 0) == 0
        answers.append(capsys.readouterr().err)
    assert answers[0] == answers[1] and answers[0].strip()


def test_a_target_that_computes_something_else_is_not_written(original, tmp_path, capsys, monkeypatch):
    from vistune.models.checkpoints import hf

    real = hf.ModelFolder.write

    def spoil(self, checkpoint, folder):
        real(self, checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if "up_proj" in name)
        tensors[name] += 0.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hf.ModelFolder, "write", spoil)
    assert run("convert", original / "llava-mlp2x_gelu", tmp_path / "model", "--verify") == 1
    assert "not written" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "coreml"], "Apple's own tools"),
        (["--to", "gguf"], "checkpoint format 'gguf'"),
        (["--to", "fastvlm"], "holds FastVLM alone"),
        (["--tensor-parallel", "2"], "tensor_parallel: a setting that hf does not have"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(original, tmp_path, capsys, words, said):
    assert run("convert", original / "llava-mlp2x_gelu", tmp_path / "model", *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_lora_run_is_merged(start, data, tmp_path, capsys):
    recipe = made_recipe(start, data, tmp_path / "run", learn={"language": 1e-3}, lora={"r": 2}, train={"steps": 2})
    stage.run(recipe)
    assert run("merge", tmp_path / "run", "--out", tmp_path / "merged") == 0
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "run/model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run("merge", tmp_path / "run", "--step", 7) == 2
    assert "no checkpoint of step 7" in capsys.readouterr().err


def test_assemble_says_what_a_family_has_not(original, tmp_path, capsys):
    vision, language = original / "clip-tiny-patch14-56", tiny_language(tmp_path / "language")
    words = ("assemble", "--vision", vision, "--language", language, "--out", tmp_path / "out")
    assert run(*words, "--resolution", 256) == 2
    assert "resolution" in capsys.readouterr().err
    assert run(*words, "--connector-type", "linear") == 0
    assert run(*words, "--connector-type", "mlp9") == 2
    assert "mlp9" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_named_with_the_line_that_brings_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("chat", "somebody/some-llava", "--ask", "hi") == 2
    assert "vistune fetch somebody/some-llava" in capsys.readouterr().err
