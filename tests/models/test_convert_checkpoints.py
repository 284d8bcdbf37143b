"""Converting says what it found, proves itself, and refuses what cannot be held."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from tests.each_family import each_family, folders_in
from tests.original_llava import BASE, ORIGINAL
from vistune.models import checkpoints, merge, weights
from vistune.models.convert import NotTheSame, convert
from vistune.models.load import load
from vistune.models.proving.compare import compare

WHOLE = ORIGINAL / "llava-mlp2x_gelu"


def test_it_says_what_it_found_and_what_it_wrote(tmp_path, capsys):
    done = convert(WHOLE, tmp_path / "out")
    assert (done.format, done.to, done.family, done.tensors, done.report) == ("llava", "hf", "llava", 80, None)
    assert done.bytes == sum(entry.nbytes for entry in weights.stored(tmp_path / "out").values())
    assert "llava (config.json: mm_vision_tower is './clip-tiny-patch14-56')" in capsys.readouterr().out
    json.dumps(done.as_dict())
    assert "`llava`" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_there_already_is_not_touched(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="not a vistune model folder"):
        convert(WHOLE, tmp_path / "theirs")
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]
    copy = shutil.copytree(WHOLE, tmp_path / "copy")
    for out in (copy, copy / "inside"):
        with pytest.raises(ValueError, match="the source itself"):
            convert(copy, out)
    convert(WHOLE, tmp_path / "ours")
    convert(ORIGINAL / "llava-linear", tmp_path / "ours")  # what is ours may be written anew
    assert load(tmp_path / "ours").family.name == "llava_variant"


@pytest.mark.parametrize(
    ("to", "match"),
    [
        ("fastvlm", "."),
        ("onevision15", "holds LLaVA-OneVision-1.5 alone"),
        ("mcore", "holds onevision15 alone"),
        ("llava-lora", "no LoRA can be told"),
        ("ggml", "there are"),
    ],
)
def test_a_form_that_cannot_hold_it_says_so(to, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        convert(WHOLE, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_models_that_the_original_cannot_hold(tmp_path):
    for folder, match in ((GOLDEN_ONEVISION, "a onevision15 model cannot be written as an original LLaVA"),):
        for to in ("llava", "llava-adapter"):
            with pytest.raises(ValueError, match=match):
                convert(folder, tmp_path / "out", to)
    with pytest.raises(ValueError, match=r"tensor_parallel: a setting that llava does not have"):
        convert(WHOLE, tmp_path / "out", "llava", settings={"tensor_parallel": 2})
    assert not (tmp_path / "out").exists()


GOLDEN_ONEVISION = ORIGINAL.parent.parent / "onevision15" / "tiny-stage0"


def test_a_conversion_is_proved_or_not_done(tmp_path, monkeypatch):
    done = convert(WHOLE, tmp_path / "out", verify=True)
    assert done.report.ok and max(row.difference for row in done.report.rows) <= 1e-5
    assert [row.check for row in done.report.rows] == [
        "preprocessing",
        "token ids",
        "vision features, one picture",
        "vision features, two pictures",
        "logits, text",
        "logits, one picture",
        "logits, two pictures",
    ]
    writes = checkpoints.named("hf").write.__func__

    def wrong(self, found, folder):
        entry = found.tensors["multi_modal_projector.linear_1.bias"]
        found.tensors["multi_modal_projector.linear_1.bias"] = weights.held(entry.read() + 1)
        writes(self, found, folder)

    monkeypatch.setattr(type(checkpoints.named("hf")), "write", wrong)
    with pytest.raises(
        NotTheSame, match=r"not written: it is not what .* is: vision features, one picture: differs"
    ) as error:
        convert(WHOLE, tmp_path / "other", verify=True)
    assert not error.value.report.ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_every_check_finds_what_it_is_for(tmp_path):
    convert(WHOLE, tmp_path / "out")
    assert compare(WHOLE, tmp_path / "out").ok

    def wrong(**said):
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        found["vistune"] |= said
        folder = shutil.copytree(tmp_path / "out", tmp_path / "changed", dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(found))
        report = compare(WHOLE, folder)
        report.show()
        return {row.check.partition(",")[0] for row in report.rows if row.wrong}

    assert wrong() == set()
    assert wrong(image="square") == {"preprocessing"}
    assert wrong(template="llava_v1") == {"token ids"}
    other = compare(WHOLE, ORIGINAL / "llava-mlp2x_gelu-hubstyle", tolerance=1e-12)
    assert other.as_dict()["ok"] == other.ok
    report = compare(WHOLE, ORIGINAL / "llava-linear")
    assert {row.check.partition(",")[0] for row in report.rows if row.wrong} >= {"vision features", "logits"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a LoRA run leaves: an adapter on full paths, a connector that learned, and the merged model."""
    path = tmp_path_factory.mktemp("run")
    convert(ORIGINAL / "stage1-mlp2x_gelu", path / "start", "hf", BASE, template="v1")
    loaded = load(path / "start")
    layers = [f"model.language_model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=layers), loaded.model)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(".lora_" in name or "multi_modal_projector" in name)
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1
    learned = {n: weights.held(p) for n, p in loaded.model.named_parameters() if p.requires_grad}
    held = merge.sort(learned, loaded.model.peft_config["default"])
    (path / "adapter").mkdir()
    merge.write_adapter(path / "adapter", held, str(path / "start"))
    merge.merge(path / "start", path / "model", held, "")
    return path


def test_a_lora_run_becomes_the_originals_pair(run, tmp_path):
    done = convert(run, tmp_path / "pair", "llava-lora", BASE, verify=False)
    assert done.format == "hf"
    names = set(weights.of_file(tmp_path / "pair" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names and len(names) == 8
    others = torch.load(tmp_path / "pair" / "non_lora_trainables.bin", weights_only=True)
    assert sorted(others)[0] == "base_model.model.model.mm_projector.0.bias" and len(others) == 4
    said = json.loads((tmp_path / "pair" / "adapter_config.json").read_text())
    assert sorted(said["target_modules"])[0] == "model.layers.0.mlp.up_proj" and said["r"] == 4

    merged, wanted = load(tmp_path / "pair", base=BASE, template="v1"), load(run / "model")
    assert merged.family.name == "llava"
    for (name, one), other in zip(wanted.model.state_dict().items(), merged.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_lora_run_is_a_model_folder_for_all_else(run, tmp_path):
    convert(run, tmp_path / "out", "llava", verify=True)
    assert load(tmp_path / "out").family.name == "llava"


@each_family
def test_a_model_of_every_family_is_proved_equal_to_its_copy(name, tmp_path):
    done = convert(folders_in(tmp_path)(name), tmp_path / "copy", "hf", verify=True)
    assert done.family == name and done.report.ok
    assert done.report.rows[0].difference == 0 and len(done.report.rows) == 7
