"""The fastvlm family against what Apple's own code computed, packed and through the stock `generate`; and training."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_fastvlm import FASTVLM, golden_hf, golden_original, tiny_fastvlm
from vistune.images import normalize
from vistune.models import attention
from vistune.models.families import family, family_of
from vistune.models.load import describe, load, save

WORDS = 320
"""Rows of the recorded vocabulary."""
FAMILY = family("fastvlm")
FACTS = json.loads((FASTVLM / "expected.json").read_text())
RENAMED = {k: v for k, v in json.loads((FASTVLM / "key_map.json").read_text())["map"].items() if v}


@pytest.fixture(scope="module")
def golden():
    return load_file(FASTVLM / "expected.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden_hf(tmp_path_factory.mktemp("fastvlm") / "hf")


@pytest.fixture(scope="module")
def apples(tmp_path_factory):
    return golden_original(tmp_path_factory.mktemp("fastvlm") / "original")


@pytest.fixture(params=["hf", "original"])
def model(folder, apples, request):
    """The recorded model out of both formats. Apple's has no row for <image>: some are added, and never the answer."""
    model = load(folder if request.param == "hf" else apples).model
    assert model.config.image_token_id == {"hf": 317, "original": 320}[request.param]
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 0
    return model


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def packed(values, size, image, rows=(0, 1)):
    """The recorded batch as one pack: ids, positions, lengths, pixels; and its labels, row by row."""
    each = values[f"tower_features_{size}"].shape[1]
    ids, labels, lengths = [], [], []
    for row in rows:
        seen = values["input_ids"][row][values["attention_mask"][row].bool()]
        ids.append(torch.cat([torch.full((each,), image) if one == -200 else one[None] for one in seen]))
        lengths.append(len(ids[-1]))
        mask = values[f"spliced_attention_mask_{size}"][row].bool()
        assert mask.sum() == lengths[-1]
        labels.append(values[f"spliced_labels_{size}"][row][mask])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return (torch.cat(ids), positions, lengths, values[f"pixel_values_{size}"][list(rows)]), labels


def loss_of(model, values, size, rows=(0, 1)):
    batch, labels = packed(values, size, model.config.image_token_id, rows)
    logits = FAMILY.head(model)(FAMILY.hidden(model, *batch))[:, :WORDS].split(batch[2])
    ahead = torch.cat([one[:-1] for one in logits])
    return torch.nn.functional.cross_entropy(ahead, torch.cat([one[1:] for one in labels])), logits


@pytest.mark.parametrize("size", ["128", "256"])
def test_logits_and_loss_are_the_recorded_ones(golden, model, size):
    with torch.no_grad():
        loss, logits = loss_of(model, golden, size)
    for row, ours in enumerate(logits):
        mask = golden[f"spliced_attention_mask_{size}"][row].bool()
        assert relative(ours, golden[f"logits_{size}"][row][mask]) <= 1e-5
    assert abs(loss.item() - FACTS[f"loss_{size}"]) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size", ["128", "256", "192x128"])
def test_projected_features_are_the_recorded_ones(golden, model, size):
    out = model.get_image_features(golden[f"pixel_values_{size}"]).pooler_output
    assert relative(out if torch.is_tensor(out) else torch.stack(list(out)), golden[f"projected_{size}"]) <= 1e-5


@torch.no_grad()
def test_text_alone(golden, model):
    ids = golden["text_only_input_ids"][0]
    hidden = FAMILY.hidden(model, ids, torch.arange(len(ids)), [len(ids)], None)
    assert relative(FAMILY.head(model)(hidden)[:, :WORDS], golden["text_only_logits"][0]) <= 1e-5


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_are_the_recorded_ones(golden, model, mode):
    """In training, batch normalization uses the batch's own statistics, and the running ones follow."""
    model.train(mode == "train")
    loss, _ = loss_of(model, golden, "128")
    loss.backward()
    wanted = FACTS[f"grad_{mode}_mode"]
    assert abs(loss.item() - wanted["loss"]) <= 1e-4
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert len(wanted["grad_norm"]) > 150
    for name, norm in wanted["grad_norm"].items():
        assert gradients[RENAMED[name]].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    whole = {k.removeprefix("grad_eval."): v for k, v in golden.items() if k.startswith("grad_eval.")}
    for name, value in whole.items() if mode == "eval" else ():
        assert relative(gradients[RENAMED[name]], value) <= 1e-4, name
    buffers = dict(model.named_buffers())
    moved = {k: v for k, v in golden.items() if k.startswith("bn_after_train_step.")}
    assert len(moved) == 6
    for name, value in moved.items() if mode == "train" else ():
        ours = buffers[RENAMED[name.removeprefix("bn_after_train_step.")]]
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["128", "256"])
def test_greedy_ids_are_the_recorded_ones(golden, model, size):
    """After a packed forward, so with our attention in place."""
    loss_of(model, golden, size)
    each = golden[f"tower_features_{size}"].shape[1]
    for row, case in enumerate(FACTS[f"greedy_{size}"]):
        prompt = [[model.config.image_token_id] * each if one == -200 else [one] for one in case["prompt_ids"]]
        ids = torch.tensor([[one for piece in prompt for one in piece]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=golden[f"pixel_values_{size}"][row : row + 1],
            max_new_tokens=len(case["generated"]),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out[0, ids.shape[1] :].tolist() == case["generated"]


def test_pixels_are_the_recorded_ones_and_tokens_follow(golden, folder):
    """Padded with black, though the folder's image processor does not say so: that is how these models were trained."""
    layout = describe(folder).layout
    for number, name in enumerate(("image0.png", "image1.png")):
        pixels = torch.from_numpy(layout.prepare(Image.open(FASTVLM / name).convert("RGB")))
        ours = normalize(pixels, layout, torch.float32)
        assert (ours - golden["pixel_values_256"][number]).abs().max() <= 1e-6
    assert layout.tokens(640, 480) == 16 and layout.mode == "pad"
    assert describe(folder, image="square").layout.mode == "square"


@pytest.mark.parametrize(("side", "tokens"), [(256, 16), (512, 64), (768, 144), (1024, 256), (1536, 576)])
def test_resolution_is_an_option(folder, side, tokens):
    said = describe(folder, options={"resolution": side})
    assert said.layout.tokens(9, 9) == tokens == said.config.image_seq_length
    assert said.layout.prepare(Image.new("RGB", (40, 30))).shape == (3, side, side)


@pytest.mark.parametrize("side", [0, 192, 500, 1600, "512", 512.0, True])
def test_other_resolutions_are_refused(folder, side):
    with pytest.raises(ValueError, match=r"model.options.resolution: .* 256 to 1536 pixels in steps of 64"):
        describe(folder, options={"resolution": side})


def test_the_family_is_found_by_what_config_says():
    assert family_of({"model_type": "fast_vlm", "vision_config": {}}).name == "fastvlm"


def test_a_vision_part_that_is_not_there_is_an_error(tmp_path):
    path = tiny_fastvlm(tmp_path / "m")
    kept = {k: v for k, v in load_file(path / "model.safetensors").items() if "timm_model" not in k}
    assert kept
    save_file(kept, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights are missing. The first:\n  model.vision_tower.timm_model"):
        load(path)


def tiny(path, **more):
    return load(tiny_fastvlm(path, **more))


def samples(counts=(1, 0, 2, 1), side=128):
    """Samples of text around `counts` images each: ids and pixels."""
    generator = torch.Generator().manual_seed(0)
    ids, pixels = [], []
    for i, count in enumerate(counts):
        pieces = [torch.randint(3, 900, (4 + 3 * i,), generator=generator)]
        for _ in range(count):
            pieces += [torch.full(((side // 64) ** 2,), 1003), torch.randint(3, 900, (5,), generator=generator)]
        ids.append(torch.cat(pieces))
        pixels.append(torch.rand(count, 3, side, side, generator=generator))
    return ids, pixels


def pack(ids, pixels):
    lengths = [len(one) for one in ids]
    images = torch.cat(pixels)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(ids), positions, lengths, images if len(images) else None


def test_packed_equals_alone_in_loss_and_gradients(tmp_path):
    """The tower in evaluation: in training its statistics are those of the images that run together."""
    seen = []
    for together in (True, False):
        model = tiny(tmp_path / str(together)).model
        ids, pixels = samples()
        batches = [pack(ids, pixels)] if together else [pack([a], [b]) for a, b in zip(ids, pixels, strict=True)]
        total = 0.0
        for batch in batches:
            logits = FAMILY.head(model)(FAMILY.hidden(model, *batch)).split(batch[2])
            targets = batch[0].split(batch[2])
            losses = [
                torch.nn.functional.cross_entropy(x[:-1], y[1:], reduction="sum")
                for x, y in zip(logits, targets, strict=True)
            ]
            sum(losses).backward()
            total += sum(losses).item()
        seen.append((total, [p.grad for p in model.parameters()]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    for one, other in zip(seen[0][1], seen[1][1], strict=True):
        assert relative(one, other) <= 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_opened_again_it_is_the_same(tmp_path, tied):
    loaded = tiny(tmp_path / "a", tied=tied)
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied
    save(loaded, tmp_path / "b", card="")
    again = load(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == [
        "FastVlmForConditionalGeneration"
    ]
    one, other = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert again.layout == loaded.layout and again.config.image_seq_length == 16
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) == tied


def test_the_saved_processor_gives_the_pixels_and_ids_of_training(tmp_path):
    loaded = tiny(tmp_path / "a")
    save(loaded, tmp_path / "b", card="")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "b")
    picture = Image.open(FASTVLM / "image0.png").convert("RGB")
    out = processor(images=picture, text="<image>\nwhat", return_tensors="pt")
    assert (out["input_ids"] == 1003).sum() == loaded.layout.tokens(*picture.size) == 16
    ours = normalize(torch.from_numpy(loaded.layout.prepare(picture)), loaded.layout, torch.float32)
    assert (out["pixel_values"][0] - ours).abs().max() <= 1e-6


@pytest.mark.parametrize("learn", [(), ("connector",), ("vision",), ("vision.layers.-2:", "language")])
def test_flops_equal_the_counted_ones(tmp_path, learn):
    """Where convolutions of single channels learn, the counter multiplies their gradients by the number of channels:
    there only the forward is compared."""
    loaded = tiny(tmp_path / "m")
    model, config = loaded.model, loaded.config
    model.requires_grad_(False)
    for key in learn:
        part, _, layers = key.partition(".layers.")
        chosen = FAMILY.layers(model, part)[-2:] if layers else FAMILY.parts(model)[part]
        for module in chosen:
            module.requires_grad_(True)
    ids, pixels = samples((2, 0), side=256)
    batch, backward = pack(ids, pixels), learn == ("connector",)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = FAMILY.head(model)(FAMILY.hidden(model, *batch)[torch.arange(9)])
        if backward:
            logits.sum().backward()
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in batch[2]) * config.text_config.hidden_size
    counted = counter.get_total_flops() - square * config.text_config.num_hidden_layers * (3 if backward else 1)
    ask = {"lengths": batch[2], "images": 2, "supervised": 9}
    assert FAMILY.flops(config, **ask, learn=learn if backward else ()) == pytest.approx(counted, rel=0.01)
    if learn and not backward:
        assert FAMILY.flops(config, **ask, learn=learn) > FAMILY.flops(config, **ask, learn=("connector",))


def test_what_learns_in_vision_costs_at_most_three_forwards(tmp_path):
    config = tiny(tmp_path / "m").config
    ask = {"lengths": [4096], "images": 16, "supervised": 100}
    forward, whole = (FAMILY.flops(config, **ask, learn=keys) for keys in ((), ("vision", "connector", "language")))
    assert 2.9 * forward < whole < 3 * forward


def test_parts_hold_every_parameter_once(tmp_path):
    model = tiny(tmp_path / "m").model
    inside = [id(p) for part in FAMILY.parts(model).values() for module in part for p in module.parameters()]
    assert sorted(inside) == sorted(id(p) for p in model.parameters())
    assert len(FAMILY.layers(model, "vision")) == 5
    with pytest.raises(ValueError, match="five stages"):
        FAMILY.layers(model, "connector")


def test_a_wrong_number_of_placeholders_is_named(tmp_path):
    model = tiny(tmp_path / "m").model
    ids, pixels = samples((1,))
    ids[0][ids[0] == 1003] = 5
    with pytest.raises(ValueError, match=r"0 image placeholders .* 1 images of 4 tokens; the data must lay 4"):
        FAMILY.hidden(model, *pack(ids, pixels))


def test_the_same_model_packs_and_generates(tmp_path):
    model = tiny(tmp_path / "m").model
    ids, pixels = samples((1, 1))
    padded = torch.stack([torch.nn.functional.pad(one, (40 - len(one), 0)) for one in ids])
    mask = (torch.arange(40)[None] >= torch.tensor([40 - len(one) for one in ids])[:, None]).long()
    ask = {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat(pixels), "max_new_tokens": 6}
    before = model.generate(**ask, do_sample=False)
    FAMILY.hidden(model, *pack(ids, pixels))
    assert model.model.language_model.config._attn_implementation == attention.NAME
    assert torch.equal(model.generate(**ask, do_sample=False), before)


QWEN2 = {  # as published with each size: width, feed-forward width, layers, heads, key-value heads, rows, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
PARAMETERS = {  # derived: the tower's 122,714,208, the connector's, the language model's (tied: the head once)
    "0.5B": (3_557_120, 494_032_768),
    "1.5B": (7_080_960, 1_543_714_304),
    "7B": (23_862_272, 7_615_616_512),
}


def real(size):
    width, inner, layers, heads, shared, rows, tied = QWEN2[size]
    text = transformers.Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=rows,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return FAMILY.model_class(transformers.FastVlmConfig(text_config=text, tie_word_embeddings=tied))


@pytest.mark.parametrize("size", QWEN2)
def test_parameters_of_the_real_sizes(size):
    model = real(size)
    counts = {
        part: sum(p.numel() for m in found for p in m.parameters()) for part, found in FAMILY.parts(model).items()
    }
    if QWEN2[size][-1]:
        counts["language"] -= model.lm_head.weight.numel()
    assert (counts["connector"], counts["language"]) == PARAMETERS[size]
    assert counts["vision"] == 122_714_208


def test_keys_of_the_published_7b():
    facts = json.loads((FASTVLM / "mobileclip_l_keys.json").read_text())
    with torch.device("meta"):
        model = FAMILY.model_class(transformers.FastVlmConfig())
    shapes = {FAMILY.stored_name(name): list(value.shape) for name, value in model.state_dict().items()}
    wanted = {name: one["shape"] for name, one in facts["hf"].items()}
    for name, shape in facts["other_keys_7b"].items():
        layers = range(28) if ".layers.0." in name else [0]
        wanted |= {name.replace(".layers.0.", f".layers.{i}."): shape for i in layers}
    assert shapes == wanted and shapes["lm_head.weight"] == [152_128, 3584]
