"""data check --fix: the corrected copy passes its own check, the input stays as it was, what is left out is named."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import PIL.Image
import pytest

from tests.data.small import turns
from vistune.data.checking.check import check
from vistune.data.checking.fix import fix
from vistune.data.formats import open_source


def row(id, image=None, text="<image>\nWhat?", answer="A cup.", **more):
    return {"id": id, **({"image": image} if image else {}), "conversations": turns(text, answer), **more}


ROWS = [
    row("good", "a.png", score=0.30, note="ä"),
    row("gone", "gone.png"),
    row("other", "c.jpg", text="<image>\nIs c.jpg here?"),
    row("both", ["a.png", "c.jpg"], text="<image><image>\nWhich?"),
    row("liar", "sub/liar.jpg"),
    row("mute", "a.png", answer=""),
    row("otherbad", "c.jpg", answer=" "),
    row("text", text="Hi"),
]


@pytest.fixture
def folder(pictures) -> Path:
    (pictures / "sub").mkdir()
    (pictures / "sub" / "liar.jpg").write_bytes((pictures / "a.png").read_bytes())
    return pictures


def digest(*folders: Path) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def fixed(source, tmp_path):
    report = check([source], None, 100, out=tmp_path / "found", workers=1)
    return fix([source], report, tmp_path / "fixed")


@pytest.mark.parametrize("lines", [False, True])
def test_the_copy_is_clean_and_the_input_untouched(write_rows, folder, tmp_path, lines):
    path = write_rows(ROWS, name="my rows.json", lines=lines)
    before = digest(folder) | {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    source = open_source(str(path), images=str(folder), name="mine")
    done = fixed(source, tmp_path)
    assert (done["rows"], done["kept"], done["mended"], done["left_out"]) == (8, 5, 3, 3)
    (copy,) = done["sources"]
    assert copy["format"] == "llava_json" and Path(copy["path"]) == tmp_path / "fixed" / "my rows.json"
    again = open_source(copy["path"], images=copy["images"])
    assert not list(check([again], None, 100, out=tmp_path / "again", workers=1).findings())
    assert [again[i].id for i in range(len(again))] == ["good", "other", "both", "liar", "text"]
    for kept, original in ((0, 0), (4, 7)):
        assert again.raw(kept) == source.raw(original)
    assert json.loads(again.raw(1)) == ROWS[2] | {"image": "c.png"}  # and what its text says stays
    assert json.loads(again.raw(2))["image"] == ["a.png", "c.png"]
    assert json.loads(again.raw(3))["image"] == "sub/liar.jpg.png"
    assert again.raw(1) == source.raw(2).replace(b'"image": "c.jpg"', b'"image": "c.png"')
    assert path.read_bytes().lstrip()[:1] == Path(copy["path"]).read_bytes()[:1]
    assert {key: value for key, value in digest(folder, path.parent).items() if key in before} == before


def test_what_is_left_out_is_named(write_rows, folder, tmp_path):
    fixed(open_source(str(write_rows(ROWS)), images=str(folder), name="mine"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "fixed" / "left_out.jsonl").read_text().splitlines()]
    assert [(line["source"], line["row"], line["id"]) for line in lines] == [
        ("mine", 1, "gone"),
        ("mine", 5, "mute"),
        ("mine", 6, "otherbad"),
    ]
    assert [[reason["code"] for reason in line["reasons"]] for line in lines] == [
        ["image_missing"],
        ["empty_answer"],
        ["empty_answer"],
    ]


def test_sources_of_one_name_and_escaped_paths(write_rows, folder, tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(folder / "ü.png")
    path = write_rows([row("a", "ü.jpg")])
    path.write_text(path.read_text().replace('"image": "', '"image":   "'))
    slashed = tmp_path / "more" / "rows.json"
    slashed.parent.mkdir()
    slashed.write_text(json.dumps([row("b", "sub/liar.jpg")]).replace("/", "\\/"))
    sources = [open_source(str(one), images=str(folder)) for one in (path, slashed)]
    report = check(sources, None, 100, out=tmp_path / "found", workers=1)
    done = fix(sources, report, tmp_path / "fixed")
    one, two = (open_source(copy["path"], images=copy["images"]) for copy in done["sources"])
    assert Path(done["sources"][1]["path"]).name == "rows-1.json"
    assert one.raw(0) == sources[0].raw(0).replace(b"\\u00fc.jpg", b"\\u00fc.png")
    assert two.raw(0) == sources[1].raw(0).replace(b"liar.jpg", b"liar.jpg.png")
    assert check([one, two], None, 100, out=tmp_path / "again", workers=1).summary["codes"] == {}


def test_an_existing_place_is_refused_and_a_failure_leaves_nothing(write_rows, folder, tmp_path, monkeypatch):
    source = open_source(str(write_rows(ROWS)), images=str(folder))
    report = check([source], None, 100, out=tmp_path / "found", workers=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there: is there already"):
        fix([source], report, tmp_path / "there")
    monkeypatch.setattr("vistune.data.checking.fix._replaced", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fix([source], report, tmp_path / "copy")
    assert not [path.name for path in tmp_path.iterdir() if "copy" in path.name]


def test_other_formats_go_through_their_writer(folder, tmp_path):
    """Rows in the `messages` format, some with their pictures inside."""
    torn = bytearray((folder / "a.png").read_bytes())
    torn[33:37] = zlib.crc32(b"").to_bytes(4, "big")

    def messages(image, answer="A cup."):
        turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "images": [image]}

    rows = [messages("a.png"), messages("c.jpg"), messages("gone.png"), messages("b.jpg", "")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = open_source(str(file), "messages", images=str(folder))
    done = fixed(source, tmp_path)
    (copy,) = done["sources"]
    assert copy["format"] == "messages" and (copy["kept"], copy["left_out"]) == (2, 2)
    again = open_source(copy["path"], "messages", images=copy["images"])
    report = check([again], None, 100, out=tmp_path / "again", workers=1)
    assert len(again) == 2 and report.summary["set_aside"] == 0 and report.ok
