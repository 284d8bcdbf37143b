"""RICE and Qwen3 joined: the reference's merged folder, proved against stock classes; broken towers refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MLCDVisionConfig, MLCDVisionModel, Qwen3Config, Qwen3ForCausalLM

from vistune.models import weights
from vistune.models.assembling.onevision15 import assemble_onevision15, vision_names
from vistune.models.load import load
from vistune.models.proving.finite import first_nonfinite
from vistune.models.proving.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15"
RICE, QWEN3, ADAPTER = GOLDEN / "tiny-rice", GOLDEN / "tiny-qwen3", GOLDEN / "tiny-adapter" / "mm_projector.safetensors"
CASES: dict[str, Any] = json.loads((GOLDEN / "nan-cases" / "nan-cases.json").read_text(encoding="utf-8"))["cases"]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in weights.stored(folder).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def changed(folder: Path, new: Path, name: str, change: Any) -> Path:
    """A copy of a folder with one tensor changed."""
    shutil.copytree(folder, new, ignore=shutil.ignore_patterns("*.safetensors"))
    held = read(folder)
    held[name] = change(held[name].clone())
    weights.write(new, {key: weights.held(value) for key, value in held.items()})
    return new


@pytest.fixture(scope="module")
def stage0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage0") / "model"
    assemble_onevision15(RICE, QWEN3, out, connector=ADAPTER)
    return out


def test_it_is_the_references_merged_folder(stage0: Path) -> None:
    same(read(stage0), read(GOLDEN / "tiny-stage0"))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    made = assemble_onevision15(RICE, GOLDEN / "tiny-qwen3-tied", tmp_path / "m", connector=ADAPTER)
    same(read(tmp_path / "m"), read(GOLDEN / "tiny-stage0-tied"))
    assert made.config.tie_word_embeddings
    untied = assemble_onevision15(RICE, GOLDEN / "tiny-qwen3-tied", tmp_path / "u", connector=ADAPTER, tie=False)
    held = read(tmp_path / "u")
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert not untied.config.tie_word_embeddings
    with pytest.raises(ValueError, match="tying would lose it"):
        assemble_onevision15(RICE, QWEN3, tmp_path / "t", tie=True)


def test_the_config_says_what_the_published_one_says(stage0: Path) -> None:
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (stage0, GOLDEN / "tiny-stage0"))
    noise = {"_name_or_path", "architectures", "transformers_version"}
    for section in ("vision_config", "text_config"):
        for key, value in theirs[section].items():
            if key not in noise:
                assert ours[section][key] == value, key
    for key in ("image_token_id", "video_token_id", "model_type", "architectures", "vocab_size"):
        assert ours[key] == theirs[key]
    assert ours["vision_config"]["text_hidden_size"] == ours["text_config"]["hidden_size"]
    pixels = json.loads((stage0 / "preprocessor_config.json").read_text())
    assert (pixels["min_pixels"], pixels["max_pixels"], pixels["temporal_patch_size"]) == (3136, 2560000, 1)


def test_verify_holds_against_the_stock_classes(stage0: Path) -> None:
    report = verify(stage0, vision=RICE, language=QWEN3, dtype=torch.float16)
    assert report.ok, report.as_dict()
    checks = {(row.part, row.check) for row in report.rows}
    assert {("vision", "hidden states"), ("language", "hidden states"), ("all", "finite in float16")} <= checks
    assert max(row.difference for row in report.rows) <= 1e-5


@pytest.mark.parametrize("name", ["visual.blocks.1.attn.qkv.weight", "model.layers.1.mlp.up_proj.weight"])
def test_verify_finds_a_weight_that_is_not_the_sources(stage0: Path, tmp_path: Path, name: str) -> None:
    broken = changed(stage0, tmp_path / "broken", name, lambda value: value + 0.01)
    report = verify(broken, vision=RICE, language=QWEN3)
    part = "vision" if name.startswith("visual") else "language"
    wrong = {(row.part, row.check) for row in report.rows if row.wrong}
    assert wrong == {(part, "weights"), (part, "hidden states")}
    assert any("blocks.1" in row.wrong or "layers.1" in row.wrong for row in report.rows)


def test_both_layouts_of_the_tower_give_the_same(tmp_path: Path, stage0: Path) -> None:
    plain = tmp_path / "rice"
    shutil.copytree(RICE, plain, ignore=shutil.ignore_patterns("*.safetensors"))
    bare = {name.removeprefix("vision_model."): entry for name, entry in weights.stored(RICE).items()}
    weights.write(plain, bare)
    assemble_onevision15(plain, QWEN3, tmp_path / "m", connector=ADAPTER)
    same(read(tmp_path / "m"), read(stage0))


def test_stock_classes_save_what_is_assembled(tmp_path: Path) -> None:
    """Other sizes than the golden ones, written by the installed `transformers`; a Qwen3 with its own head size."""
    torch.manual_seed(0)
    tower = MLCDVisionModel(
        MLCDVisionConfig(
            hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, image_size=56
        )
    )
    tower.save_pretrained(tmp_path / "vision")
    text = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=24, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(text).save_pretrained(tmp_path / "language")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(QWEN3 / file, tmp_path / "language")
    made = assemble_onevision15(tmp_path / "vision", tmp_path / "language", tmp_path / "m", seed=3)
    assert verify(tmp_path / "m", vision=tmp_path / "vision", language=tmp_path / "language").ok
    again = assemble_onevision15(tmp_path / "vision", tmp_path / "language", tmp_path / "again", seed=3)
    same(made.model.state_dict(), again.model.state_dict())
    merger: Any = made.model.visual.merger  # type: ignore[union-attr]
    assert merger.mlp[0].bias.abs().max() == 0 and merger.ln_q.weight.min() == 1
    assert 0.018 < merger.mlp[0].weight.std() < 0.022


def test_real_sizes_391_weights_become_293() -> None:
    table = vision_names(24)
    sources = [part for parts in table.values() for part in parts]
    assert len(table) == 293
    assert len(set(sources)) == len(sources) == 391 - 2  # post_layernorm is left out
    with torch.device("meta"):
        stock = MLCDVisionModel(MLCDVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24))
    assert set(sources) | {"post_layernorm.weight", "post_layernorm.bias"} == set(stock.state_dict())


def test_half_precision_becomes_full_unless_asked(tmp_path: Path) -> None:
    assemble_onevision15(GOLDEN / "nan-cases" / "fp16_overflow_block", QWEN3, tmp_path / "m")
    assert {value.dtype for value in read(tmp_path / "m").values()} == {torch.float32}
    assemble_onevision15(RICE, QWEN3, tmp_path / "b", dtype=torch.bfloat16)
    assert {value.dtype for value in read(tmp_path / "b").values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["nan_tensor", "missing_key"])
def test_a_broken_tower_is_refused_by_the_name_of_its_weight(tmp_path: Path, case: str) -> None:
    with pytest.raises(ValueError) as raised:
        assemble_onevision15(GOLDEN / "nan-cases" / case, QWEN3, tmp_path / "m", connector=ADAPTER)
    said = str(raised.value)
    assert CASES[case]["touched_source_key"] in said
    assert "visual.blocks.1.attn.qkv" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["nan_tensor", "fp16_overflow_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_module_that_is_not_finite_is_named(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """On the picture that the reference's hooks saw."""
    if case == "nan_tensor":  # as the reference merges it
        name = "visual.blocks.1.attn.qkv.weight"
        changed(GOLDEN / "tiny-stage0", tmp_path / "m", name, lambda value: value.fill_(float("nan")))
        with pytest.raises(ValueError, match=r"visual\.blocks\.1\.attn\.qkv\.weight"):
            load(tmp_path / "m")
        model: Any = load(GOLDEN / "tiny-stage0").model
        model.visual.blocks[1].attn.qkv.weight.data[-1, -1] = float("nan")
    else:
        model = assemble_onevision15(GOLDEN / "nan-cases" / case, QWEN3, tmp_path / "m", connector=ADAPTER).model
    with np.load(GOLDEN / "expected.npz") as golden:
        given = {
            "pixel_values": torch.tensor(golden["s03/pixel_values"]),
            "grid_thw": torch.tensor(golden["s03/grid_thw"]),
        }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = first_nonfinite(model.visual, given, dtype)
    wanted = CASES[case]["forward_" + str(dtype).removeprefix("torch.")]["first_non_finite_module"]
    assert (f"visual.{first}" if first else None) == wanted
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())


def test_verify_says_which_module_leaves_half_precision(tmp_path: Path) -> None:
    broken = GOLDEN / "nan-cases" / "fp16_overflow_block"
    assemble_onevision15(broken, QWEN3, tmp_path / "m", connector=ADAPTER)
    assert verify(tmp_path / "m", vision=broken, language=QWEN3).ok
    report = verify(tmp_path / "m", vision=broken, language=QWEN3, dtype=torch.float16)
    [wrong] = [row.wrong for row in report.rows if row.wrong]
    assert "visual.blocks.2.mlp.fc2" in wrong


def test_a_tokenizer_without_the_picture_tokens_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "qwen3"
    shutil.copytree(QWEN3, bare)
    for file in ("added_tokens.json", "vocab.json", "merges.txt"):
        (bare / file).unlink()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / file).write_text((bare / file).read_text().replace("<|image_pad|>", "<|picture|>"))
    with pytest.raises(ValueError, match=r"lacks <\|image_pad\|>"):
        assemble_onevision15(RICE, bare, tmp_path / "m")


@pytest.mark.parametrize(
    ("vision", "language", "said"), [(QWEN3, QWEN3, "vision: .*qwen3"), (RICE, RICE, "language: .*mlcd_vision_model")]
)
def test_other_kinds_of_parts_are_refused(tmp_path: Path, vision: Path, language: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assemble_onevision15(vision, language, tmp_path / "m")


def test_a_connector_of_another_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mm_projector.bin"
    held = {name: entry.read() for name, entry in weights.safetensors(ADAPTER).items()}
    torch.save(held, file)
    assemble_onevision15(RICE, QWEN3, tmp_path / "m", connector=file)
    same(read(tmp_path / "m"), read(GOLDEN / "tiny-stage0"))
    torch.save(held | {"model.mm_projector.mlp.2.weight": torch.zeros(65, 192)}, file)
    with pytest.raises(ValueError, match=r"mlp\.2\.weight is \[65, 192\]; these parts need \[64, 192\]"):
        assemble_onevision15(RICE, QWEN3, tmp_path / "n", connector=file)
