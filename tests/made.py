"""Made-up LLaVA data, a stage-0 folder and a recipe over them, for tests that train."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import tiny_language, tiny_vision
from vistune import recipe as recipes
from vistune.models.assemble import assemble
from vistune.samples import Image as Picture

WORDS = "the red cup stands on a small wooden table near two green boats and one tall old tree by the lake"


def made_data(folder: Path, rows: int = 24, seed: int = 0) -> Path:
    """A LLaVA JSON list: text only, one picture, two pictures, one to three rounds, answers of unequal length."""
    draw = random.Random(seed)
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    conversations = []
    for row in range(rows):
        count = (1, 0, 2, 1)[row % 4]
        names = [f"{row}_{i}.png" for i in range(count)]
        for name in names:
            size = (draw.randint(40, 90), draw.randint(40, 90))
            noise = np.frombuffer(random.Random(f"{seed} {name}").randbytes(size[0] * size[1]), np.uint8).reshape(
                size[::-1]
            )
            Image.fromarray(noise).convert("RGB").save(pictures / name)
        turns = []
        for turn in range(draw.randint(1, 3)):
            mark = "<image>\n" * (count if turn == 0 else 0)
            turns.append({"from": "human", "value": mark + _sentence(draw, 3, 9) + "?"})
            turns.append({"from": "gpt", "value": _sentence(draw, 2, 30) + "."})
        entry: dict[str, Any] = {"id": f"row-{row}", "conversations": turns}
        if count:
            entry["image"] = names if count > 1 else names[0]
        conversations.append(entry)
    path = folder / "data.json"
    path.write_text(json.dumps(conversations))
    return path


def noise_in(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[Picture]:
    """Pictures of noise of these widths and heights, the same ones every time."""
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return [Picture(path=str(folder / f"{i}.png")) for i in range(len(sizes))]


def _sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS.split()) for _ in range(draw.randint(least, most)))


def stage0(folder: Path, kind: str = "llama", template: str = "v1") -> Path:
    """A tiny assembled model folder: CLIP of 16 image tokens and a language model of `kind`."""
    vision = tiny_vision(folder / "vision")
    language = tiny_language(folder / "language", kind)
    assemble(vision=str(vision), language=str(language), out=folder / "stage0", template=template, image="pad")
    return folder / "stage0"


def made_recipe(start: Path, file: Path, run: Path, /, **sections: dict[str, Any]) -> recipes.Recipe:
    """A small fp32 recipe on the CPU; `sections` are laid over it."""
    tree: dict[str, Any] = {
        "name": "made",
        "run": str(run),
        "model": {"start": str(start)},
        "data": {"sources": [{"path": str(file), "images": str(file.parent / "images")}], "length": 256, "workers": 0},
        "learn": {"connector": 1e-3, "language": 2e-4},
        "train": {"batch": 8, "precision": "fp32", "device": "cpu", "steps": 6, "seed": 3},
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"peak_tflops": 0.1},
    }
    for section, values in sections.items():
        tree[section] = values if section == "learn" else tree.get(section, {}) | values
    return recipes.build(tree, "made")
