"""FastViTHD against maps, keys and counts recorded from the published code."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import FastVlmConfig

from tests.tiny_fastvlm import FASTVLM, SIZES, spread
from vistune.models.towers import fastvithd

MARK = "model.vision_tower."


@pytest.fixture(scope="module")
def golden():
    return load_file(FASTVLM / "expected.safetensors")


def tower():
    made = fastvithd.Tower(FastVlmConfig.from_pretrained(FASTVLM / "hf").vision_config)
    stored = load_file(FASTVLM / "hf" / "model.safetensors")
    made.load_state_dict({k.removeprefix(MARK): v for k, v in stored.items() if k.startswith(MARK)})
    return made.eval()


def random_tower():
    torch.manual_seed(0)
    made = fastvithd.FastViTHD(fastvithd.Sizes(tuple(SIZES["layers"]), tuple(SIZES["embed_dims"])))
    spread(made)
    return made


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def recorded_maps(model):
    """What the recorded names of the stages are in our tower."""
    stages = model.timm_model.stages
    found = {"patch_embed": model.timm_model.stem}
    number = 0
    for stage in stages:
        for module in (stage.downsample, stage.pos_emb, stage.blocks[-1]):
            if module is not None:
                found[f"network_{number}"] = module
                number += 1
    return found


@torch.no_grad()
def test_every_stage_is_the_recorded_one(golden):
    model, seen = tower(), {}
    for name, module in recorded_maps(model).items():
        module.register_forward_hook(lambda module, given, out, name=name: seen.__setitem__(name, out))
    model(golden["pixel_values_128"][:1])
    wanted = {k.removeprefix("stage_maps_128."): v for k, v in golden.items() if k.startswith("stage_maps_128.")}
    assert seen.keys() == wanted.keys() and len(wanted) == 12
    for name, value in wanted.items():
        assert seen[name].shape == value.shape
        assert relative(seen[name], value) <= 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("size", ["128", "256", "192x128"])
def test_map_and_features_are_the_recorded_ones(golden, size):
    model, pixels = tower(), golden[f"pixel_values_{size}"]
    assert relative(model(pixels).last_hidden_state, golden[f"tower_map_{size}"]) <= 1e-5
    features = fastvithd.see(model, pixels)
    assert features.shape == golden[f"tower_features_{size}"].shape
    assert relative(features, golden[f"tower_features_{size}"]) <= 1e-5


def test_keys_shapes_and_parameters_of_the_real_size():
    facts = json.loads((FASTVLM / "mobileclip_l_keys.json").read_text())
    with torch.device("meta"):
        model = fastvithd.Tower(FastVlmConfig().vision_config)
    ours = {MARK + name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == {name: one["shape"] for name, one in facts["hf"].items()}
    assert len(ours) == 628
    assert sum(p.numel() for p in model.parameters()) == facts["hf_parameters"] == 122_714_208


def test_a_frozen_tower_is_the_same_in_training_and_takes_no_gradient(golden):
    model = tower().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet = fastvithd.see(model, golden["pixel_values_128"])
    trained = fastvithd.see(model.train(), golden["pixel_values_128"])
    assert torch.equal(quiet, trained) and not trained.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_statistics_of_what_learns_move(golden):
    model = tower().requires_grad_(False)
    model.timm_model.stages[2].requires_grad_(True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    fastvithd.see(model.train(), golden["pixel_values_128"])
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert len(moved) == 9 and all("stages.2." in name for name in moved)


def test_recomputing_activations_changes_neither_gradients_nor_statistics():
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    seen = []
    for again in (False, True):
        model = random_tower().train()
        for module in model.modules():
            if again and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = lambda run, *given: torch.utils.checkpoint.checkpoint(
                    run, *given, use_reentrant=False
                )
        model(pixels).square().mean().backward()
        seen.append(([p.grad for p in model.parameters()], list(model.buffers())))
    for one, other in zip(*(gradients + buffers for gradients, buffers in seen), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_half_precision_norms_sum_in_fp32():
    norm = fastvithd.Norm(4).to(torch.bfloat16).train()
    reference = torch.nn.BatchNorm2d(4).train()
    map = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = norm(map)
    assert out.dtype == torch.bfloat16 and norm.num_batches_tracked == 1
    torch.testing.assert_close(out.float(), reference(map.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm.running_var.float(), reference.running_var, rtol=1e-2, atol=1e-2)


def test_operations_are_the_counted_ones():
    with torch.device("meta"):
        model = fastvithd.FastViTHD(fastvithd.Sizes())
    parts = fastvithd.operations(model, 512)
    ours = sum(a + b for part in (parts["stem"], *parts["stages"], parts["last"]) for a, b in part)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 512, 512, device="meta"))
    assert ours == counter.get_total_flops()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"architecture": "resnet50"}, "architecture is 'resnet50'"),
        ({"model_args": {"inference_mode": False}}, "unfolded branches"),
        ({"model_args": {"inference_mode": True, "token_mixers": []}}, "token_mixers"),
        ({"model_args": {"inference_mode": True, "layers": [1, 1]}}, "five layers"),
        ({"hidden_size": 100}, "hidden_size is 100"),
    ],
)
def test_another_tower_is_refused(said, error):
    config = FastVlmConfig().vision_config
    for key, value in said.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=error):
        fastvithd.Sizes.of(config)


def test_sides_that_give_no_whole_tokens_are_refused():
    with pytest.raises(ValueError, match="100 x 128 pixels"):
        fastvithd.see(tower(), torch.zeros(1, 3, 128, 100))
