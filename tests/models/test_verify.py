"""The proof after assembly, for towers of our own."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import tiny_language
from tests.tiny_fastvlm import tiny_fastvlm
from vistune.models import weights
from vistune.models.assemble import assemble
from vistune.models.proving.verify import verify


def test_a_fastvlm_is_proved_and_a_changed_tower_is_found(tmp_path: Path) -> None:
    source, language = tiny_fastvlm(tmp_path / "a"), tiny_language(tmp_path / "language", "qwen2")
    assemble(source, language, tmp_path / "out")
    report = verify(tmp_path / "out", vision=source, language=language, dtype=torch.float16)
    assert report.ok, report.as_dict()
    assert {row.part for row in report.rows} == {"all", "vision", "language"}
    held = {name: entry.read().clone() for name, entry in weights.stored(tmp_path / "out").items()}
    name = next(name for name in held if name.endswith("mlp.fc1.weight"))
    held[name] *= 1.5
    (tmp_path / "out" / "model.safetensors").unlink()
    weights.write(tmp_path / "out", {name: weights.held(value) for name, value in held.items()})
    report = verify(tmp_path / "out", vision=source, language=language)
    assert {row.part for row in report.rows if row.wrong} == {"vision"}
