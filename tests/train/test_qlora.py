"""Adapters beside quantised matrices: where they land, what learns, and the steps of the same adapters on the matrices
turned back, in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.made import made_recipe, stage0
from vistune.models import lowbit, quantize
from vistune.models.load import outline, stored_tensors
from vistune.train import adapters, learn

pytest.importorskip("bitsandbytes", reason="extra quant")
IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return stage0(tmp_path_factory.mktemp("start"), "qwen2", "qwen_2")


def recipe_of(start, **lora):
    return made_recipe(
        *(start, start / "data.json", start / "run"),
        learn={"connector": 1e-3, "language": 1e-2},
        lora={"r": 4, "alpha": 8, **lora},
    )


def filled(start, recipe):
    """The model as a run makes it, one tensor after the other: laid out, then given memory."""
    loaded = outline(start)
    learned = learn.apply(loaded.model, loaded.family, recipe)
    stored = stored_tensors(loaded)
    for path, module in loaded.model.named_modules():
        pieces = module.pieces(stored(f"{path}.weight".replace(".base_layer", ""))) if hasattr(module, "pieces") else {}
        for leaf, held in module._parameters.items():
            if held is None:
                continue
            name = f"{path}.{leaf}"
            value = pieces.get(leaf)
            if value is None:
                adapter = ".lora_" in name
                value = (
                    adapters.initial(name, held.shape, 3, stored)
                    if adapter
                    else stored(name.replace(".base_layer", ""))
                )
            module._parameters[leaf] = nn.Parameter(value.clone().to(held.dtype), requires_grad=held.requires_grad)
    return loaded, learn.again(loaded.model, learned)


def turned_back(loaded, learned):
    """The same adapters on plain linear layers with the matrices turned back."""
    model = copy.deepcopy(loaded.model)
    for path, module in list(model.named_modules()):
        if isinstance(module, lowbit.Quantized):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(path, plain)
    return model, learn.again(model, learned)


def trained(model, learned, steps=3):
    """Losses of a few steps of AdamW on next tokens."""
    model.train()
    adamw = torch.optim.AdamW([one.parameter for one in learned], lr=1e-2)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        logits = model(input_ids=IDS).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], IDS[0, 1:])
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("quantised", "more"),
    [
        ({"quantize": "4bit"}, {}),
        ({"quantize": "4bit", "double_quant": True}, {"rslora": True}),
        ({"quantize": "4bit"}, {"dropout": 0.1}),
        ({"quantize": "4bit"}, {"dora": True}),
        ({"quantize": "8bit"}, {}),
        ({"quantize": "8bit"}, {"dora": True, "rslora": True}),
    ],
)
def test_the_steps_are_those_on_the_matrices_turned_back(start, quantised, more):
    loaded, learned = filled(start, recipe_of(start, **quantised, **more))
    model, plain = turned_back(loaded, learned)
    ours, theirs = trained(loaded.model, learned), trained(model, plain)
    assert ours == pytest.approx(theirs, rel=1e-5) and ours[-1] < ours[0]
    for one, other in zip(learned, plain, strict=True):
        torch.testing.assert_close(one.parameter, other.parameter, rtol=1e-3, atol=1e-5, msg=one.name)
    held = {name: p for name, p in loaded.model.named_parameters() if not p.requires_grad}
    assert sum(name.endswith((".packed", ".rows")) for name in held) == 14


@pytest.mark.parametrize("kind", lowbit.KINDS)
def test_on_the_meta_device_every_language_matrix_but_the_head(start, kind):
    loaded = outline(start)
    plain = learn.describe(loaded.model, loaded.family, [])
    paths = quantize.linear_paths(loaded.model, loaded.family)
    learned = learn.apply(loaded.model, loaded.family, recipe_of(start, quantize=kind))
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    quantised = [path for path, one in loaded.model.named_modules() if isinstance(one, lowbit.Quantized)]
    assert quantised == [f"{path}.base_layer" for path in paths] and len(paths) == 14
    assert {one.name for one in learned} == {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in one.name for one in learned if one.key == "language")
    rows = learn.describe(loaded.model, loaded.family, learned)
    for (part, total, _, _), (_, now, learning, _) in zip(plain, rows, strict=True):
        assert now == total + (learning if part == "language" else 0)  # a quantised value is a value


def test_what_cannot_be_had_together(start):
    with pytest.raises(ValueError, match=r"^lora.dora with lora.dropout = 0.1 and lora.quantize = 4bit: DoRA"):
        filled(start, recipe_of(start, quantize="4bit", dora=True, dropout=0.1))
    with pytest.raises(ValueError, match="quantised matrices cannot learn; add adapters"):
        made_recipe(start, start, start, lora={"quantize": "4bit"})
