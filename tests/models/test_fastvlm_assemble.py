"""A FastViTHD and a Qwen2 become a FastVLM folder: from every place a tower may lie, and checked against it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_language, tiny_vision
from tests.tiny_fastvlm import golden_hf, golden_original, tiny_fastvlm
from vistune.models.assemble import assemble as any_assemble
from vistune.models.assembling import fastvlm as assemble_fastvlm
from vistune.models.assembling.fastvlm import assemble, compare_vision, read_tower
from vistune.models.checkpoints import fastvlm_names
from vistune.models.load import load
from vistune.models.proving.verify import verify

APPLE, TIMM = fastvlm_names.APPLE, fastvlm_names.TIMM


def towers(tmp_path):
    """The golden tower in every form that a user may have it."""
    hf, apple = golden_hf(tmp_path / "hf"), golden_original(tmp_path / "apple")
    whole = load_file(hf / "model.safetensors")
    timm = {name.removeprefix(TIMM): value for name, value in whole.items() if name.startswith(TIMM)}
    (tmp_path / "timm").mkdir()
    save_file(timm | {"head.fc.weight": torch.ones(3, 256)}, tmp_path / "timm" / "model.safetensors")
    stored = load_file(apple / "model.safetensors")
    clip = {"image_encoder.model." + k.removeprefix(APPLE): v for k, v in stored.items() if k.startswith(APPLE)}
    torch.save(clip | {"logit_scale": torch.ones(())}, tmp_path / "mobileclip.pt")
    return {"hf": hf, "apple": apple, "timm": tmp_path / "timm", "mobileclip": tmp_path / "mobileclip.pt"}


@pytest.mark.parametrize(("form", "side"), [("hf", 256), ("apple", 256), ("timm", 1024), ("mobileclip", 1024)])
def test_the_tower_is_taken_from_wherever_it_lies(tmp_path, form, side):
    source, language = towers(tmp_path)[form], tiny_language(tmp_path / "language", "qwen2")
    loaded = assemble(source, language, tmp_path / "out")
    rows = compare_vision(source, loaded.model.model.vision_tower)
    assert [(row.check, row.wrong) for row in rows] == [("weights", ""), ("features", "")]
    stored = load_file(language / "model.safetensors")
    ours = dict(loaded.model.named_parameters())
    for name, value in stored.items():
        inner = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(ours[inner][: len(value)], value), name
    assert loaded.layout.size == side and loaded.template_name == "qwen_2"
    assert loaded.model.get_input_embeddings().weight.shape[0] % 64 == 0


def test_what_differs_is_named(tmp_path):
    source = tiny_fastvlm(tmp_path / "a", seed=1)
    other = load(tiny_fastvlm(tmp_path / "b", seed=2)).model.model.vision_tower
    with torch.no_grad():
        other.timm_model.stages[1].blocks[0].mlp.fc1.weight.mul_(1.5)
    weights, features = compare_vision(source, other)
    assert "differs" in weights.wrong and weights.difference > 0
    assert features.wrong and features.difference > 1e-4


def test_connectors_are_fresh_or_given_and_the_seed_counts(tmp_path):
    source, language = tiny_fastvlm(tmp_path / "a"), tiny_language(tmp_path / "language", "qwen2", tied=True)
    made = {}
    for name, said in {"0": {}, "0 again": {}, "1": {"seed": 1}, "given": {"connector": source}}.items():
        loaded = assemble(source, language, tmp_path / name, **said)
        made[name] = loaded.model.model.multi_modal_projector.linear_1.weight
        assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert torch.equal(made["0"], made["0 again"]) and not torch.equal(made["0"], made["1"])
    assert torch.equal(made["given"], load(source).model.model.multi_modal_projector.linear_1.weight)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    source, clip = tiny_fastvlm(tmp_path / "a"), tiny_vision(tmp_path / "clip")
    with pytest.raises(ValueError, match="is a 'llama'; FastVLM is built on Qwen2"):
        assemble(source, tiny_language(tmp_path / "llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="holds no FastViTHD"):
        read_tower(clip)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {TIMM + "stages.0.blocks.0.token_mixer.conv_kxk.0.conv.weight": torch.ones(2)}, tmp_path / "f")
    (tmp_path / "f").rename(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"training form .*reparameterize_model"):
        read_tower(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="256 to 1536"):
        assemble(source, tiny_language(tmp_path / "qwen2", "qwen2"), tmp_path / "out", resolution=100)
    assert not (tmp_path / "out").exists()


def test_half_precision_is_asked_for(tmp_path):
    source, language = tiny_fastvlm(tmp_path / "a"), tiny_language(tmp_path / "language", "qwen2")
    loaded = assemble(source, language, tmp_path / "out", dtype=torch.bfloat16, resolution=512)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.layout.tokens(5, 5) == 64
    assert assemble_fastvlm.said_resolution(tmp_path / "out") == 512


@pytest.mark.slow
def test_the_verb_joins_and_proves(tmp_path):
    """As `vistune assemble` does: the tower's folder decides that it becomes a FastVLM."""
    for form, source in towers(tmp_path).items():
        language = tiny_language(tmp_path / f"language {form}", "qwen2")
        any_assemble(source, language, tmp_path / f"out {form}", resolution=256)
        report = verify(tmp_path / f"out {form}", vision=source, language=language)
        assert report.ok, [row.wrong for row in report.rows]
        assert {"weights", "features"} <= {row.check for row in report.rows if row.part == "vision"}, form
