"""The soak in small: what it sends is what it says, its verdict sees what is wrong, and a run of seconds ends well."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from vistune.images import open_image
from vistune.serve.limits import Limits
from vistune.serve.pictures.media import Media
from vistune.serve.refused import Refused

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def target():
    import serve_faults

    return serve_faults.Target(1, "key", "tiny", 2, 3, "secret.png", 5.0, 8 << 20)


def test_every_bomb_is_refused_by_its_header_or_when_it_is_decoded():
    import serve_made

    for name, data in serve_made.bombs().items():
        assert len(data) < 2 << 20, name
        with pytest.raises((Refused, ValueError)):
            open_image(Media(Limits()).check(data, name).image)


def test_every_kind_of_fault_has_something_that_is_none():
    """Bodies are made for every kind, over and over; a good request is one that is not among them."""
    import serve_faults as faults

    at, draw = target(), random.Random(0)
    for kind, (made, allowed) in faults.POSTED.items():
        bodies = {made(at, draw) for _ in range(12)}
        assert len(bodies) > 1 and 200 not in allowed, kind
    kinds = Counter(faults.good(at, draw)[0] for _ in range(200))
    assert set(kinds) == {"text", "picture", "several turns", "fetched"}


def test_an_answer_is_heard_in_both_shapes():
    import serve_faults as faults

    whole = {"choices": [{"message": {"content": "a b"}}], "usage": {"completion_tokens": 2}}
    assert faults.heard(faults.Reply(200, {}, json.dumps(whole).encode()), False) == ("a b", 2)
    pieces = [{"choices": [{"delta": {"content": one}}]} for one in ("a", " b")]
    events = [*map(json.dumps, [*pieces, {"choices": [], "usage": {"completion_tokens": 2}}]), "[DONE]"]
    stream = "".join(f"data: {event}\n\n" for event in events).encode()
    assert faults.heard(faults.Reply(200, {}, stream), True) == ("a b", 2)
    for wrong in (stream[:-14], stream.replace(b'"choices": []', b'"error": {}')):
        with pytest.raises(ValueError):
            faults.heard(faults.Reply(200, {}, wrong), True)


GOOD = {
    "said": {"text": {"200": 9}, "bomb": {"400": 2}, "bad host": {"502": 1}},
    "escapes": 0,
    "requests": 12,
    "answered": 9,
    "start": {"memory": 400 << 20, "files": 20, "threads": 9},
    "end": {"memory": 410 << 20, "files": 20, "threads": 9, "slots": {"running": 0.0}, "ready": 200},
    "health": {"asked": 40, "p50": 0.001, "p99": 0.02, "max": 0.05, "not_200": 0},
    "touched": {"canary": 0, "secret": 0},
    "exit_code": 0,
    "in_the_log": [],
}


def test_the_verdict_sees_what_is_wrong():
    import serve_soak

    assert all(line["holds"] for line in serve_soak.verdict(GOOD))
    changes = [
        ("said", "text", {"500": 1}),
        ("said", "bomb", {"502": 1}),
        ("escapes", None, 1),
        ("answered", None, 0),
        ("end", "memory", 500 << 20),
        ("end", "files", 40),
        ("end", "threads", 30),
        ("end", "slots", {"running": 1.0}),
        ("end", "slots", {"running": float("nan")}),
        ("end", "ready", 503),
        ("health", "p99", 0.2),
        ("health", "not_200", 1),
        ("touched", "canary", 1),
        ("touched", "secret", 1),
        ("exit_code", None, None),
        ("in_the_log", None, ["key"]),
    ]
    for key, inner, value in changes:
        wrong = copy.deepcopy(GOOD)
        if inner:
            wrong[key][inner] = value
        else:
            wrong[key] = value
        assert [line["holds"] for line in serve_soak.verdict(wrong)].count(False) == 1, (key, inner)


def test_a_metric_is_summed_over_its_labels():
    import serve_soak

    text = '# TYPE a gauge\na{model="x"} 2.0\na{model="y"} 3.0\nab 7.0\n'
    assert serve_soak.total(text, "a") == 5 and serve_soak.total(text, "ab") == 7
    assert serve_soak.total(text, "b") != serve_soak.total(text, "b")


@pytest.mark.slow
def test_a_soak_of_seconds_ends_well(tmp_path):
    """All but the time that /health takes, which on a machine of many tests is not the server's."""
    out = tmp_path / "soak.json"
    words = [sys.executable, str(ROOT / "benchmarks" / "serve_soak.py"), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300, check=False)
    result = json.loads(out.read_text(encoding="utf-8"))
    failed = [one["line"] for one in result["verdict"] if not one["holds"] and "/health" not in one["line"]]
    assert not failed, result["escaped"]
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| 200 |")


def quick(script, folder):
    """The summary of a benchmark's smoke test."""
    out = folder / "out.json"
    words = ["--quick", "--threads", "1", "--data", str(folder / "data"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))["summary"]


@pytest.mark.slow
def test_both_servers_are_measured_and_say_the_same(tmp_path):
    (found,) = quick("serve.py", tmp_path)
    assert found["connections"] == 2 and found["same_texts"] == found["texts"] == 2
    assert all(row["tokens_per_s"] > 0 for row in found["rows"].values())


@pytest.mark.slow
def test_conversations_are_measured_and_what_is_remembered_changes_no_word(tmp_path):
    found = quick("serve_talk.py", tmp_path)
    assert len(found) == 3 and all(len(row["firsts"]) == 2 for row in found.values())
    assert found["vistune serve --prefixes 0"]["same_texts"] == [[4, 4]]
