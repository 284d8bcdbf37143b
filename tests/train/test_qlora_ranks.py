"""QLoRA with its weights in shards over two ranks: the losses and the model of one process."""

from __future__ import annotations

import json

import pytest
import torch

from tests.made import made_data, made_recipe, stage0
from tests.runs import finish_run, run_both, start_run
from vistune.models.load import load

pytest.importorskip("bitsandbytes", reason="extra quant")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return stage0(folder), made_data(folder / "data", 12)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"quantize": "4bit", "double_quant": True},
        pytest.param({"quantize": "8bit", "dora": True}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_in_shards_are_one_process(made, tmp_path, lora):
    recipes = {}
    for shard in ("none", "zero3"):
        (tmp_path / shard).mkdir()
        recipes[shard] = made_recipe(
            *(*made, tmp_path / shard / "run"),
            learn={"connector": 1e-3, "language": 1e-2},
            lora={"r": 4, "alpha": 8, **lora},
            train={"steps": 3, "batch": 4},
            checkpoint={"every": 3},
            parallel={"shard": shard},
        )
    finish_run(start_run(recipes["none"], tmp_path / "none"), tmp_path / "none")
    run_both(recipes["zero3"], tmp_path / "zero3")
    one, two = (losses(tmp_path / shard / "run") for shard in ("none", "zero3"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)
    alone, spread = (load(tmp_path / shard / "run" / "model").model.state_dict() for shard in ("none", "zero3"))
    for name, tensor in alone.items():
        torch.testing.assert_close(spread[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert (tmp_path / "zero3" / "run" / "checkpoints" / "step-00000003" / "adapter_model.safetensors").is_file()
