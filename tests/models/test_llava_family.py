"""The llava family's packed forward against the stock class, sample by sample, and against the original's values."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_language, tiny_vision
from vistune.models import attention
from vistune.models.families import family, family_of, names
from vistune.models.flops import chosen

IMAGE, PATCHES = 1003, 16
LLAVA = family("llava")


def build(tmp_path, language="llama", vision="clip", select=-2, strategy=None, **more):
    """A tiny random stock model, eval mode, fp32."""
    strategy = strategy or ("default" if vision == "clip" else "full")
    text = transformers.AutoConfig.from_pretrained(tiny_language(tmp_path / language, language, **more))
    config = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.from_pretrained(tiny_vision(tmp_path / vision, vision)),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=select,
        vision_feature_select_strategy=strategy,
    )
    config.text_config.vocab_size = 1024
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def samples(counts=(1, 0, 2, 1, 1), patches=PATCHES):
    """Samples of text around `counts` images each: their ids and their pixels. The last two have equal lengths."""
    generator = torch.Generator().manual_seed(0)
    ids, pixels = [], []
    for i, count in enumerate(counts):
        pieces = [torch.randint(3, 900, (4 + 3 * min(i, 3),), generator=generator)]
        for _ in range(count):
            pieces += [torch.full((patches,), IMAGE), torch.randint(3, 900, (5,), generator=generator)]
        ids.append(torch.cat(pieces))
        pixels.append(torch.randn(count, 3, 56, 56, generator=generator))
    return ids, pixels


def pack(ids, pixels):
    lengths = [len(one) for one in ids]
    positions = torch.cat([torch.arange(length) for length in lengths])
    images = torch.cat(pixels)
    return torch.cat(ids), positions, lengths, images if len(images) else None


def alone(model, ids, pixels):
    """The stock forward of each sample by itself: its logits."""
    model.set_attn_implementation("eager")
    logits = [
        model(input_ids=one[None], pixel_values=seen if len(seen) else None).logits[0]
        for one, seen in zip(ids, pixels, strict=True)
    ]
    return torch.cat(logits)


def score(logits):
    """A loss in which every logit counts differently."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


@pytest.mark.parametrize(
    ("language", "vision", "more"),
    [
        ("llama", "clip", {}),
        ("mistral", "clip", {"sliding_window": 9}),
        ("mistral", "siglip", {"sliding_window": None}),
        ("qwen2", "siglip", {"tied": True}),
        ("qwen3", "clip", {"kv_heads": 1}),
    ],
)
def test_packed_equals_the_stock_class_sample_by_sample(tmp_path, language, vision, more):
    model = build(tmp_path, language, vision, **more)
    ids, pixels = samples()
    expected = alone(model, ids, pixels)
    score(expected).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    got = LLAVA.head(model)(LLAVA.hidden(model, *pack(ids, pixels)))
    score(got).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert (got - expected).abs().max() <= 1e-5
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize(("select", "strategy"), [(-1, "default"), (-2, "full"), (1, "default"), ([-2, 1], "default")])
def test_layer_selection(tmp_path, select, strategy):
    model = build(tmp_path, select=select, strategy=strategy)
    ids, pixels = samples((1, 2), PATCHES + (strategy == "full"))
    with torch.no_grad():
        got = LLAVA.head(model)(LLAVA.hidden(model, *pack(ids, pixels)))
        assert (got - alone(model, ids, pixels)).abs().max() <= 2e-5


def test_text_alone_and_frozen_vision_take_no_gradient_through_vision(tmp_path):
    model = build(tmp_path)
    model.requires_grad_(False)
    LLAVA.parts(model)["connector"][0].requires_grad_(True)
    ids, pixels = samples()
    LLAVA.hidden(model, *pack(ids, pixels)).sum().backward()
    assert all(p.grad is not None for p in LLAVA.parts(model)["connector"][0].parameters())
    text, none = samples((0, 0))
    assert not LLAVA.hidden(model, *pack(text, none)).requires_grad


def test_layers_above_the_selected_one_do_not_run(tmp_path):
    model = build(tmp_path)
    calls = []
    for i, layer in enumerate(LLAVA.layers(model, "vision")):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    LLAVA.hidden(model, *pack(*samples()))
    assert calls == [0, 1]


def test_activation_checkpointing_reaches_vision_and_language(tmp_path):
    model = build(tmp_path).train()
    batch = pack(*samples())
    LLAVA.hidden(model, *batch).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    for part in ("vision", "language"):
        LLAVA.layers(model, part)[0].self_attn.register_forward_hook(lambda *_, part=part: runs.append(part))
    LLAVA.hidden(model, *batch).square().sum().backward()
    assert runs == ["vision", "language", "language", "vision"]
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name])


def test_a_wrong_number_of_placeholders_is_named(tmp_path):
    model = build(tmp_path)
    ids, pixels = samples((1, 1))
    ids, positions, lengths, images = pack(ids, pixels)
    with pytest.raises(ValueError, match=r"32 image placeholders \(id 1003\).*1 images of 16 tokens"):
        LLAVA.hidden(model, ids, positions, lengths, images[:1])
    with pytest.raises(ValueError, match="but 0 images"):
        LLAVA.hidden(model, ids, positions, lengths, None)


def test_parts_hold_every_parameter_once(tmp_path):
    for tied in (True, False):
        model = build(tmp_path / str(tied), tied=tied)
        parts = LLAVA.parts(model)
        per_part = [{id(p) for module in modules for p in module.parameters()} for modules in parts.values()]
        assert sum(map(len, per_part)) == len(set.union(*per_part)) == len({id(p) for p in model.parameters()})
        assert LLAVA.head(model).weight in set(parts["language"][1].parameters())
    with pytest.raises(ValueError, match="connector"):
        LLAVA.layers(model, "connector")


def test_dropping_a_class_token_that_is_not_there_is_refused(tmp_path):
    model = build(tmp_path, vision="siglip", strategy="default")
    with pytest.raises(ValueError, match="set it to 'full'"):
        LLAVA.hidden(model, *pack(*samples()))


@pytest.mark.parametrize(
    "learn",
    [
        ("connector",),
        ("connector", "language"),
        ("vision", "connector", "language"),
        ("language",),
        ("vision.layers.-2:", "connector"),
        ("language.layers.1:",),
    ],
)
@pytest.mark.parametrize("images", [0, 3])
def test_flops_equal_the_counted_ones(tmp_path, learn, images):
    model = build(tmp_path, vision="siglip").train()
    model.requires_grad_(False)
    for key in learn:
        part, _, layers = key.partition(".layers.")
        modules = LLAVA.parts(model)[part] if not layers else LLAVA.layers(model, part)
        for module in modules if not layers else [modules[i] for i in chosen(layers, len(modules))]:
            module.requires_grad_(True)
    ids, pixels = samples((images, 0))
    batch = pack(ids, pixels)
    rows = torch.arange(0, 9)
    # The counter knows no fused attention of the CPU; the plain one is products it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = LLAVA.head(model)(LLAVA.hidden(model, *batch)[rows])
        if logits.requires_grad:
            logits.sum().backward()
    # It computes the whole square of a causal attention: forward once, backward twice, in layers that have one.
    earlier = "language" in learn or (images and not learn[0].startswith("language"))
    text, first = model.config.text_config, 0 if earlier else 1
    backward = [i >= first and logits.requires_grad for i in range(text.num_hidden_layers)]
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in batch[2]) * text.hidden_size
    counted = counter.get_total_flops() - sum(square * (3 if back else 1) for back in backward)
    flops = LLAVA.flops(model.config, lengths=batch[2], images=images, supervised=len(rows), learn=learn)
    assert flops == pytest.approx(counted, rel=0.02)


def test_family_lookup(tmp_path):
    assert "llava" in names()
    assert family_of({"model_type": "llava", "vision_config": {}}).name == "llava"
    with pytest.raises(ValueError, match=r"no model family 'lava'; there are .*llava"):
        family("lava")
    with pytest.raises(ValueError, match="'gpt2'"):
        family_of({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="'llava_llama'"):
        family_of({"model_type": "llava_llama", "mm_vision_tower": "x"})


def test_the_same_model_packs_and_generates(tmp_path):
    """After a packed forward the stock paths, with padding and a cache, still give what they gave."""
    model = build(tmp_path)
    ids, pixels = samples((1, 1))
    padded = torch.stack([torch.nn.functional.pad(one, (40 - len(one), 0)) for one in ids])
    mask = (torch.arange(40)[None] >= torch.tensor([40 - len(one) for one in ids])[:, None]).long()
    ask = {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat(pixels), "max_new_tokens": 6}
    before = model.generate(**ask, do_sample=False)
    LLAVA.hidden(model, *pack(ids, pixels))
    assert model.model.language_model.config._attn_implementation == attention.NAME
    assert torch.equal(model.generate(**ask, do_sample=False), before)
