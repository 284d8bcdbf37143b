"""LLaVA-NeXT's folders: made from a llava model's parts, proved, trained, opened by the stock classes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from tests.models.test_llava_next_family import LAYOUT
from tests.test_generate import stock_answer
from tests.tiny import tiny_language, tiny_vision
from vistune import images
from vistune.generate import Chat, answer_batch
from vistune.models import weights
from vistune.models.assemble import assemble as assemble_llava
from vistune.models.assembling.llava_next import assemble, cut_into_tiles
from vistune.models.load import check_save, describe, load, save
from vistune.models.proving.verify import verify
from vistune.samples import Image

SIZES = [(97, 140), (200, 60), (30, 31)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    tiny_vision(path / "clip", full=True)
    tiny_vision(path / "siglip", "siglip")
    for kind in ("llama", "mistral", "qwen2"):
        tiny_language(path / kind, kind, tied=kind == "qwen2")
    return path


@pytest.fixture(scope="module")
def stage0(parts):
    assemble(parts / "clip", parts / "llama", parts / "stage0")
    return parts / "stage0"


def noise(size, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(drawn)


@pytest.mark.parametrize(
    ("vision", "language", "template"),
    [("clip", "llama", "v1"), ("siglip", "qwen2", "qwen_2"), ("clip", "mistral", "mistral_instruct")],
)
def test_the_stock_classes_open_a_folder_and_compute_the_same(parts, tmp_path, vision, language, template):
    said = {"template": template, "select_layer": -1 if vision == "siglip" else -2}
    assemble(parts / vision, parts / language, tmp_path / "out", **said)
    assert verify(tmp_path / "out", vision=parts / vision, language=parts / language).ok
    ours = load(tmp_path / "out")
    stock, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock) is transformers.LlavaNextForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    pictures = [noise(size, seed) for seed, size in enumerate(SIZES)]
    content = [*[{"type": "image"}] * 3, {"type": "text", "text": "\nWhat are these?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor(text=text, images=pictures, return_tensors="pt")

    pixels = [images.normalize(torch.from_numpy(ours.layout.prepare(p)), ours.layout, torch.float32) for p in pictures]
    grids = [ours.layout.grid(*size) for size in SIZES]
    inputs = ours.family.inputs(pixels, grids)
    assert (inputs["pixel_values"] - asked["pixel_values"]).abs().max() <= 1e-6
    assert torch.equal(inputs["image_sizes"], asked["image_sizes"])
    ids = asked["input_ids"][0]
    assert (ids == ours.image_token_id).sum() == sum(ours.layout.tokens(*size) for size in SIZES)
    batch = ids, torch.arange(len(ids)), [len(ids)], torch.cat(pixels), torch.tensor(grids)
    hidden = ours.family.hidden(ours.model, *batch)
    assert (ours.family.head(ours.model)(hidden) - stock(**asked).logits[0]).abs().max() <= 1e-5


def test_names_are_the_published_ones_and_saving_keeps_every_tensor(stage0, tmp_path):
    names = set(weights.stored(stage0))
    assert {
        "image_newline",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    } <= names
    loaded = load(stage0)
    assert (loaded.family.name, loaded.layout.mode, loaded.layout) == ("llava_next", "anyres", LAYOUT)
    save(loaded, tmp_path / "again", frozen_from=loaded.source, card="")
    again = weights.stored(tmp_path / "again")
    assert again.keys() == names
    for name, entry in weights.stored(stage0).items():
        assert entry.dtype == again[name].dtype and torch.equal(entry.read(), again[name].read())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (stage0, tmp_path / "again"))
    assert before == after
    stock = transformers.LlavaNextForConditionalGeneration.from_pretrained(stage0)
    stock.save_pretrained(tmp_path / "stock")
    assert set(weights.stored(tmp_path / "stock")) == names


def test_a_trained_connector_is_taken_along(parts, tmp_path):
    assemble_llava(parts / "clip", parts / "llama", tmp_path / "first", template="plain", image="square", seed=5)
    assemble(parts / "clip", parts / "llama", tmp_path / "next", connector=tmp_path / "first")
    cut_into_tiles(tmp_path / "first", tmp_path / "cut", pinpoints=[[56, 112], [112, 56]], seed=1)
    first, other, cut = (weights.stored(tmp_path / name) for name in ("first", "next", "cut"))
    assert other.keys() == cut.keys() == first.keys() | {"image_newline"}
    for name in first:
        assert torch.equal(first[name].read(), other[name].read()) and torch.equal(first[name].read(), cut[name].read())
    assert not torch.equal(other["image_newline"].read(), cut["image_newline"].read())
    assert other["image_newline"].read().norm() == pytest.approx(1, abs=0.3)
    assert describe(tmp_path / "cut").layout.pinpoints == ((56, 112), (112, 56))
    assert describe(tmp_path / "cut").template_name == "plain" and describe(tmp_path / "next").template_name == "v1"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cut", "first", "next"]
    with pytest.raises(ValueError, match="what these parts make: a llava_variant model"):
        assemble(parts / "clip", parts / "llama", tmp_path / "odd", connector_type="linear")
    with pytest.raises(ValueError, match="cut: a llava_next model"):
        cut_into_tiles(tmp_path / "cut", tmp_path / "twice")
    with pytest.raises(ValueError, match="whole tiles of 56"):
        cut_into_tiles(tmp_path / "first", tmp_path / "odd", pinpoints=[[336, 1000]])
    assemble_llava(parts / "clip", parts / "llama", tmp_path / "class", select="cls_patch")
    with pytest.raises(ValueError, match="set it to 'default'"):
        cut_into_tiles(tmp_path / "class", tmp_path / "odd")


def test_options_and_images_of_a_recipe(stage0, tmp_path):
    assert describe(stage0, image="anyres").layout == LAYOUT
    chosen = load(stage0, options={"pinpoints": [[168, 168]]})
    assert chosen.layout.tokens(100, 100) == 16 + 12 * 13
    save(chosen, tmp_path / "chosen", card="")
    assert describe(tmp_path / "chosen").layout == chosen.layout  # the folder carries them itself
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "chosen").image_processor.image_grid_pinpoints == [
        [168, 168]
    ]
    with pytest.raises(ValueError, match="takes pictures in tiles"):
        describe(stage0, image="pad")
    with pytest.raises(ValueError, match="no such option; it has pinpoints"):
        describe(stage0, options={"grid": 3})
    check_save(load(stage0), tmp_path / "dry")


def test_a_folder_without_its_end_of_line_is_refused(stage0, tmp_path):
    shutil.copytree(stage0, tmp_path / "cut")
    kept = {name: entry for name, entry in weights.stored(stage0).items() if name != "image_newline"}
    weights.write_file(tmp_path / "cut" / weights.SINGLE, kept)
    with pytest.raises(ValueError, match=r"1 weights are missing. The first:\n  image_newline"):
        load(tmp_path / "cut")


def test_answers_are_the_stock_ones(stage0, tmp_path):
    paths = []
    for seed, size in enumerate(SIZES):
        noise(size, seed).save(tmp_path / f"{seed}.png")
        paths.append(Image(path=str(tmp_path / f"{seed}.png")))
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is there?"}]
    messages = [{"role": "user", "content": content}]
    loaded, expected = load(stage0), [stock_answer(stage0, messages, [picture], 8) for picture in paths]
    assert "".join(Chat(loaded).ask("What is there?", paths[:1], max_new_tokens=8)) == expected[0]
    asked = [("What is there?", [picture]) for picture in paths]
    assert answer_batch(loaded, asked, max_new_tokens=8, batch=3) == expected
