"""LLaVA-NeXT's packed forward against the stock class, sample by sample, and what its folders must say."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_llava_family import score
from tests.tiny import tiny_language, tiny_vision
from vistune.anyres import AnyresLayout, standard_pinpoints
from vistune.models import attention
from vistune.models.families import family, family_of
from vistune.models.families.llava_next import config_from_original, feature_rows, is_original, to_original

IMAGE = 1003
NEXT = family("llava_next")
LAYOUT = AnyresLayout(size=56, pinpoints=standard_pinpoints(56))
SIZES = [(97, 140), (200, 60), (30, 31), (600, 7), (112, 112)]
"""Width and height of pictures: tall, wide, small, a line, and one that fills its canvas."""


def build(tmp_path, language="llama", vision="clip", select=-2, **more):
    """A tiny random stock model, eval mode, fp32."""
    text = transformers.AutoConfig.from_pretrained(tiny_language(tmp_path / language, language, **more))
    config = transformers.LlavaNextConfig(
        vision_config=transformers.AutoConfig.from_pretrained(tiny_vision(tmp_path / vision, vision)),
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=[list(each) for each in LAYOUT.pinpoints],
        vision_feature_layer=select,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    config.text_config.vocab_size = 1024
    torch.manual_seed(3)
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def samples(counts=(1, 0, 2, 1, 1)):
    """Samples of text around `counts` images each: their ids, their tiles and the images' grids."""
    generator = torch.Generator().manual_seed(0)
    sizes = iter(SIZES * 3)
    ids, pixels, grids = [], [], []
    for i, count in enumerate(counts):
        pieces = [torch.randint(3, 900, (4 + 3 * min(i, 3),), generator=generator)]
        shown, said = [], []
        for size in (next(sizes) for _ in range(count)):
            said.append(LAYOUT.grid(*size))
            shown.append(torch.randn(said[-1][0], 3, 56, 56, generator=generator))
            pieces.append(torch.full((LAYOUT.tokens(*size),), IMAGE))
            pieces.append(torch.randint(3, 900, (5,), generator=generator))
        ids.append(torch.cat(pieces))
        pixels.append(shown)
        grids.append(said)
    return ids, pixels, grids


def pack(ids, pixels, grids):
    lengths = [len(one) for one in ids]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tiles = [one for shown in pixels for one in shown]
    said = [grid for one in grids for grid in one]
    images = torch.cat(tiles) if tiles else None
    return torch.cat(ids), positions, lengths, images, torch.tensor(said) if said else None


def alone(model, ids, pixels, grids):
    """The stock forward of each sample by itself: its logits."""
    model.set_attn_implementation("eager")
    logits = [
        model(input_ids=one[None], **(NEXT.inputs(shown, said) if shown else {})).logits[0]
        for one, shown, said in zip(ids, pixels, grids, strict=True)
    ]
    return torch.cat(logits)


@pytest.mark.parametrize(
    ("language", "vision", "select", "more"),
    [
        ("llama", "clip", -2, {}),
        ("mistral", "clip", -2, {"sliding_window": 9}),
        ("qwen2", "siglip", -1, {"tied": True}),
        ("llama", "siglip", [-2, 1], {}),
    ],
)
def test_packed_equals_the_stock_class_sample_by_sample(tmp_path, language, vision, select, more):
    model = build(tmp_path, language, vision, select, **more)
    ids, pixels, grids = samples()
    expected = alone(model, ids, pixels, grids)
    score(expected).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    got = NEXT.head(model)(NEXT.hidden(model, *pack(ids, pixels, grids)))
    score(got).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert (got - expected).abs().max() <= 1e-5
    assert found.keys() == wanted.keys() and "model.image_newline" in found
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_the_rows_of_a_picture_are_its_tokens(tmp_path):
    config = build(tmp_path).config
    for size in SIZES:
        rows = feature_rows(torch.tensor([LAYOUT.grid(*size)]), config)
        tiles = LAYOUT.grid(*size)[0]
        assert len(rows) == LAYOUT.tokens(*size)
        assert rows[:16].tolist() == list(range(16))  # the whole view
        assert (rows == tiles * 16).sum() == len(LAYOUT.covered(*size)[0])  # an end for every line
    two = feature_rows(torch.tensor([LAYOUT.grid(*SIZES[0]), LAYOUT.grid(*SIZES[2])]), config)
    first = LAYOUT.tokens(*SIZES[0])
    assert two[:first].max() == two.max() == (5 + 3) * 16  # one end of line, after all tiles
    assert two[first:].min() == 5 * 16


def test_the_end_of_line_belongs_to_the_connector(tmp_path):
    model = build(tmp_path)
    parts = NEXT.parts(model)
    per_part = {name: {id(p) for module in modules for p in module.parameters()} for name, modules in parts.items()}
    assert sum(map(len, per_part.values())) == len({id(p) for p in model.parameters()})
    assert id(model.model.image_newline) in per_part["connector"]

    model.requires_grad_(False)
    for module in parts["connector"]:
        module.requires_grad_(True)
    NEXT.hidden(model, *pack(*samples())).sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"model.image_newline"} | {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


def test_text_alone_takes_no_gradient_through_vision(tmp_path):
    model = build(tmp_path)
    model.requires_grad_(False)
    for module in NEXT.parts(model)["connector"]:
        module.requires_grad_(True)
    assert not NEXT.hidden(model, *pack(*samples((0, 0)))).requires_grad


def test_a_wrong_number_of_placeholders_is_named(tmp_path):
    model = build(tmp_path)
    ids, positions, lengths, images, grids = pack(*samples((1, 1)))
    with pytest.raises(ValueError, match=r"140 image placeholders \(id 1003\).*1 images of 72 tokens in all"):
        NEXT.hidden(model, ids, positions, lengths, images[:5], grids[:1])
    with pytest.raises(ValueError, match="but 0 images"):
        NEXT.hidden(model, ids, positions, lengths, None)


@pytest.mark.parametrize(
    "learn", [("connector",), ("vision", "connector", "language"), ("language",), ("vision.layers.-2:", "connector")]
)
@pytest.mark.parametrize("images", [0, 3])
def test_flops_equal_the_counted_ones(tmp_path, learn, images):
    model = build(tmp_path, vision="siglip").train()
    model.requires_grad_(False)
    for key in learn:
        part, _, layers = key.partition(".layers.")
        for module in NEXT.layers(model, part)[-2:] if layers else NEXT.parts(model)[part]:
            module.requires_grad_(True)
    batch = pack(*samples((images, 0)))
    rows = torch.arange(0, 9)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = NEXT.head(model)(NEXT.hidden(model, *batch)[rows])
        if logits.requires_grad:
            logits.sum().backward()
    earlier = "language" in learn or images
    text, first = model.config.text_config, 0 if earlier else 1
    backward = [i >= first and logits.requires_grad for i in range(text.num_hidden_layers)]
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in batch[2]) * text.hidden_size
    counted = counter.get_total_flops() - sum(square * (3 if back else 1) for back in backward)
    said = {"lengths": batch[2], "images": images, "supervised": len(rows), "learn": learn, "grids": batch[4]}
    assert NEXT.flops(model.config, **said) == pytest.approx(counted, rel=0.02)


def test_the_same_model_packs_and_generates(tmp_path):
    """Two prompts with pictures of unequal tiles, padded, before and after a packed forward."""
    model = build(tmp_path)
    ids, pixels, grids = samples((1, 1))
    longest = max(map(len, ids))
    padded = torch.stack([torch.nn.functional.pad(one, (longest - len(one), 0)) for one in ids])
    mask = (torch.arange(longest)[None] >= torch.tensor([longest - len(one) for one in ids])[:, None]).long()
    inputs = NEXT.inputs([one for shown in pixels for one in shown], [grid for said in grids for grid in said])
    assert inputs["pixel_values"].shape[:2] == (2, 5) and inputs["image_sizes"].tolist() == [[140, 97], [60, 200]]
    ask = {"input_ids": padded, "attention_mask": mask, **inputs, "max_new_tokens": 6, "do_sample": False}
    before = model.generate(**ask)
    NEXT.hidden(model, *pack(ids, pixels, grids))
    assert model.model.language_model.config._attn_implementation == attention.NAME
    assert torch.equal(model.generate(**ask), before)


def test_what_a_folder_says_must_agree(tmp_path):
    config = build(tmp_path).config
    edge = {"height": 56, "width": 56}
    points = [list(each) for each in LAYOUT.pinpoints]
    stock = transformers.LlavaNextImageProcessorPil(size=edge, crop_size=edge, image_grid_pinpoints=points)
    assert family_of({"model_type": "llava_next", "vision_config": {}}).name == "llava_next"
    assert NEXT.layout(config, stock, None, {}) == NEXT.layout(config, stock, "anyres", {}) == LAYOUT
    with pytest.raises(ValueError, match="takes pictures in tiles"):
        NEXT.layout(config, stock, "pad", {})
    stock.image_grid_pinpoints = points[:2]
    with pytest.raises(ValueError, match="must have the same"):
        NEXT.layout(config, stock, None, {})
    chosen = {"pinpoints": [[56, 56], [168, 168]]}
    NEXT.configure(config, chosen)
    tower = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=edge)
    assert NEXT.layout(config, tower, None, {}).pinpoints == ((56, 56), (168, 168))  # config.json's
    assert NEXT.layout(config, stock, None, chosen).pinpoints == ((56, 56), (168, 168))
    with pytest.raises(ValueError, match="whole tiles of 56"):
        NEXT.configure(config, {"pinpoints": [[336, 672], [60, 60]]})
    with pytest.raises(ValueError, match=r"list of \[height, width\]"):
        NEXT.configure(config, {"pinpoints": "4x4"})
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="set it to 'default'"):
        NEXT.layout(config, stock, None, chosen)
    config.vision_config.image_size = 112
    with pytest.raises(ValueError, match="tiles of 56 pixels"):
        NEXT.layout(config, stock, None, {})


ORIGINAL = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[(56, 112), (168, 56)]",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
}


def test_the_originals_config(tmp_path):
    stock = build(tmp_path).config
    parts = {"vision_config": stock.vision_config, "text_config": stock.text_config, "image_token_id": IMAGE}
    config = config_from_original(ORIGINAL, **parts)
    assert config.image_grid_pinpoints == [[112, 56], [56, 168]]  # (width, height) there, [height, width] here
    assert to_original(config)["image_grid_pinpoints"] == [[56, 112], [168, 56]]
    assert (config.vision_feature_select_strategy, config.vision_feature_layer) == ("default", -2)
    assert is_original(ORIGINAL) and is_original({"mm_patch_merge_type": "spatial"})
    assert not is_original({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"})
    for key, value in {
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "anyres_max_9",
        "mm_projector_type": "linear",
        "mm_vision_select_feature": "cls_patch",
    }.items():
        with pytest.raises(ValueError, match=f"{key} is '{value}'"):
            config_from_original(ORIGINAL | {key: value}, **parts)
    with pytest.raises(ValueError, match=r"not a list of \(width, height\)"):
        config_from_original(ORIGINAL | {"image_grid_pinpoints": "(1x1),...,(6x6)"}, **parts)
    with pytest.raises(ValueError, match="whole tiles of 56"):
        config_from_original(ORIGINAL | {"image_grid_pinpoints": [[340, 672]]}, **parts)
