"""LLaVA-NeXT against values that the original LLaVA computed from its own checkpoint with anyres and spatial_unpad."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.models.test_golden_llava import stock_name
from tests.tiny import GOLDEN
from vistune.anyres import AnyresLayout
from vistune.images import normalize, open_image
from vistune.models.families import family
from vistune.models.families.llava_next import config_from_original
from vistune.models.towers import clip
from vistune.samples import Image

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"
NAME, IMAGE, WORDS = "llava-anyres-spatial_unpad", 1000, 1000
NEXT = family("llava_next")


@pytest.fixture(scope="module")
def golden():
    values = {k: torch.from_numpy(v) for k, v in np.load(ORIGINAL / "expected" / f"{NAME}.npz").items()}
    return values, json.loads((ORIGINAL / "expected" / f"{NAME}.json").read_text())


@pytest.fixture(scope="module")
def layout(model):
    tower = json.loads((ORIGINAL / "clip-tiny-patch14-56" / "preprocessor_config.json").read_text())
    return AnyresLayout.from_processor(tower, patch=14, pinpoints=model.config.image_grid_pinpoints)


@pytest.fixture(scope="module")
def model():
    """The original's weights in the stock class, one vocabulary row added for the image's placeholder."""
    raw = json.loads((ORIGINAL / NAME / "config.json").read_text())
    config = config_from_original(
        raw,
        vision_config=transformers.CLIPVisionConfig.from_pretrained(ORIGINAL / "clip-tiny-patch14-56"),
        text_config=transformers.LlamaConfig.from_pretrained(ORIGINAL / "base-llm", vocab_size=WORDS + 1),
        image_token_id=IMAGE,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    tensors = load_file(ORIGINAL / NAME / "model.safetensors")
    newline = tensors.pop("model.image_newline")
    tensors = {stock_name(name): tensor for name, tensor in tensors.items()} | {"model.image_newline": newline}
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(1, 64)])
    model.load_state_dict(tensors)
    return model.requires_grad_(False)


SLOTS = {0: [0], 1: [1, 2], 2: []}
"""Which of the original's image slots a row has; the one it spends on a text-only row is left out."""


def packed(values, facts, layout, rows=(0, 1, 2)):
    ids, positions, lengths, tiles, grids = [], [], [], [], []
    for row in rows:
        slots, parts = iter(SLOTS[row]), []
        for one in values["input_ids"][row][values["attention_mask"][row]]:
            if one != -200:
                parts.append(one[None])
                continue
            slot = next(slots)
            size = facts["image_sizes"][slot]
            parts.append(torch.full((layout.tokens(*size),), IMAGE))
            tiles.append(values[f"pixel_values_{slot}"])
            grids.append(layout.grid(*size))
        ids.append(torch.cat(parts))
        lengths.append(len(ids[-1]))
        positions.append(torch.arange(lengths[-1]))
    pixels = torch.cat(tiles) if tiles else None
    return torch.cat(ids), torch.cat(positions), lengths, pixels, torch.tensor(grids) if grids else None


def test_pictures_become_the_originals_pixels(golden, layout):
    values, facts = golden
    names = [name for sample in facts["samples"] for name in sample["images"]]
    for slot, name in enumerate(names):
        picture = open_image(Image(path=str(GOLDEN / "llava" / "images" / name)))
        pixels = normalize(torch.from_numpy(layout.prepare(picture)), layout, torch.float32)
        assert (pixels - values[f"pixel_values_{slot}"]).abs().max() <= 1e-6
        assert layout.tokens(*picture.size) == facts["image_token_counts"][slot]


def test_features_embeddings_logits_and_loss(golden, model, layout):
    values, facts = golden
    ids, positions, lengths, pixels, grids = packed(values, facts, layout)
    assert lengths == facts["spliced_lengths"]

    features = clip.see(
        model.model.vision_tower, torch.cat([values[f"pixel_values_{i}"] for i in range(4)]), model.config
    )
    assert (features - values["vision_features"]).abs().max() <= 1e-4
    projected = model.model.multi_modal_projector(features)
    assert (projected - values["projected_features"]).abs().max() <= 1e-4

    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    hidden = NEXT.hidden(model, ids, positions, lengths, pixels, grids)
    hook.remove()
    wanted = values["spliced_inputs_embeds"][values["spliced_attention_mask"]]
    assert (seen[0][0] - wanted).abs().max() <= 1e-4

    starts = torch.tensor([0, *np.cumsum(lengths)[:-1]])
    row, place = values["supervised_index"].T
    logits = NEXT.head(model)(hidden[starts[row] + place - 1])[:, :WORDS]
    assert (logits - values["supervised_logits"]).abs().max() <= 1e-4
    loss = torch.nn.functional.cross_entropy(logits, values["supervised_target"])
    assert abs(loss.item() - facts["loss"]) <= 5e-5


@pytest.mark.parametrize("number", SLOTS)
def test_one_sample_alone_gives_its_own_loss(golden, model, layout, number):
    values, facts = golden
    hidden = NEXT.hidden(model, *packed(values, facts, layout, (number,)))
    chosen = values["supervised_index"][:, 0] == number
    places = values["supervised_index"][chosen, 1] - 1
    logits = NEXT.head(model)(hidden[places])[:, :WORDS]
    loss = torch.nn.functional.cross_entropy(logits, values["supervised_target"][chosen])
    assert abs(loss.item() - facts["per_sample_loss"][number]) <= 5e-5


def test_greedy_ids(golden, model, layout):
    """Through the stock generate after a packed forward, so with our attention in place."""
    values, facts = golden
    NEXT.hidden(model, *packed(values, facts, layout))
    for number, case in enumerate(facts["generation"]):
        sizes = [facts["image_sizes"][slot] for slot in SLOTS[number]][: case["input_ids"].count(-200)]
        tiles = [values[f"pixel_values_{slot}"] for slot in SLOTS[number]][: len(sizes)]
        left = iter(sizes)
        ids = [[IMAGE] * layout.tokens(*next(left)) if one == -200 else [one] for one in case["input_ids"]]
        prompt = torch.tensor([[one for piece in ids for one in piece]])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(case["new_ids"]),
            do_sample=False,
            pad_token_id=0,
            **(NEXT.inputs(tiles, [layout.grid(*size) for size in sizes]) if sizes else {}),
        )
        assert out[0, prompt.shape[1] :].tolist() == case["new_ids"]
