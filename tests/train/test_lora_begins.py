"""How adapters begin: on a model without memory, with the values that peft would draw, the same however often asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.made import made_recipe, stage0
from vistune.models import merge
from vistune.models.load import load, stored_tensors
from vistune.train import adapters, learn

LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return stage0(tmp_path_factory.mktemp("start"))


def adapted(start, **lora):
    """A model on the meta device with adapters, and what learns."""
    loaded = load(start)
    loaded.model.to("meta")
    recipe = made_recipe(
        *(start, start / "data.json", start / "run"),
        learn={"connector": 1e-3, "language": 1e-3},
        lora={"r": 4, "alpha": 8, **lora},
    )
    return loaded, learn.apply(loaded.model, loaded.family, recipe)


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_takes_memory_until_it_is_filled(start, dora):
    loaded, learned = adapted(start, dora=dora)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    kinds = {one.name.split(".lora_")[1].split(".")[0] for one in learned if ".lora_" in one.name}
    assert kinds == ({"A", "B", "magnitude_vector"} if dora else {"A", "B"})
    assert all(one.parameter.requires_grad for one in learned)
    assert {one.parameter.dtype for one in learned} == {torch.float32}
    held = {name: nn.Parameter(torch.zeros(p.shape)) for name, p in loaded.model.named_parameters()}
    for name, parameter in held.items():
        path, _, leaf = name.rpartition(".")
        loaded.model.get_submodule(path)._parameters[leaf] = parameter
    after = learn.again(loaded.model, learned)
    assert [(one.name, one.key, one.rate) for one in after] == [(one.name, one.key, one.rate) for one in learned]
    assert all(one.parameter is held[one.name] for one in after)


@pytest.mark.parametrize("dora", [False, True])
def test_the_values_are_those_that_peft_begins_with(start, dora):
    """Magnitudes equal peft's; A has its bounds and spread; B is zero."""
    from peft import inject_adapter_in_model

    loaded, learned = adapted(start, dora=dora)
    stored = stored_tensors(loaded)
    ours = {
        one.name: adapters.initial(one.name, one.parameter.shape, 3, stored) for one in learned if ".lora_" in one.name
    }
    other = load(start)
    config = merge.lora_config(made_recipe(start, start, start, lora={"r": 4, "dora": dora}).lora, [LAYER])
    inject_adapter_in_model(config, other.model)
    theirs = {n: p for n, p in other.model.named_parameters() if ".lora_" in n}
    assert theirs and theirs.keys() <= ours.keys()
    for name, parameter in theirs.items():
        assert ours[name].shape == parameter.shape and ours[name].dtype == torch.float32
        if "lora_A" not in name:
            torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-6, atol=0)
    drawn = torch.cat([value.flatten() * math.sqrt(value.shape[1]) for name, value in ours.items() if "lora_A" in name])
    assert drawn.abs().max() <= 1 and drawn.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_a_function_of_seed_and_name_alone(start):
    def a(name, seed):
        return adapters.initial(f"{name}.lora_A.default.weight", (4, 64), seed, lambda name: torch.empty(0))

    assert torch.equal(a(LAYER, 3), a(LAYER, 3))
    torch.manual_seed(1)
    assert torch.equal(a(LAYER, 3), a(LAYER, 3))
    assert not torch.equal(a(LAYER, 3), a(LAYER, 4)) and not torch.equal(a(LAYER, 3), a(LAYER.replace("q", "k"), 3))
    with pytest.raises(ValueError, match="only adapters of linear layers"):
        adapters.initial("model.embed.lora_embedding_A.default", (4, 64), 0, lambda name: torch.empty(0))
