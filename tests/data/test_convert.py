"""Any format to any other: nothing changes, nothing is dropped in silence; packs made offline hold every row once."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.small import make_language, turns
from vistune import files
from vistune.data.converting.convert import convert
from vistune.data.formats import open_source
from vistune.data.tokenize import tokenize

WEBDATASET = Path(__file__).parents[1] / "golden" / "onevision15" / "webdataset"
FORMATS = {"llava_json": "rows.json", "messages": "rows.parquet", "energon": "rows"}


def picture(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 10 + number % 40, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def content(reader, row: int):
    sample = reader[row]
    data = [i.data if i.data is not None else files.read(i.path, i.start, i.size) for i in sample.images]
    texts = tuple((message.role, message.text) for message in sample.messages)
    return texts, tuple(hashlib.sha256(d).hexdigest() for d in data)


def contents(reader):
    return [content(reader, row) for row in range(len(reader))]


@pytest.fixture
def source(tmp_path):
    """60 rows of one picture and one question; 9 are more or less: text, two turns, two pictures, system, faults."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(60):
        (folder / f"{i}.jpg").write_bytes(picture(i))
        told = turns("<image>\nWhat?", f"It is {i}. " * (i % 9 + 1))
        rows.append({"id": f"r{i}", "image": f"{i}.jpg", "conversations": told})
    rows[3] = {"id": "text", "conversations": turns("Hi", "Ho")}
    rows[9]["conversations"] += turns("Sure?", "Yes")
    rows[12] |= {"image": ["12.jpg", "13.jpg"], "conversations": turns("<image><image>", "Two")}
    rows[20]["image"] = "gone.jpg"
    rows[21]["conversations"][0]["value"] = "no mark"
    rows[22]["conversations"] = "nothing"
    rows[30]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    rows[40]["conversations"] = turns("<image>", "long " * 300)
    rows[41]["conversations"] = turns("<image>", "open", "question")
    path = tmp_path / "source.json"
    path.write_text(json.dumps(rows))
    return open_source(str(path), images=str(folder))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_any_format_to_any_other_and_on(tmp_path, source, first, second):
    report = convert(source, tmp_path / "1" / FORMATS[first], first)
    one = open_source(str(tmp_path / "1" / FORMATS[first]), first)
    named = first == "llava_json"  # names pictures, and so does not miss the one that is gone
    assert report["left_out"] == (1 if named else 2) and report["samples"] == len(one) == 60 - report["left_out"]
    report = convert(one, tmp_path / "2" / FORMATS[second], second)
    two = open_source(str(tmp_path / "2" / FORMATS[second]), second)
    good = [row for row in range(60) if row not in (20, 21, 22)]
    back = contents(two)
    del back[20]  # row 21 names a picture and has no mark for it: "messages" reads that as a picture in front
    assert back == [content(source, row) for row in good]
    assert report["left_out"] == (1 if named else 0)


def test_what_is_left_out_is_named(tmp_path, source):
    report = convert(source, tmp_path / "made", "energon")
    lines = [json.loads(line) for line in (tmp_path / "made" / "left_out.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"], line["code"]) for line in lines] == [
        (20, "r20", "image_missing"),
        (22, "r22", "row_unreadable"),
    ]
    assert "gone.jpg" in lines[0]["reason"] and report["left_out_image_missing"] == 1
    report = convert(source, tmp_path / "captions", "image_text", options={"prompts": "ignore"})
    assert report["samples"] == 53 and report["left_out_not_held"] == 5
    report = convert(source, tmp_path / "one.parquet", "messages")
    assert report["left_out_file"] == str(tmp_path / "one.parquet.left_out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} >= {"one.parquet", "one.parquet.left_out.jsonl"}
    assert not list(tmp_path.glob(".*"))


def test_a_target_that_can_hold_nothing_is_an_error(tmp_path, source):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"conversations": turns("Hi", "Ho")}))
    with pytest.raises(ValueError, match="no row can be written so, such as row 0: not_held"):
        convert(open_source(str(text)), tmp_path / "x", "image_text")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def packed(tmp_path, source, name="packs", **options):
    report = convert(source, tmp_path / name, "energon", pack=128, language=make_language(), **options)
    return report, open_source(str(tmp_path / name), "energon")


def by_pack(reader) -> dict[str, list[int]]:
    packs: dict[str, list[int]] = {}
    for row in range(len(reader)):
        packs.setdefault(reader[row].id.split("#")[0], []).append(row)
    return packs


def left_out(report) -> dict[int, str]:
    lines = Path(report["left_out_file"]).read_text().splitlines()
    return {line["row"]: line["code"] for line in map(json.loads, lines)}


LEFT = {20: "image_missing", 21: "image_without_mark", 22: "row_unreadable"}


def test_packs_of_conversations_hold_every_row_once(tmp_path, source):
    report, reader = packed(tmp_path, source)
    assert report["layout"] == "packed_turns"
    left = left_out(report)
    assert left == {**LEFT, 30: "not_held", 40: "too_long", 41: "not_held"}
    kept = [row for row in range(60) if row not in left]
    assert sorted(contents(reader)) == sorted(content(source, row) for row in kept)
    language = make_language()
    lengths = {row: len(tokenize(reader[row], language, 10**6).ids) for row in range(len(reader))}
    filled = [sum(lengths[row] for row in rows) for rows in by_pack(reader).values()]
    assert max(filled) <= 128 and report["samples"] == len(filled)
    assert report["filled"] == round(sum(filled) / 128 / len(filled), 4) > 0.75
    assert report["conversations"] == len(kept)


def test_packs_of_captions_are_the_references_layout(tmp_path, source):
    report, reader = packed(tmp_path, source, layout="packed")
    left = left_out(report)
    assert left == {**LEFT, **dict.fromkeys((3, 9, 12, 30, 41), "not_held"), 40: "too_long"}
    kept = [row for row in range(60) if row not in left]
    assert sorted(contents(reader)) == sorted(content(source, row) for row in kept)
    assert {sample.images[0].name for sample in (reader[row] for row in range(len(reader)))} >= {"img0.jpg", "img1.jpg"}


def test_layout_follows_the_rows_and_workers_change_nothing(tmp_path):
    golden = open_source(str(WEBDATASET / "packed"), "energon")
    report, reader = packed(tmp_path, golden, "a", workers=2)
    assert report["layout"] == "packed" and report["left_out"] == 0 and report["left_out_file"] == ""
    assert sorted(contents(reader)) == sorted(contents(golden))
    again, _ = packed(tmp_path, golden, "b", window=5)
    assert again["conversations"] == 25
    same, _ = packed(tmp_path, golden, "c")
    first, third = ([path.read_bytes() for path in sorted((tmp_path / n).rglob("*")) if path.is_file()] for n in "ac")
    assert first == third and same == report
    other, _ = packed(tmp_path, golden, "d", seed=1)
    assert (tmp_path / "d" / "pretrain-000000.tar").read_bytes() != (
        tmp_path / "a" / "pretrain-000000.tar"
    ).read_bytes()
    assert other["conversations"] == 25


def test_packing_wants_its_format_and_a_tokenizer(tmp_path, source):
    with pytest.raises(ValueError, match="'energon', not 'messages'"):
        convert(source, tmp_path / "x.parquet", "messages", pack=128, language=make_language())
    with pytest.raises(ValueError, match="whose tokenizer"):
        convert(source, tmp_path / "x", "energon", pack=128)
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        convert(source, tmp_path / "x", "energon", pack=128, language=make_language())
