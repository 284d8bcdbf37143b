"""Recipes: unknown keys name the nearest, words lie over the file, what is written reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vistune.recipe import Learn, Rate, Recipe, build, dump, read

LEAST = """
[model]
start = "folder"

[[data.sources]]
path = "rows.json"

[learn]
connector = 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stage" / "one.toml"
    path.parent.mkdir()
    path.write_text(LEAST, encoding="utf-8")
    return path


def refusal(file: Path, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(file, words)
    return str(caught.value)


def test_a_least_recipe_has_the_defaults_and_a_run_folder(file: Path) -> None:
    recipe = read(file)
    assert (recipe.name, recipe.run) == ("one", "runs/stage-one")
    assert recipe.learn.root == {"connector": Rate(lr=1e-3, min_lr=0.0)}
    assert (recipe.train.batch, recipe.optimizer.warmup, recipe.lora.r) == (128, 0.03, 0)


@pytest.mark.parametrize(
    ("word", "key", "near"),
    [
        ("train.bach=3", "train.bach", "batch"),
        ("optimizer.weightdecay=0", "optimizer.weightdecay", "weight_decay"),
        ("parralel.shard=zero2", "parralel", "parallel"),
        ("data.sources.0.epoch=2", "data.sources.0.epoch", "epochs"),
        ("model.strat=x", "model.strat", "start"),
        ("lora.rank=8", "lora.rank", None),
        ("train.zzz=1", "train.zzz", None),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, word: str, key: str, near: str | None) -> None:
    text = refusal(file, word)
    assert f"unknown key {key} = " in text
    assert str(file) in text
    if near:
        assert f"Did you mean {near}?" in text
    else:
        assert "Did you mean" in text or "Known keys: " in text


def test_an_unknown_key_without_a_near_one_lists_what_is_known(file: Path) -> None:
    text = refusal(file, "checkpoint.zzzz=1")
    assert "Known keys: background, every, keep." in text


def test_words_lie_over_the_file(file: Path) -> None:
    words = [
        "run=elsewhere",
        "train.steps=60",
        "train.tf32=false",
        "optimizer.betas=[0.9, 0.95]",
        "model.template=v1",
        'data.sources.0.images=["a", "b"]',
        "learn.language={lr = 2e-5, min_lr = 1e-6}",
    ]
    recipe = read(file, words)
    assert (recipe.run, recipe.train.steps, recipe.train.tf32) == ("elsewhere", 60, False)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.model.template == "v1"
    assert recipe.data.sources[0].images == ["a", "b"]
    assert recipe.learn.root["language"] == Rate(lr=2e-5, min_lr=1e-6)
    assert recipe.learn.root["connector"].lr == 1e-3


@pytest.mark.parametrize("word", ["learn.vision.layers.-4:=2e-6", 'learn."vision.layers.-4:"=2e-6'])
def test_a_rate_may_be_given_to_layers(file: Path, word: str) -> None:
    assert read(file, [word]).learn.root["vision.layers.-4:"] == Rate(lr=2e-6)


def test_layers_may_stand_in_the_file(file: Path) -> None:
    file.write_text(LEAST + '"vision.layers.-4:" = 2e-6\n', encoding="utf-8")
    recipe = read(file)
    assert recipe.learn.root["vision.layers.-4:"].lr == 2e-6
    again = file.with_name("again.toml")
    again.write_text(dump(recipe), encoding="utf-8")
    assert read(again) == recipe


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.batch=0", ["train.batch = 0", "greater than or equal to 1"]),
        ("train.batch=many", ["train.batch = 'many'", "integer"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule = 'cosin'", "cosine"]),
        ("parallel.shard=zero4", ["parallel.shard = 'zero4'", "zero3"]),
        ("model.image=padded", ["model.image = 'padded'", "pad"]),
        ("data.sources.0.epochs=0", ["data.sources.0.epochs = 0", "greater than 0"]),
        ("learn.connector=-1", ["learn.connector", "greater than 0"]),
        ("learn.connector={lr = 1e-3, min_lr = 1e-2}", ["learn.connector", "min_lr 0.01 is above lr 0.001"]),
        ("optimizer.warmup=1.5", ["optimizer.warmup = 1.5", "share below 1, or whole steps"]),
        ("lora.r=8", ["lora.parts names language", "[learn]"]),
        ("train.tf32=perhaps", ["train.tf32 = 'perhaps'", "boolean"]),
    ],
)
def test_a_bad_value_names_file_key_and_value(file: Path, word: str, parts: list[str]) -> None:
    text = refusal(file, word)
    for part in [str(file), *parts]:
        assert part in text


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("train.batch", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.deeper=1", "run: Input should be a valid string"),
        ("data.sources.4.path=x", "4 is not one of the 1 entries"),
        ("data.sources.first.path=x", "first is not one of the 1 entries"),
        ("train.batch.more=1", "train.batch"),
        ("model.start.a.b=1", "start is a value, not a section"),
    ],
)
def test_a_word_that_cannot_be_laid_is_named(file: Path, word: str, part: str) -> None:
    text = refusal(file, word)
    assert part in text
    assert word.split("=")[0].split(".")[0] in text


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    text = refusal(file, "train.bach=1", "optimizer.eps=-1")
    assert "train.bach" in text
    assert "optimizer.eps" in text


@pytest.mark.parametrize("missing", ["model", "data", "learn"])
def test_what_is_missing_is_named(missing: str) -> None:
    tree: dict[str, Any] = {
        "model": {"start": "x"},
        "data": {"sources": [{"path": "x"}]},
        "learn": {"connector": 1e-3},
    }
    del tree[missing]
    with pytest.raises(ValueError, match=f"here: {missing} is missing"):
        build(tree, "here")


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not TOML.*line 1"):
        read(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not TOML"):
        read(broken)


def test_nothing_changes_after_reading(file: Path) -> None:
    recipe = read(file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.batch = 3  # type: ignore[misc]


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
rates = st.builds(Rate, lr=st.floats(1e-8, 1.0))
trees = st.fixed_dictionaries(
    {
        "name": texts,
        "run": texts,
        "model": st.fixed_dictionaries({"start": texts}, optional={"template": texts}),
        "data": st.fixed_dictionaries(
            {
                "sources": st.lists(
                    st.fixed_dictionaries(
                        {"path": texts, "images": texts | st.lists(texts), "epochs": st.floats(0.1, 9)}
                    ),
                    min_size=1,
                    max_size=3,
                )
            }
        ),
        "learn": st.dictionaries(
            st.sampled_from(["connector", "language", "vision.layers.-4:", "vision.layers.2"]),
            st.floats(1e-9, 1.0) | st.builds(lambda lr: {"lr": lr, "min_lr": lr / 3}, st.floats(1e-9, 1.0)),
            min_size=1,
        ),
        "train": st.fixed_dictionaries(
            {"tf32": st.booleans(), "seed": st.integers(-(2**40), 2**40), "steps": st.none() | st.integers(1, 10**9)}
        ),
        "log": st.fixed_dictionaries({"trackers": st.lists(st.sampled_from(["wandb", "tensorboard", "trackio"]))}),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_what_is_written_reads_back(tmp_path: Path, tree: dict[str, Any]) -> None:
    recipe = build(tree, "made up")
    path = tmp_path / "recipe.toml"
    path.write_text(dump(recipe), encoding="utf-8", newline="")
    assert read(path) == recipe


def test_learn_is_a_table_of_rates() -> None:
    assert Learn({"connector": 1e-3}).root["connector"] == Rate(lr=1e-3)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="nothing learns"):
        Learn({})
    assert isinstance(Recipe.model_fields["learn"].annotation, type)
