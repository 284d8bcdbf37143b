"""The recipes of LLaVA-OneVision-1.5 carry the numbers of its scripts, and say what was never published."""

from __future__ import annotations

from pathlib import Path

import pytest

from vistune.models.families import family
from vistune.recipe import Recipe, read
from vistune.templates import template

RECIPES = Path(__file__).parent.parent / "recipes" / "llava_onevision_1_5"
STAGES = ("align", "mid", "instruct")
ALL = {"vision", "connector", "language"}

# stage: what learns, lr, weight decay, second beta, batch and what it counts, steps (examples/llava_ov_1_5/quick_start)
PUBLISHED = {
    "align": ({"connector"}, 1e-4, 0.0, 0.99, (8, "packs"), 2500),
    "mid": (ALL, 1e-5, 0.01, 0.95, (16, "packs"), 20000),
    "instruct": (ALL, 1e-5, 0.0, 0.99, (224, "samples"), 3500),
}
AUTHORS_WORD = {"mid": (112, 70000)}
"""Of the 8B only this was ever said; 112 x 70,000 packs are 7.84 million."""


def recipe(size: str, stage: str) -> Recipe:
    return read(RECIPES / f"{size}_{stage}.toml")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_numbers(size: str, stage: str) -> None:
    said = recipe(size, stage)
    learns, lr, decay, beta, (batch, unit), steps = PUBLISHED[stage]
    if size == "8b":
        batch, steps = AUTHORS_WORD.get(stage, (batch, steps))
    assert set(said.learn.root) == learns
    assert all((rate.lr, rate.min_lr) == (lr, 1e-6) for rate in said.learn.root.values())
    optimizer = said.optimizer
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (decay, (0.9, beta), 1e-5)
    assert (optimizer.clip, optimizer.schedule, optimizer.warmup) == (1.0, "cosine", round(0.002 * steps))
    assert (said.train.batch, said.train.unit, said.train.steps) == (batch, unit, steps)
    assert (said.train.precision, said.train.seed, said.checkpoint.every) == ("bf16", 1234, 2000)
    assert said.data.length == (32768 if stage == "instruct" else 8192)
    assert said.model.options == ({"image_resolution": 1000} if stage == "instruct" else {})
    assert said.model.options.keys() <= family("onevision15").options.keys() and template(str(said.model.template))


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_each_stage_starts_where_the_one_before_ends(size: str) -> None:
    one, two, three = (recipe(size, stage) for stage in STAGES)
    assert one.model.start.endswith(f"-{size}/stage0")
    assert (two.model.start, three.model.start) == (f"{one.run}/model", f"{two.run}/model")


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_never_published_says_so(stage: str) -> None:
    text = (RECIPES / f"8b_{stage}.toml").read_text()
    assert "No script was published for this size" in text and "ours" in text
