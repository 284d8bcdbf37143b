"""Layers computed twice: the same loss and gradients as held ones, in less memory."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel

from vistune.models import attention
from vistune.models.language import hidden
from vistune.models.towers.fastvithd import FastViTHD, Sizes
from vistune.train.spreading import recompute

LENGTHS = [20, 7, 7, 30]


class Of:
    """A family that has these layers."""

    def __init__(self, layers, part="language"):
        self.held, self.part = layers, part

    def layers(self, model, part):
        return self.held if part == self.part else []


def settings(kind, vision=None):
    return SimpleNamespace(checkpointing=kind, checkpointing_vision=vision)


def llama(adapters=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=5)).train()
    attention.use(model)
    if adapters:
        torch.manual_seed(1)
        names = ["q_proj", "v_proj", "up_proj", "down_proj"]
        found = LoraConfig(r=4, target_modules=names, lora_dropout=0.5, init_lora_weights=False)
        model = inject_adapter_in_model(found, model)
    return model


class Held(TorchDispatchMode):
    """Bytes of what operators made and is still there, views of weights apart."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self.weights:
                    self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def bytes(self):
        return sum(size for there, size in self.storages.values() if there() is not None)


def run(model, counted=True):
    """Loss, gradients and the bytes held between forward and backward, where they are `counted`: that hides the layers
    from the compiler."""
    embeds = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    torch.manual_seed(3)
    with Held(model) if counted else nullcontext() as held:
        out = hidden(model, embeds, places, LENGTHS)
    size = held.bytes() if held else 0
    loss = out.pow(2).sum()
    loss.backward()
    gradients = [embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return loss.detach(), gradients, size


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_same_gradients_in_less_memory(adapters):
    """With adapters there is dropout too, which must fall the same way twice."""
    found = {}
    for kind in ("none", "selective", "full"):
        model = llama(adapters)
        recompute.wrap(model, Of(model.layers), settings(kind))
        found[kind] = run(model)
    for kind in ("selective", "full"):
        torch.testing.assert_close(found[kind][0], found["none"][0], rtol=0, atol=0)
        for mine, theirs in zip(found[kind][1], found["none"][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    none, selective, full = (found[kind][2] for kind in ("none", "selective", "full"))
    assert full < 0.5 * selective and selective < 0.7 * none


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def calls(kind):
    model = llama()
    recompute.wrap(model, Of(model.layers), settings(kind))
    with Counted() as counted:
        run(model)
    return counted.calls


def test_selective_runs_attention_and_the_products_once():
    none, selective, full = (calls(kind) for kind in ("none", "selective", "full"))
    dear = torch.ops.vistune.packed_attention.default
    assert (none[dear], selective[dear], full[dear]) == (2, 2, 4)
    product = torch.ops.aten.mm.default
    assert selective[product] == none[product] < full[product]


def test_a_layer_in_evaluation_or_without_gradients_is_run_as_it_is():
    model = llama()
    recompute.wrap(model, Of(model.layers), settings("full"))
    names = list(model.state_dict())
    assert names == list(llama().state_dict())
    model.eval()
    with Counted() as counted:
        run(model)
    assert counted.calls[torch.ops.vistune.packed_attention.default] == 2


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_statistics_of_batch_norms_move_once(kind):
    def tower():
        torch.manual_seed(0)
        return FastViTHD(Sizes((1, 1, 1, 1, 1), (32, 32, 32, 64, 64))).train()

    plain, twice = tower(), tower()
    recompute.wrap(twice, Of(twice.stages, "vision"), settings("none", vision=kind))
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    for one in (plain, twice):
        one(pixels).pow(2).mean().backward()
    for (name, mine), theirs in zip(twice.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    for (name, mine), theirs in zip(twice.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_vision_and_language_are_wrapped_apart():
    layers = nn.ModuleList([nn.Linear(4, 4)])
    recompute.wrap(layers, Of(layers, "vision"), settings("full", vision="none"))
    assert "forward" not in vars(layers[0])
    recompute.wrap(layers, Of(layers, "vision"), settings("none", vision="full"))
    assert "forward" in vars(layers[0])
