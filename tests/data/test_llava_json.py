"""The LLaVA reader: rows by place, faults by name, and files that cannot be read at all."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import turns
from vistune.data.formats import FORMATS, open_source, register
from vistune.data.reading.json_rows import find_rows
from vistune.data.tokenize import check_marks
from vistune.samples import Image, Message, SampleError

GOOD = {"id": "x", "conversations": turns("Hi", "Hello")}


def code_of(reader, row: int) -> str:
    with pytest.raises(SampleError) as error:
        reader[row]
    assert (error.value.fault.row, error.value.fault.source) == (row, reader.name)
    return error.value.fault.code


@pytest.mark.parametrize("lines", [False, True])
def test_reads_list_and_lines(write_rows, pictures, lines):
    rows = [
        {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat?", "Red — «дa» 红")},
        {"image": ["a.png", "b.jpg"], "conversations": turns("<image>\n<image>\nBoth?", "Yes", "Sure?", "Sure")},
        {"id": 7, "model": "", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "Hello")]},
    ]
    reader = open_source(str(write_rows(rows, lines=lines)), images=str(pictures), name="mine")
    one, two, three = (reader[row] for row in range(3))
    assert len(reader) == 3
    assert one.messages[1] == Message(role="assistant", text="Red — «дa» 红")
    assert [sample.id for sample in (one, two, three)] == ["one", "1", "7"]
    assert two.images == (Image(path=str(pictures / "a.png")), Image(path=str(pictures / "b.jpg")))
    assert three.messages[0].role == "system" and three.images == ()
    assert (three.source, three.row) == ("mine", 2)
    assert pickle.loads(pickle.dumps(reader))[0] == one


def test_image_folders_in_order_and_absolute_paths(write_rows, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "only_here.png").touch()
    names = ["only_here.png", "a.png", str(pictures / "b.jpg"), "nowhere.png"]
    rows = [{"image": name, "conversations": turns("<image>", "x")} for name in names]
    reader = open_source(str(write_rows(rows)), images=[str(pictures), str(other)])
    found = [reader[row].images[0].path for row in range(4)]
    assert found == [
        str(other / "only_here.png"),
        str(pictures / "a.png"),
        str(pictures / "b.jpg"),
        str(pictures / "nowhere.png"),
    ]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (3, "row_unreadable"),
        ([], "row_unreadable"),
        ({"id": "x"}, "row_unreadable"),
        ({"id": {}, "conversations": turns("a", "b")}, "row_unreadable"),
        ({"conversations": []}, "row_unreadable"),
        ({"conversations": {"from": "human"}}, "row_unreadable"),
        ({"conversations": [{"from": "human", "value": 3}]}, "row_unreadable"),
        ({"conversations": [["human", "Hi"]]}, "row_unreadable"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "role_order"),
        ({"image": 3, "conversations": turns("<image>", "b")}, "row_unreadable"),
        ({"image": "", "conversations": turns("<image>", "b")}, "row_unreadable"),
    ],
)
def test_faults_of_a_row(write_rows, pictures, row, code):
    reader = open_source(str(write_rows([row, GOOD])), images=str(pictures))
    assert code_of(reader, 0) == code
    assert reader[1].id == "x"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"image": "a.png", "conversations": turns("a", "b")}, "image_without_mark"),
        ({"image": ["a.png", "b.jpg"], "conversations": turns("<image>\na", "b")}, "image_without_mark"),
        ({"image": "a.png", "conversations": turns("<image><image>", "b")}, "mark_without_image"),
        ({"conversations": turns("<image>\nWhat?", "b")}, "mark_without_image"),
        ({"conversations": turns("What?\n<image>", "b")}, "mark_without_image"),
        ({"image": None, "conversations": turns("<image>", "b")}, "mark_without_image"),
    ],
)
def test_marks_and_pictures_must_agree(write_rows, pictures, row, code):
    reader = open_source(str(write_rows([row])), images=str(pictures))
    with pytest.raises(SampleError) as error:
        check_marks(reader[0])
    assert error.value.fault.code == code


def test_mark_in_the_text_of_a_row_without_image_is_text(write_rows):
    reader = open_source(str(write_rows([{"conversations": turns("What does <image> mean in HTML?", "Nothing.")}])))
    assert reader[0].messages[0].text == "What does <image> mean in HTML?"
    check_marks(reader[0])


@pytest.mark.parametrize(
    "bad", ['{"id": 1,, "a": 2}', "{'id': 1}", '{"id": "\\x"}', '{"id": NaN_}', '"text"', "12", "null"]
)
def test_a_bad_row_of_a_list_is_one_row(tmp_path, bad):
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(GOOD)},\n {bad},\n{json.dumps(GOOD)}\n]\n")
    reader = open_source(str(path))
    assert len(reader) == 3
    assert code_of(reader, 1) == "row_unreadable"
    assert reader[2].messages[1].text == "Hello"


def test_bad_bytes_and_a_torn_last_line_are_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n  \n" + b'{"id": "\xff\xfe"}\n' + good + b"\n" + good[:20])
    reader = open_source(str(path))
    assert len(reader) == 4
    assert reader[0].id == reader[2].id == "x"
    assert code_of(reader, 1) == code_of(reader, 3) == "row_unreadable"


@pytest.mark.parametrize("cut", [-1, -2, -10, -30])
def test_a_torn_list_names_row_and_byte(tmp_path, cut):
    path = tmp_path / "rows.json"
    text = json.dumps([GOOD, GOOD, GOOD])
    path.write_text(text[:cut])
    with pytest.raises(ValueError, match=rf"rows.json: row [23], .* ends at byte {len(text) + cut}"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("  \n ", "no rows"),
        ("[]", "no rows"),
        ('[{"a": [1}]', "row 0, which begins at byte 1: at byte 9 '}'"),
        ('[{"a": 1}, oops {"a": 2}]', "before row 1, at byte 9: 'oops'"),
        ('[{"a": 1}] [{"a": 2}]', "more is at byte 11"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(str(path))


def test_missing_file_folder_and_format_are_named(tmp_path, write_rows):
    path = str(write_rows([GOOD]))
    with pytest.raises(ValueError, match=r"nothing\.json: the data file cannot be opened"):
        open_source(str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"image folder .*nowhere does not exist"):
        open_source(path, images=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no data format 'llava'\. Formats: .*llava_json"):
        open_source(path, format="llava")
    with pytest.raises(ValueError, match="registered twice"):
        register("llava_json")(FORMATS["llava_json"])


def test_row_places_are_kept_and_follow_the_file(write_rows, tmp_path):
    cache = tmp_path / "cache"
    path = write_rows([GOOD])
    first = open_source(str(path), cache=cache)
    (kept,) = cache.glob("rows-*.npy")
    before = kept.stat().st_mtime_ns
    again = open_source(str(path), cache=cache)
    assert kept.stat().st_mtime_ns == before and again.fingerprint() == first.fingerprint()
    assert pickle.loads(pickle.dumps(again))[0] == first[0]
    write_rows([GOOD, GOOD])
    changed = open_source(str(path), cache=cache)
    assert len(changed) == 2 and changed.fingerprint() != first.fingerprint()


def test_a_row_beyond_four_gigabytes(tmp_path, monkeypatch):
    path, row, place = tmp_path / "rows.jsonl", json.dumps(GOOD).encode(), (5 << 30) + 3
    with open(path, "wb") as file:  # a hole, which costs no disk; scanning it would cost time, so the place is given
        file.seek(place)
        file.write(row)
    monkeypatch.setattr("vistune.data.reading.json_rows.find_rows", lambda _: np.array([[place, place + len(row)]]))
    assert open_source(str(path))[0].id == "x"
    monkeypatch.undo()
    path.write_bytes(row + b"\n" + row)
    assert find_rows(path).dtype == np.int64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(['"', "\\", "]}", "{[", '\\"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1]))
def test_rows_are_found_as_json_finds_them(tmp_path_factory, rows, ascii, indent):
    path = tmp_path_factory.getbasetemp() / "some.json"
    path.write_bytes(json.dumps(rows, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass"))
    data = path.read_bytes()
    spans = find_rows(path)
    assert len(spans) == len(rows)
    for (start, end), row in zip(spans.tolist(), rows, strict=True):
        if isinstance(row, list | dict):
            assert json.loads(data[start:end].decode("utf-8", "surrogatepass")) == row
        else:
            assert start == end
