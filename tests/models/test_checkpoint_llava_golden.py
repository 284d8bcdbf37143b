"""The original's checkpoints, opened as they lie, against what the original computed from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import GOLDEN
from vistune.models.checkpoints.llava_names import in_model
from vistune.models.load import load
from vistune.models.towers import clip

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"
WORDS = 1000
SLOTS = {0: [0], 1: [1, 2], 2: []}
"""Which of the original's image slots a row has; the one it spends on a text-only row is left out."""
EXPECTED = {
    "llava-mlp2x_gelu": "llava-mlp2x_gelu",
    "llava-mlp2x_gelu-hubstyle": "llava-mlp2x_gelu",
    "llava-linear": "llava-linear",
    "llava-anyres-spatial_unpad": "llava-anyres-spatial_unpad",
    "llava-lora-mlp2x_gelu": "llava-lora-mlp2x_gelu-merged",
}


@dataclass
class Case:
    """A checkpoint as it is opened, and what is known of it."""

    loaded: Any
    values: dict[str, torch.Tensor]
    facts: dict[str, Any]
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self):
        self.sizes = self.facts["image_sizes"] or [(56, 56)] * 4

    def pixels(self, slot):
        """Of one image: [3, H, W], or [tiles, 3, H, W]."""
        tiles = f"pixel_values_{slot}"
        return self.values[tiles] if tiles in self.values else self.values["pixel_values"][slot]

    def spread(self, ids, slots):
        """Ids with every image as its placeholders."""
        sizes, parts = iter(self.sizes[slot] for slot in slots), []
        for one in ids:
            count = self.loaded.layout.tokens(*next(sizes)) if one == -200 else 1
            parts += [self.loaded.image_token_id if one == -200 else int(one)] * count
        return torch.tensor(parts)

    def pack(self, rows):
        """What `Family.hidden` takes of these rows of the golden batch."""
        ids = [
            self.spread(self.values["input_ids"][row][self.values["attention_mask"][row]], SLOTS[row]) for row in rows
        ]
        slots = [slot for row in rows for slot in SLOTS[row]]
        grids = [grid for slot in slots if (grid := self.loaded.layout.grid(*self.sizes[slot])) is not None]
        shown = [self.pixels(slot) for slot in slots]
        pixels = (torch.cat(shown) if grids else torch.stack(shown)) if shown else None
        positions = torch.cat([torch.arange(len(one)) for one in ids])
        lengths = [len(one) for one in ids]
        return torch.cat(ids), positions, lengths, pixels, torch.tensor(grids) if grids else None

    def logits(self, rows):
        """Logits that predict the supervised tokens of these rows, in the words the original knows."""
        pack = self.pack(rows)
        hidden = self.loaded.family.hidden(self.loaded.model, *pack)
        starts = dict(zip(rows, np.cumsum([0, *pack[2]])[:-1].tolist(), strict=True))
        places = [starts[row] + place - 1 for row, place in self.values["supervised_index"].tolist() if row in rows]
        return self.loaded.family.head(self.loaded.model)(hidden[places])[:, :WORDS]


@pytest.fixture(scope="module", params=list(EXPECTED))
def case(request):
    base = ORIGINAL / "base-llm" if "lora" in request.param else None
    loaded = load(ORIGINAL / request.param, base=base)
    expected = ORIGINAL / "expected" / EXPECTED[request.param]
    values = {name: torch.from_numpy(value) for name, value in np.load(f"{expected}.npz").items()}
    return Case(loaded, values, json.loads(expected.with_name(f"{expected.name}.json").read_text()))


def test_lengths_and_features(case):
    assert case.pack((0, 1, 2))[2] == case.facts["spliced_lengths"]
    seen = torch.cat([case.pixels(slot).reshape(-1, 3, 56, 56) for slot in range(4)])
    model = case.loaded.model.model
    with torch.no_grad():
        features = clip.see(model.vision_tower, seen, model.config)
        projected = model.multi_modal_projector(features)
    assert (features - case.values["vision_features"]).abs().max() <= 1e-4
    assert (projected - case.values["projected_features"]).abs().max() <= 1e-4


@torch.no_grad()
def test_the_class_itself_gives_these_features(case):
    if "pixel_values" not in case.values:
        pytest.skip("tiles: the class lays them out, and its logits are compared")
    given = case.loaded.model.model.get_image_features(case.values["pixel_values"]).pooler_output
    assert (torch.stack(list(given)) - case.values["projected_features"]).abs().max() <= 1e-4


def test_logits_loss_and_gradients(case):
    model = case.loaded.model
    for part, modules in case.loaded.family.parts(model).items():
        for module in modules:
            module.requires_grad_(part != "vision")
    logits = case.logits((0, 1, 2))
    assert (logits - case.values["supervised_logits"]).abs().max() <= 1e-4
    loss = torch.nn.functional.cross_entropy(logits, case.values["supervised_target"])
    assert abs(loss.item() - case.facts["loss"]) <= 5e-5
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name.removeprefix("grad."): value for name, value in case.values.items() if name.startswith("grad.")}
    assert len(wanted) in (0, len(list(model.model.multi_modal_projector.parameters())))
    for name, value in wanted.items():
        assert (gradients[in_model(name, case.loaded.family)] - value).abs().max() <= 1e-4, name
    norms = case.facts.get("grad_norm", {})
    assert bool(norms) == bool(wanted) and len(norms) in (0, len(gradients))
    for name, norm in norms.items():
        assert gradients[in_model(name, case.loaded.family)].norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not any("vision_tower" in name for name in gradients)
    model.zero_grad()


@torch.no_grad()
def test_each_sample_alone(case):
    for row, wanted in enumerate(case.facts["per_sample_loss"]):
        targets = case.values["supervised_target"][case.values["supervised_index"][:, 0] == row]
        assert abs(torch.nn.functional.cross_entropy(case.logits((row,)), targets).item() - wanted) <= 5e-5


@torch.no_grad()
def test_greedy_ids(case):
    loaded, slots = case.loaded, iter(range(4))
    for asked in case.facts["generation"]:
        shown = [next(slots) for _ in range(asked["input_ids"].count(-200))]
        ids = case.spread(asked["input_ids"], shown)[None]
        grids = [grid for slot in shown if (grid := loaded.layout.grid(*case.sizes[slot])) is not None]
        images = loaded.family.inputs([case.pixels(slot) for slot in shown], grids) if shown else {}
        out = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(asked["new_ids"]),
            do_sample=False,
            suppress_tokens=list(range(WORDS, loaded.config.text_config.vocab_size)),
            **images,
        )
        assert out[0, ids.shape[1] :].tolist() == asked["new_ids"]
