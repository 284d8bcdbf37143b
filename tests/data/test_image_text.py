"""Folders of pictures with a text beside each, or with one metadata file for all."""

from __future__ import annotations

import json
import pickle
import shutil
import uuid

import fsspec
import pytest

from vistune.data.formats import open_source
from vistune.data.tokenize import check_marks
from vistune.samples import Message, SampleError


def read(folder, cache=None, **options):
    return open_source(str(folder), "image_text", cache=cache, options=options)


def fault_of(reader, row: int):
    with pytest.raises(SampleError) as error:
        reader[row]
    assert (error.value.fault.row, error.value.fault.source) == (row, reader.name)
    return error.value.fault


@pytest.fixture
def tree(pictures):
    """a, b and sub/c, each with another kind of text; whole has none."""
    for name in ("empty.jpg", "torn.jpg"):
        (pictures / name).unlink()
    (pictures / "sub").mkdir()
    (pictures / "c.png").rename(pictures / "sub" / "c.png")
    (pictures / "a.txt").write_text("A red wall — «красная»\n", encoding="utf-8")
    (pictures / "b.json").write_text(json.dumps({"caption": "Green", "score": 0.5}))
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Blue"}]
    (pictures / "sub" / "c.json").write_text(json.dumps(turns))
    (pictures / ".hidden.jpg").touch()
    (pictures / "notes.txt").write_text("beside no picture")
    return pictures


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_texts_beside_pictures(tree, tmp_path, cached, remote):
    place = str(tree)
    if remote:
        (tree / ".hidden.jpg").unlink()
        place = f"memory://{uuid.uuid4()}"
        fsspec.filesystem("memory").put(str(tree), place, recursive=True)
    cache = tmp_path / "cache" if cached else None
    reader = read(place, cache)
    assert len(reader) == 4
    samples = [reader[row] for row in (0, 1, 3)]
    assert [sample.id for sample in samples] == ["a", "b", "sub/c"]
    assert samples[0].messages == (
        Message(role="user", text="<image>"),
        Message(role="assistant", text="A red wall — «красная»"),
    )
    assert samples[1].messages[1].text == "Green" and samples[1].notes == {"score": 0.5}
    assert [message.text for message in samples[2].messages] == ["<image>\nWhat?", "Blue"]
    assert samples[2].images[0].path == f"{place}/sub/c.png"
    for sample in samples:
        check_marks(sample)
    missing = fault_of(reader, 2)
    assert (missing.id, missing.code) == ("whole", "row_unreadable") and "no text beside it" in missing.reason
    other = pickle.loads(pickle.dumps(reader))
    assert [other[row] for row in (0, 1, 3)] == samples
    assert read(place, cache).fingerprint() == reader.fingerprint() == other.fingerprint()


def test_a_prompt_is_asked(tree):
    reader = read(tree, prompt="Describe <image> in a word.")
    assert reader[0].messages[0].text == "Describe <image> in a word."
    assert read(tree, prompt="Describe it.")[0].messages[0].text == "<image>\nDescribe it."
    assert reader[3].messages[0].text == "<image>\nWhat?"
    assert reader.fingerprint() != read(tree).fingerprint()


@pytest.mark.parametrize("change", ["text", "new", "gone"])
def test_the_folder_is_looked_at_again(tree, tmp_path, change):
    cache = tmp_path / "cache"
    before = read(tree, cache).fingerprint()
    if change == "text":
        (tree / "a.txt").write_text("Something longer than what it said before")
    elif change == "new":
        shutil.copy(tree / "a.png", tree / "z.png")
    else:
        (tree / "whole.jpg").unlink()
    after = read(tree, cache)
    assert after.fingerprint() != before
    assert len(after) == {"text": 4, "new": 5, "gone": 3}[change]
    assert change != "text" or after[0].messages[1].text.startswith("Something")


def test_a_kept_listing_is_believed(tree, tmp_path):
    cache = tmp_path / "cache"
    kept = read(tree, cache, keep_listing=True)
    shutil.copy(tree / "a.png", tree / "z.png")
    again = read(tree, cache, keep_listing=True)
    assert len(again) == 4 and again.fingerprint() == kept.fingerprint() and again[0] == kept[0]
    shutil.rmtree(cache)
    assert len(read(tree, cache, keep_listing=True)) == 5


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(pictures, tmp_path, kind, cached):
    if kind == "jsonl":
        rows = [{"file_name": "b.jpg", "text": "Green, dark", "n": 1}, {"file_name": "a.png"}, {"text": "x"}]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"file_name": "to'
        (pictures / "metadata.jsonl").write_text(text)
    else:
        text = b'\xef\xbb\xbffile_name,text,n\nb.jpg,"Green, dark",1\na.png\n,x,2\n\xff.png,"\xfe",3\n'
        (pictures / "metadata.csv").write_bytes(text)
    reader = read(pictures, tmp_path / "cache" if cached else None)
    assert len(reader) == 4
    first = reader[0]
    assert (first.id, first.messages[1].text, first.images[0].path) == ("b", "Green, dark", str(pictures / "b.jpg"))
    assert first.notes == {"n": 1 if kind == "jsonl" else "1"}
    assert {fault_of(reader, row).code for row in (1, 2, 3)} == {"row_unreadable"}
    assert pickle.loads(pickle.dumps(reader))[0] == first
    before = reader.fingerprint()
    with open(pictures / f"metadata.{kind}", "a") as file:
        file.write("\n" if kind == "csv" else '", "text": "x"}\n')
    assert read(pictures).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.json", b"3"),
        ("a.json", b"[" * 100_000),
        ("a.json", b'{"score": 1}'),
        ("a.json", b'{"messages": "x"}'),
        ("a.txt", b"caf\xe9"),
        ("a.txt", b"x" * ((1 << 23) + 1)),
    ],
)
def test_texts_that_cannot_be_used(pictures, name, content):
    (pictures / name).write_bytes(content)
    assert fault_of(read(pictures), 0).code == "row_unreadable"


def test_a_text_that_went_away_is_a_fault(tree):
    reader = read(tree)
    (tree / "a.txt").unlink()
    assert fault_of(reader, 0).code == "row_unreadable"
    assert reader[1].messages[1].text == "Green"


def test_what_cannot_be_opened(tmp_path, pictures):
    with pytest.raises(ValueError, match="no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in it; expected files that end with \.jpg"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no option 'promt' .* it takes prompt, keep_listing"):
        read(pictures, promt="x")
    with pytest.raises(ValueError, match=r"options\.prompt = 3"):
        read(pictures, prompt=3)
    with pytest.raises(ValueError, match="lie in its own folder"):
        open_source(str(pictures), "image_text", images=str(pictures))
    (pictures / "metadata.csv").write_text('file_name,text\na.png,"' + "x" * 100)
    assert read(pictures)[0].messages[1].text == "x" * 100  # a quote that is not closed ends with the file
