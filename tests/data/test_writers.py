"""Writers: what is written reads back equal, is the same on every run, and leaves nothing behind when it fails."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import yaml

from vistune import files
from vistune.data.formats import open_source
from vistune.data.writers import WRITERS, NotHeld, open_writer, register
from vistune.images import ImageError, open_image
from vistune.samples import Image, Message, Sample


def encoded(width: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (12, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def sample(*texts: str, images: tuple[Image, ...] = (), system: str = "", id: str = "x", **notes) -> Sample:
    messages = [Message(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    if system:
        messages.insert(0, Message(role="system", text=system))
    return Sample(id=id, source="made", row=0, messages=tuple(messages), images=images, notes=notes)


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Pictures as a file, as bytes and as a slice of a file; none; several; PNG, GIF and WebP; a system text."""
    file = tmp_path / "in" / "a picture.v1.PNG"
    file.parent.mkdir()
    file.write_bytes(encoded(20, "PNG"))
    tar = tmp_path / "in" / "t.bin"
    tar.write_bytes(b"before" + encoded(30) + b"after")
    slice_ = Image(path=str(tar), start=6, size=len(encoded(30)), name="img0.jpg")
    gif = Image(data=encoded(40, "GIF"), name="x.gif")
    return [
        sample("<image>\nWhat? — «é» 红", 'A cat.\n\n"x"', images=(Image(path=str(file)),), id="file"),
        sample("<image>Which?", "This", "Sure?", "Yes", images=(slice_,), id="slice", answers=["This", "that"]),
        sample("Hi", "Ho", system="Be brief.", id="text"),
        sample("<image><image>", "Two", images=(gif, Image(data=encoded(50, "WEBP")))),
    ]


def pixels(image: Image) -> tuple[tuple[int, int], str]:
    opened = open_image(image)
    return opened.size, hashlib.sha256(np.asarray(opened).tobytes()).hexdigest()


def raw(image: Image) -> bytes:
    return image.data if image.data is not None else files.read(image.path, image.start, image.size)


def content(one: Sample):
    return [(m.role, m.text) for m in one.messages], [raw(image) for image in one.images]


TARGETS = [
    ("llava_json", "out.json"),
    ("llava_json", "out.jsonl"),
    ("messages", "out.parquet"),
    ("messages", "out.jsonl"),
    ("energon", "out"),
]


@pytest.mark.parametrize(("format", "name"), TARGETS)
def test_what_is_written_reads_back_equal(tmp_path, samples, format, name):
    out = tmp_path / "made" / name
    with open_writer(format, out) as writer:
        for one in samples:
            writer.add(one)
    assert writer.report["samples"] == 4
    reader = open_source(str(out), format)
    back = [reader[row] for row in range(len(reader))]
    assert [content(one) for one in back] == [content(one) for one in samples]
    assert [pixels(i) for one in back for i in one.images] == [pixels(i) for one in samples for i in one.images]
    left = {path.name for path in out.parent.iterdir()}
    assert left <= {name, "out_images"} and (tmp_path / "in" / "t.bin").exists()


@pytest.mark.parametrize(("format", "name"), [*TARGETS, ("image_text", "out")])
def test_equal_samples_give_equal_bytes(tmp_path, samples, format, name):
    found = []
    for again in ("1", "2"):
        out = tmp_path / again / name
        with open_writer(format, out) as writer:
            for one in samples if format != "image_text" else [sample("<image>", "A", images=samples[0].images)]:
                writer.add(one)
        paths = sorted(path for path in out.parent.rglob("*") if path.is_file())
        found.append([(path.relative_to(out.parent), path.read_bytes()) for path in paths])
    assert found[0] == found[1] and found[0]


@pytest.mark.parametrize(("format", "name"), [*TARGETS, ("image_text", "out")])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, samples, format, name):
    out = tmp_path / "made" / name
    with pytest.raises(RuntimeError), open_writer(format, out) as writer:
        writer.add(sample("<image>", "A", images=samples[1].images))
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    out.touch()
    with pytest.raises(ValueError, match="is there already"):
        open_writer(format, out)
    with pytest.raises(ValueError, match=r"only local files"):
        open_writer(format, "memory://bucket/" + name)


@pytest.mark.parametrize(("format", "name"), TARGETS)
def test_a_sample_whose_picture_is_gone_is_not_written_in_part(tmp_path, samples, format, name):
    gone = Image(path=str(tmp_path / "gone.jpg"), start=0, size=9)
    torn = Image(path=samples[1].images[0].path, start=6, size=1 << 20)
    out = tmp_path / name
    with open_writer(format, out) as writer:
        for image, code in ((gone, "image_missing"), (torn, "image_broken")):
            with pytest.raises(ImageError) as error:
                writer.add(sample("<image><image>", "A", images=(samples[1].images[0], image)))
            assert error.value.code == code
        writer.add(samples[2])
    assert len(open_source(str(out), format)) == 1


def test_llava_json_names_pictures_where_they_lie(tmp_path, samples):
    for i, options in enumerate(({}, {"root": str(tmp_path / "in")}, {"copy": True})):
        out = tmp_path / f"{i}.json"
        with open_writer("llava_json", out, **options) as writer:
            writer.add(samples[0])
        told = json.loads(out.read_text())[0]["image"]
        lies = str(tmp_path / "in" / "a picture.v1.PNG")
        assert told == [lies, "a picture.v1.PNG", "2_images/00000/00000000.png"][i]
    with open_writer("llava_json", tmp_path / "notes.jsonl") as writer:
        writer.add(samples[1])
    assert json.loads((tmp_path / "notes.jsonl").read_text())["answers"] == ["This", "that"]


def test_parquet_has_the_columns_of_the_hub(tmp_path, samples):
    with open_writer("messages", tmp_path / "a.parquet") as writer:
        for one in samples * 400:
            writer.add(one)
    table = pq.ParquetFile(tmp_path / "a.parquet")
    assert table.num_row_groups == 2 and table.metadata.num_rows == 1600
    row = table.read_row_group(0).slice(0, 1).to_pylist()[0]
    assert row["messages"][0] == {"role": "user", "content": samples[0].messages[0].text}
    assert row["images"] == [{"bytes": encoded(20, "PNG"), "path": "a picture.v1.PNG"}]
    assert writer.report["notes_left_out"] == 400
    with open_writer("messages", tmp_path / "b.parquet", embed=False) as writer:
        writer.add(samples[0])
    assert pq.read_table(tmp_path / "b.parquet").to_pylist()[0]["images"][0]["bytes"] is None


def test_image_text_holds_one_picture_with_each_text(tmp_path, samples):
    caption = sample("<image>", "A cat", images=(Image(data=encoded(9, "PNG")),))
    with open_writer("image_text", tmp_path / "out") as writer:
        for one in (caption, *samples[:2]):
            writer.add(one)
        for one in samples[2:]:
            with pytest.raises(NotHeld, match=r"[02] pictures; it holds one"):
                writer.add(one)
    below = {path.name for path in (tmp_path / "out" / "00000").iterdir()}
    assert below >= {"00000000.png", "00000000.txt", "00000001.png", "00000001.json", "00000002.jpg"}
    reader = open_source(str(tmp_path / "out"), "image_text", options={"prompt": "<image>"})
    assert [content(one) for one in reader] == [content(one) for one in (caption, *samples[:2])]
    with open_writer("image_text", tmp_path / "two", prompts="ignore") as writer:
        writer.add(samples[0])
        with pytest.raises(NotHeld, match="a caption is one answer"):
            writer.add(samples[1])
    assert (tmp_path / "two" / "00000" / "00000000.txt").read_text() == samples[0].messages[1].text
    with pytest.raises(ValueError, match="choose 'use' or 'ignore'"):
        open_writer("image_text", tmp_path / "three", prompts="no")


def test_energon_shards_have_limits_and_say_what_is_in_them(tmp_path):
    with open_writer("energon", tmp_path / "few", max_samples=2) as writer:
        for i in range(5):
            writer.add(sample("Hi", str(i)))
    assert (writer.report["shards"], writer.report["samples"]) == (3, 5)
    meta = tmp_path / "few" / ".nv-meta"
    counts = {"pretrain-000000.tar": 2, "pretrain-000001.tar": 2, "pretrain-000002.tar": 1}
    assert json.loads((meta / ".info.json").read_text())["shard_counts"] == counts
    assert yaml.safe_load((meta / ".info.yaml").read_text())["shard_counts"] == counts
    assert yaml.safe_load((meta / "split.yaml").read_text())["split_parts"]["train"] == list(counts)
    named = yaml.safe_load((meta / "dataset.yaml").read_text())["sample_type"]
    assert named == {"__module__": "aiak_training_llm.data.multimodal", "__class__": "MultiMixQASample"}
    with open_writer("energon", tmp_path / "small", max_bytes=8000) as writer:
        for i in range(4):
            writer.add(sample("<image>", str(i), images=(Image(data=encoded(60)),)))
    shards = list((tmp_path / "small").glob("*.tar"))
    assert len(shards) > 1 and all(path.stat().st_size <= 8000 for path in shards)


def test_packed_layouts_hold_what_they_can(tmp_path, samples):
    one = sample("<image>\nQ", "A", images=(Image(data=encoded(9)),))
    with open_writer("energon", tmp_path / "a", layout="packed") as writer:
        for other in samples[1:]:
            with pytest.raises(NotHeld):
                writer.add_pack([one, other])
        writer.add_pack([one, samples[0]])
    with open_writer("energon", tmp_path / "b", layout="packed_turns") as writer:
        with pytest.raises(NotHeld, match="system"):
            writer.add_pack([samples[2]])
        with pytest.raises(NotHeld, match="turns user, assistant, user"):
            writer.add_pack([sample("a", "b", "c")])
        writer.add_pack([*samples[:2], samples[3], sample("Hi", "Ho")])
    a, b = (open_source(str(tmp_path / name), "energon") for name in "ab")
    assert [content(a[row]) for row in range(2)] == [content(one), content(samples[0])]
    assert [content(b[row]) for row in range(3)] == [content(samples[i]) for i in (0, 1, 3)]
    assert content(b[3]) == ([("user", "Hi"), ("assistant", "Ho")], [])
    with pytest.raises(ValueError, match="layout 'x' is unknown"):
        open_writer("energon", tmp_path / "c", layout="x")


def test_names_are_looked_up_exactly(tmp_path):
    assert {"llava_json", "messages", "energon", "image_text"} <= set(WRITERS)
    with pytest.raises(ValueError, match=r"cannot be written\. Formats: energon, image_text"):
        open_writer("Energon", tmp_path / "x")
    with pytest.raises(ValueError, match="registered twice"):
        register("energon")(WRITERS["energon"])
    with pytest.raises(ValueError, match="unexpected keyword argument 'shards'"):
        open_writer("energon", tmp_path / "x", shards=3)
    with pytest.raises(ValueError, match=r"\.parquet or a \.jsonl"):
        open_writer("messages", tmp_path / "x.arrow")
