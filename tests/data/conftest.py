"""Small data sources on disk, and a language that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data.small import make_language
from vistune.data.tokenize import Language


@pytest.fixture
def language() -> Language:
    return make_language()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.json", lines: bool = False) -> Path:
        path = tmp_path / name
        text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.png, b.jpg, c.png: 40, 60 and 80 pixels wide; empty.jpg without a byte; torn.jpg cut in the middle."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, width, colour in (("a.png", 40, "red"), ("b.jpg", 60, "green"), ("c.png", 80, "blue")):
        PIL.Image.new("RGB", (width, 30), colour).save(folder / name)
    (folder / "empty.jpg").touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "torn.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    return folder
