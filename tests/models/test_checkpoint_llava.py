"""Original LLaVA checkpoints in and out: recognised by contents, written back to the byte."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.original_llava import (
    BASE,
    FORMATS,
    ORIGINAL,
    base_of,
    changed,
    copied,
    each_checkpoint,
    edited,
    files,
    same,
    through,
)
from tests.tiny import GOLDEN, tiny_language, tiny_vision
from vistune.models import checkpoints, weights
from vistune.models.assemble import assemble
from vistune.models.checkpoints import llava_config, llava_parts
from vistune.models.convert import convert
from vistune.models.load import load


def test_every_golden_folder_has_one_claimant_or_none(tmp_path):
    claimed = {}
    for folder in sorted(path for path in (GOLDEN / "llava" / "tiny-llava-original").iterdir() if path.is_dir()):
        claims = [one.name for one in checkpoints.formats().values() if one.recognises(folder)]
        assert len(claims) <= 1
        claimed |= {folder.name: claims[0]} if claims else {}
    assert claimed == FORMATS
    for file in ("stage1-mlp2x_gelu", "stage1-linear"):
        assert checkpoints.recognise(ORIGINAL / file / "mm_projector.bin")[0].name == "llava-adapter"
    # By contents: another name changes nothing, another tower does.
    renamed = shutil.copytree(ORIGINAL / "llava-mlp2x_gelu", tmp_path / "nothing-of-the-kind")
    assert checkpoints.recognise(renamed)[0].name == "llava"
    assert not llava_config.recognise({"model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_1024"})
    assert llava_config.recognise({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})


@each_checkpoint
def test_written_back_in_its_own_format(name, tmp_path):
    written = through(checkpoints.read(ORIGINAL / name, base=base_of(name)), tmp_path, FORMATS[name])
    assert same(files(ORIGINAL / name), files(written))
    for said in ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json"):
        if (ORIGINAL / name / said).exists():
            assert json.loads((written / said).read_text()) == json.loads((ORIGINAL / name / said).read_text())
    if (ORIGINAL / name / "tokenizer.model").exists():
        assert (written / "tokenizer.model").read_bytes() == (ORIGINAL / name / "tokenizer.model").read_bytes()
    load(written, base=base_of(name) and BASE)


@each_checkpoint
def test_after_detours(name, tmp_path):
    found, own = checkpoints.read(ORIGINAL / name, base=base_of(name)), FORMATS[name]
    for number, way in enumerate((["hf"], ["hf", "llava", "hf"], ["llava", "hf"])):
        (tmp_path / str(number)).mkdir()
        written = through(found, tmp_path / str(number), *way, own)
        assert same(files(ORIGINAL / name), files(written)), way


@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_a_folder_of_ours_after_a_detour(layout, tmp_path):
    tiny_vision(tmp_path / "clip")
    tiny_language(tmp_path / "llama", "llama")
    assemble(tmp_path / "clip", tmp_path / "llama", tmp_path / "whole", dtype=torch.bfloat16)
    convert(tmp_path / "whole", tmp_path / "there", layout, verify=True)
    convert(tmp_path / "there", tmp_path / "back", "hf", verify=True)
    assert same(weights.stored(tmp_path / "whole"), weights.stored(tmp_path / "back"))
    one, other = load(tmp_path / "whole"), load(tmp_path / "back")
    assert (one.template_name, one.layout, one.image_token_id) == (
        other.template_name,
        other.layout,
        other.image_token_id,
    )


def test_files_of_every_kind(tmp_path):
    """Pickles and safetensors, in one file or several, with an index or without."""
    wanted = weights.found(ORIGINAL / "llava-mlp2x_gelu")
    for kind in ("bin", "safetensors"):
        for index in (True, False):
            folder = copied("llava-mlp2x_gelu", tmp_path / f"{kind}-{index}")
            (folder / weights.SINGLE).unlink()
            (weights.write_pickles if kind == "bin" else weights.write)(folder, wanted, 200_000)
            assert len(list(folder.glob(f"*-of-*.{kind}"))) > 3
            if not index:
                next(folder.glob("*.index.json")).unlink()
            assert same(wanted, weights.found(folder))
            assert load(folder).layout.mode == "pad"
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"holds \d of \d shards"):
        load(folder)


def test_the_image_token_and_the_rows_it_needs():
    found = load(ORIGINAL / "llava-mlp2x_gelu")
    old = load_file(ORIGINAL / "llava-mlp2x_gelu" / weights.SINGLE)
    assert found.image_token_id == 1000 == found.tokenizer.convert_tokens_to_ids("<image>")
    for name, weight in (
        ("lm_head.weight", found.model.lm_head.weight),
        ("model.embed_tokens.weight", found.model.get_input_embeddings().weight),
    ):
        assert weight.shape == (1024, 64) and torch.equal(weight[:1000], old[name])
        torch.testing.assert_close(weight[1000:], old[name].mean(0).expand(24, -1))


def test_the_tower_is_looked_for_beside_then_as_given(tmp_path):
    name = "llava-mlp2x_gelu-hubstyle"
    folder = copied(name, tmp_path)
    beside = load(folder).model.model.vision_tower.state_dict()
    other = tiny_vision(tmp_path / "elsewhere", seed=3)
    assert not torch.equal(*(one["post_layernorm.bias"] for one in (beside, towers(folder, base=other))))
    edited(folder, mm_vision_tower=str(other))
    assert same_tower(towers(folder), towers(folder, base=other))
    shutil.move(tmp_path / "clip-tiny-patch14-56", folder / "elsewhere")  # inside, by the path's last name
    assert same_tower(towers(folder), beside)
    edited(folder, mm_vision_tower="nobody/clip-of-nobody")
    with pytest.raises(ValueError, match=r"'nobody/clip-of-nobody', which is not at .*clip-of-nobody.*with --base"):
        load(folder)


def towers(folder, **more):
    return load(folder, **more).model.model.vision_tower.state_dict()


def same_tower(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def test_a_tower_inside_counts_and_not_the_one_beside(tmp_path):
    """The original's own anyres checkpoint holds another tower than the one its config.json names."""
    name = "llava-anyres-spatial_unpad"
    stored = load_file(ORIGINAL / name / weights.SINGLE)
    held = load(ORIGINAL / name).model.model.vision_tower.state_dict()
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert all(torch.equal(value, stored[prefix + key]) for key, value in held.items() if "position_ids" not in key)
    known = llava_parts.vision({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, (tmp_path,), None, inside=True)
    assert (known.config.hidden_size, known.config.image_size, known.processor["size"]) == (1024, 336, 336)


def test_what_older_files_carry_is_kept_and_not_loaded(tmp_path):
    folder = copied("llava-mlp2x_gelu", tmp_path)
    changed(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    written = through(checkpoints.read(folder), tmp_path, "hf", "llava")
    assert same(files(folder), files(written))
    assert not any("inv_freq" in name for name in checkpoints.read(folder).tensors)


@pytest.mark.parametrize(
    ("said", "template"),
    [
        ({"model_type": "llava_llama"}, "v1"),
        ({"model_type": "llava"}, "v1"),
        ({"model_type": "llava_llama", "vocab_size": 64000}, "chatml_direct"),
        ({"model_type": "llava_mistral"}, "mistral_instruct"),
        ({"model_type": "llava_mpt"}, "mpt"),
        ({"model_type": "llava_qwen2"}, "qwen_2"),
        ({"model_type": "llava_llama", "tune_mm_mlp_adapter": True}, "plain"),
    ],
)
def test_the_template_where_nobody_says_one(said, template):
    assert llava_config.template(said) == template


def test_template_and_image_can_be_said(tmp_path):
    said = load(ORIGINAL / "llava-mlp2x_gelu", template="llava_v1", image="square")
    assert (said.template_name, said.layout.mode) == ("llava_v1", "square")
    found = checkpoints.read(ORIGINAL / "llava-mlp2x_gelu", template="llava_v1", image="square")
    again = load(through(found, tmp_path, "llava"))
    assert (again.template_name, again.layout.mode) == ("llava_v1", "square")


def test_tokens_around_images_that_a_first_stage_added(tmp_path):
    """The pickle has the embedding with two more rows; tokens and the head's rows are made as the original does."""
    folder = copied("stage1-mlp2x_gelu", tmp_path, mm_use_im_start_end=True, vocab_size=1002)
    held = torch.load(folder / "mm_projector.bin", weights_only=True)
    held["model.embed_tokens.weight"] = torch.randn(1002, 64)
    torch.save(held, folder / "mm_projector.bin")
    found = load(folder, base=BASE, template="v1")
    assert found.start_end and found.image_token_id == 1002
    assert torch.equal(found.model.get_input_embeddings().weight[:1002], held["model.embed_tokens.weight"])
    head = load_file(BASE / weights.SINGLE)["lm_head.weight"]
    torch.testing.assert_close(found.model.lm_head.weight[1001], head.mean(0))
    written = through(checkpoints.read(folder, base=BASE, template="v1"), tmp_path, "hf", "llava-adapter")
    assert same(files(folder), files(written))


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_language_models(kind, tmp_path):
    tiny_vision(tmp_path / "clip")
    tiny_language(tmp_path / kind, kind)
    template = "qwen_2" if kind == "qwen2" else "mistral_instruct"
    assemble(tmp_path / "clip", tmp_path / kind, tmp_path / "whole", template=template)
    convert(tmp_path / "whole", tmp_path / "there", "llava", verify=True)
    said = json.loads((tmp_path / "there" / "config.json").read_text())
    assert said["model_type"] == f"llava_{kind}" and said["rope_theta"] and "vistune" not in said
    assert isinstance(load(tmp_path / "there").config.text_config, transformers.CONFIG_MAPPING[kind])


@pytest.mark.parametrize(
    ("vision", "language", "more"),
    [
        ("clip", "llama", {"connector_type": "mlp3x_gelu", "start_end": True}),
        ("clip", "llama", {"connector_type": "linear", "select": "cls_patch", "select_layer": -1}),
        ("clip", "llama", {"s2_scales": "56,112"}),
        ("siglip", "llama", {"connector_type": "identity", "image": "square"}),
        ("clip", "mpt", {}),
        ("clip", "llama", {"image": "anyres"}),
    ],
)
def test_all_that_the_original_has_words_for(vision, language, more, tmp_path):
    tiny_vision(tmp_path / "vision", vision, hidden=64 if "identity" in more.values() else 32)
    tiny_language(tmp_path / "language", language)
    assemble(tmp_path / "vision", tmp_path / "language", tmp_path / "whole", **more)
    convert(tmp_path / "whole", tmp_path / "there", "llava", verify=True)
    convert(tmp_path / "there", tmp_path / "back", "hf", verify=True)
    assert same(weights.stored(tmp_path / "whole"), weights.stored(tmp_path / "back"))
    one, other = load(tmp_path / "there"), load(tmp_path / "whole")
    for name in ("family", "template_name", "layout", "start_end", "image_token_id"):
        assert getattr(one, name) == getattr(other, name), name


def test_any_model_gives_its_connector(tmp_path):
    tiny_vision(tmp_path / "clip")
    tiny_language(tmp_path / "llama", "llama")
    assemble(tmp_path / "clip", tmp_path / "llama", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "part", "llava-adapter", verify=True)
    held = torch.load(tmp_path / "part" / "mm_projector.bin", weights_only=True)
    stored = weights.stored(tmp_path / "whole")
    assert sorted(held) == [f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")]
    wanted = stored["multi_modal_projector.linear_2.weight"].read()
    assert torch.equal(held["model.mm_projector.2.weight"], wanted)


def test_a_connector_goes_onto_a_whole_model_too(tmp_path):
    convert(ORIGINAL / "stage1-mlp2x_gelu", tmp_path / "first", "hf", BASE)
    held = torch.load(ORIGINAL / "stage1-mlp2x_gelu" / "mm_projector.bin", weights_only=True)
    for base in (tmp_path / "first", ORIGINAL / "llava-mlp2x_gelu", ORIGINAL / "llava-mlp2x_gelu-hubstyle"):
        model = load(ORIGINAL / "stage1-mlp2x_gelu" / "mm_projector.bin", base=base).model
        assert torch.equal(model.model.multi_modal_projector.linear_2.weight, held["model.mm_projector.2.weight"])


def test_lora_is_folded_where_the_adapter_says_and_nowhere_else(tmp_path):
    """The adapter's targets are leaf names that the tower has too; its tensors say which paths are meant."""
    folder = copied("llava-lora-mlp2x_gelu", tmp_path)
    found = load(folder, base=BASE)
    tower = load_file(ORIGINAL / "clip-tiny-patch14-56" / weights.SINGLE)
    for name, value in found.model.model.vision_tower.state_dict().items():
        assert torch.equal(value, tower[f"vision_model.{name}"])
    base = load_file(BASE / weights.SINGLE)
    assert torch.equal(found.model.lm_head.weight[:1000], base["lm_head.weight"])

    path = "vision_model.encoder.layers.1.self_attn.q_proj"
    pair = load_file(folder / "adapter_model.safetensors")
    down, up = torch.randn(8, 32), torch.randn(32, 8)
    pair[f"base_model.model.model.vision_tower.vision_tower.{path}.lora_A.weight"] = down
    pair[f"base_model.model.model.vision_tower.vision_tower.{path}.lora_B.weight"] = up
    save_file(pair, folder / "adapter_model.safetensors")
    again = load(folder, base=BASE).model.model.vision_tower.state_dict()
    wanted = tower[f"{path}.weight"] + up @ down * 2
    torch.testing.assert_close(again[f"{path.removeprefix('vision_model.')}.weight"], wanted)
    assert torch.equal(again["encoder.layers.0.self_attn.q_proj.weight"], tower[f"{path}.weight".replace(".1.", ".0.")])
