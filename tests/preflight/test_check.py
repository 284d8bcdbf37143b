"""The check as a whole: cards and sizes, presets, what is said instead of data, the verdict, and what would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from tests.made import made_data, made_recipe, stage0
from tests.preflight.tiny import micro, recipe, subject
from vistune import cli_preflight, inputs
from vistune import recipe as recipes
from vistune.preflight import check, inference, parts, presets, remedies, sizes, steps, timing
from vistune.preflight.counting import WEIGHTS
from vistune.preflight.steps import Instead

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.mark.parametrize(
    ("said", "gib"),
    [("80GB", 80), ("80GiB", 80), ("64", 64), ("24 gb", 24), ("H100", 80), ("rtx 4090", 24), ("4090", 24)],
)
def test_cards_are_sold_in_gib(said: str, gib: int) -> None:
    assert sizes.card(said).memory == gib * 2**30


def test_an_unknown_card_lists_the_known() -> None:
    with pytest.raises(ValueError, match="A100-80GB"):
        sizes.card("A1000")


def test_both_units_are_said() -> None:
    assert sizes.both(2**30) == "1.1 GB (1.0 GiB)"


@pytest.mark.parametrize(
    "file", sorted(RECIPES.glob("[!t]*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_recipe_has_its_sizes(file: Path) -> None:
    said = recipes.read(file)
    assert presets.find(said.model.start).name in said.model.start


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llava-onevision-1.5-4b", 4.35), ("fastvlm-1.5b", 1.68)],
)
def test_presets_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    one = presets.preset(name)
    assert inference.weights(one, "none") / 2e9 == pytest.approx(billions, rel=0.02)


def test_a_model_that_is_nowhere_names_the_presets() -> None:
    with pytest.raises(ValueError, match=r"llava-1\.5-13b"):
        presets.find("runs/nowhere/stage0")


def test_a_folder_with_a_config_alone(tmp_path: Path) -> None:
    subject().config.save_pretrained(tmp_path)
    found = presets.find(str(tmp_path))
    assert found.family.name == "llava" and found.layout.tokens(10, 10) == 16
    report = check.check(recipe(), model=str(tmp_path), gpu="1GB")
    assert report.fits and not report.remedies and report.run.assumed


def test_what_is_said_stands_for_data() -> None:
    said = recipe(train={"batch": 12, "micro_batch": 2})
    run = steps.look(subject(), said, 2, Instead(length=128, images=2, samples=1200))
    assert run.facts["steps"] == 100 and run.facts["packs_per_step"] == 6 and run.micro_batches == 2
    assert run.worst[0].tokens == 256 and run.worst[0].images == 4
    assert any("nowhere.json" in line for line in run.assumed)
    with pytest.raises(ValueError, match="--images 9"):
        steps.look(subject(), said, 1, Instead(length=128, images=9))


def test_data_that_is_there_is_counted(tmp_path: Path) -> None:
    start = stage0(tmp_path)
    said = made_recipe(start, made_data(tmp_path), tmp_path / "run", train={"steps": None, "batch": 4})
    report = check.check(said, gpu="24GB")
    plan = inputs.read_plan(said)
    assert report.run.facts["steps"] == plan.steps and report.run.facts["tokens"] == plan.describe()["tokens"]
    assert not report.run.assumed and report.fits
    images = max(plan.index.columns["images"][list(pack)].sum() for k in range(plan.steps) for pack in plan.step(k))
    assert max(one.images for one in report.run.worst) == images
    assert report.micro.tokens % 128 == 0


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    said = recipe(
        learn={"connector": 1e-3, "language": 1e-3}, train={"micro_batch": 4, "batch": 64}, data={"length": 1024}
    )
    one = micro(16)
    held = parts.memory(subject(), said, one, accumulates=True)
    every = remedies.changes(said, 1)
    assert [change.cost for change in every] == sorted(change.cost for change in every)
    monkeypatch.setattr(remedies, "changes", lambda *_: every[:2])
    found = remedies.find(subject(), said, one, 1, held.needed - 1, True)
    fitting = [remedy for remedy in found if remedy.fits]
    assert fitting and all(remedy.memory.needed < held.needed for remedy in fitting)
    assert found[: len(fitting)] == fitting
    assert ("train.checkpointing=selective",) in [remedy.words for remedy in found]


def test_time_follows_from_the_share_of_the_peak() -> None:
    said, bought = recipe(), sizes.card("A100")
    run = steps.look(subject(), said, 1, Instead(samples=1280))
    half, whole = (timing.time(said, run, bought, 1, mfu=share) for share in (0.25, 0.5))
    assert half and whole and half.step == pytest.approx(2 * whole.step)
    assert timing.time(said, run, sizes.card("64GB"), 1) is None
    with pytest.raises(ValueError, match="--mfu 40"):
        timing.time(said, run, bought, 1, mfu=40)


def test_answering_in_fewer_bits_takes_less() -> None:
    one = subject()
    said = [inference.answering(one, kind, sizes.card("1GB"), micro(), 2) for kind in inference.KINDS]
    assert said[0].parts[WEIGHTS] > said[1].parts[WEIGHTS] > said[2].parts[WEIGHTS]
    text: Any = one.config.text_config
    assert inference.cache(one.config, 100) == 2 * 2 * 2 * 32 * 100 * text.num_hidden_layers


def test_the_verb_prints_json_and_leaves_with_one_when_it_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    subject().config.save_pretrained(tmp_path / "model")
    file = tmp_path / "tiny.toml"
    file.write_text(recipes.dump(recipe(model={"start": str(tmp_path / "model")})))
    app = typer.Typer()
    app.command()(cli_preflight.preflight)
    done = typer.testing.CliRunner().invoke(app, [str(file), "--gpu", "80GB", "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["fits"] and 0 < said["peak_gib"] < said["peak_gb"]
    assert sum(said["parts_gb"].values()) == pytest.approx(said["peak_gb"])


def test_one_line_for_a_step_that_ran_out_of_memory(tmp_path: Path) -> None:
    subject().config.save_pretrained(tmp_path)
    line = check.figure(recipe(model={"start": str(tmp_path)}), [100, 28], 2)
    assert "of tensors" in line and "GiB" in line
