"""Rows and pictures broken in every way, trained on: no crash, no hang, and the ledger names what the check names."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from tests.made import made_recipe, stage0
from tests.mutated import mutated
from vistune import inputs
from vistune.data.checking.check import check
from vistune.data.index import open_index
from vistune.train import metrics, stage


@pytest.fixture(autouse=True)
def no_hanging():
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(200)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_over_mutated_data(tmp_path, workers):
    """All five hundred with workers; without, other hundred and forty."""
    made = mutated(tmp_path / "data", 500 if workers else 140, seed=workers)
    sources = [{"path": str(made.path), "images": str(made.images), "name": "mutated"}]
    data = {"sources": sources, "length": 200, "workers": workers, "quarantine_cap": 1.0}
    recipe = made_recipe(
        stage0(tmp_path),
        made.path,
        tmp_path / "run",
        data=data,
        learn={"connector": 1e-3},
        train={"batch": 40, "steps": None, "epochs": 1.0},
        checkpoint={"every": 100},
    )
    summary = stage.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    aside = {line["row"] for line in lines}
    assert len(lines) == len(aside) == summary["quarantined"]
    assert all(line["source"] == "mutated" and line["code"] and line["reason"] for line in lines)

    language = inputs.language_of(inputs.describe_model(recipe))
    report = check(inputs.open_readers(recipe.data, None), language, 200, out=tmp_path / "check", workers=1)
    errors = {one.row for one in report.findings() if one.severity == "error"}
    names = {row: made.rows[row] for row in aside ^ errors}
    assert aside == errors, names
    assert not [row for row, (_, fate) in enumerate(made.rows) if fate == "error" and row not in aside]
    assert not [row for row, (_, fate) in enumerate(made.rows) if fate == "ok" and row in aside]

    rows = metrics.read(tmp_path / "run")
    (index,) = map(open_index, (tmp_path / "run" / "index").glob("index-*"))
    assert sum(row["samples"] for row in rows) == len(made.rows) - len(index.faults)
    assert len(index.faults) < len(lines)  # some are found only when they are decoded
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
