"""Tables of conversations: every layout of columns, every kind of file, and what is wrong with each."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
import tracemalloc
import uuid
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.small import turns
from vistune.data.formats import open_source
from vistune.data.index import build_index
from vistune.data.reading import tables
from vistune.data.tokenize import check_marks
from vistune.images import image_size
from vistune.samples import Image, Message, SampleError


def png(width: int = 20, colour: str = "red") -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, 10), colour).save(stream, "PNG")
    return stream.getvalue()


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def numbered(count: int, first: int = 0) -> list[dict]:
    return [
        {"id": f"r{i}", "images": [{"bytes": png(10 + i), "path": f"{i}.png"}], "messages": chat(f"q{i}", f"a{i}")}
        for i in range(first, first + count)
    ]


def write(path, rows, **how):
    """Rows as a table of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **how)
    else:
        new = pa.ipc.new_file if how.pop("file", False) else pa.ipc.new_stream
        with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**how)) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **options):
    images = options.pop("images", "")
    cache = options.pop("cache", None)
    return open_source(str(path), "messages", images, cache=cache, options=options)


def one(tmp_path, row, **options):
    """The sample of a table with this row alone, from JSON lines."""
    return read(write_lines(tmp_path / "rows.jsonl", [row]), **options)[0]


def fault_of(reader, row: int):
    with pytest.raises(SampleError) as error:
        reader[row]
    assert (error.value.fault.row, error.value.fault.source) == (row, reader.name)
    return error.value.fault


TALK = (Message(role="user", text="<image>\nWhat?"), Message(role="assistant", text="Red"))
URL = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("<image>\nWhat?", "Red"), "image": "a.png"},
        {"messages": chat("What?", "Red"), "image": ["a.png"]},
        {"conversations": turns("What?", "Red"), "images": [{"path": "a.png", "bytes": None}]},
        {"conversation": [{"from": "User", "value": "What?"}, {"from": "GPT", "value": "Red"}], "image_path": "a.png"},
        {"texts": [{"user": "What?", "assistant": "Red", "source": "x"}], "images": ["a.png"]},
        {"question": "What?", "answer": ["Red", "Blue"], "image": "a.png"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red"}]},
            ],
            "images": ["a.png"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": "Red"},
            ]
        },
    ],
)
def test_every_way_to_write_a_conversation(tmp_path, pictures, row):
    sample = one(tmp_path, row, images=str(pictures))
    assert sample.messages == TALK
    assert sample.images == (Image(path=str(pictures / "a.png")),)
    check_marks(sample)


def test_parts_place_their_marks_where_they_stand(tmp_path, pictures):
    parts = [
        {"type": "text", "text": "First"},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image"},
        {"type": "text", "text": "Same?"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, *chat("", "No")[1:]], "images": ["b.jpg", "c.png"]}
    sample = one(tmp_path, row, images=str(pictures))
    assert sample.messages[0].text == "First\n<image>\n<image>\nSame?"
    assert sample.images[0].data == png()
    assert [image.path for image in sample.images[1:]] == [str(pictures / "b.jpg"), str(pictures / "c.png")]
    with pytest.raises(SampleError, match="image_without_mark"):
        check_marks(sample)  # c.png has no place: said where marks are judged


@pytest.mark.parametrize(
    "value",
    [png(), [png()], {"bytes": png(), "path": None}, [{"bytes": png(), "path": "x.png"}]],
)
def test_picture_bytes_in_a_table(tmp_path, value):
    reader = read(write(tmp_path / "t.parquet", [{"image": value, "caption": "A wall"}]), prompt="Say it.")
    sample = reader[0]
    assert sample.images[0].data == png() and image_size(sample.images[0]) == (20, 10)
    assert [message.text for message in sample.messages] == ["<image>\nSay it.", "A wall"]


def test_pictures_written_as_text(tmp_path):
    assert one(tmp_path, {"image": URL, "caption": "x"}).images[0].data == png()
    coded = base64.b64encode(png()).decode()
    assert one(tmp_path, {"image": {"bytes": coded}, "caption": "x"}).images[0].data == png()
    assert (
        one(tmp_path, {"image": "https://host.test/a.png", "caption": "x"}).images[0].path == "https://host.test/a.png"
    )


def test_a_row_without_pictures_is_text(tmp_path):
    rows = [
        {"image": {"bytes": png(), "path": "p"}, "messages": chat("What?", "Red")},
        {"image": None, "messages": chat("Hi", "Hello")},
        {"image": {"bytes": None, "path": None}, "messages": chat("Hi", "Hello")},
    ]
    reader = read(write(tmp_path / "t.parquet", rows))
    assert [len(reader[i].images) for i in range(3)] == [1, 0, 0]
    assert [reader[i].messages[0].text for i in range(3)] == ["<image>\nWhat?", "Hi", "Hi"]


def test_small_columns_are_notes_and_large_ones_are_not_read(tmp_path):
    rows = [
        {
            "caption": "x",
            "score": 0.5,
            "choices": ["a", "b"],
            "boxes": [[0.0, 0.5]],
            "mask": b"bytes",
            "long": "x" * 5000,
            "nothing": None,
        }
    ]
    path = write(tmp_path / "t.parquet", rows)
    assert read(path)[0].notes == {"score": 0.5, "choices": ["a", "b"], "boxes": [[0.0, 0.5]]}
    assert read(path, notes=["score"])[0].notes == {"score": 0.5}
    assert read(path, notes=False)[0].notes == one(tmp_path, {"caption": "x", "s": 1}, notes=False).notes == {}


def test_chosen_columns(tmp_path):
    row = {"messages": chat("no", "no"), "text": "yes", "pic": "a.png", "image": "b.png", "uid": 3, "key": "k"}
    columns = {"caption": "text", "images": "pic", "id": "key"}
    for path in (write(tmp_path / "t.parquet", [row]), write_lines(tmp_path / "t.jsonl", [row])):
        sample = read(path, columns=columns)[0]
        assert sample.messages[-1].text == "yes" and sample.images[0].path.endswith("/pic".replace("pic", "a.png"))
        assert sample.id == "k"
    with pytest.raises(ValueError, match="no column 'talk' for messages; there are 'messages', 'text'"):
        read(tmp_path / "t.parquet", columns={"messages": "talk"})
    with pytest.raises(ValueError, match="takes id, messages"):
        read(tmp_path / "t.parquet", columns={"talk": "messages"})


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": None}, "row_unreadable"),
        ({"messages": []}, "row_unreadable"),
        ({"messages": "Hi"}, "row_unreadable"),
        ({"messages": ["Hi"]}, "row_unreadable"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role_order"),
        ({"messages": [{"role": "user", "content": 3}]}, "row_unreadable"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "row_unreadable"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "mark_without_image"),
        ({"texts": [{"user": "x"}]}, "row_unreadable"),
        ({"caption": 3}, "row_unreadable"),
        ({"other": "x"}, "row_unreadable"),
        ({"caption": "x", "id": []}, "row_unreadable"),
        ({"caption": "x", "image": 3}, "row_unreadable"),
        ({"caption": "x", "images": [None]}, "image_missing"),
        ({"caption": "x", "images": [{"bytes": "", "path": ""}]}, "image_missing"),
        ({"caption": "x", "image": "data:image/png;base64,###"}, "image_broken"),
        ({"caption": "x", "image": "data:,"}, "image_broken"),
        ({"caption": "x\ud800"}, "row_unreadable"),
        ({"caption": "x" * (1 << 23) + "x"}, "row_unreadable"),
    ],
)
def test_faults_of_a_row(tmp_path, row, code):
    reader = read(write_lines(tmp_path / "rows.jsonl", [row, {"caption": "good"}]))
    assert fault_of(reader, 0).code == code
    assert reader[1].messages[-1].text == "good"


def test_faults_of_rows_in_a_table(tmp_path):
    rows = [
        {"messages": chat("a", "b"), "images": [{"bytes": png(), "path": "x"}], "id": "good"},
        {"messages": None, "images": None, "id": "null"},
        {"messages": chat("a", "b"), "images": [{"bytes": b"", "path": None}], "id": "empty"},
        {"messages": [{"role": None, "content": None}], "images": [], "id": "nothing"},
    ]
    reader = read(write(tmp_path / "t.parquet", rows))
    assert reader[0].id == "good"
    found = [(fault_of(reader, i).id, fault_of(reader, i).code) for i in (1, 2, 3)]
    assert found == [("null", "row_unreadable"), ("empty", "image_missing"), ("nothing", "row_unreadable")]


def test_bytes_that_are_no_text_are_one_row(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 2, 4, 6], np.int32)), pa.py_buffer(b"ok\xff\xfeok")]
    )
    for name in ("t.parquet", "t.arrow"):
        reader = read(write(tmp_path / name, pa.table({"caption": texts})))
        assert fault_of(reader, 1).code == "row_unreadable"
        assert reader[0].messages[-1].text == reader[2].messages[-1].text == "ok"


def test_bytes_that_are_no_text_inside_of_turns_are_one_row(tmp_path):
    rows = [{"messages": chat(f"q{i}", f"answer{i}"), "images": [png()]} for i in range(6)]
    for name, how in (
        ("t.parquet", {"use_dictionary": False, "compression": "none"}),
        ("t.arrow", {}),
        ("f.arrow", {"file": True}),
    ):
        path = write(tmp_path / name, rows, **how)
        data = path.read_bytes()
        assert b"answer4" in data
        path.write_bytes(data.replace(b"answer4", b"answer\xff"))
        reader = read(path)
        assert fault_of(reader, 4).code == "row_unreadable"
        assert [reader[i].messages[1].text for i in (0, 1, 2, 3, 5)] == [f"answer{i}" for i in (0, 1, 2, 3, 5)]
        assert reader[5].images[0].data == png()


LAYOUTS = {
    "t.parquet": [{"row_group_size": 4}],
    "t.arrow": [{}, {"file": True}, {"compression": "lz4"}, {"file": True, "compression": "zstd"}],
}


@pytest.mark.parametrize(("name", "how"), [(name, how) for name, hows in LAYOUTS.items() for how in hows])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_any_row_of_any_shard(tmp_path, name, how, cached, remote):
    folder = tmp_path / "shards"
    for shard in range(3):
        rows = pa.Table.from_pylist(numbered(10, 10 * shard))
        if shard:
            rows = rows.select(["messages", "id", "images"])  # the order of the columns may differ
        write(folder / f"{shard}" / name, rows, **dict(how))
    path = f"memory://{uuid.uuid4()}" if remote else str(folder)
    if remote:
        fsspec.filesystem("memory").put(str(folder), path, recursive=True)
    cache = tmp_path / "cache" if cached else None
    reader = read(path, cache=cache)
    wanted = np.random.default_rng(0).permutation(30).tolist()
    got = {row: reader[row] for row in wanted}
    assert len(reader) == 30
    for row, sample in got.items():
        assert sample.id == f"r{row}" and sample.row == row and sample.messages[1].text == f"a{row}"
        assert (sample.images[0].data, sample.images[0].name) == (png(10 + row), f"{row}.png")
    other = pickle.loads(pickle.dumps(reader))
    assert [other[row] for row in range(30)] == [got[row] for row in range(30)]
    assert read(path, cache=cache).fingerprint() == reader.fingerprint() == other.fingerprint()
    with pytest.raises(IndexError):
        reader[30]


def test_dictionary_columns_in_arrow(tmp_path):
    table = pa.table({"caption": pa.array(["a", "b", "a", "c", "b"]).dictionary_encode(), "n": [0, 1, 2, 3, 4]})
    reader = read(write(tmp_path / "t.arrow", table))
    assert [reader[i].messages[-1].text for i in range(5)] == ["a", "b", "a", "c", "b"]


def big(tmp_path, rows: int = 60, size: int = 1 << 20):
    noise = np.random.default_rng(0)
    table = pa.table({"caption": [f"c{i}" for i in range(rows)], "image": [noise.bytes(size) for _ in range(rows)]})
    how = {"row_group_size": rows, "use_dictionary": False, "data_page_size": 1 << 20, "write_batch_size": 1}
    return write(tmp_path / "big.parquet", table, **how), table


@pytest.mark.parametrize("how", ["walk", "unpack", "all"])
def test_a_large_row_group_is_never_decoded_at_once(tmp_path, monkeypatch, how):
    path, table = big(tmp_path)
    monkeypatch.setattr(tables, "LARGE", 1 << 22)
    tables._decoded.clear()
    reader = read(
        path, cache=None if how == "walk" else tmp_path / "cache", **({"unpack": True} if how == "all" else {})
    )
    before = pa.total_allocated_bytes()
    most = 0
    for row in (0, 1, 30, 59, 2, 40):
        sample = reader[row]
        most = max(most, pa.total_allocated_bytes() - before)
        assert sample.messages[-1].text == f"c{row}" and sample.images[0].data == table["image"][row].as_py()
    assert most < 24 << 20
    assert bool(list((tmp_path / "cache").glob("unpacked/*.arrow"))) == (how != "walk")


def test_what_is_decoded_is_bounded(tmp_path, monkeypatch):
    for shard in range(6):
        (tmp_path / str(shard)).mkdir()
        big(tmp_path / str(shard), rows=4)
    tables._decoded.clear()
    monkeypatch.setattr(tables._decoded, "limit", 9 << 20)
    before = pa.total_allocated_bytes()
    reader = read(tmp_path)
    for row in range(24):
        assert reader[row].id == str(row)
        assert pa.total_allocated_bytes() - before < 16 << 20
    tables._decoded.clear()


def test_no_room_to_unpack_is_no_fault_of_the_row(tmp_path, monkeypatch):
    path, _ = big(tmp_path, rows=8)
    cache = tmp_path / "cache"
    reader = read(path, cache=cache, unpack=True)
    (cache / "unpacked").write_text("in the way")
    with pytest.raises(ValueError, match=r"options\.unpack = false") as error:
        reader[0]
    assert not isinstance(error.value, SampleError)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"messages": [{"role": "user"}], "images": [png()]}, "'messages' is list<.*>, in .*0.parquet it is list<"),
        ({"messages": chat("a", "b"), "images": ["a.png"]}, "'images' is list<.*string>, in .* it is list<.*binary>"),
        ({"messages": chat("a", "b")}, "'images' is not there"),
    ],
)
def test_a_schema_that_changes_names_shard_column_and_types(tmp_path, other, said):
    write(tmp_path / "0.parquet", [{"messages": chat("a", "b"), "images": [png()]}])
    write(tmp_path / "1.parquet", [other])
    with pytest.raises(ValueError, match=rf"1\.parquet: column {said}.*write this shard again"):
        read(tmp_path)


def test_schemas_that_read_alike_are_one(tmp_path):
    write(tmp_path / "0.parquet", [{"caption": "a", "n": 1, "image": {"bytes": png(), "path": "x"}}])
    struct = pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()})
    columns = {"n": pa.array([2], pa.int8()), "caption": pa.array(["b"], pa.large_string())}
    image = pa.array([{"bytes": png(), "path": "y"}], struct)
    write(tmp_path / "1.parquet", pa.table(columns | {"image": image}))
    write(tmp_path / "2.parquet", pa.table(columns | {"image": pa.nulls(1)}))
    reader = read(tmp_path)
    assert [(len(reader[i].images), reader[i].notes["n"]) for i in range(3)] == [(1, 1), (1, 2), (0, 2)]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "f.arrow"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.97])
def test_a_torn_shard_is_named(tmp_path, name, keep):
    write(tmp_path / f"0{name[1:]}", numbered(9), **({"file": True} if name[0] == "f" else {}))
    torn = write(tmp_path / name, numbered(9), **({"file": True} if name[0] == "f" else {}))
    data = torn.read_bytes()
    torn.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=rf"{name}: this shard cannot be read.*[Ff]etch or write it again"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_bytes_flipped_inside_a_shard_never_end_the_process(tmp_path, name):
    how = {"row_group_size": 3} if name == "t.parquet" else {}
    data = bytearray(write(tmp_path / name, numbered(9), **how).read_bytes())
    dice = np.random.default_rng(1)
    outcomes = set()
    for turn in range(60):
        spoiled = bytearray(data)
        for at in dice.integers(8, len(data) - 8, 3):
            spoiled[at] = dice.integers(0, 256)
        path = tmp_path / f"{turn}{(tmp_path / name).suffix}"
        path.write_bytes(spoiled)
        try:
            reader = read(path)
        except ValueError as error:
            outcomes.add("refused")
            assert str(path) in str(error)
            continue
        for row in range(len(reader) if len(reader) < 100 else 9):
            try:
                reader[row]
                outcomes.add("read")
            except SampleError:
                outcomes.add("fault")
    assert outcomes >= {"read", "fault"}


def saved(folder, rows, shards=2):
    """As `Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        write(folder / name, rows[i * len(rows) // shards : (i + 1) * len(rows) // shards])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_what_datasets_saves(tmp_path):
    saved(tmp_path / "one", numbered(10))
    assert [read(tmp_path / "one")[i].id for i in (0, 9)] == ["r0", "r9"]
    both = tmp_path / "both"
    saved(both / "train", numbered(6))
    saved(both / "test", numbered(2, 6))
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(both, split="test")[0].id == "r6"
    with pytest.raises(ValueError, match=r"2 splits; say options\.split, one of train, test"):
        read(both)
    with pytest.raises(ValueError, match="no split 'dev'"):
        read(both, split="dev")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002\.arrow: listed in state\.json and not there"):
        read(tmp_path / "one")


def test_folders_as_the_hub_has_them(tmp_path):
    for name, first in (
        ("data/train-00000-of-00002", 0),
        ("data/train-00001-of-00002", 4),
        ("data/test-00000-of-00001", 8),
    ):
        write(tmp_path / f"{name}.parquet", numbered(4, first))
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several splits; say options\.split, one of test, train"):
        read(tmp_path)
    assert [sample.id for sample in (read(tmp_path, split="train")[row] for row in (0, 7))] == ["r0", "r7"]
    assert len(read(f"{tmp_path}/data/train-*.parquet")) == 8
    assert len(read(f"{tmp_path}/*/*.parquet")) == len(read(f"{tmp_path}/**/*.parquet")) == 12
    with pytest.raises(ValueError, match="no file of rows"):
        read(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="no file of split 'dev'; splits seen: test, train"):
        read(tmp_path, split="dev")
    write_lines(tmp_path / "data" / "train.jsonl", [{"caption": "x"}])
    with pytest.raises(ValueError, match="files of parquet and json side by side"):
        read(tmp_path, split="train")


def test_json_lists_and_lines_side_by_side(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"caption": f"c{i}"} for i in range(3)])
    (tmp_path / "b.json").write_text(json.dumps([{"caption": f"c{i}"} for i in range(3, 5)]))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"caption": "to')
    reader = read(tmp_path)
    assert [reader[i].messages[-1].text for i in (0, 2, 4, 5)] == ["c0", "c2", "c3", "c4"]
    assert "a torn last line" and fault_of(reader, 3).code == "row_unreadable"


def test_options_and_paths_that_are_wrong(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"caption": "x"}])
    for options, said in (
        ({"colums": {}}, "no option 'colums'"),
        ({"columns": ["a"]}, "expected a table"),
        ({"split": 3}, "options.split = 3, expected text"),
        ({"unpack": "yes"}, "expected true or false"),
        ({"notes": 3}, "options.notes = 3"),
    ):
        with pytest.raises(ValueError, match=said):
            read(path, **options)
    with pytest.raises(ValueError, match="no such file or folder"):
        read(tmp_path / "nothing.parquet")
    with pytest.raises(ValueError, match="no rows in it"):
        read(write(tmp_path / "empty.parquet", pa.table({"caption": pa.array([], pa.string())})))
    with pytest.raises(ValueError, match=r"no column messages.*there are 'x'\. Say which with options\.columns"):
        read(write(tmp_path / "other.parquet", [{"x": 1}]))
    with pytest.raises(ValueError, match=r"image folder .*nowhere does not exist"):
        read(path, images=str(tmp_path / "nowhere"))


def test_a_reader_is_cheap_to_send(tmp_path):
    write(tmp_path / "t.parquet", numbered(200), row_group_size=1)
    reader = read(tmp_path / "t.parquet", cache=tmp_path / "cache")
    reader[0]
    sent = pickle.dumps(reader)
    assert len(sent) < 2000
    shutil.rmtree(tmp_path / "cache")
    assert pickle.loads(sent)[150].id == "r150"  # a cache that is gone is made again


def test_ids_and_memory_of_many_groups(tmp_path):
    table = pa.table({"caption": [f"c{i}" for i in range(20_000)]})
    reader = read(write(tmp_path / "t.parquet", table, row_group_size=100))
    tracemalloc.start()
    assert [reader[row].id for row in range(0, 20_000, 997)] == [str(row) for row in range(0, 20_000, 997)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 << 20


GOLDEN = Path(__file__).parents[1] / "golden" / "datasets"


@pytest.mark.parametrize(("name", "split"), [("saved", ""), ("dict", "train"), ("hub", "train")])
def test_what_datasets_itself_wrote(name, split):
    reader = read(GOLDEN / name, split=split)
    assert len(reader) == 8
    for row, sample in enumerate(reader[row] for row in range(8)):
        mark = "<image>\n" if row % 3 else ""
        assert (sample.id, [message.text for message in sample.messages]) == (f"r{row}", [f"{mark}q{row}", f"a{row}"])
        assert [image_size(image) for image in sample.images] == [(20 + row, 10)] * bool(row % 3)
        assert sample.notes == {"score": row / 2, "source": "x"}
    if split:
        assert [sample.id for sample in map(read(GOLDEN / name, split="test").__getitem__, range(2))] == ["r0", "r1"]


def test_workers_that_were_forked_read_what_the_parent_read(tmp_path, language):
    folder = tmp_path / "shards"
    for shard in range(2):
        write(folder / f"{shard}.parquet", numbered(6, 6 * shard), row_group_size=4)
        write(tmp_path / "arrow" / f"{shard}.arrow", numbered(6, 6 * shard))
    remote = f"memory://{uuid.uuid4()}"
    fsspec.filesystem("memory").put(str(folder), remote, recursive=True)
    readers = [read(folder), read(tmp_path / "arrow"), read(remote, cache=tmp_path / "cache")]
    assert {reader[11].id for reader in readers} == {"r11"}
    alone, shared = (build_index(readers, language, 64, workers=workers) for workers in (0, 2))
    assert alone.hash == shared.hash and not shared.faults and len(shared) == 36
