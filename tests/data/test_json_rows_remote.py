"""JSON behind a URI: the same rows as on disk, found in blocks and read by ranges."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import uuid

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small import turns
from vistune import files
from vistune.data.formats import open_source
from vistune.data.reading import json_rows
from vistune.data.reading.json_rows import find_rows
from vistune.samples import SampleError

GOOD = {"id": "x", "image": "sub/a.png", "conversations": turns("<image>\nWhat?", "Red"), "boxes": [[0, 1]], "n": 3}


def put(data: bytes, name: str = "rows.json") -> str:
    path = f"memory://{uuid.uuid4()}/{name}"
    with fsspec.open(path, "wb") as file:
        file.write(data)
    return path


LINE = st.sampled_from([b"", b" ", b"\r", b'{"a": "{[\\"]}"}', b"x" * 16, b" " * 17, b'{"text": "' + b"y" * 40 + b'"}'])
ROW = st.sampled_from(['{"a": "]}"}', '{"b": ["\\\\", "\\""]}', "3", '"x"', "null", "[]", '{"c": "' + "z" * 50 + '"}'])


@settings(max_examples=120, deadline=None)
@given(st.lists(LINE, min_size=1, max_size=9), st.integers(4, 60), st.booleans(), st.booleans())
def test_lines_in_blocks_of_any_size(tmp_path_factory, lines, block, ends, mark):
    data = b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n" * ends
    same_as_on_disk(tmp_path_factory, data, block)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=6),
    st.integers(4, 60),
    st.sampled_from(["", "\n", "\n  ", "   "]),
    st.integers(0, 4),
)
def test_lists_in_blocks_of_any_size(tmp_path_factory, rows, block, space, cut):
    data = f"{space}[{space}{f'{space},{space}'.join(rows)}{space}]{space}".encode()
    same_as_on_disk(tmp_path_factory, data[: len(data) - cut], block)


def same_as_on_disk(tmp_path_factory, data: bytes, block: int) -> None:
    """The same spans, or the same error, from a file on disk in one window and behind a URI in small blocks."""
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_bytes(data)
    uri = put(data)
    found = []
    for place, size in ((path, 1 << 24), (uri, block)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "_BLOCK", size)
            try:
                found.append(find_rows(place).tolist())
            except ValueError as error:
                found.append(str(error).replace(str(place), ""))
    assert found[0] == found[1]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_and_pictures_behind_a_uri(tmp_path, lines, cached):
    rows = [GOOD, {**GOOD, "id": 7, "image": None}, 3]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path = put(text.encode())
    beside, other = path.rpartition("/")[0], f"memory://{uuid.uuid4()}"
    with fsspec.open(f"{other}/sub/a.png", "wb") as file:
        file.write(b"picture")
    cache = tmp_path / "cache" if cached else None
    reader = open_source(path, cache=cache)
    assert len(reader) == 3 and reader[0].images[0].path == f"{beside}/sub/a.png"
    assert reader[0].notes == {"boxes": [[0, 1]], "n": 3}
    with pytest.raises(SampleError, match="row_unreadable"):
        reader[2]
    found = open_source(path, images=[beside, other], cache=cache)
    assert found[0].images[0].path == f"{other}/sub/a.png"
    assert files.read(found[0].images[0].path) == b"picture"
    sent = pickle.dumps(found)
    assert pickle.loads(sent)[0] == found[0] and len(sent) < 2000
    assert open_source(path, images=[beside, other], cache=cache).fingerprint() == found.fingerprint()
    with fsspec.open(path, "wb") as file:
        file.write(json.dumps([GOOD]).encode())
    changed = open_source(path, images=[beside, other], cache=cache)
    assert len(changed) == 1 and changed.fingerprint() != found.fingerprint()


def test_places_are_looked_for_once(tmp_path, monkeypatch):
    path = put(json.dumps([GOOD] * 5).encode())
    open_source(path, cache=tmp_path)
    monkeypatch.setattr(json_rows, "find_rows", None)
    asked = []
    whole = files.read
    monkeypatch.setattr(files, "read", lambda *range: asked.append(range) or whole(*range))
    reader = open_source(path, cache=tmp_path)
    assert reader[3].id == "x"
    ((_, start, count),) = asked
    assert (start, count) == tuple(np.load(next(tmp_path.glob("rows-*.npy")))[3] * [1, 1] - [0, start])


def test_a_scan_holds_blocks_and_no_file(monkeypatch):
    path = put(json.dumps([{"text": "x" * 1000, "n": i} for i in range(12_000)]).encode())
    monkeypatch.setattr(json_rows, "_BLOCK", 1 << 19)
    tracemalloc.start()
    assert len(find_rows(path)) == 12_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert files.size(path) > 11 << 20 and most < 6 << 20


def test_a_string_without_an_end_is_named_before_memory_is_full(monkeypatch):
    monkeypatch.setattr(json_rows, "_BLOCK", 1 << 10)
    monkeypatch.setattr(json_rows, "MAX_STRING", 1 << 12)
    path = put(b'[{"a": 1}, {"b": "' + b"x" * 50_000)
    with pytest.raises(ValueError, match=r"rows\.json: row 1, which begins at byte 11, is torn: from byte 12 on"):
        find_rows(path)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        b'{"id": "' + b"x" * (12 << 20) + b'"}',
        b'{"conversations": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"conversations": [{"from": "human", "value": "\\ud83d"}]}',
        b'{"conversations": [{"from": "human", "value": "\xff\xfe"}]}',
        b'{"conversations": [{"from": "human", "value": "' + b"x" * (9 << 20) + b'"}]}',
        b'{"id": ' + b"9" * 10_000 + b"}",
        b'{"image": "a\\u0000.png", "conversations": [{"from": "human", "value": "x"}]}',
        b'{"image": "' + b"a" * 10_000 + b'.png", "conversations": [{"from": "human", "value": "x"}]}',
    ],
    ids=["huge", "deep", "half a pair", "no UTF-8", "long", "number", "zero", "long path"],
)
def test_rows_that_would_break_something(tmp_path, monkeypatch, row, remote):
    monkeypatch.setattr(json_rows, "MAX_ROW", 12 << 20)
    data = b"[" + row + b", " + json.dumps(GOOD).encode() + b"]"
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    reader = open_source(put(data) if remote else str(path))
    with pytest.raises(SampleError) as error:
        reader[0]
    assert error.value.fault.code == "row_unreadable" and len(str(error.value)) < 1000
    assert reader[1].id == "x"


def test_a_uri_that_is_not_there():
    with pytest.raises(ValueError, match=r"nothing\.json: the data file cannot be opened"):
        open_source(f"memory://{uuid.uuid4()}/nothing.json")
    with pytest.raises(ValueError, match=r"image folder memory://nowhere/at/all does not exist"):
        open_source(put(b"[{}]"), images="memory://nowhere/at/all")
