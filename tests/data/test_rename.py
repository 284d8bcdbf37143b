"""Pictures renamed to what a JSON calls them: journal first, nothing replaced, everything taken back."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistune.data.fetching import rename as module
from vistune.data.fetching.rename import Change, find_changes, rename, undo


def lay(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"bytes of {name}".encode())


def tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path):
    root = tmp_path / "data"
    lay(root, "ocr/1.gif", "ocr/2.PNG", "ocr/3.png", "ocr/3.gif", "ocr/4.jpg", "ocr/5.png", "ocr/6.txt", "other/1.png")
    return root


WANTED = [f"ocr/{i}.jpg" for i in range(1, 8)] + ["ocr/5.png"]


def test_there_and_back(place, tmp_path):
    before = tree(place)
    missing = [name for name in WANTED if name not in before]
    changes, unclear = find_changes(place, [*missing, "../escape.jpg", "/etc/passwd.jpg"], WANTED)
    assert changes == [
        Change(do="rename", old="ocr/1.gif", new="ocr/1.jpg"),
        Change(do="rename", old="ocr/2.PNG", new="ocr/2.jpg"),
        Change(do="link", old="ocr/5.png", new="ocr/5.jpg"),
    ]
    assert [name for name, _ in unclear] == ["ocr/3.jpg"] and "ocr/3.gif, ocr/3.png" in unclear[0][1]
    journal = tmp_path / "journal.jsonl"
    done = rename(place, changes, journal)
    assert (done.changed, done.left) == (3, [])
    after = tree(place)
    assert after["ocr/1.jpg"] == before["ocr/1.gif"] and after["ocr/5.jpg"] == before["ocr/5.png"]
    assert set(after) - set(before) == {"ocr/1.jpg", "ocr/2.jpg", "ocr/5.jpg"}
    assert set(before) - set(after) == {"ocr/1.gif", "ocr/2.PNG"}
    done = undo(place, journal)
    assert (done.changed, done.left) == (3, [])
    assert tree(place) == before
    assert not journal.exists() and len(journal.with_name("journal.jsonl.undone").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="no journal"):
        undo(place, journal)


def test_nothing_is_replaced(place, tmp_path):
    changes, _ = find_changes(place, ["ocr/1.jpg", "ocr/2.jpg"], WANTED)
    lay(place, "ocr/1.jpg")  # came meanwhile
    (place / "ocr/2.PNG").unlink()  # went meanwhile
    before = tree(place)
    done = rename(place, changes, tmp_path / "journal")
    assert done.changed == 0
    assert done.left == [("ocr/1.jpg", "there is another 1.jpg by now"), ("ocr/2.jpg", "2.PNG is gone")]
    assert tree(place) == before
    assert undo(place, tmp_path / "journal").left == []  # what was left alone is not touched by undoing either
    assert tree(place) == before


def test_undo_does_not_replace_either(place, tmp_path):
    changes, _ = find_changes(place, ["ocr/1.jpg"], WANTED)
    rename(place, changes, tmp_path / "journal")
    (place / "ocr/1.gif").write_bytes(b"a new one")
    done = undo(place, tmp_path / "journal")
    assert done.left == [("ocr/1.jpg", "1.gif and 1.jpg are different pictures")]
    assert (place / "ocr/1.gif").read_bytes() == b"a new one" and (place / "ocr/1.jpg").exists()
    assert (tmp_path / "journal").exists()
    (place / "ocr/1.gif").unlink()
    assert undo(place, tmp_path / "journal").changed == 1


def test_the_journal_is_on_disk_before_the_first_change(place, tmp_path, monkeypatch):
    changes, _ = find_changes(place, ["ocr/1.jpg", "ocr/2.jpg"], WANTED)
    before = tree(place)
    seen = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda file: (seen.append(tree(place)), real(file)))
    rename(place, changes, tmp_path / "journal")
    assert seen == [before]
    assert [json.loads(line)["new"] for line in (tmp_path / "journal").read_text().splitlines()] == [
        "ocr/1.jpg",
        "ocr/2.jpg",
    ]


class Crash(BaseException):
    pass


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 9), links=st.booleans(), torn=st.booleans())
def test_a_crash_at_any_step_can_be_gone_on_with_or_taken_back(tmp_path_factory, stop, links, torn):
    """Die at the `stop`-th system call that changes names; then go on in one copy and undo in another."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("crash")
        for which in ("on", "back"):
            lay(root / which, "a/1.gif", "a/2.gif", "a/3.png")
            wanted = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/3.png"]
            before = tree(root / which)
            journal = root / f"{which}.jsonl"
            if torn:
                journal.write_bytes(b'{"do": "rename", "old": "a/1.g')
            steps = iter(range(100))
            with patch.context() as failing:
                for name in ("link", "unlink", "rename"):
                    failing.setattr(module.os, name, crashing(getattr(os, name), name, steps, stop, links))
                changes, _ = find_changes(root / which, wanted[:3], wanted)
                try:
                    rename(root / which, changes, journal)
                except Crash:
                    assert stop < 9
            if which == "back":
                undo(root / which, journal)
                assert tree(root / which) == before
                continue
            missing = [name for name in wanted if name not in tree(root / which)]
            rename(root / which, find_changes(root / which, missing, wanted)[0], journal)
            now = tree(root / which)
            assert {name: now[name] for name in wanted} == {
                "a/1.jpg": before["a/1.gif"],
                "a/2.jpg": before["a/2.gif"],
                "a/3.jpg": before["a/3.png"],
                "a/3.png": before["a/3.png"],
            }
            assert set(now) == set(wanted)
            undo(root / which, journal)
            assert tree(root / which) == before


def crashing(real, name, steps, stop, links):
    def act(*args):
        if next(steps) == stop:
            raise Crash
        if name == "link" and not links:
            raise PermissionError("no hard links on this disk")
        return real(*args)

    return act
