"""The packed forward against values that the original LLaVA computed from its own checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.tiny import GOLDEN
from vistune.models.families import family
from vistune.models.towers import clip

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"
NAME, IMAGE, WORDS = "llava-mlp2x_gelu", 1000, 1000
LLAVA = family("llava")

# The original's names in the stock class; the longest prefix that fits counts.
RENAMED = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}


def stock_name(name):
    prefix = next(prefix for prefix in RENAMED if name.startswith(prefix))
    return RENAMED[prefix] + name.removeprefix(prefix)


@pytest.fixture(scope="module")
def golden():
    values = {k: torch.from_numpy(v) for k, v in np.load(ORIGINAL / "expected" / f"{NAME}.npz").items()}
    return values, json.loads((ORIGINAL / "expected" / f"{NAME}.json").read_text())


@pytest.fixture
def model():
    """The original's weights in the stock class, one vocabulary row added for the image's placeholder."""
    folder = ORIGINAL / NAME
    text = transformers.LlamaConfig.from_pretrained(ORIGINAL / "base-llm", vocab_size=WORDS + 1)
    vision = transformers.CLIPVisionConfig.from_pretrained(ORIGINAL / "clip-tiny-patch14-56")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tensors = {stock_name(k): v.float() for k, v in load_file(folder / "model.safetensors").items()}
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].mean(0, keepdim=True)])
    model.load_state_dict(tensors)
    LLAVA.parts(model)["vision"][0].requires_grad_(False)
    return model


def packed(values, rows=(0, 1, 2)):
    """The golden batch as one pack; the slot that the original spends on a text-only row is left out."""
    ids, positions, lengths = [], [], []
    for row in rows:
        seen = values["input_ids"][row][values["attention_mask"][row]]
        parts = [torch.full((16,), IMAGE) if one == -200 else one[None] for one in seen]
        ids.append(torch.cat(parts))
        lengths.append(len(ids[-1]))
        positions.append(torch.arange(lengths[-1]))
    return torch.cat(ids), torch.cat(positions), lengths, values["pixel_values"][:3]


def test_lengths_features_logits_loss_and_gradients(golden, model):
    values, facts = golden
    ids, positions, lengths, pixels = packed(values)
    assert lengths == facts["spliced_lengths"]

    features = clip.see(model.model.vision_tower, values["pixel_values"], model.config)
    assert (features - values["vision_features"]).abs().max() <= 1e-4
    projected = model.model.multi_modal_projector(features)
    assert (projected - values["projected_features"]).abs().max() <= 1e-4

    hidden = LLAVA.hidden(model, ids, positions, lengths, pixels)
    starts = torch.tensor([0, *np.cumsum(lengths)[:-1]])
    row, place = values["supervised_index"].T
    logits = LLAVA.head(model)(hidden[starts[row] + place - 1])[:, :WORDS]
    assert (logits - values["supervised_logits"]).abs().max() <= 1e-4

    loss = torch.nn.functional.cross_entropy(logits, values["supervised_target"])
    assert abs(loss.item() - facts["loss"]) <= 5e-5
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for name, wanted in values.items():
        if name.startswith("grad."):
            assert (gradients[stock_name(name.removeprefix("grad."))] - wanted).abs().max() <= 1e-4, name
            compared += 1
    assert compared == 4
    for name, wanted in facts["grad_norm"].items():
        assert gradients[stock_name(name)].norm().item() == pytest.approx(wanted, rel=1e-4), name
    assert not any("vision_tower" in name for name in gradients)


def test_one_sample_alone_gives_its_own_loss(golden, model):
    values, facts = golden
    slots = {0: values["pixel_values"][:1], 1: values["pixel_values"][1:3], 2: None}
    for number, images in slots.items():
        ids, positions, lengths, _ = packed(values, (number,))
        with torch.no_grad():
            hidden = LLAVA.hidden(model, ids, positions, lengths, images)
        chosen = values["supervised_index"][:, 0] == number
        places = values["supervised_index"][chosen, 1] - 1
        logits = LLAVA.head(model)(hidden[places])[:, :WORDS]
        loss = torch.nn.functional.cross_entropy(logits, values["supervised_target"][chosen])
        assert abs(loss.item() - facts["per_sample_loss"][number]) <= 5e-5


def test_greedy_ids(golden, model):
    """Through the stock generate after a packed forward, so with our attention in place."""
    values, facts = golden
    LLAVA.hidden(model, *packed(values))
    pictures = iter(values["pixel_values"])
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 0
    for case in facts["generation"]:
        ids = [[IMAGE] * 16 if one == -200 else [one] for one in case["input_ids"]]
        images = [next(pictures) for _ in range(case["input_ids"].count(-200))]
        asked = {"pixel_values": torch.stack(images)} if images else {}
        prompt = torch.tensor([[one for piece in ids for one in piece]])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(case["new_ids"]),
            do_sample=False,
            pad_token_id=0,
            **asked,
        )
        assert out[0, prompt.shape[1] :].tolist() == case["new_ids"]
