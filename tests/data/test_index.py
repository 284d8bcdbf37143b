"""The index: what it counts, how it is kept, and when it is made anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.small import make_language, turns
from vistune.data.formats import open_source
from vistune.data.growing import Faults
from vistune.data.index import COLUMNS, _Measure, build_index, open_index
from vistune.data.tokenize import tokenize

ROWS = [
    {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "Red")},
    {"id": "b", "conversations": turns("Hi", "Hello there")},
    {"id": "gone", "image": "gone.png", "conversations": turns("<image>\nWhat?", "Red")},
    {"id": "empty", "image": "empty.jpg", "conversations": turns("<image>\nWhat?", "Red")},
    {"id": "mute", "conversations": turns("Hi", "")},
    {"id": "two", "image": ["a.png", "b.jpg"], "conversations": turns("<image>\nOne", "x", "<image>\nTwo", "y " * 90)},
    {"id": "long", "conversations": turns("Hi", "Hello " * 300)},
]
CODES = {2: "image_missing", 3: "image_broken", 4: "empty_answer"}


@pytest.fixture
def source(write_rows, pictures):
    return open_source(str(write_rows(ROWS)), images=str(pictures), name="mine")


def test_columns_are_what_tokenize_says(source, language):
    index = build_index([source, source], language, 120)
    assert len(index) == 14 and index.source.tolist() == [0] * 7 + [1] * 7
    assert index.row.tolist() == [*range(7), *range(7)]
    for position in range(7):
        if position in CODES:
            assert index.fault[position] and not index.tokens(np.array([position]))[0]
            continue
        tokens = tokenize(source[position], language, 120)
        assert index.tokens(np.array([position])).tolist() == [len(tokens.ids)]
        assert index.supervised[position] == tokens.supervised
        assert index.images[position] == len(tokens.images) and index.image[position] == 4 * len(tokens.images)
        assert index.shortened[position] == tokens.shortened == (position in (5, 6))
    assert {fault.row: fault.code for fault in index.faults} == CODES
    assert {column.dtype for column in index.columns.values()} == {np.dtype(kind) for kind in COLUMNS.values()}
    assert index.faults[0].path.endswith("gone.png") and index.faults[0].source == "mine"


def test_workers_and_disk_change_nothing(write_rows, tmp_path, language):
    rows = [{"conversations": turns("Hi " * (i % 9), "Yes " * (i % 5))} for i in range(2500)]
    source = open_source(str(write_rows(rows)), cache=tmp_path)
    here = build_index([source], language, 120)
    kept = build_index([source], language, 120, cache=tmp_path, workers=2)
    assert kept.hash == here.hash and kept.faults == here.faults and len(here.faults) > 100
    for name in COLUMNS:
        assert isinstance(kept.columns[name], np.memmap)
        assert kept.columns[name].tolist() == here.columns[name].tolist()
    assert kept.folder is not None
    assert len(pickle.dumps(kept)) < 1000 < len(pickle.dumps(here))
    assert pickle.loads(pickle.dumps(kept)).tokens(np.arange(9)).tolist() == here.tokens(np.arange(9)).tolist()


def test_what_a_worker_is_sent_works_there(source, language):
    """Started by spawn a worker gets it all pickled; starting one takes too long for a test."""
    measure = _Measure((source,), language, 120)
    here, there = (m((0, 0, 7)) for m in (measure, pickle.loads(pickle.dumps(measure))))
    assert here.digest == there.digest and here.faults == there.faults


def test_an_error_in_a_worker_ends_the_build_and_leaves_nothing(source, tmp_path):
    broken = replace(make_language(), layout=None)
    with pytest.raises(AttributeError):
        build_index([source], broken, 120, cache=tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").iterdir())


def built_again(monkeypatch, *args, **kwargs) -> bool:
    """Whether this call measures rows, rather than taking what is kept."""
    calls = []
    monkeypatch.setattr("vistune.data.index.tokenize", lambda *a, **k: calls.append(1) or tokenize(*a, **k))
    build_index(*args, **kwargs)
    return len(calls) > sum(code.startswith("image_") for code in CODES.values())


def test_what_is_kept_is_used_until_something_changes(write_rows, pictures, tmp_path, monkeypatch, source, language):
    cache = tmp_path / "cache"
    assert built_again(monkeypatch, [source], language, 120, cache=cache)
    assert not built_again(monkeypatch, [source], language, 120, cache=cache)
    assert built_again(monkeypatch, [source], language, 121, cache=cache)
    assert built_again(monkeypatch, [source, source], language, 120, cache=cache)
    assert built_again(monkeypatch, [source], make_language(name="llava_v1"), 120, cache=cache)
    assert built_again(monkeypatch, [source], make_language(needs_size=True), 120, cache=cache)
    assert built_again(monkeypatch, [source], make_language("qwen2_like", "qwen_2"), 120, cache=cache)
    path = write_rows([*ROWS, ROWS[0]])
    assert built_again(monkeypatch, [open_source(str(path), images=str(pictures))], language, 120, cache=cache)


def test_a_mended_picture_is_noticed(pictures, tmp_path, source, language):
    before = build_index([source], language, 120, cache=tmp_path / "cache")
    PIL.Image.new("RGB", (10, 10)).save(pictures / "gone.png")
    after = build_index([source], language, 120, cache=tmp_path / "cache")
    assert {fault.row for fault in before.faults} - {fault.row for fault in after.faults} == {2}
    assert after.fault[2] == 0 and after.hash != before.hash
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_that_was_not_finished_is_made_again(tmp_path, source, language):
    index = build_index([source], language, 120, cache=tmp_path / "cache")
    assert index.folder is not None
    (index.folder / "meta.json").write_text("{")
    assert build_index([source], language, 120, cache=tmp_path / "cache").hash == index.hash
    assert json.loads((index.folder / "meta.json").read_text())["rows"] == 7
    assert open_index(index.folder).faults == index.faults


@pytest.fixture
def many(write_rows):
    rows = [{"conversations": turns("Hi " * (i % 9), "Yes " * (i % 5))} for i in range(700)]
    return open_source(str(write_rows(rows)), name="many")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("vistune.data.index._CHUNK", 200)
    monkeypatch.setattr("vistune.data.growing._KEEP_SECONDS", 0.0)


def dies_at(monkeypatch, row: int, how) -> list[int]:
    """From here on `row` of the source ends the build; the list grows with the rows that are measured."""
    seen: list[int] = []

    def tokenize_until(sample, *args, **kwargs):
        seen.append(sample.row)
        return how() if sample.row == row else tokenize(sample, *args, **kwargs)

    monkeypatch.setattr("vistune.data.index.tokenize", tokenize_until)
    return seen


def stop():
    raise KeyboardInterrupt


def test_a_build_that_was_stopped_goes_on_where_it_was(many, tmp_path, language, monkeypatch, small_chunks):
    whole = build_index([many], language, 120)
    dies_at(monkeypatch, 500, stop)
    with pytest.raises(KeyboardInterrupt):
        build_index([many], language, 120, cache=tmp_path / "cache")
    (part,) = (tmp_path / "cache").iterdir()
    with open(part / "chunks.bin", "ab") as done, open(part / "faults.jsonl", "ab") as faults:
        done.write(b"torn"), faults.write(b'{"torn')
    seen = dies_at(monkeypatch, -1, stop)
    index = build_index([many], language, 120, cache=tmp_path / "cache")
    assert min(seen) == 400
    assert index.hash == whole.hash and index.faults == whole.faults and len(whole.faults) > 100
    assert all((index.columns[name] == whole.columns[name]).all() for name in COLUMNS)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [index.folder.name]
    assert not (index.folder / "lock").exists()


def test_workers_of_a_killed_build_leave_and_hold_no_lock(many, tmp_path, language, monkeypatch, small_chunks):
    def slow(*args, **kwargs):
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(600)

    monkeypatch.setattr("vistune.data.index.tokenize", slow)
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=build_index, args=([many], language, 120, tmp_path / "cache"), kwargs={"workers": 1})
    killed.start()
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("*.pid"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    worker = int(found[0].stem)
    assert worker != killed.pid
    monkeypatch.setattr("vistune.data.index.tokenize", tokenize)
    assert len(build_index([many], language, 120, cache=tmp_path / "cache")) == 700
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(worker)


def runs(process: int) -> bool:
    """Whether it is there and no zombie that nobody has reaped."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_build_that_was_killed_goes_on_too(many, tmp_path, language, monkeypatch, small_chunks):
    def build():
        dies_at(monkeypatch, 500, lambda: os.kill(os.getpid(), signal.SIGKILL))
        build_index([many], language, 120, cache=tmp_path)

    killed = multiprocessing.get_context("fork").Process(target=build)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    seen = dies_at(monkeypatch, -1, stop)
    index = build_index([many], language, 120, cache=tmp_path)
    assert min(seen) == 400 and index.hash == build_index([many], language, 120).hash


def test_a_resumed_build_looks_at_pictures_again(pictures, tmp_path, source, language, monkeypatch, small_chunks):
    monkeypatch.setattr("vistune.data.index._CHUNK", 4)
    dies_at(monkeypatch, 6, stop)
    with pytest.raises(KeyboardInterrupt):
        build_index([source], language, 120, cache=tmp_path / "cache")
    PIL.Image.new("RGB", (10, 10)).save(pictures / "gone.png")
    dies_at(monkeypatch, -1, stop)
    index = build_index([source], language, 120, cache=tmp_path / "cache")
    assert index.fault[2] == 0 and index.fault[3] != 0


def test_two_processes_make_it_once(many, tmp_path, language, monkeypatch):
    def slow(sample, *args, **kwargs):
        with open(tmp_path / "measured", "a") as log:
            log.write(".")
        return tokenize(sample, *args, **kwargs)

    monkeypatch.setattr("vistune.data.index.tokenize", slow)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=build_index, args=([many], language, 120, tmp_path / "cache")) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert len((tmp_path / "measured").read_text()) == 700
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_many_faults_stay_on_disk(many, tmp_path, language, monkeypatch):
    here = build_index([many], language, 120)
    monkeypatch.setattr("vistune.data.index._MANY", 10)
    kept = build_index([many], language, 120, cache=tmp_path)
    assert isinstance(kept.faults, Faults) and kept.faults == here.faults and here.faults == list(kept.faults)
    assert kept.faults[0] == here.faults[0] and kept.faults[-1] == here.faults[-1]
    assert kept.faults[2:5] == here.faults[2:5] and len(kept.faults) == len(here.faults)
    with pytest.raises(IndexError):
        kept.faults[len(kept.faults)]


def test_a_build_that_nobody_goes_on_with_is_forgotten(many, tmp_path, language):
    old, new = tmp_path / ".index-aa.part", tmp_path / ".index-bb.part"
    for part in (old, new):
        part.mkdir()
    os.utime(old, (0, 0))
    build_index([many], language, 120, cache=tmp_path)
    assert not old.exists() and new.exists()


def test_the_hash_is_of_the_content_not_of_the_place(write_rows, pictures, tmp_path, language):
    path = write_rows(ROWS)
    moved = tmp_path / "elsewhere" / "rows.json"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    one, two = (
        build_index([open_source(str(p), images=str(pictures), name="n")], language, 120) for p in (path, moved)
    )
    assert one.hash == two.hash
    swapped = [{**ROWS[1], "conversations": turns("Hi", "there Hello")} if row["id"] == "b" else row for row in ROWS]
    other = build_index([open_source(str(write_rows(swapped)), images=str(pictures))], language, 120)
    assert other.text.tolist() == one.text.tolist() and other.hash != one.hash


def test_too_many_sources(source, language):
    with pytest.raises(ValueError, match="65535"):
        build_index([source] * 65536, language, 120)
