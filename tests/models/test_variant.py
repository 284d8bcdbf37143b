"""What the stock class cannot hold: other connectors, several scales, MPT; opened by a process that has no vistune."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_llava_family import pack, samples, score
from tests.original_llava import ORIGINAL
from tests.tiny import GOLDEN, tiny_language, tiny_vision
from vistune import images
from vistune.models.assemble import assemble
from vistune.models.assembling import connectors
from vistune.models.load import load
from vistune.models.proving.verify import verify
from vistune.models.shipped.modeling_llava_variant import (
    Connector,
    LlavaVariantConfig,
    LlavaVariantForConditionalGeneration,
    at_scales,
)
from vistune.models.towers import clip

CASES = {
    "linear": {"connector_type": "linear", "start_end": True},
    "mlp3x": {"connector_type": "mlp3x_gelu", "select_layer": -1},
    "identity": {"connector_type": "identity"},
    "s2": {"s2_scales": "56,112,168", "image": "square"},
    "mpt": {"connector_type": "mlp3x_gelu"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("variants")
    tiny_vision(path / "clip", hidden=64)
    tiny_language(path / "llama")
    tiny_language(path / "mpt-language", "mpt", tied=True)
    for name, said in CASES.items():
        assemble(path / "clip", path / ("mpt-language" if name == "mpt" else "llama"), path / name, **said)
    return path


def by_hand(loaded, pixels):
    """Features through the tower's own class and the connector's weights, written out."""
    tower, config = loaded.model.model.vision_tower, loaded.config
    with torch.no_grad():
        if config.s2_scales:
            seen = slow_scales(tower, pixels, config.s2_scales, config.vision_feature_layer)
        else:
            seen = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer][:, 1:]
        weights = loaded.model.model.multi_modal_projector.state_dict()
        for number in range(0, len(weights), 2):
            seen = F.gelu(seen) if number else seen
            seen = F.linear(seen, weights[f"{number}.weight"], weights[f"{number}.bias"])
    return seen


def slow_scales(tower, pixels, scales, layer):
    """Tile by tile, token by token: what S2 says, written for reading."""
    whole = []
    for image in pixels:
        columns = []
        for scale in scales:
            sized = F.interpolate(image[None], size=(scale, scale), mode="bicubic")
            tiles, patch = scale // 56, 14
            grid = torch.empty(tiles * 4, tiles * 4, 64)
            for row in range(tiles):
                for column in range(tiles):
                    tile = sized[:, :, row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
                    tokens = tower(tile, output_hidden_states=True).hidden_states[layer][0, 1:]
                    for number, token in enumerate(tokens):
                        grid[row * 4 + number // (56 // patch), column * 4 + number % (56 // patch)] = token
            means = [
                grid[i * tiles : i * tiles + tiles, j * tiles : j * tiles + tiles].mean((0, 1))
                for i in range(4)
                for j in range(4)
            ]
            columns.append(torch.stack(means))
        whole.append(torch.cat(columns, dim=-1))
    return torch.stack(whole)


def pictures(loaded, counts):
    ids, pixels = samples(counts)
    side = loaded.layout.size
    ids = [torch.where(one == 1003, loaded.image_token_id, one) for one in ids]
    return ids, [torch.randn(len(seen), 3, side, side) for seen in pixels]


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_written_out_and_packed_equals_the_class_sample_by_sample(folders, name):
    torch.manual_seed(0)
    loaded, whole = load(folders / name), LlavaVariantForConditionalGeneration.from_pretrained(folders / name).eval()
    ids, pixels = pictures(loaded, (1, 0, 2, 1))
    wanted = by_hand(loaded, torch.cat(pixels))
    assert wanted.shape == (4, 16, 64)
    features = loaded.model.model.multi_modal_projector(
        clip.see(loaded.model.model.vision_tower, torch.cat(pixels), loaded.config)
    )
    assert (features - wanted).abs().max() <= 1e-5
    assert (torch.stack(whole.get_image_features(torch.cat(pixels)).pooler_output) - wanted).abs().max() <= 1e-5

    expected = [
        whole(input_ids=one[None], pixel_values=seen if len(seen) else None).logits[0]
        for one, seen in zip(ids, pixels, strict=True)
    ]
    score(torch.cat(expected)).backward()
    got = loaded.family.head(loaded.model)(loaded.family.hidden(loaded.model, *pack(ids, pixels)))
    score(got).backward()
    assert (got - torch.cat(expected)).abs().max() <= 2e-5
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for each, parameter in loaded.model.named_parameters():
        assert (parameter.grad is None) == (each not in gradients), each
        if parameter.grad is not None:
            close = 5e-5 * max(1.0, float(gradients[each].abs().max()))
            assert (parameter.grad - gradients[each]).abs().max() <= close, each


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_it_was_made_of_and_its_processor_fits(folders, name):
    loaded = load(folders / name)
    language = folders / ("mpt-language" if name == "mpt" else "llama")
    report = verify(folders / name, vision=folders / "clip", language=language)
    assert report.ok and [row.difference for row in report.rows] == [0.0] * len(report.rows)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 81, 3), dtype=np.uint8))
    asked = transformers.AutoProcessor.from_pretrained(folders / name)(
        text="<image>", images=[picture], return_tensors="pt"
    )
    pixels = images.normalize(torch.from_numpy(loaded.layout.prepare(picture))[None], loaded.layout, torch.float32)
    assert asked["pixel_values"].shape[-1] == (168 if name == "s2" else 56)
    assert (pixels - asked["pixel_values"]).abs().max() <= 1e-6
    assert (asked["input_ids"] == loaded.image_token_id).sum() == loaded.layout.tokens(81, 70) == 16


OPEN = """
import sys
class NoVistune:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vistune":
            raise ImportError("this process has no vistune")
sys.meta_path.insert(0, NoVistune())
import torch, transformers
given = torch.load(sys.argv[1], weights_only=True)
for folder, (ids, pixels) in given.items():
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        given[folder] = model(**ask).logits, model.generate(**ask, max_new_tokens=4, do_sample=False, pad_token_id=0)
torch.save(given, sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_without_vistune_opens_every_folder(folders, tmp_path):
    given, wanted = {}, {}
    for name in CASES:
        loaded = load(folders / name)
        ids, pixels = pictures(loaded, (1,))
        given[str(folders / name)] = ids[0][None], pixels[0]
        hidden = loaded.family.hidden(loaded.model, *pack(ids, pixels))
        ask = {"input_ids": ids[0][None], "attention_mask": torch.ones(1, len(ids[0])), "pixel_values": pixels[0]}
        made = loaded.model.generate(**ask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        wanted[str(folders / name)] = loaded.family.head(loaded.model)(hidden), made
    torch.save(given, tmp_path / "given.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "given.pt")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (logits, made) in torch.load(tmp_path / "given.pt", weights_only=True).items():
        assert (logits[0] - wanted[folder][0]).abs().max() <= 2e-5, folder
        assert torch.equal(made, wanted[folder][1]), folder


def test_assembling_says_what_the_stock_class_cannot_hold(folders, tmp_path, capsys):
    assemble(folders / "clip", folders / "llama", tmp_path / "out", **CASES["s2"] | {"connector_type": "linear"})
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot hold a connector of type linear or several scales (56, 112, 168); saved with our class" in said
    assert "trust_remote_code" in said
    assemble(folders / "clip", folders / "llama", tmp_path / "stock")
    assert "cannot hold" not in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava_variant" and config["connector_type"] == "linear"
    assert config["architectures"] == ["LlavaVariantForConditionalGeneration"]
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "llava"
    assert not list((tmp_path / "stock").glob("*.py"))


def test_connectors_are_read_from_every_kind_of_place(folders, tmp_path):
    for name in ("linear", "mlp3x", "s2"):
        read = connectors.read(folders / name)
        again = assemble(
            folders / "clip",
            folders / "llama",
            tmp_path / name,
            connector=folders / name,
            **{key: value for key, value in CASES[name].items() if key != "connector_type"},
        )
        assert again.config.connector_type == load(folders / name).config.connector_type
        assert connectors.read(tmp_path / name).keys() == read.keys()
        assert all(torch.equal(value, read[key]) for key, value in connectors.read(tmp_path / name).items())
    original = {f"model.mm_projector.{key}": value for key, value in connectors.read(folders / "mlp3x").items()}
    torch.save(original, tmp_path / "mm_projector.bin")
    assert connectors.kind(connectors.read(tmp_path / "mm_projector.bin"), "it") == "mlp3x_gelu"
    torch.save({"model.mm_projector.1.weight": torch.zeros(2, 2)}, tmp_path / "odd.bin")
    with pytest.raises(ValueError, match=r"holds \['1.weight'\], which is neither linear nor an mlpNx_gelu"):
        connectors.read(tmp_path / "odd.bin")
    torch.save({"other": torch.zeros(2)}, tmp_path / "none.bin")
    with pytest.raises(ValueError, match="holds no connector, but other"):
        connectors.read(tmp_path / "none.bin")


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("llava-mlp2x_gelu-hubstyle", "mlp2x_gelu"),
        ("llava-lora-mlp2x_gelu", "mlp2x_gelu"),
        ("llava-linear", "linear"),
        ("stage1-linear", "linear"),
    ],
)
def test_connectors_of_original_checkpoints(folder, kind):
    """A pickled model, what lies beside a LoRA adapter, safetensors, a first stage's file."""
    assert connectors.kind(connectors.read(GOLDEN / "llava" / "tiny-llava-original" / folder), folder) == kind


@pytest.mark.parametrize(
    ("width", "said", "parameters"),
    [
        (4096, {}, 20_979_712),  # of the published 7B
        (5120, {}, 31_467_520),  # of the published 13B
        (4096, {"connector_type": "linear"}, 4_198_400),  # derived, as those below
        (4096, {"s2_scales": [336, 672, 1008]}, 29_368_320),
        (1024, {"connector_type": "identity"}, 0),
    ],
)
def test_connectors_of_the_real_sizes(width, said, parameters):
    vision = transformers.CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, image_size=336, patch_size=14)
    text = transformers.LlamaConfig(hidden_size=width, num_attention_heads=width // 128)
    with torch.device("meta"):
        connector = Connector(LlavaVariantConfig(vision_config=vision, text_config=text, **said))
    assert sum(p.numel() for p in connector.parameters()) == parameters


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"connector_type": "mlp0x_gelu"}, "choose linear, mlpNx_gelu"),
        ({"connector_type": "identity", "vision": "narrow"}, "needs equal widths: vision gives 32, language takes 64"),
        ({"s2_scales": "112,224"}, r"the smallest must be the tower's own 56 pixels"),
        ({"s2_scales": "56,100"}, "whole multiples of it"),
        ({"s2_scales": "56,big"}, "give sides in pixels"),
        ({"s2_scales": "56,112", "select": "cls_patch"}, "select must be patch"),
        ({"start_end": True, "template": "tokenizer"}, "no chat template|the tokenizer's own"),
        ({"resolution": 512}, "resolution: LLaVA has no such choice; it takes .*connector_type"),
        ({"image": "anyres", "s2_scales": "56,112"}, "s2_scales: LLaVA-NeXT has no such choice"),
    ],
)
def test_bad_choices_are_named_and_nothing_is_written(folders, tmp_path, said, message):
    vision = tiny_vision(tmp_path / "narrow") if said.pop("vision", "") else folders / "clip"
    with pytest.raises(ValueError, match=message):
        assemble(vision, folders / "llama", tmp_path / "out", **said)
    assert not (tmp_path / "out").exists()


def test_one_scale_is_the_tower_itself():
    pixels = torch.randn(2, 3, 56, 56)
    seen = at_scales(lambda tiles: tiles.flatten(2)[..., :16].transpose(1, 2), pixels, [56])
    assert torch.equal(seen, pixels.flatten(2)[..., :16].transpose(1, 2))


@pytest.mark.parametrize("name", ["s2", "mlp3x", "mpt"])
def test_flops_equal_the_counted_ones(folders, name):
    loaded = load(folders / name)
    ids, pixels = pictures(loaded, (2,))
    batch = pack(ids, pixels)
    model = loaded.model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loaded.family.head(model)(loaded.family.hidden(model, *batch)[:9]).sum().backward()
    text = loaded.config.text_config
    square = sum(4 * n * n - 4 * n * (n + 1) // 2 for n in batch[2]) * text.hidden_size
    counted = counter.get_total_flops() - 3 * square * text.num_hidden_layers
    flops = loaded.family.flops(loaded.config, lengths=batch[2], images=2, supervised=9)
    assert flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("folder", ["stage1-linear", "llava-linear"])
def test_the_connector_alone_is_read_from_the_original(folder):
    read = connectors.read(ORIGINAL / folder)
    assert connectors.kind(read, folder) == "linear" and read["0.weight"].shape == (64, 32)
    stage1 = torch.load(ORIGINAL / "stage1-linear" / "mm_projector.bin", weights_only=True)
    full = load_file(ORIGINAL / "llava-linear" / "model.safetensors")
    held = stage1 if folder.startswith("stage1") else full
    assert torch.equal(read["0.weight"], held["model.mm_projector.weight"])
    assert torch.equal(read["0.bias"], held["model.mm_projector.bias"])
