"""Adapters folded into a base: the bits of the run's own model, whatever was kept of it; bases that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.made import made_recipe, stage0
from vistune.models import merge as room
from vistune.models import weights
from vistune.models.load import load
from vistune.train import stage
from vistune.train.keeping.merge import merge

LORA = {"connector": 1e-3, "language": 1e-2}


def half(start, folder, **types):
    """The start folder with its language model in bf16: types are mixed, as in published folders."""
    shutil.copytree(start, folder)
    held = load_file(folder / "model.safetensors")
    cast = {name: one.to(torch.bfloat16) if name.startswith("language") else one for name, one in held.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(
    scope="module",
    params=["plain", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rslora", "dora", "bf16_true"))],
)
def run(request, start, data, tmp_path_factory):
    """A finished LoRA run of each kind, from a start folder of mixed types."""
    folder = tmp_path_factory.mktemp(request.param)
    first = half(start, folder / "start")
    more = {request.param: True} if request.param in ("rslora", "dora") else {}
    precision = "bf16_true" if request.param == "bf16_true" else "fp32"
    recipe = made_recipe(
        *(first, data, folder / "run"),
        learn=LORA,
        lora={"r": 4, "alpha": 8, **more},
        train={"steps": 3, "precision": precision},
        checkpoint={"every": 2, "keep": 3},
    )
    stage.run(recipe)
    return folder / "run"


def tensors(folder):
    return {name: entry.read().clone() for name, entry in weights.stored(folder).items()}


def same(one, other):
    assert one.keys() == other.keys()
    differ = [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    assert not differ


def test_a_run_merges_to_the_bits_of_its_own_model(run):
    merged = merge(run)
    assert merged == run / "merged"
    own = tensors(run / "model")
    same(tensors(merged), own)
    assert own["language_model.model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert load(merged).template_name == load(run / "model").template_name
    assert "step 3" in (merged / "README.md").read_text()


def test_an_adapter_alone_holds_all_that_learned(run, tmp_path):
    """The run's checkpoints are gone; and then all of it but the adapter folder."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "merged"))
    same(tensors(merge(copy)), tensors(run / "model"))
    same(tensors(merge(run / "adapter", tmp_path / "from-adapter")), tensors(run / "model"))


def test_an_earlier_step(run, start):
    """Step 0 is what the run began with: adapters that do nothing, a connector that nobody has touched."""
    first = merge(run, run.parent / "first", step=0)
    same(tensors(first), tensors(run.parent / "start"))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; there are 0, 2, 3"):
        merge(run, step=7)


@pytest.mark.slow
def test_a_run_that_was_cut_short(start, data, tmp_path, monkeypatch):
    """Only checkpoints are left; what they hold is merged, and the run may still go on."""
    from vistune.train import loop

    recipe = made_recipe(
        *(start, data, tmp_path / "run"), learn=LORA, lora={"r": 4, "alpha": 8}, train={"steps": 3},
        checkpoint={"every": 1, "keep": 1},
    )  # fmt: skip
    real = loop.Loop.step

    def killed(self, *given):
        if self.state.step == 2:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(loop.Loop, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(recipe)
    merged = tensors(merge(tmp_path / "run"))
    before = tensors(start)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert any("q_proj" in name for name in changed) and any("projector" in name for name in changed)
    assert not any("vision" in name or "norm" in name or "lm_head" in name for name in changed)
    monkeypatch.setattr(loop.Loop, "step", real)
    assert stage.run(recipe)["steps"] == 3


def test_a_run_without_adapters_merges_what_learned(start, data, tmp_path):
    stage.run(made_recipe(start, data, tmp_path / "run", train={"steps": 2}))
    same(tensors(merge(tmp_path / "run")), tensors(tmp_path / "run" / "model"))


@pytest.fixture(scope="module")
def foreign(start, tmp_path_factory):
    """An adapter that peft made by itself, on the stock class, with a rank and alpha of its own for one layer; and the
    weights that peft merges it to."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("foreign")
    model = load(start).model
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r".*language_model.*\.(q_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        rank_pattern={"layers.0.self_attn.q_proj": 5},
        alpha_pattern={"layers.0.self_attn.q_proj": 11},
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    return folder / "adapter", {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def test_an_adapter_made_by_peft_alone(foreign, start, tmp_path):
    adapter, expected = foreign
    model = load(merge(adapter, tmp_path / "out", base=start)).model.state_dict()
    assert model.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=0, atol=1e-6, msg=name)
    connector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(load(start).model.state_dict()[connector], model[connector])


def test_biases_that_peft_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    start = stage0(tmp_path, "qwen2", "qwen_2")
    model = get_peft_model(load(start).model, LoraConfig(r=2, target_modules=r".*language.*q_proj", bias="lora_only"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = load(merge(tmp_path / "adapter", base=start)).model.state_dict()
    expected = model.merge_and_unload().state_dict()
    bias = "model.language_model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(load(start).model.state_dict()[bias], merged[bias])
    assert not [name for name in expected if not torch.allclose(expected[name], merged[name], rtol=0, atol=1e-6)]


@pytest.mark.parametrize("prefix", ["language_model.model.layers", "model.layers"])
def test_paths_of_other_versions_layouts(foreign, start, tmp_path, prefix):
    """Adapters made with older classes name the language model's layers otherwise."""
    shutil.copytree(foreign[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {n.replace("model.language_model.layers", prefix): t for n, t in load_file(file).items()}
    save_file(renamed, file)
    ours, theirs = (
        merge(foreign[0], tmp_path / "a", base=start),
        merge(tmp_path / "adapter", tmp_path / "b", base=start),
    )
    # The alpha of its own is named by a path's end, which is the same in all of them.
    same(tensors(ours), tensors(theirs))


def spoilt(adapter, folder, change):
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)
    return folder


def test_a_base_that_does_not_match_is_named(foreign, start, tmp_path):
    adapter, _ = foreign
    name = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight"
    wide = spoilt(adapter, tmp_path / "wide", lambda held: held.update({name: torch.zeros(128, 3)}))
    with pytest.raises(
        ValueError, match=r"1 tensors have another shape:\n.*layers.1.mlp.down_proj.weight is \[64, 176\]"
    ):
        merge(wide, tmp_path / "out", base=start)

    def deeper(held):
        for key in [key for key in held if "layers.1." in key]:
            held[key.replace("layers.1.", "layers.7.")] = held.pop(key)

    with pytest.raises(ValueError, match=r"2 tensors are not in it:\n.*layers.7.mlp.down_proj.weight"):
        merge(spoilt(adapter, tmp_path / "deep", deeper), tmp_path / "out", base=start)
    half = spoilt(adapter, tmp_path / "half", lambda held: held.pop(name))
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj has lora_A; lora_A and lora_B belong together"):
        merge(half, tmp_path / "out", base=start)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_what_cannot_be_merged(foreign, start, tmp_path):
    adapter, _ = foreign
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither checkpoints nor an adapter"):
        merge(tmp_path / "empty")
    for key, value, message in (
        ("init_lora_weights", "pissa", "changes the base too"),
        ("peft_type", "IA3", "only LoRA"),
        ("base_model_name_or_path", None, "does not say what it started from"),
    ):
        folder = tmp_path / key
        shutil.copytree(adapter, folder)
        said = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(said | {key: value}))
        with pytest.raises(ValueError, match=message):
            merge(folder, base=None if key.startswith("base") else start)
    shutil.copytree(adapter, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="copy the adapter again"):
        merge(tmp_path / "cut", base=start)


def test_a_tied_head_follows_the_embedding(start, tmp_path):
    """A folder that ties its head and stores it all the same."""
    folder = tmp_path / "tied"
    shutil.copytree(start, folder)
    held = load_file(folder / "model.safetensors")
    held["language_model.lm_head.weight"] = held["language_model.model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    grown = held["language_model.model.embed_tokens.weight"] + 1
    learned = room.Learned(whole={"model.language_model.embed_tokens.weight": weights.held(grown)})
    model = load(room.merge(folder, tmp_path / "out", learned, "")).model
    assert isinstance(model.lm_head, nn.Linear) and torch.equal(model.lm_head.weight, grown)
