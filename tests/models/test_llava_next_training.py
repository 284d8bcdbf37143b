"""A tiny LLaVA-NeXT learns: packed as unpacked, by workers or without, with pictures that break; then it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.made import made_data, made_recipe
from tests.test_generate import stock_answer
from tests.tiny import tiny_language, tiny_vision
from tests.train.test_stage import assert_same_step, one_step_gradients
from vistune import inputs, prove
from vistune.data.loader import load as load_batches
from vistune.generate import Chat
from vistune.models import weights
from vistune.models.assembling.llava_next import assemble
from vistune.models.load import describe, load
from vistune.samples import Image
from vistune.train import metrics, stage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    assemble(tiny_vision(path / "vision"), tiny_language(path / "language"), path / "stage0")
    return path / "stage0"


def recipe(start, data, run, learn=None, /, **sections):
    learn = learn or {"connector": 1e-3, "language": 2e-4, "vision": 2e-6}
    sections["data"] = {"length": 512} | sections.get("data", {})
    return made_recipe(start, data, run, learn=learn, model={"image": "anyres"}, **sections)


def batches(one, **more):
    data = inputs.read(one, describe(one.model.start), Path(one.run) / "index")
    steps = load_batches(data.plan, data.readers, data.language, stop_step=2, packs_per_micro=2, **more)
    return data, [batch for step in steps for batch in step]


def test_packed_equals_unpacked_in_every_gradient(start, data, tmp_path):
    packed = recipe(start, data, tmp_path / "a")
    unpacked = recipe(start, data, tmp_path / "b", data={"pack": False})
    loss, gradients = one_step_gradients(packed)
    assert gradients["model.image_newline"].abs().max() > 0
    assert_same_step((loss, gradients), one_step_gradients(unpacked))
    assert prove.prove(packed, packs=2)["ok"]


def test_tiles_come_alike_from_workers_and_without(start, data, tmp_path):
    one = recipe(start, data, tmp_path / "run")
    read, alone = batches(one)
    _, others = batches(one, workers=2)
    assert len(alone) == len(others) > 1
    for mine, theirs in zip(alone, others, strict=True):
        for name in ("ids", "positions", "rows", "targets", "pixels", "grids"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        tiles, images = int(mine.grids[:, 0].sum()), len(mine.grids)
        assert mine.pixels.shape == (tiles, 3, 56, 56) and mine.images == images
        assert mine.pixels.dtype == torch.uint8 and mine.grids.device.type == "cpu"
        laid = sum(read.language.layout.tokens(width, height) for _, height, width in mine.grids.tolist())
        assert (mine.ids == read.language.image_token_id).sum() == laid
    assert {int(tiles) for batch in alone for tiles in batch.grids[:, 0]} > {3}


@pytest.mark.slow
def test_a_picture_that_breaks_later_keeps_its_place(start, tmp_path):
    data = made_data(tmp_path / "data", rows=12)
    one = recipe(start, data, tmp_path / "run")
    _, whole = batches(one)
    broken = tmp_path / "data" / "images" / "0_0.png"
    read = broken.read_bytes()
    broken.write_bytes(read[: len(read) // 2])  # its header still says its size
    _, cut = batches(one)
    assert sum(len(batch.faults) for batch in cut) == 1
    assert [b.lengths for b in cut] == [b.lengths for b in whole]
    assert all(
        torch.equal(a.grids, b.grids) and a.pixels.shape == b.pixels.shape for a, b in zip(cut, whole, strict=True)
    )
    broken.unlink()  # and now nothing does: placeholders of nothing
    _, gone = batches(one)
    assert [b.lengths for b in gone] == [b.lengths for b in whole]
    assert sum(len(b.grids) for b in gone) == sum(len(b.grids) for b in whole) - 1
    summary = stage.run(one)
    assert summary["steps"] == 6 and len(list((tmp_path / "run").glob("quarantine.jsonl"))) == 1


@pytest.mark.slow
def test_a_stage_ends_in_a_folder_that_opens_and_answers(start, data, tmp_path):
    one = recipe(start, data, tmp_path / "run", train={"steps": 4})
    stage.run(one)
    assert all(np.isfinite(row["loss"]) for row in metrics.read(tmp_path / "run"))
    before, after = weights.stored(start), weights.stored(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    learned = {name for name in after if not torch.equal(before[name].read(), after[name].read())}
    assert {"image_newline", "multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"} < learned
    assert any(name.startswith("vision_tower.") for name in learned)

    folder = tmp_path / "run" / "model"
    loaded = load(folder)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    held = loaded.model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, held[name]), name
    picture = Image(path=str(data.parent / "images" / "0_0.png"))
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]
    expected = stock_answer(folder, [{"role": "user", "content": content}], [picture], 8)
    assert "".join(Chat(loaded).ask("What is this?", [picture], max_new_tokens=8)) == expected
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava_next"


def test_the_connector_alone_may_learn_with_its_end_of_line(start, data, tmp_path):
    one = recipe(start, data, tmp_path / "run", {"connector": 1e-3}, train={"steps": 2})
    stage.run(one)
    before, after = weights.stored(start), weights.stored(tmp_path / "run" / "model")
    learned = {name for name in after if not torch.equal(before[name].read(), after[name].read())}
    assert learned == {name for name in after if "multi_modal_projector" in name or name == "image_newline"}
    shutil.rmtree(tmp_path / "run" / "checkpoints")
