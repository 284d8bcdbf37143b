"""Every checkpoint of a run is a model: it opens for chat, converts, merges; of LoRA it is peft's adapter too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.made import made_data, made_recipe, stage0
from vistune import generate
from vistune.models import checkpoints
from vistune.models.convert import convert
from vistune.models.load import load
from vistune.train import stage
from vistune.train.keeping.merge import merge

KINDS = {
    "whole": {},
    "lora": {"lora": {"r": 4, "alpha": 8, "rslora": True}},
    "qlora": {"lora": {"r": 4, "alpha": 8, "dora": True, "quantize": "4bit"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return stage0(folder), made_data(folder / "data", 8)


@pytest.fixture(scope="module", params=KINDS)
def run(request, made, tmp_path_factory):
    """A run that has ended, its checkpoints of steps 2 and 4 left, and its kind."""
    if request.param == "qlora":
        pytest.importorskip("bitsandbytes", reason="extra quant")
    folder = tmp_path_factory.mktemp("runs") / request.param
    learn = {"connector": 1e-3, "language": 1e-2}
    stage.run(made_recipe(*made, folder, learn=learn, train={"steps": 4, "batch": 4}, **KINDS[request.param]))
    return folder, request.param


def same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.slow
def test_it_opens_as_the_model_that_it_is(run, made, tmp_path):
    folder, _ = run
    two, four = (folder / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    last = load(four)
    same(last.model.state_dict(), load(folder / "model").model.state_dict())
    assert last.template_name == load(folder / "model").template_name and last.layout == load(folder / "model").layout
    earlier = load(two).model.state_dict()
    same(earlier, load(merge(folder, tmp_path / "two", step=2)).model.state_dict())
    same(earlier, load(merge(two, tmp_path / "direct")).model.state_dict())
    convert(two, tmp_path / "converted")
    same(earlier, load(tmp_path / "converted").model.state_dict())
    start = load(made[0]).model.state_dict()
    changed = {name for name in start if not torch.equal(start[name], earlier[name])}
    assert any("q_proj" in name for name in changed) and any("multi_modal_projector" in name for name in changed)
    assert any(not torch.equal(earlier[name], tensor) for name, tensor in last.model.state_dict().items())


def test_it_answers(run):
    loaded = generate.open_model(run[0] / "checkpoints" / "step-00000002", "cpu")
    assert isinstance(generate.answer_batch(loaded, [("what?", [])], max_new_tokens=2)[0], str)


def test_of_a_run_that_has_not_ended_the_last_one_opens(run, tmp_path):
    copy = tmp_path / "killed"
    shutil.copytree(run[0], copy, ignore=shutil.ignore_patterns("model", "adapter"))
    found = checkpoints.read(copy)
    assert found.format == "run" and found.why.startswith("run.json and .metadata in step-00000004, on ")
    same(load(copy).model.state_dict(), load(run[0] / "model").model.state_dict())


def test_a_lora_runs_holds_all_but_the_base(run, made):
    folder, kind = run
    two = folder / "checkpoints" / "step-00000002"
    if kind == "whole":
        assert not (two / "adapter_config.json").exists()
        return
    said = json.loads((two / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(made[0]) and said["r"] == 4
    assert said["use_dora"] == (kind == "qlora") and said["use_rslora"] == (kind == "lora")
    held = load_file(two / "adapter_model.safetensors")
    assert len(held) == 14 * (3 if kind == "qlora" else 2)
    assert len(load_file(two / "learned.safetensors")) == 4  # the connector
    assert json.loads((two / "config.json").read_text())["model_type"] == "llava"
    tokenizer = AutoTokenizer.from_pretrained(two)
    assert tokenizer("the red cup").input_ids == load(folder / "model").tokenizer("the red cup").input_ids
    assert (two / "chat_template.jinja").is_file() and (two / "preprocessor_config.json").is_file()
    last = load_file(folder / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    ended = load_file(folder / "adapter" / "adapter_model.safetensors")
    same(last, ended)
    assert any(not torch.equal(held[name], last[name]) for name in held)


def test_peft_opens_it_on_the_base(run, made):
    from peft import PeftModel

    folder, kind = run
    if kind == "whole":
        return
    two, ids = folder / "checkpoints" / "step-00000002", torch.arange(5, 45)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(load(made[0]).model, two).eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs, load(two).model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_start_that_has_moved(run, made, tmp_path):
    two = tmp_path / "two"
    shutil.copytree(run[0] / "checkpoints" / "step-00000002", two)
    state = json.loads((two / "run.json").read_text())
    state["recipe"]["model"]["start"] = str(tmp_path / "gone")
    (two / "run.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"what it started from \(--base where that has moved\): .*gone: no such folder"
    ):
        load(two)
    same(load(two, base=made[0]).model.state_dict(), load(run[0] / "checkpoints" / "step-00000002").model.state_dict())
    (two / ".metadata").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        load(two, base=made[0])
