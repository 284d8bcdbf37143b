"""The benchmark of the time to the first token: its parts run in order, and its table says what was measured."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.tiny_fastvlm import tiny_fastvlm
from vistune.models.load import load
from vistune.models.towers import fastvithd


@pytest.fixture
def ttft(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("ttft")


def test_a_first_token_is_the_models_own(ttft, tmp_path):
    loaded = load(tiny_fastvlm(tmp_path / "m"))
    model = loaded.model
    one = ttft.parts(model, 128, 4, fastvithd.see, "cpu")
    with torch.no_grad():
        value = None
        for step in one["steps"].values():
            value = step(value)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, 4 + ttft.QUESTION), generator=draw)
    pixels = torch.rand(1, 3, 128, 128, generator=draw)
    ids[0, :4] = loaded.image_token_id
    with torch.no_grad():
        assert value == model(input_ids=ids, pixel_values=pixels).logits[0, -1].argmax()


def test_the_table_says_what_was_measured(ttft):
    steps = {part: lambda value: value for part in ("vision", "connector", "prefill")}
    made = {
        name: {"tokens": 16, "vision_parameters": 10**6, "steps": steps} for name in ("FastViTHD 256", "ViT-L/14 336")
    }
    found = ttft.measure(made, 3, "cpu")
    assert found["FastViTHD 256"]["seconds"].keys() == {"vision", "connector", "prefill", "total"}
    said = {"device": "cpu", "dtype": "float32", "threads": 1, "language": "tiny", "rounds": 3, "contenders": found}
    lines = ttft.markdown(said).splitlines()
    assert lines[4].startswith("| FastViTHD 256 | 1.0M | 16 |") and lines[5].endswith("| 1.00 |")
