"""8-bit moments and stochastic rounding in whole runs: a resume goes on to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.made import made_recipe
from vistune.train import metrics, stage
from vistune.train.spreading import precision as precisions
from vistune.train.updating import moments

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [
    ("adamw8bit", "fp32"),
    pytest.param("adamw8bit", "bf16_true", marks=pytest.mark.slow),
    pytest.param("adamw8bit", "bf16_stochastic", marks=pytest.mark.slow),
    pytest.param("adamw", "bf16_stochastic", marks=pytest.mark.slow),
]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(("name", "precision"), KINDS)
def test_resume_is_bit_for_bit(start, data, tmp_path, name, precision, monkeypatch):
    """From the checkpoint in the middle of a whole run."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(precisions, "has_bf16", lambda device: True)  # also on a CPU that only imitates it
    monkeypatch.setattr(moments, "SMALL", 64)
    whole, again = tmp_path / "whole", tmp_path / "again"
    said = {"optimizer": {"name": name}, "train": {"precision": precision, "batch": 4, "steps": 4}}
    said |= {"checkpoint": {"every": 2, "keep": 9}}
    stage.run(made_recipe(start, data, whole, **said))
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("model", "summary.json", "step-00000004"))
    stage.run(made_recipe(start, data, again, **said))
    assert losses(again) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    for tensor, value in weights(whole).items():
        assert torch.equal(value, weights(again)[tensor]), tensor
