"""The onevision15 family: packed against the class's own forward, gradients too; what learns; operations; bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.made import made_data, made_recipe
from tests.tiny import GOLDEN
from vistune.generate import answer_batch
from vistune.models.families import family, family_of
from vistune.models.flops import chosen
from vistune.models.load import describe, load
from vistune.samples import Image
from vistune.train import learn, stage

START = GOLDEN / "onevision15" / "tiny-stage0"
ONE = family("onevision15")
IMAGE = 486
GRIDS = [(1, 4, 6), (1, 2, 2), (2, 4, 2), (1, 2, 2)]
"""Three pictures and a video of two frames, two of them in one sample."""


@pytest.fixture
def model():
    return load(START).model


def batch(grids=GRIDS):
    """Two samples with pictures, one without: ids, positions, lengths, pixels, grids."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for own in (grids[:2], [], grids[2:]):
        pieces = [torch.randint(3, 400, (5,), generator=draw)]
        for frames, rows, columns in own:
            pieces += [torch.full((frames * rows * columns // 4,), IMAGE), torch.randint(3, 400, (4,), generator=draw)]
        samples.append(torch.cat(pieces))
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    pixels = torch.randn(patches, 588, generator=draw) if grids else None
    lengths = [len(one) for one in samples]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(samples), positions, lengths, pixels, torch.tensor(grids) if grids else None


def score(logits):
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def alone(model, ids, lengths, pixels, grids):
    """The class's own forward of each sample."""
    model.set_attn_implementation("eager")
    logits, counts = [], [g[0] * g[1] * g[2] for g in grids.tolist()]
    for one, own in zip(ids.split(lengths), ([0, 1], [], [2, 3]), strict=True):
        seen = [pixels.split(counts)[i] for i in own]
        more = {"pixel_values": torch.cat(seen), "image_grid_thw": grids[own]} if own else {}
        logits.append(model(input_ids=one[None], **more).logits[0])
    return torch.cat(logits)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_equals_sample_by_sample(model):
    ids, positions, lengths, pixels, grids = batch()
    expected = alone(model, ids, lengths, pixels, grids)
    score(expected).backward()
    wanted = gradients(model)
    model.zero_grad()
    got = ONE.head(model)(ONE.hidden(model, ids, positions, lengths, pixels, grids))
    score(got).backward()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    found = gradients(model)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        worst = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1.0)
        assert worst <= 2e-5, name


def test_checkpointing_changes_nothing(model):
    model.train()
    score(ONE.hidden(model, *batch())).backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    for part in ("vision", "language"):
        ONE.layers(model, part)[0].register_forward_hook(lambda *_, part=part: runs.append(part))
    for module in (model.visual.blocks[0].attn, model.model.layers[0].self_attn):
        module.register_forward_hook(lambda *_: runs.append("attention"))
    score(ONE.hidden(model, *batch())).backward()
    assert runs.count("attention") == 4
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
def test_each_part_learns_alone(model, tmp_path, part):
    recipe = made_recipe(START, GOLDEN, tmp_path, learn={part: 1e-3}, model={"template": "qwen2-vl"})
    learned = {one.name for one in learn.apply(model, ONE, recipe)}
    score(ONE.hidden(model, *batch())).backward()
    prefix = {"vision": "visual.", "connector": "visual.merger.", "language": ("model.", "lm_head.")}[part]
    assert all(name.startswith(prefix) for name in learned)
    assert (
        {"lm_head.weight"} == learned - gradients(model).keys()
        if part == "language"
        else learned == set(gradients(model))
    )


def test_parts_hold_all_but_the_class_token(model):
    parts = [{id(p) for one in modules for p in one.parameters()} for modules in ONE.parts(model).values()]
    everything = {id(p): name for name, p in model.named_parameters()}
    assert sum(map(len, parts)) == len(set.union(*parts))
    left = {everything[one] for one in everything.keys() - set.union(*parts)}
    assert left == {"visual.class_embedding", "visual.class_pos_emb"}
    with pytest.raises(ValueError, match="connector"):
        ONE.layers(model, "connector")


def test_a_frozen_tower_takes_no_gradient_through_it(model):
    model.requires_grad_(False)
    model.visual.merger.requires_grad_(True)
    seen = []
    model.visual.blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    ONE.hidden(model, *batch()).sum().backward()
    assert seen == [False] and all(p.grad is not None for p in model.visual.merger.parameters())


@pytest.mark.parametrize(
    "keys",
    [
        ("connector",),
        ("connector", "language"),
        ("vision", "connector", "language"),
        ("vision.layers.-2:", "connector"),
        ("language.layers.1:",),
    ],
)
@pytest.mark.parametrize("grids", [[], GRIDS], ids=["text", "pictures"])
def test_flops_equal_the_counted_ones(model, keys, grids):
    model.train().requires_grad_(False)
    for key in keys:
        part, _, layers = key.partition(".layers.")
        modules = ONE.parts(model)[part] if not layers else ONE.layers(model, part)
        for module in modules if not layers else [modules[i] for i in chosen(layers, len(modules))]:
            module.requires_grad_(True)
    ids, positions, lengths, pixels, three = batch(grids)
    # The counter knows no fused attention of the CPU; the plain one is products it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = ONE.head(model)(ONE.hidden(model, ids, positions, lengths, pixels, three)[:9])
        if logits.requires_grad:
            logits.sum().backward()
    # It computes the whole square of a causal attention: forward once, backward twice, in layers that have one.
    earlier = "language" in keys or (grids and not keys[0].startswith("language"))
    text, first = model.config.text_config, 0 if earlier else 1
    backward = [i >= first and logits.requires_grad for i in range(text.num_hidden_layers)]
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in lengths) * text.num_attention_heads * text.head_dim
    counted = counter.get_total_flops() - sum(square * (3 if back else 1) for back in backward)
    flops = ONE.flops(model.config, lengths=lengths, images=len(grids), supervised=9, learn=keys, grids=three)
    assert flops == pytest.approx(counted, rel=1e-4)  # some releases multiply for the rotary angles too


def test_wrong_counts_are_named(model):
    ids, positions, lengths, pixels, grids = batch()
    with pytest.raises(ValueError, match=r"12 image placeholders \(id 486\).*3 images of 11 tokens"):
        ONE.hidden(model, ids, positions, lengths, pixels[:-4], grids[:-1])
    with pytest.raises(ValueError, match="0 images"):
        ONE.hidden(model, ids, positions, lengths, None, None)
    with pytest.raises(ValueError, match=r"44 patches, but their grids .* are of 48"):
        ONE.hidden(model, ids, positions, lengths, pixels[:-4], grids)
    with pytest.raises(ValueError, match="12 tokens 486 for pictures of 11"):
        model(input_ids=ids[None], pixel_values=pixels[:-4], image_grid_thw=grids[:-1])


@pytest.mark.parametrize(
    ("options", "image", "said"),
    [
        ({"norm_eps": "mcore"}, None, 'norm_eps = \'mcore\': choose "hf" or "training"'),
        ({"legacy_images": "yes"}, None, "legacy_images = 'yes': true or false"),
        ({"max_pixels": "big"}, None, "max_pixels = 'big': a number of pixels"),
        ({"max_pixels": 10}, None, "min_pixels = 3136, max_pixels = 10"),
        ({"norm_epsilon": 1}, None, "onevision15 has no such option; it has norm_eps"),
        ({}, "pad", "keeps every picture's own shape"),
    ],
)
def test_bad_options_are_refused(options, image, said):
    with pytest.raises(ValueError, match=said):
        describe(START, options=options, image=image)


def test_the_limit_that_is_written_twice():
    """preprocessor_config.json carries size.longest_edge = 12,845,056 beside max_pixels = 2,560,000."""
    assert describe(START).layout.max_pixels == 1600 * 1600
    assert describe(START, options={"max_pixels": 3_240_000}).layout.max_pixels == 3_240_000


def test_the_family_of_a_config():
    assert family_of(json.loads((START / "config.json").read_text())).name == "onevision15"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_stage_packed_and_unpacked_saved_reloaded_asked(tmp_path):
    """Loss and weights of three steps are equal; the folder opens and answers, its options remembered."""
    data = made_data(tmp_path / "data", rows=12)
    losses, runs = [], []
    for pack in (True, False):
        run = tmp_path / f"run{pack}"
        recipe = made_recipe(
            START,
            data,
            run,
            model={"template": "qwen2-vl", "options": {"norm_eps": "training", "image_resolution": 70}},
            learn={"vision": 1e-3, "connector": 1e-3, "language": 1e-3},
            data={"pack": pack},
            train={"steps": 3, "batch": 4},
        )
        losses.append(stage.run(recipe)["losses"])
        runs.append(load(run / "model"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]
    one, other = (load_file(run.folder / "model.safetensors") for run in runs)
    before = load_file(START / "model.safetensors")
    assert list(one) == list(other) and one.keys() == before.keys()
    same = {name for name in one if torch.equal(one[name], before[name])}
    assert same == {"visual.class_embedding", "visual.class_pos_emb"}
    assert runs[0].layout.image_resolution == 70
    assert runs[0].model.visual.pre_layernorm.eps == 1e-4
    picture = Image(path=str(tmp_path / "data" / "images" / "0_0.png"))
    asked = [("What is it?", [picture]), ("And these?", [picture, picture]), ("Why?", [])]
    together = answer_batch(runs[0], asked, max_new_tokens=6)
    assert together == [answer_batch(runs[0], [one], max_new_tokens=6)[0] for one in asked]
