"""Original LLaVA checkpoints that are not whole, not theirs, or not safe: refused with the reason, nothing touched."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from tests.original_llava import (
    BASE,
    ORIGINAL,
    base_of,
    changed,
    copied,
)
from tests.tiny import GOLDEN, tiny_language
from vistune.models import checkpoints, weights
from vistune.models.convert import check, convert
from vistune.models.load import load


def test_weights_that_do_not_fit_are_listed(tmp_path):
    gone = "model.layers.0.mlp.up_proj.weight"
    cases = {
        "missing": (lambda t: t.pop(gone), r"llava: config.json: mm_vision_tower(.|\n)*1 weights are missing"),
        "extra": (lambda t: t.update(stray=torch.zeros(2)), r"1 weights are not of this model(.|\n)*stray"),
        "shape": (lambda t: t.update({gone: torch.zeros(5, 64)}), r"up_proj.weight is \[5, 64\], not \[176, 64\]"),
        "many": (lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name], r"25 weights are missing"),
    }
    for name, (change, match) in cases.items():
        folder = changed(copied("llava-mlp2x_gelu", tmp_path / name), change)
        with pytest.raises(ValueError, match=match):
            load(folder)
        with pytest.raises(ValueError, match=match) as error:
            convert(folder, tmp_path / "out", "hf")
        assert str(error.value).count("\n") <= 11
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    found = checkpoints.read(ORIGINAL / "llava-mlp2x_gelu")
    check(found, "as it is")


def test_a_file_that_was_cut(tmp_path):
    for name, file in (("llava-mlp2x_gelu", weights.SINGLE), ("llava-mlp2x_gelu-hubstyle", weights.PICKLE)):
        folder = copied(name, tmp_path / name)
        (folder / file).write_bytes((folder / file).read_bytes()[:-1000])
        with pytest.raises(ValueError, match="not a whole"):
            convert(folder, tmp_path / "out", "hf")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["stage1-mlp2x_gelu", "llava-lora-mlp2x_gelu"])
def test_a_base_that_does_not_match(name, tmp_path):
    with pytest.raises(ValueError, match=r"give the other with --base \(config.json names ./base-llm\)"):
        load(ORIGINAL / name)
    tiny_language(tmp_path / "wide", "llama", hidden=96)
    with pytest.raises(ValueError, match=r"(is|has) .*96"):
        convert(ORIGINAL / name, tmp_path / "out", "hf", tmp_path / "wide")
    tiny_language(tmp_path / "deep", "llama", layers=1)
    with pytest.raises(ValueError, match=r"layers.1.*"):
        convert(ORIGINAL / name, tmp_path / "out", "hf", tmp_path / "deep")
    assert not (tmp_path / "out").exists()


def test_parts_of_a_lora_pair_that_are_not_there(tmp_path):
    folder = copied("llava-lora-mlp2x_gelu", tmp_path)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"no non_lora_trainables[.]bin; the original writes them at the end"):
        load(folder, base=BASE)
    with pytest.raises(ValueError, match="in which no LoRA can be told from what it lies on"):
        convert(ORIGINAL / "llava-mlp2x_gelu", tmp_path / "out", "llava-lora", BASE)
    assert not (tmp_path / "out").exists()


def test_a_pair_whose_model_has_learned_since(tmp_path):
    convert(ORIGINAL / "llava-lora-mlp2x_gelu", tmp_path / "hf", "hf", BASE)
    convert(tmp_path / "hf", tmp_path / "pair", "llava-lora")
    changed(tmp_path / "hf", lambda t: t["multi_modal_projector.linear_2.weight"].add_(0.1))
    with pytest.raises(ValueError, match=r"linear_2.weight has changed since .* no longer this model's"):
        convert(tmp_path / "hf", tmp_path / "again", "llava-lora")


def test_a_tokenizer_of_another_model(tmp_path):
    folder = copied("llava-mlp2x_gelu", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["a-word", "another"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 1002 tokens, the embedding 1000 rows; take the tokenizer that belongs"):
        load(folder)
    convert(ORIGINAL / "llava-mlp2x_gelu", tmp_path / "hf", "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "llava" / "tokenizers" / "llama_like" / file, tmp_path / "hf")
    with pytest.raises(ValueError, match="image token is 1000, the tokenizer has '<image>' = None"):
        convert(tmp_path / "hf", tmp_path / "out", "llava")
    for file in (*folder.glob("token*"), folder / "special_tokens_map.json"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer can be opened in it"):
        load(folder)


class Trap:
    """What free unpickling would run."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llava-mlp2x_gelu-hubstyle", weights.PICKLE),
        ("stage1-mlp2x_gelu", "mm_projector.bin"),
        ("llava-lora-mlp2x_gelu", "non_lora_trainables.bin"),
    ],
)
def test_a_pickle_with_anything_but_tensors_is_not_run(name, file, tmp_path):
    folder = copied(name, tmp_path)
    held = torch.load(folder / file, weights_only=True)
    torch.save({**held, "more": Trap(tmp_path / "sprung")}, folder / file)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="nothing of it was run"):
        convert(folder, tmp_path / "out", "hf", base_of(name))
    assert not (tmp_path / "sprung").exists()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"mm_projector_type": "resampler"}, "resampler"),
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"mm_vision_select_feature": "cls"}, "patch and cls_patch"),
        ({"model_type": "llava_gemma", "architectures": ["GemmaForCausalLM"]}, "known are llama, mistral"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
    ],
)
def test_what_no_family_holds_is_said(said, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load(copied("llava-mlp2x_gelu", tmp_path, **said))
