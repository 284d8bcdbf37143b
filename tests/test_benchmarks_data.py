"""The data benchmarks in small: a file of the announced shape, figures of the right kind, the same work by all."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"pictures": 12, "pieces": 600, "words": 2000}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import made_mix665k

    yield made_mix665k.make(tmp_path_factory.mktemp("made"), 300, **SMALL)
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def asked(made, tmp_path_factory):
    """What data_scale.py gives a part."""
    work = tmp_path_factory.mktemp("work")
    return argparse.Namespace(
        data=made.folder,
        work=work,
        cache=work / "cache",
        workers=0,
        steps=2,
        lengths=[1024, 4096],
        huge=40_000,
        began=0.0,
    )


def test_the_file_has_the_shape_of_the_mixture(made):
    from made_mix665k import KINDS

    rows = json.loads(made.json.read_text())
    assert len(rows) == 300 == sum(made.sources.values())
    found = Counter(row["id"].rsplit("_", 1)[0] for row in rows)
    for kind in KINDS:
        assert found[kind.name] == made.sources[kind.name] and abs(found[kind.name] - kind.rows * 300 / 665_298) < 1
    pictured = [row for row in rows if "image" in row]
    assert len(pictured) == 300 - made.sources["sharegpt"]
    assert all((made.images / row["image"]).is_file() for row in pictured)
    assert len({row["image"] for row in pictured}) <= 14 < len(pictured)
    assert all(("image" in row) == ("<image>" in row["conversations"][0]["value"]) for row in rows)


def test_the_same_arguments_write_the_same_bytes(made, tmp_path):
    import made_mix665k

    again = made_mix665k.make(tmp_path, 300, **SMALL)
    assert again.json.read_bytes() == made.json.read_bytes()
    when = again.json.stat().st_mtime_ns
    assert made_mix665k.make(tmp_path, 300, **SMALL).json.stat().st_mtime_ns == when
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


@pytest.fixture
def no_driver(monkeypatch):
    import data_scale

    monkeypatch.setattr(data_scale, "mark", lambda: None)


def test_parts_tell_of_rows_steps_and_fill(asked, no_driver):
    from data_scale import PARTS

    told = {name: PARTS[name](asked) for name in ("whole_json", "scan", "index", "rank", "plan", "offline", "huge")}
    assert told["whole_json"]["rows"] == told["scan"]["rows"] == told["index"]["rows"] == 300
    assert told["index"]["faults"] == 0 and told["index"]["tokens"]["100"] <= 4096
    assert told["rank"]["images"] > 20
    for length in asked.lengths:
        best = told["offline"][str(length)]
        for unit in ("samples", "packs"):
            found = told["plan"][f"{unit} {length}"]
            assert found["samples"] == 300 and found["longest_pack"] <= length
            assert best["packs"] * 0.95 <= found["packs"] and 0.5 < found["fill"] <= 1
    assert told["huge"]["samples"]["steps"] == pytest.approx(40_000 / 128, abs=2)
    assert told["huge"]["packs"]["step_max_s"] >= told["huge"]["packs"]["step_median_s"] > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_first_fit_is_what_the_plain_loop_gives(sizes):
    from data_scale import first_fit

    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(20 - size)
        else:
            rooms[at] -= size
    assert first_fit(np.array(sizes), 20) == len(rooms)


@pytest.mark.slow
def test_memory_is_seen_from_outside(asked, tmp_path):
    """The driver's own process, on the part that holds the whole file."""
    import data_scale

    given = data_scale.arguments(["--data", str(asked.data), "--work", str(tmp_path), "--lengths", "1024"])
    found = data_scale.run("whole_json", given)
    assert found["rows"] == 300 and found["held_bytes"] > 5e6 and 0 <= found["peak_bytes"] < 5e8
    assert "| whole_json |" in data_scale.table({"parts": {"whole_json": found}})


@pytest.mark.slow
def test_the_plain_dataset_and_ours_do_the_same_work(tmp_path):
    import loader

    out = tmp_path / "loader.json"
    assert loader.main(["--quick", "--data", str(tmp_path / "data"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["same_work"] and {run["who"] for run in result["runs"]} == {"llava", "vistune"}
    assert all(run["samples"] == 24 and run["supervised"] > 100 for run in result["runs"])
    assert result["summary"]["llava"]["vistune_times"] > 0
