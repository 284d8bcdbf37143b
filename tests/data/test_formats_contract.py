"""What every registered format keeps: rows by number in any order, the same in every process, cheap to send, and a
fingerprint that follows the files. A new format is one more example here."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_annotations import GQA, IMAGE_DATA, INSTANCES, OCRVQA, REFS, REGIONS, TEXTCAPS, VQA_ANNOTATIONS, VQA_QUESTIONS

from tests.data.small import turns
from tests.data.test_scienceqa_format import PROBLEMS
from vistune.data.formats import FORMATS, Reader, open_source
from vistune.data.writers import open_writer
from vistune.samples import Image, Message, Sample, SampleError

Example = tuple[str, dict[str, Any]]
"""What is opened, below the folder it was made in, and with which options (of them `{folder}` is filled in)."""

AOKVQA = [
    {"image_id": i, "question_id": f"q{i}", "question": "?", "choices": ["a", "b"], "correct_choice_idx": i}
    for i in range(3)
]
TALKS = [{"id": f"t{i}", "image": "a.png", "conversations": turns(f"<image>\n{i}?", "Yes")} for i in range(5)]


def dumped(name: str, content: Any, **beside: Any) -> Callable[[Path], Example]:
    """An example of JSON files; `beside` are options that name companion files."""

    def make(folder: Path) -> Example:
        (folder / name).write_text(json.dumps(content))
        for option, other in beside.items():
            (folder / f"{option}.json").write_text(json.dumps(other))
        return name, {option: f"{{folder}}/{option}.json" for option in beside}

    return make


def lines_with_faults(folder: Path) -> Example:
    text = "".join(json.dumps(row) + "\n" for row in [*TALKS, 3, {"id": "x"}]) + '{"id": "torn'
    (folder / "rows.jsonl").write_text(text)
    return "rows.jsonl", {}


def shards(folder: Path) -> Example:
    for shard in range(3):
        picture = (folder / "a.png").read_bytes()
        rows = [{"id": f"{shard}-{i}", "caption": f"c{i}", "image": picture if i else None} for i in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet", row_group_size=3)
    return ".", {}


def texts_beside(folder: Path) -> Example:
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"Picture {name}")
    return ".", {}


def written(format: str) -> Callable[[Path], Example]:
    def make(folder: Path) -> Example:
        with open_writer(format, folder / "out") as writer:
            for i in range(5):
                messages = (Message(role="user", text="<image>\nWhat?"), Message(role="assistant", text=f"{i}"))
                image = Image(path=str(folder / "a.png"))
                writer.add(Sample(id=f"s{i}", source="", row=i, messages=messages, images=(image,)))
        return "out", {}

    return make


EXAMPLES: dict[str, Callable[[Path], Example]] = {
    "llava_json": lines_with_faults,
    "messages": shards,
    "image_text": texts_beside,
    "energon": written("energon"),
    "aokvqa": dumped("aokvqa.json", AOKVQA),
    "gqa": dumped("gqa.json", GQA),
    "ocrvqa": dumped("dataset.json", OCRVQA),
    "okvqa": dumped("questions.json", VQA_QUESTIONS, annotations=VQA_ANNOTATIONS),
    "refcoco": dumped("refs.json", REFS * 2, instances=INSTANCES),
    "scienceqa": dumped("problems.json", PROBLEMS),
    "sharegpt": dumped("sharegpt.json", TALKS),
    "textcaps": dumped("textcaps.json", TEXTCAPS),
    "visual_genome": dumped("regions.json", REGIONS, image_data=IMAGE_DATA),
    "vqav2": dumped("questions.json", VQA_QUESTIONS, annotations=VQA_ANNOTATIONS),
}
each_format = pytest.mark.parametrize("format", sorted(FORMATS))


def made(format: str, folder: Path, cache: Path | None = None) -> Reader:
    """The example of `format`, made in `folder` when it is not there yet."""
    if format not in EXAMPLES:
        pytest.fail(f"format {format!r} has no example: add one to EXAMPLES in {Path(__file__).name}")
    kept = folder / ".example"
    if not kept.exists():
        kept.write_text(json.dumps(EXAMPLES[format](folder)))
    path, options = json.loads(kept.read_text())
    filled = {key: value.format(folder=folder) for key, value in options.items()}
    return open_source(os.path.normpath(folder / path), format, name="mine", cache=cache, options=filled)


def contents(reader: Reader, rows: list[int] | None = None) -> dict[int, Any]:
    """Samples and faults by row, read in the order of `rows`."""
    found: dict[int, Any] = {}
    for row in range(len(reader)) if rows is None else rows:
        try:
            found[row] = reader[row]
        except SampleError as error:
            found[row] = error.fault
    return found


@each_format
def test_rows_are_the_same_in_any_order_with_and_without_a_cache(pictures, tmp_path, format):
    cache = tmp_path / "cache"
    reader, cached = made(format, pictures), made(format, pictures, cache)
    again = made(format, pictures, cache)
    wanted = contents(reader)
    assert len(wanted) == len(reader) == len(cached) == len(again) >= 2
    assert any(isinstance(found, Sample) for found in wanted.values())
    mixed = np.random.default_rng(0).permutation(np.repeat(np.arange(len(reader)), 2)).tolist()
    assert contents(reader, mixed) == contents(cached, mixed) == contents(again) == wanted
    for row, found in wanted.items():
        assert (found.row, found.source) == (row, "mine") and isinstance(found.id, str)


@each_format
def test_a_fingerprint_is_the_same_until_a_file_changes(pictures, tmp_path, format):
    before = made(format, pictures).fingerprint()
    assert before == made(format, pictures, tmp_path / "cache").fingerprint() == made(format, pictures).fingerprint()
    path, _ = json.loads((pictures / ".example").read_text())
    place = pictures / path
    touched = [place] if place.is_file() else [f for f in place.rglob("*") if f.suffix in (".parquet", ".txt", ".tar")]
    assert touched
    for file in touched:
        about = file.stat()
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1_000_000_000))
        after = made(format, pictures, tmp_path / "cache").fingerprint()
        assert after != before, file
        before = after


@each_format
def test_a_reader_that_was_used_can_be_sent(pictures, tmp_path, format):
    for cache in (None, tmp_path / "cache"):
        reader = made(format, pictures, cache)
        wanted = contents(reader)
        sent = pickle.dumps(reader)
        assert len(sent) < 16 << 10
        other = pickle.loads(sent)
        assert contents(other) == wanted and other.fingerprint() == reader.fingerprint() and len(other) == len(reader)


CHILD = """
import pickle, sys
from vistune.samples import SampleError
def read(reader, row):
    try:
        return reader[row]
    except SampleError as error:
        return error.fault
with open(sys.argv[1], "rb") as file:
    readers = pickle.load(file)
found = {name: {row: read(reader, row) for row in range(len(reader))} for name, reader in readers.items()}
with open(sys.argv[2], "wb") as file:
    pickle.dump(found, file)
"""


@pytest.mark.parametrize("how", ["forked", "new"])
def test_another_process_reads_the_same(pictures, tmp_path, how):
    readers = {}
    for format in sorted(FORMATS):
        folder = tmp_path / format
        folder.mkdir()
        for name in ("a.png", "b.jpg"):
            (folder / name).write_bytes((pictures / name).read_bytes())
        readers[format] = made(format, folder, tmp_path / "cache")
    here = {format: contents(reader) for format, reader in readers.items()}
    if how == "forked":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            there = dict(zip(readers, pool.map(contents, readers.values()), strict=True))
    else:
        (tmp_path / "readers").write_bytes(pickle.dumps(readers))
        ways = [str(tmp_path / "readers"), str(tmp_path / "found")]
        subprocess.run([sys.executable, "-c", CHILD, *ways], check=True, cwd=Path(__file__).parents[2])
        there = pickle.loads((tmp_path / "found").read_bytes())
    assert there == here


@each_format
def test_an_unknown_option_is_refused(pictures, format):
    made(format, pictures)
    path, options = json.loads((pictures / ".example").read_text())
    filled = {key: value.format(folder=pictures) for key, value in options.items()}
    with pytest.raises(ValueError, match=rf"format '{format}' has no option 'colour' \(= 'red'\)"):
        open_source(str(pictures / path), format, options={**filled, "colour": "red"})
