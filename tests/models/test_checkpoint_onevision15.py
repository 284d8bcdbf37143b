"""LLaVA-OneVision-1.5's published folder, read and written back; both ways to call its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vistune.models import checkpoints, weights
from vistune.models.checkpoints.onevision15 import FORMAT, published
from vistune.models.fit import expected
from vistune.models.folders import beside
from vistune.models.load import load

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15"
NAMES = ["tiny-stage0", "tiny-stage0-tied"]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in weights.stored(folder).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def written(checkpoint: Any, folder: Path) -> Path:
    with beside(folder) as new:
        FORMAT.write(checkpoint, new)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_published_folder_has_one_claimant_and_is_written_back(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name
    found = checkpoints.read(source)
    assert found.format == "hf"
    out = written(found, tmp_path / "out")
    same(read(out), read(source))
    same(read(written(FORMAT.read(source, base=None), tmp_path / "direct")), read(source))
    assert checkpoints.recognise(out)[0].name == "hf"
    assert load(out).config.tie_word_embeddings == name.endswith("tied")


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_as_published(name: str, tmp_path: Path) -> None:
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (written(checkpoints.read(GOLDEN / name), tmp_path / "out"), GOLDEN / name)
    )
    assert "vistune" not in ours
    noise = {"_name_or_path", "architectures", "transformers_version", "text_config", "vision_config"}
    for one, other in ((ours, theirs), *((ours[part], theirs[part]) for part in ("text_config", "vision_config"))):
        assert {key: one.get(key) for key in other if key not in noise} == {
            key: value for key, value in other.items() if key not in noise
        }
    # Said outright: the default of a release for what is not said may be either.
    assert ours["tie_word_embeddings"] is ours["text_config"]["tie_word_embeddings"] is name.endswith("tied")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_the_processor_is_as_published(file: str, tmp_path: Path) -> None:
    ours, theirs = (
        json.loads((folder / file).read_text())
        for folder in (written(checkpoints.read(GOLDEN / NAMES[0]), tmp_path / "out"), GOLDEN / NAMES[0])
    )
    for key in (
        "min_pixels",
        "max_pixels",
        "image_mean",
        "image_std",
        "patch_size",
        "merge_size",
        "temporal_patch_size",
    ):
        assert ours.get(key) == theirs.get(key), key
    assert ours.get("eos_token") == theirs.get("eos_token")


def test_names_of_the_class_in_memory_become_the_published_ones(tmp_path: Path) -> None:
    source = checkpoints.read(GOLDEN / NAMES[0])
    in_memory = {
        re.sub("^visual", "model.visual", re.sub(r"^model\.", "model.language_model.", name)): entry
        for name, entry in source.tensors.items()
    }
    assert "model.language_model.layers.0.mlp.up_proj.weight" in in_memory
    assert "model.visual.class_embedding" in in_memory
    with beside(tmp_path / "newer") as new:
        checkpoints.named("hf").write(source, new)
        (new / "model.safetensors").unlink()
        weights.write(new, in_memory)
    newer = checkpoints.read(tmp_path / "newer")
    same(read(written(newer, tmp_path / "out")), read(GOLDEN / NAMES[0]))
    assert published(source.tensors) == source.tensors


def test_types_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    source = checkpoints.read(GOLDEN / NAMES[0])
    source.tensors = {
        name: entry.cast(torch.bfloat16 if name.startswith("model.") else None)
        for name, entry in source.tensors.items()
    }
    out = read(written(source, tmp_path / "out"))
    assert {out[name].dtype for name in out if name.startswith("model.")} == {torch.bfloat16}
    assert {out[name].dtype for name in out if not name.startswith("model.")} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("visual.blocks.1.norm1.bias"), r"1 weights are missing.*\n.*visual\.blocks\.1\.norm1\.bias"),
        (lambda t: t.update(odd=t["model.norm.weight"]), r"1 weights are not of this model.*\n.*odd"),
        (
            lambda t: t.update({"model.norm.weight": t["lm_head.weight"]}),
            r"model\.norm\.weight is \[500, 64\], not \[64\]",
        ),
    ],
)
def test_what_is_not_whole_is_not_written(change: Any, said: str, tmp_path: Path) -> None:
    source = checkpoints.read(GOLDEN / NAMES[0])
    change(source.tensors)
    with pytest.raises(ValueError, match=said):
        written(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_published_sizes_698_tensors() -> None:
    said = checkpoints.read(GOLDEN / NAMES[0]).said
    said.config = type(said.config)()  # the defaults are the 4B's
    wanted = expected(said)
    assert len(wanted) == 698
    assert wanted["visual.patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert wanted["visual.merger.mlp.2.weight"] == (2560, 4096)
    assert wanted["model.embed_tokens.weight"] == wanted["lm_head.weight"] == (151936, 2560)
    merger = sum(torch.Size(shape).numel() for name, shape in wanted.items() if ".merger." in name)
    assert merger == 27_271_680  # as a user's training log counts it
