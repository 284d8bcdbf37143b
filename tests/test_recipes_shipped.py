"""The recipes that come with vistune: each reads, and those of LLaVA-1.5 carry the published numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vistune.data.index import COLUMNS, Index
from vistune.data.plan import Plan
from vistune.recipe import Recipe, dump, read

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(RECIPES.rglob("*.toml"))

ROWS = {"align": 558_128, "instruct": 665_298, "instruct_lora": 665_298, "instruct_qlora": 665_298}
"""Samples of LLaVA-Pretrain and of the 665k mixture, as published."""

PUBLISHED = {
    "align": {
        "learn": {"connector": 1e-3},
        "batch": 256,
        "template": "plain",
        "image": "square",
        "shard": "zero2",
        "lora": (0, 16.0, 0.0),
        "steps": 2181,
    },
    "instruct": {
        "learn": {"connector": 2e-5, "language": 2e-5},
        "batch": 128,
        "template": "v1",
        "image": "pad",
        "shard": "zero3",
        "lora": (0, 16.0, 0.0),
        "steps": 5198,
    },
    "instruct_lora": {
        "learn": {"connector": 2e-5, "language": 2e-4},
        "batch": 128,
        "template": "v1",
        "image": "pad",
        "shard": "zero3",
        "lora": (128, 256.0, 0.05),
        "steps": 5198,
    },
    "instruct_qlora": {
        "learn": {"connector": 2e-5, "language": 2e-4},
        "batch": 128,
        "template": "v1",
        "image": "pad",
        "shard": "zero2",
        "lora": (128, 256.0, 0.05),
        "steps": 5198,
    },
}
"""LLaVA-1.5, scripts/v1_5/{pretrain,finetune,finetune_lora}.sh: eight GPUs x 32 or 16 samples."""

COMMON = {
    "data.length": 2048,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.03,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.clip": 1.0,
    "train.epochs": 1.0,
    "train.unit": "samples",
    "train.precision": "bf16",
    "train.tf32": True,
    "train.checkpointing": "full",
}


def published(size: str, stage: str) -> Recipe:
    return read(RECIPES / "llava_1_5" / f"{size}_{stage}.toml")


def lengths_only(rows: int) -> Index:
    """An index of made-up lengths: the number of steps does not depend on them."""
    columns = {name: np.zeros(rows, kind) for name, kind in COLUMNS.items()}
    columns["row"] = np.arange(rows)
    columns["text"][:], columns["image"][:], columns["supervised"][:] = 100, 576, 50
    return Index(columns, [], "", 2048)


def look(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_reads_and_writes_itself_back(path: Path, tmp_path: Path) -> None:
    recipe = read(path)
    again = tmp_path / "again.toml"
    again.write_text(dump(recipe), encoding="utf-8")
    assert read(again) == recipe


@pytest.mark.parametrize("stage", PUBLISHED)
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_llava_1_5_has_the_published_numbers(size: str, stage: str) -> None:
    recipe, wanted = published(size, stage), PUBLISHED[stage]
    assert {part: rate.lr for part, rate in recipe.learn.root.items()} == wanted["learn"]
    assert all(rate.min_lr == 0.0 for rate in recipe.learn.root.values())
    assert recipe.train.batch == wanted["batch"]
    assert (recipe.model.template, recipe.model.image) == (wanted["template"], wanted["image"])
    assert recipe.parallel.shard == wanted["shard"]
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == wanted["lora"]
    assert {key: look(recipe, key) for key in COMMON} == COMMON


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_steps_follow(stage: str) -> None:
    recipe, rows = published("7b", stage), ROWS[stage]
    index = lengths_only(rows)
    plan = Plan(index, batch=recipe.train.batch, unit=recipe.train.unit, length=recipe.data.length, pack=True, seed=0)
    assert plan.steps_per_epoch == math.ceil(rows / recipe.train.batch) == PUBLISHED[stage]["steps"]


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_second_stage_starts_where_the_first_ends(size: str) -> None:
    end = f"{published(size, 'align').run}/model"
    assert published(size, "instruct").model.start == end
    assert published(size, "instruct_lora").model.start == end
    assert published(size, "instruct_qlora").model.start == end


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_qlora_is_lora_on_matrices_in_4_bits(size: str) -> None:
    plain, quantised = (published(size, stage).model_dump() for stage in ("instruct_lora", "instruct_qlora"))
    assert quantised["lora"] == plain["lora"] | {"quantize": "4bit", "double_quant": True}
    differ = {key for key in plain if plain[key] != quantised[key]}
    assert differ == {"name", "run", "lora", "parallel"}


@pytest.mark.parametrize("path", ["fastvlm/7b_stage2", "llava_onevision_1_5/4b_instruct"])
def test_other_families_take_the_rank_and_rates_of_llava(path: str) -> None:
    said, full = read(RECIPES / f"{path}_lora.toml"), read(RECIPES / f"{path}.toml")
    llava = published("7b", "instruct_lora")
    assert said.lora == llava.lora
    assert {part: rate.lr for part, rate in said.learn.root.items()} == {p: r.lr for p, r in llava.learn.root.items()}
    differ = {key for key, value in said.model_dump().items() if value != full.model_dump()[key]}
    assert differ == {"name", "run", "learn", "lora"}


def test_the_quickstart_is_two_ordinary_recipes() -> None:
    stages = {path.stem: read(path) for path in (RECIPES / "tiny").glob("*.toml")}
    learns = {name: set(recipe.learn.root) for name, recipe in stages.items()}
    assert {"connector"} in learns.values()
    assert {"connector", "language"} in learns.values()
    assert sorted(learns) == ["align", "instruct"]
