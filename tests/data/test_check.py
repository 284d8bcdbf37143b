"""data check: every kind of finding with its row, what a killed check keeps, and when a run would fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.small import make_language, turns
from vistune.data.checking import check as room
from vistune.data.checking import guarded
from vistune.data.checking import pictures as check_pictures
from vistune.data.checking import rows as check_rows
from vistune.data.checking.check import check
from vistune.data.checking.fix import fix
from vistune.data.checking.summary import _first
from vistune.data.formats import open_source
from vistune.data.tokenize import tokenize
from vistune.samples import Image, Message, Sample


def row(id, image=None, *texts, **more):
    texts = texts or ("<image>\nWhat is this?" if image else "What is this?", "A cup.")
    return {"id": id, **({"image": image} if image else {}), "conversations": turns(*texts), **more}


ROWS = [
    (row("good", "a.png"), []),
    (row("mute", "a.png", "<image>\nWhat?", ""), ["empty_answer"]),
    (
        row("order", None, "Hi", "Hello", "And", "Yes") | {"conversations": turns("a", "b")[:1] + turns("a", "b")},
        ["role_order"],
    ),
    (7, ["row_unreadable"]),
    (row("unmarked", "a.png", "What?", "Red"), ["image_without_mark"]),
    (row("unnamed", None, "<image>\nWhat?", "Red"), ["mark_without_image"]),
    (row("answered", "a.png", "<image>\nWhat?", "Red <image>"), ["mark_in_answer"]),
    (row("gone", "gone.png"), ["image_missing"]),
    (row("empty", "empty.jpg"), ["image_broken"]),
    (row("torn", "torn.jpg"), ["image_truncated"]),
    (row("again", "torn.jpg", "<image>\nSo?", "No"), ["image_truncated"]),
    (row("other", "c.jpg"), ["image_extension"]),
    (row("liar", "liar.jpg"), ["image_format"]),
    (row("thin", "thin.png"), ["image_aspect"]),
    (row("bomb", "bomb.png"), ["image_bomb"]),
    (row("folder", "folder.png"), ["image_broken"]),
    (row("noise", "noise.png"), ["image_broken"]),
    (row("good", "b.jpg"), ["id_duplicate"]),
    (row("twin", "a.png"), ["row_duplicate"]),
    (row(None, "b.jpg", "<image>\nNo id?", "None"), ["id_missing"]),
    (row("long", None, "Hi", "Hello " * 90, "More", "And more"), ["shortened"]),
    (row("two", ["a.png", "b.jpg", "c.png"], "<image>\n<image>\n<image>\nWhich?", "The first"), []),
]


@pytest.fixture
def folder(pictures) -> Path:
    (pictures / "liar.jpg").write_bytes((pictures / "a.png").read_bytes())
    PIL.Image.new("RGB", (5, 1100)).save(pictures / "thin.png")
    header = bytearray((pictures / "a.png").read_bytes())
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (pictures / "bomb.png").write_bytes(header)
    (pictures / "folder.png").mkdir()
    (pictures / "noise.png").write_bytes(bytes(range(200)))
    return pictures


@pytest.fixture
def source(write_rows, folder):
    return open_source(str(write_rows([one for one, _ in ROWS])), images=str(folder), name="mine")


def codes_of(report) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for one in report.findings():
        found.setdefault(one.row, []).append(one.code)
    return found


@pytest.mark.parametrize("needs_size", [False, True])
def test_every_fault_is_found_with_its_row(source, tmp_path, needs_size):
    report = check([source], make_language(needs_size=needs_size), 100, out=tmp_path / "out", workers=1)
    wanted = {i: codes for i, (_, codes) in enumerate(ROWS) if codes}
    assert codes_of(report) == wanted
    gone = next(one for one in report.findings() if one.code == "image_missing")
    assert (gone.source, gone.row, gone.id) == ("mine", 7, "gone") and gone.path.endswith("gone.png")
    other = next(one for one in report.findings() if one.code == "image_extension")
    assert other.path.endswith("c.jpg") and other.found.endswith("c.png")


def test_a_run_sets_aside_just_the_rows_with_errors(source, tmp_path):
    """Whatever training's own tokenization and decoding refuse is an error here, and nothing else is."""
    from vistune.data.batch import Planned, read_item
    from vistune.data.index import build_index

    language = make_language()
    report = check([source], language, 100, out=tmp_path / "out", workers=1)
    index = build_index([source], language, 100)
    aside = {fault.row for fault in index.faults}
    for i in np.flatnonzero(index.fault == 0).tolist():
        planned = Planned(source=0, row=i, tokens=int(index.tokens(np.array([i]))[0]), images=int(index.images[i]))
        if read_item(source, planned, language, 100).faults:
            aside.add(i)
    errors = {one.row for one in report.findings() if one.severity == "error"}
    assert errors == aside and report.summary["set_aside"] == len(aside) == 14


def test_without_a_language_all_that_needs_none_is_found(source, tmp_path):
    report = check([source], None, 100, out=tmp_path / "out", workers=1)
    assert codes_of(report) == {i: codes for i, (_, codes) in enumerate(ROWS) if codes and codes != ["shortened"]}
    assert report.summary["lengths"] == {} and report.summary["sources"][0]["tokens"] == {}
    assert "–" in (report.out / "index.html").read_text()
    report.show()


def test_headers_alone(source, tmp_path):
    report = check([source], make_language(), 100, out=tmp_path / "out", workers=1, decode=False)
    found = Counter(code for codes in codes_of(report).values() for code in codes)
    assert "image_truncated" not in found and found["image_bomb"] == found["image_format"] == 1


def test_numbers_of_the_summary(write_rows, pictures, tmp_path, language):
    rows = [row(str(i + 100), "a.png", "<image>\n" + "Hi " * (i % 9), "Yes " * (1 + i % 70)) for i in range(300)]
    mine = open_source(str(write_rows(rows)), images=str(pictures), name="mine")
    report = check([mine, mine], language, 90, out=tmp_path / "out", workers=1, expect=[300, 299])
    lengths = [len(tokenize(mine[i], language, 10**6).ids) for i in range(300)]
    kept = [tokenize(mine[i], language, 90) for i in range(300)]
    facts = report.summary["sources"][0]
    assert facts["tokens"]["median"] == round(float(np.median(lengths))) and facts["tokens"]["max"] == max(lengths)
    supervised, total = sum(one.supervised for one in kept), sum(len(one.ids) for one in kept)
    assert facts["supervised_share"] == supervised / total
    assert facts["shortened"] == sum(one.shortened for one in kept) == sum(length > 90 for length in lengths) > 20
    assert sum(report.summary["lengths"]["counts"]) == 600 and sum(report.summary["lengths"]["sources"][1]) == 300
    assert report.summary["pictures"]["distinct"] == 1
    counts = [one for one in report.findings() if one.code == "row_count"]
    assert len(counts) == 1 and counts[0].number == 1 and "299" in counts[0].message
    doubled = [one for one in report.findings() if one.code == "row_duplicate"]
    assert sum(one.number == 1 for one in doubled) == 300  # the second source repeats the first
    assert report.ok and json.loads((tmp_path / "out" / "summary.json").read_text()) == report.as_dict()


def test_the_rule_for_a_run_that_would_fail(write_rows, pictures, tmp_path):
    def checked(bad: int, good: int, **more):
        rows = [row(f"b{i}", None, "Hi", "") for i in range(bad)] + [row(f"g{i}") for i in range(good)]
        mine = open_source(str(write_rows(rows)), images=str(pictures))
        return check([mine], None, 100, out=tmp_path / f"{bad}-{good}", workers=1, **more)

    assert checked(10, 5).ok
    assert not checked(11, 5).ok and "11 of 16 rows are faulty, 10 are allowed" in checked(11, 5).summary["verdict"]
    assert checked(11, 5, cap=0.7).ok
    assert checked(0, 5, strict=True).ok and not checked(1, 5, strict=True).ok
    assert not checked(3, 0).ok


def test_a_picture_shared_by_rows_is_decoded_once(write_rows, pictures, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    real = check_pictures.open_image

    def counted(image):
        with seen.open("a") as file:
            file.write(Path(image.path).name + "\n")
        return real(image)

    monkeypatch.setattr(check_pictures, "open_image", counted)
    names = ["a.png", "b.jpg", "torn.jpg"]
    rows = [row(f"r{i}", names[i % 3], f"<image>\n{i}", "Yes") for i in range(30)]
    mine = open_source(str(write_rows(rows)), images=str(pictures))
    report = check([mine, mine], None, 100, out=tmp_path / "out", workers=1)
    assert Counter(seen.read_text().split()) == Counter(names)
    assert report.summary["codes"]["image_truncated"]["findings"] == 20


def test_a_picture_that_hangs_or_kills_its_process_stops_nothing(write_rows, pictures, tmp_path, monkeypatch):
    real = check_pictures.open_image

    def treacherous(image):
        if image.path.endswith("b.jpg"):
            time.sleep(60)
        if image.path.endswith("c.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(image)

    monkeypatch.setattr(check_pictures, "open_image", treacherous)
    rows = [row(name, name) for name in ("a.png", "b.jpg", "c.png", "torn.jpg")]
    mine = open_source(str(write_rows(rows)), images=str(pictures))
    began = time.monotonic()
    report = check([mine], None, 100, out=tmp_path / "out", workers=1, seconds=1)
    assert codes_of(report) == {1: ["image_slow"], 2: ["image_broken"], 3: ["image_truncated"]}
    assert time.monotonic() - began < 20
    assert "died" in next(one for one in report.findings() if one.row == 2).message


def test_a_killed_check_goes_on(source, tmp_path, monkeypatch):
    """Stopped after its first pictures: the rows are not judged again, and the result is the same."""
    monkeypatch.setattr(room, "_PICTURES", 2)
    whole = check([source], make_language(), 100, out=tmp_path / "whole", workers=1)
    real, kept = room.keep_pictures, []

    def stopped(*args):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(args[1])
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "keep_pictures", stopped)
        check([source], make_language(), 100, out=tmp_path / "out", workers=1)
    again: list[int] = []
    monkeypatch.setattr(room, "keep_rows", lambda *args: again.append(1))
    monkeypatch.setattr(room, "keep_pictures", lambda *args: (again.append(args[1]), real(*args)))
    report = check([source], make_language(), 100, out=tmp_path / "out", workers=1)
    assert not set(again) & set(kept) and 1 not in again
    assert (report.out / "findings.jsonl").read_bytes() == (whole.out / "findings.jsonl").read_bytes()
    assert {k: v for k, v in report.summary.items() if k != "seconds"} == {
        k: v for k, v in whole.summary.items() if k != "seconds"
    }
    assert sorted(path.name for path in report.out.iterdir()) == ["findings.jsonl", "index.html", "summary.json"]


def test_workers_and_chunks_change_nothing(source, tmp_path, monkeypatch):
    one = check([source], make_language(), 100, out=tmp_path / "one", workers=0)
    monkeypatch.setattr(check_rows, "CHUNK", 3)
    two = check([source], make_language(), 100, out=tmp_path / "two", workers=2)
    assert (one.out / "findings.jsonl").read_bytes() == (two.out / "findings.jsonl").read_bytes()


def test_mended_data_are_looked_at_anew(source, folder, tmp_path):
    assert not check([source], None, 100, out=tmp_path / "out", workers=1).ok
    shutil.copy(folder / "a.png", folder / "gone.png")
    again = check([source], None, 100, out=tmp_path / "out", workers=1)
    assert "image_missing" not in again.summary["codes"]


def test_text_that_the_tokenizer_does_not_give_back(write_rows, tmp_path):
    """A tokenizer that folds ligatures, and one without a token for an emoji."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vistune.chat import TextEncoder

    texts = ("<unk>", "What", "is", "this", "?", "A", "fish", ".", ":", "USER", "ASSISTANT")
    words = {word: i for i, word in enumerate(texts)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    language = make_language()
    template = replace(language.template, system="", stop="", end="", between="")
    poor = replace(language, template=template, encoder=encoder)
    rows = [row(str(10 + i), None, "What is this?", text) for i, text in enumerate(["A fish.", "A ﬁsh.", "A 😀."])]
    report = check([open_source(str(write_rows(rows)))], poor, 100, out=tmp_path / "out", workers=1)
    assert codes_of(report) == {1: ["round_trip"], 2: ["round_trip"]}
    assert "😀" in [one.message for one in report.findings()][1]


def test_an_unreadable_container_fails_the_check(tmp_path):
    class Torn:
        name = "torn"

        def __len__(self):
            return 3

        def __getitem__(self, row):
            if row == 1:
                raise ValueError("shard-2.tar: torn; fetch it again")
            return Sample(
                id=f"r{row}",
                source="torn",
                row=row,
                messages=(Message(role="user", text=str(row)), Message(role="assistant", text="x")),
            )

        def fingerprint(self):
            return "torn"

    report = check([Torn()], None, 100, out=tmp_path / "out", workers=1)
    assert codes_of(report) == {1: ["source_unreadable"]} and not report.ok
    assert "shard-2.tar" in next(report.findings()).message


def test_pictures_behind_a_uri(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    PIL.Image.new("RGB", (9, 9)).save(path := tmp_path / "a.png")
    memory.pipe("/check/a.png", path.read_bytes())
    assert check_pictures.locate(Image(path="memory://check/a.png")).code == ""
    other = check_pictures.locate(Image(path="memory://check/a.jpg"))
    assert other.code == "image_extension" and other.image.path == "memory://check/a.png"
    assert check_pictures.locate(Image(path="memory://check/b.jpg")).code == "image_missing"
    assert check_pictures.locate(Image(path="nosuch://check/b.jpg")).code == "image_missing"


def test_another_extension_in_another_folder(write_rows, pictures, tmp_path):
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    shutil.copy(pictures / "a.png", other / "sub" / "there.png")
    shutil.copy(pictures / "torn.jpg", other / "torn2.jpeg")
    rows = [row("there", "sub/there.jpg"), row("torn", "torn2.jpg"), row("nowhere", "sub/nowhere.jpg")]
    source = open_source(str(write_rows(rows)), images=[str(pictures), str(other)])
    report = check([source], None, 100, out=tmp_path / "out", workers=1)
    assert codes_of(report) == {
        0: ["image_extension"],
        1: ["image_extension", "image_truncated"],
        2: ["image_missing"],
    }
    copy = fix([source], report, tmp_path / "fixed")["sources"][0]
    again = open_source(copy["path"], images=copy["images"])
    assert len(again) == 1 and again[0].images[0].path == str(other / "sub" / "there.png")
    assert check([again], None, 100, out=tmp_path / "again", workers=1).summary["codes"] == {}


def test_first_of_equal_values():
    values = np.array([5, 3, 5, 3, 5, 9], np.uint64)
    assert _first(values, np.ones(6, bool)).tolist() == [0, 1, 0, 1, 0, 5]
    assert _first(values, np.array([0, 1, 1, 0, 1, 1], bool)).tolist() == [0, 1, 2, 3, 2, 5]
    assert _first(values[:0], np.ones(0, bool)).tolist() == []


def test_an_error_of_the_work_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(guarded.run(lambda task: 1 / task, [("key", [1, 0])], workers=1))
    assert dict(guarded.run(abs, [("a", [-1, 2]), ("b", []), ("c", [-3])], workers=2)) == {
        "a": [1, 2],
        "b": [],
        "c": [3],
    }


def test_a_process_that_never_comes_up_is_replaced(tmp_path, monkeypatch):
    first, serve = tmp_path / "first", guarded._serve

    def stuck_once(*given):
        if not first.exists():
            first.touch()
            time.sleep(60)
        serve(*given)

    monkeypatch.setattr(guarded, "START", 0.5)
    monkeypatch.setattr(guarded, "_serve", stuck_once)
    assert dict(guarded.run(abs, [("a", [-1, 2])], workers=1)) == {"a": [1, 2]} and first.exists()
