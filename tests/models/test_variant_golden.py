"""Our class against values that the original LLaVA computed from a checkpoint with a linear connector."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.models.test_golden_llava import IMAGE, ORIGINAL, WORDS, packed
from vistune.models.assembling import connectors
from vistune.models.families import family
from vistune.models.shipped.modeling_llava_variant import LlavaVariantConfig, LlavaVariantForConditionalGeneration
from vistune.models.towers import clip

NAME = "llava-linear"
VARIANT = family("llava_variant")
RENAMED = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.": "model.multi_modal_projector.0.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}


def ours(name):
    prefix = next(prefix for prefix in RENAMED if name.startswith(prefix))
    return RENAMED[prefix] + name.removeprefix(prefix)


@pytest.fixture(scope="module")
def golden():
    values = {k: torch.from_numpy(v) for k, v in np.load(ORIGINAL / "expected" / f"{NAME}.npz").items()}
    return values, json.loads((ORIGINAL / "expected" / f"{NAME}.json").read_text())


@pytest.fixture
def model():
    """The original's weights in our class, one vocabulary row added for the image's placeholder."""
    text = transformers.LlamaConfig.from_pretrained(ORIGINAL / "base-llm", vocab_size=WORDS + 1)
    vision = transformers.CLIPVisionConfig.from_pretrained(ORIGINAL / "clip-tiny-patch14-56")
    config = LlavaVariantConfig(
        connector_type="linear", vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = LlavaVariantForConditionalGeneration(config).eval()
    tensors = {ours(k): v.float() for k, v in load_file(ORIGINAL / NAME / "model.safetensors").items()}
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].mean(0, keepdim=True)])
    model.load_state_dict(tensors)
    VARIANT.parts(model)["vision"][0].requires_grad_(False)
    return model


def test_features_logits_loss_and_gradients(golden, model):
    values, facts = golden
    ids, positions, lengths, pixels = packed(values)
    assert lengths == facts["spliced_lengths"]
    features = clip.see(model.model.vision_tower, values["pixel_values"], model.config)
    assert (features - values["vision_features"]).abs().max() <= 1e-4
    assert (model.model.multi_modal_projector(features) - values["projected_features"]).abs().max() <= 1e-4
    whole = torch.stack(model.model.get_image_features(values["pixel_values"]).pooler_output)
    assert (whole - values["projected_features"]).abs().max() <= 1e-4

    hidden = VARIANT.hidden(model, ids, positions, lengths, pixels)
    starts = torch.tensor([0, *np.cumsum(lengths)[:-1]])
    row, place = values["supervised_index"].T
    logits = VARIANT.head(model)(hidden[starts[row] + place - 1])[:, :WORDS]
    assert (logits - values["supervised_logits"]).abs().max() <= 1e-4
    loss = torch.nn.functional.cross_entropy(logits, values["supervised_target"])
    assert abs(loss.item() - facts["loss"]) <= 5e-5
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = [name for name in values if name.startswith("grad.")]
    for name in compared:
        assert (gradients[ours(name.removeprefix("grad."))] - values[name]).abs().max() <= 1e-4, name
    assert any("mm_projector" in name for name in compared)
    for name, wanted in facts["grad_norm"].items():
        assert gradients[ours(name)].norm().item() == pytest.approx(wanted, rel=1e-4), name


def test_greedy_ids(golden, model):
    values, facts = golden
    VARIANT.hidden(model, *packed(values))
    pictures = iter(values["pixel_values"])
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 0
    for case in facts["generation"]:
        ids = [[IMAGE] * 16 if one == -200 else [one] for one in case["input_ids"]]
        images = [next(pictures) for _ in range(case["input_ids"].count(-200))]
        prompt = torch.tensor([[one for piece in ids for one in piece]])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(case["new_ids"]),
            do_sample=False,
            pad_token_id=0,
            **({"pixel_values": torch.stack(images)} if images else {}),
        )
        assert out[0, prompt.shape[1] :].tolist() == case["new_ids"]


@pytest.mark.parametrize("folder", ["stage1-linear", NAME])
def test_the_connector_alone_is_read_from_the_original(folder):
    read = connectors.read(ORIGINAL / folder)
    assert connectors.kind(read, folder) == "linear" and read["0.weight"].shape == (64, 32)
    stage1 = torch.load(ORIGINAL / "stage1-linear" / "mm_projector.bin", weights_only=True)
    full = load_file(ORIGINAL / NAME / "model.safetensors")
    held = stage1 if folder.startswith("stage1") else full
    assert torch.equal(read["0.weight"], held["model.mm_projector.weight"])
    assert torch.equal(read["0.bias"], held["model.mm_projector.bias"])
