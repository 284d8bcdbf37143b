"""Where adapters land, in every family: by full path, in the language model only unless asked; and peft reads them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.each_family import each_family, folders_in
from tests.made import made_recipe
from vistune.models import merge as room
from vistune.models import weights
from vistune.models.families import family
from vistune.models.load import load, save
from vistune.recipe import Lora
from vistune.train import adapters, learn
from vistune.train.keeping.merge import merge

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("families"))


def counts(model, family):
    """Linear layers of each part, the head apart, and adapted layers of each part."""
    from peft.tuners.lora import LoraLayer

    head, linear, adapted = family.head(model), Counter(), Counter()
    for part, roots in family.parts(model).items():
        modules = {id(one): one for root in roots for one in root.modules()}.values()
        # An adapted layer holds its own linear layer and the two of its adapter.
        linear[part] = sum(isinstance(one, nn.Linear) and one is not head for one in modules)
        adapted[part] = sum(isinstance(one, LoraLayer) for one in modules)
    return linear, adapted


def adapt(loaded, parts=("language",), **more):
    """The model with adapters that do something, as a run would leave it: the connector learned too."""
    recipe = made_recipe(
        *("start", loaded.folder / "data.json", "run"),
        learn=dict.fromkeys(("connector", *parts), 1e-3),
        lora={"r": 2, "alpha": 4, "parts": list(parts), **more},
    )
    learned = learn.apply(loaded.model, loaded.family, recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in learned:
            one.parameter.add_(torch.randn(one.parameter.shape, generator=generator) * 0.05)
    return learned


def write_adapter(loaded, learned, folder, base):
    """The adapter folder of a run that ended with this model."""
    lora = Lora(r=2, alpha=4)
    folder.mkdir()
    held = room.sort({one.name: weights.held(one.parameter) for one in learned}, room.lora_config(lora, []))
    room.write_adapter(folder, held, base)


@each_family
def test_the_language_model_alone_unless_asked(folders, name):
    loaded = load(folders(name))
    before, _ = counts(loaded.model, loaded.family)
    learned = adapt(loaded)
    _, adapted = counts(loaded.model, loaded.family)
    assert adapted == Counter(language=before["language"]) and before["language"] >= 7
    language = [one.name for one in learned if one.key == "language"]
    assert len(language) == 2 * before["language"] and all(".lora_" in n for n in language)
    connector = {id(p) for root in loaded.family.parts(loaded.model)["connector"] for p in root.parameters()}
    assert {id(one.parameter) for one in learned if one.key == "connector"} == connector
    learns = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert learns == {one.name for one in learned}


@each_family
def test_vision_too_when_it_is_named(folders, name):
    loaded = load(folders(name))
    before, _ = counts(loaded.model, loaded.family)
    adapt(loaded, parts=("language", "vision"))
    _, adapted = counts(loaded.model, loaded.family)
    assert before["vision"] >= 1
    assert adapted == Counter(language=before["language"], vision=before["vision"])


@each_family
def test_targets_are_full_paths(folders, name):
    """A leaf's name that vision and language share finds the language model's only."""
    loaded = load(folders(name))
    lora = Lora(r=2, targets=r"\.0\..*(q_proj|qkv|fc1|up_proj)$")
    found = adapters.lora_targets(loaded.model, loaded.family, lora)
    inside = [path for path, _ in loaded.model.named_modules()]
    assert found and set(found) < set(inside)
    language = {id(one) for root in loaded.family.parts(loaded.model)["language"] for one in root.modules()}
    assert all(id(loaded.model.get_submodule(path)) in language for path in found)
    with pytest.raises(ValueError, match=r"lora\.targets = 'nothing_proj': matches no linear layer of language"):
        adapters.lora_targets(loaded.model, loaded.family, Lora(r=2, targets="nothing_proj"))


@each_family
def test_an_adapter_is_read_by_peft_itself_and_merges_to_the_same(folders, name, tmp_path):
    """Three ways to one model: ours with its adapters, the exported folder's class with peft's, and the merged one. The
    files are those that peft itself writes."""
    from peft import PeftModel, get_peft_model_state_dict

    loaded = load(folders(name))
    save(loaded, tmp_path / "start", card="")
    learned = adapt(loaded)
    write_adapter(loaded, learned, tmp_path / "adapter", str(tmp_path / "start"))
    with torch.no_grad():
        expected = loaded.model(input_ids=IDS).logits
        merged = load(merge(tmp_path / "adapter", tmp_path / "merged")).model(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)

    opened = load(tmp_path / "start").model
    files = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert files.keys() == {f"base_model.model.{n}" for n in get_peft_model_state_dict(loaded.model)}
    with torch.no_grad():
        without = opened(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(opened, tmp_path / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert (without - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "parameters"), [(4096, 11008, 32, 319_815_680), (5120, 13824, 40, 500_695_040)]
)
def test_the_real_sizes_have_the_adapters_that_llava_trains(hidden, ffn, layers, parameters):
    """r = 128 on q, k, v, o, gate, up and down of 7B and 13B."""
    text = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config = transformers.LlavaConfig(text_config={"model_type": "llama", "num_attention_heads": 32, **text})
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    paths = adapters.lora_targets(model, family("llava"), Lora(r=128))
    assert len(paths) == 7 * layers
    assert sum(128 * sum(model.get_submodule(path).weight.shape) for path in paths) == parameters
