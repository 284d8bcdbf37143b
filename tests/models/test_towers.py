"""Vision towers of every kind: which tokens they give, and that they are what the stock classes compute."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_llava_family import pack, samples, score
from tests.tiny import tiny_language, tiny_vision
from vistune import images
from vistune.models.assemble import assemble
from vistune.models.assembling import parts
from vistune.models.families import family
from vistune.models.load import load
from vistune.models.proving.verify import verify
from vistune.models.shipped.modeling_llava_variant import LlavaVariantForConditionalGeneration
from vistune.models.towers import clip

PATCHES, REGISTERS = 16, 4
# What is assembled: tower, its options, what of it is used; then the family that holds it, and the tokens of an image.
CASES = {
    "clip": ("clip", {}, {}, "llava", PATCHES),
    "clip with its class token": ("clip", {}, {"select": "cls_patch"}, "llava", PATCHES + 1),
    "siglip, last layer": ("siglip", {}, {"select_layer": -1}, "llava", PATCHES),
    "siglip 2 of one size": ("siglip", {"full": True}, {}, "llava", PATCHES),
    "siglip 2 of 384 by 14": ("siglip", {"image_size": 60}, {}, "llava", PATCHES),  # the last pixels are in no patch
    "dinov2": ("dinov2", {}, {}, "llava", PATCHES),
    "dinov2, last layer": ("dinov2", {}, {"select_layer": -1}, "llava", PATCHES),
    "dinov2 with its class token": ("dinov2", {}, {"select": "cls_patch"}, "llava", PATCHES + 1),
    "dinov2 at another size": ("dinov2", {"crop": 42}, {}, "llava", 9),
    "dinov2 padded": ("dinov2", {}, {"image": "pad"}, "llava", PATCHES),
    "registers": ("dinov2_with_registers", {}, {"select": "cls_patch"}, "llava", PATCHES + 1 + REGISTERS),
    "without registers": ("dinov2_with_registers", {}, {}, "llava_variant", PATCHES),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("towers")
    tiny_language(path / "llama")
    for name, (kind, more, used, *_) in CASES.items():
        tower = tiny_vision(path / "parts" / name, kind, **more)
        assemble(tower, path / "llama", path / name, **{"image": "square"} | used)
    return path


def stock(folder):
    said = json.loads((folder / "config.json").read_text())["model_type"]
    made = transformers.LlavaForConditionalGeneration if said == "llava" else LlavaVariantForConditionalGeneration
    return made.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_the_stock_class_with_its_gradients(folders, name):
    loaded, whole, tokens = load(folders / name), stock(folders / name), CASES[name][-1]
    assert loaded.family.name == CASES[name][3]
    side = loaded.layout.size
    torch.manual_seed(0)
    ids, pixels = samples(patches=tokens)
    ids = [torch.where(one == 1003, loaded.image_token_id, one) for one in ids]
    pixels = [torch.randn(len(seen), 3, side, side) for seen in pixels]
    expected = [
        whole(input_ids=one[None], pixel_values=seen if len(seen) else None).logits[0]
        for one, seen in zip(ids, pixels, strict=True)
    ]
    score(torch.cat(expected)).backward()
    got = loaded.family.head(loaded.model)(loaded.family.hidden(loaded.model, *pack(ids, pixels)))
    score(got).backward()
    assert (got - torch.cat(expected)).abs().max() <= 1e-5
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for each, parameter in loaded.model.named_parameters():
        # The stock class runs the last layers too, but gives nothing of them.
        assert (parameter.grad is None) == (each not in wanted), each
        if parameter.grad is not None:
            assert (parameter.grad - wanted[each]).abs().max() <= 2e-5 * max(1.0, float(wanted[each].abs().max())), each


@pytest.mark.parametrize("name", CASES)
def test_the_folder_s_processor_counts_the_same_tokens_and_gives_the_same_pixels(folders, name):
    loaded, tokens = load(folders / name), CASES[name][-1]
    processor = transformers.AutoProcessor.from_pretrained(folders / name)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 81, 3), dtype=np.uint8))
    asked = processor(text="<image>", images=[picture], return_tensors="pt")
    pixels = images.normalize(torch.from_numpy(loaded.layout.prepare(picture))[None], loaded.layout, torch.float32)
    assert (pixels - asked["pixel_values"]).abs().max() <= 1e-6
    assert (asked["input_ids"] == loaded.image_token_id).sum() == loaded.layout.tokens(81, 70) == tokens
    assert clip.tokens(loaded.config) == tokens == loaded.config.image_seq_length


@pytest.mark.parametrize("name", ["dinov2", "without registers"])
def test_layers_above_the_chosen_one_do_not_run(folders, name):
    loaded, calls = load(folders / name), []
    for i, layer in enumerate(loaded.family.layers(loaded.model, "vision")):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    clip.see(loaded.model.model.vision_tower, torch.randn(1, 3, 56, 56), loaded.config)
    assert calls == [0, 1]


@pytest.mark.parametrize("name", ["clip", "dinov2 at another size", "registers", "without registers"])
@pytest.mark.parametrize("learn", [("connector",), ("vision.layers.-2:", "connector"), ("vision", "connector")])
def test_flops_equal_the_counted_ones(folders, name, learn):
    loaded, tokens = load(folders / name), CASES[name][-1]
    model, side = loaded.model.train().requires_grad_(False), loaded.layout.size
    loaded.family.parts(model)["connector"][0].requires_grad_(True)
    if learn[0] == "vision":
        loaded.family.parts(model)["vision"][0].requires_grad_(True)
    elif learn[0].startswith("vision"):
        loaded.family.layers(model, "vision")[-2:].requires_grad_(True)
    ids, pixels = samples((3,), tokens)
    ids = [torch.where(one == 1003, loaded.image_token_id, one) for one in ids]
    batch = pack(ids, [pixels[0][..., :side, :side]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loaded.family.head(model)(loaded.family.hidden(model, *batch)[:9]).sum().backward()
    text = loaded.config.text_config
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in batch[2]) * text.hidden_size
    counted = counter.get_total_flops() - 3 * square * text.num_hidden_layers
    flops = loaded.family.flops(loaded.config, lengths=batch[2], images=3, supervised=9, learn=learn)
    assert flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_it_was_made_of(folders, name):
    report = verify(folders / name, vision=folders / "parts" / name, language=folders / "llama")
    assert report.ok and [row.difference for row in report.rows] == [0.0] * len(report.rows)


@pytest.mark.parametrize("name", ["clip", "siglip, last layer", "dinov2", "registers"])
def test_tensors_are_named_as_transformers_names_them(folders, tmp_path, name):
    stock(folders / name).save_pretrained(tmp_path)
    with (
        safe_open(folders / name / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "model.safetensors", "pt") as theirs,
    ):
        if "dinov2" in CASES[name][0]:
            assert set(ours.keys()) == set(theirs.keys())
        else:  # `transformers` 5 leaves out a level that every published folder has
            published = {each.replace(".vision_model.", ".") for each in ours.keys()}  # noqa: SIM118 - no mapping
            assert published == {each.replace(".vision_model.", ".") for each in theirs.keys()}  # noqa: SIM118


def test_what_cannot_be_used_is_refused(folders, tmp_path):
    (tmp_path / "naflex").mkdir()
    (tmp_path / "naflex" / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"a NaFlex tower.*squares of one size.*says 'siglip'"):
        parts.read_vision(tmp_path / "naflex", "auto")
    with pytest.raises(ValueError, match="no class token"):
        assemble(folders / "parts" / "siglip, last layer", folders / "llama", tmp_path / "out", select="cls_patch")
    assert not (tmp_path / "out").exists()


def test_the_published_sizes_of_dinov2_give_the_known_number_of_tokens():
    """facebook/dinov2-large is made for 518 pixels, its processor gives 224: 16 x 16 patches of 14."""
    config = transformers.LlavaConfig(
        vision_config=transformers.Dinov2Config(image_size=518, patch_size=14), text_config=transformers.LlamaConfig()
    )
    read = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    read |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    layout = clip.layout(read, config, None)
    assert (
        layout.tokens()
        == clip.tokens(config)
        == family("llava").config_class.from_dict(config.to_dict()).image_seq_length
        == 256
    )
    assert clip.positions(config) == 257
