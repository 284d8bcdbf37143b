"""The golden checkpoints of the original LLaVA: which format each is, copies with something changed, comparisons."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import GOLDEN
from vistune.models import checkpoints, weights

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"
BASE = ORIGINAL / "base-llm"
FORMATS = {
    "llava-mlp2x_gelu": "llava",
    "llava-mlp2x_gelu-hubstyle": "llava",
    "llava-linear": "llava",
    "llava-anyres-spatial_unpad": "llava",
    "stage1-mlp2x_gelu": "llava-adapter",
    "stage1-linear": "llava-adapter",
    "llava-lora-mlp2x_gelu": "llava-lora",
}
each_checkpoint = pytest.mark.parametrize("name", FORMATS)


def base_of(name):
    return None if FORMATS[name] == "llava" else BASE


def files(folder):
    """Every tensor of a checkpoint's folder by file's kind and name; the tower's own folder apart."""
    found = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        found |= {(file.suffix, name): entry for name, entry in weights.of_file(file).items()}
    return found


def same(one, other):
    """Equal names, shapes, types and bytes."""
    assert one.keys() == other.keys()
    for name, entry in one.items():
        a, b = entry.read(), other[name].read()
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (entry.dtype, torch.Size(entry.shape)), name
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), name
    return True


def copied(name, path, **config):
    """A copy of a golden checkpoint beside its tower, with changes to config.json."""
    shutil.copytree(ORIGINAL / "clip-tiny-patch14-56", path / "clip-tiny-patch14-56", dirs_exist_ok=True)
    shutil.copytree(ORIGINAL / name, path / name)
    return edited(path / name, **config)


def edited(folder, **config):
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return folder


def changed(folder, change):
    """Its one safetensors file went through `change`."""
    tensors = load_file(folder / weights.SINGLE)
    change(tensors)
    save_file(tensors, folder / weights.SINGLE, metadata={"format": "pt"})
    return folder


def through(found, path, *formats):
    """A checkpoint written and read again in one format after another; the last is only written. Returns its folder."""
    for number, name in enumerate(formats):
        folder = path / f"{number}-{name}"
        folder.mkdir()
        checkpoints.named(name).write(found, folder)
        if number < len(formats) - 1:
            found = checkpoints.read(folder)
    return folder
