"""The shipped parts are small, stock, and what the script makes; the script runs and repeats itself."""

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from vistune import chat
from vistune.quickstart import digits, pretrain, scenes, texts

PARTS = pretrain.PARTS


def test_six_megabytes_at_most():
    assert sum(file.stat().st_size for file in PARTS.rglob("*.safetensors")) <= 6_000_000
    assert sum(file.stat().st_size for file in PARTS.rglob("*") if file.is_file()) <= 6_000_000


@pytest.mark.parametrize("name", ["plain", "v1", "vicuna_v1", "llava_v1"])
def test_tokenizer_fits_the_templates_and_knows_their_words(name):
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "language")
    template = chat.template(name)
    chat.check_fits(template, tokenizer)
    pieces = tokenizer.tokenize(template.system)
    assert len(pieces) <= len(template.system.split()) + 8  # words are whole, punctuation is apart
    assert tokenizer.decode(tokenizer("Hé, 7 llamas?\n").input_ids, skip_special_tokens=True) == "Hé, 7 llamas?\n"


def test_vision_reads_held_out_digits():
    """A linear head fitted on training scans names the digits of held-out ones, from the state a connector reads."""
    draw = random.Random(1)
    model = CLIPVisionModel.from_pretrained(PARTS / "vision", dtype=torch.float32).eval()
    assert AutoImageProcessor.from_pretrained(PARTS / "vision").to_dict()["crop_size"] == {"height": 48, "width": 48}

    @torch.no_grad()
    def read(scans, count):
        pixels, cells = pretrain.pictures(count, scans.tolist(), draw, scenes.Jitter())
        states = model(pretrain.normalize(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        return torch.cat([states.flatten(0, 1), torch.ones(16 * count, 1)], 1), texts.spread(cells).flatten()

    train, held_out = digits.split()
    known, names = read(train, 200)
    head = torch.linalg.lstsq(known, torch.nn.functional.one_hot(names, 11).float()).solution
    seen, truth = read(held_out, 60)
    assert ((seen @ head).argmax(1) == truth).float().mean() > 0.95


@torch.no_grad()
def test_language_reads_pictures_told_in_words():
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "language")
    model = LlamaForCausalLM.from_pretrained(PARTS / "language", dtype=torch.float32).eval()
    told = texts.Texts(tokenizer, 5)
    right = total = 0
    for _ in range(3):
        ids, labels, places = told.batch(24)
        said = model(inputs_embeds=pretrain.told(model, told, ids, places, 0.0)).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        right += int((said == wanted)[wanted >= 0].sum())
        total += int((wanted >= 0).sum())
    assert right / total > 0.95


@pytest.mark.slow
def test_pretraining_repeats_itself(tmp_path):
    for name in "ab":
        pretrain.vision(tmp_path / name / "vision", seed=0, count=8, steps=2, batch=4)
        pretrain.language(tmp_path / name / "language", seed=0, steps=2, batch=2)
    for part in ("vision", "language"):
        a, b = (load_file(tmp_path / name / part / "model.safetensors") for name in "ab")
        shipped = load_file(PARTS / part / "model.safetensors")
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in shipped.items()}
    made, ours = ((folder / "language" / "tokenizer.json").read_text() for folder in (tmp_path / "a", PARTS))
    assert made == ours
