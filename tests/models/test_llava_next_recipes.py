"""The recipes of LLaVA-1.6: what its checkpoints say of their training, and where each stage begins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vistune.anyres import AnyresLayout
from vistune.recipe import read

RECIPES = Path(__file__).parent.parent.parent / "recipes"
INSTRUCT = sorted((RECIPES / "llava_next").glob("*_instruct.toml"))
ALIGN = sorted((RECIPES / "llava_next").glob("*_align.toml"))


def test_there_is_one_for_each_published_model() -> None:
    assert [path.stem for path in INSTRUCT] == ["13b_instruct", "34b_instruct", "7b_instruct", "mistral_7b_instruct"]
    assert [path.stem for path in ALIGN] == ["34b_align", "mistral_7b_align"]


@pytest.mark.parametrize("path", INSTRUCT, ids=lambda path: path.stem)
def test_the_second_stage(path: Path) -> None:
    recipe = read(path)
    rates = {part: rate.lr for part, rate in recipe.learn.root.items()}
    assert rates.keys() == {"vision", "connector", "language"}
    assert rates["vision"] == 2e-6 and rates["connector"] == rates["language"] in (1e-5, 2e-5)
    assert (recipe.model.image, recipe.data.length, recipe.train.batch) == ("anyres", 4096, 128)
    assert AnyresLayout().tokens(672, 672) < recipe.data.length
    assert math.ceil(779_289 / recipe.train.batch) == 6089  # as the comment says
    text = path.read_text()
    assert f"--out {recipe.model.start}\n" in text and f"--template {recipe.model.template} " in text
    connector = text.partition("--connector ")[2].split()[0]
    trained = [read(other).run for other in [*ALIGN, *(RECIPES / "llava_1_5").glob("*_align.toml")]]
    assert connector.removesuffix("/model") in trained


@pytest.mark.parametrize("path", ALIGN, ids=lambda path: path.stem)
def test_the_first_stage_is_llava_1_5s(path: Path) -> None:
    recipe, like = read(path), read(RECIPES / "llava_1_5" / "7b_align.toml")
    for section in ("learn", "optimizer", "train"):
        assert getattr(recipe, section) == getattr(like, section)
    assert recipe.data == like.data
    assert (recipe.model.template, recipe.model.image) == ("plain", "square")
