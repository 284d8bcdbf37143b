"""Energon datasets: the golden ones sample for sample, every other layout we know, and datasets that lie or tear."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vistune import files
from vistune.data.formats import open_source
from vistune.data.reading.metadataset import expand
from vistune.data.reading.nv_meta import expand_braces, read_yaml
from vistune.data.reading.tar import ShardWriter
from vistune.images import open_image
from vistune.samples import Message, SampleError

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15" / "webdataset"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def opened(path, **options):
    return open_source(str(path), "energon", options=options)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def picture_of(image) -> bytes:
    return files.read(image.path, image.start, image.size)


def jpeg(width: int = 20) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (width, 10), (width, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def shard(path: Path, samples: dict[str, dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path)
    for key, parts in samples.items():
        writer.add(key, {n: p if isinstance(p, bytes) else json.dumps(p).encode() for n, p in parts.items()})
    writer.close()
    return path


def texts(sample) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in sample.messages]


@pytest.mark.parametrize("cache", [False, True])
def test_packed_reads_as_the_reference_does(tmp_path, cache):
    reader = open_source(str(GOLDEN / "packed"), "energon", cache=tmp_path if cache else None)
    reader = pickle.loads(pickle.dumps(reader))
    samples = {sample.id: sample for sample in (reader[row] for row in range(len(reader)))}
    assert len(samples) == len(reader) == sum(len(e["json"]["captions"]) for e in EXPECTED["packed"].values()) == 25
    for key, want in EXPECTED["packed"].items():
        for sub, (prompt, caption) in enumerate(zip(want["json"]["prompts"], want["json"]["captions"], strict=True)):
            sample = samples[f"{want['shard']}/{key}#{sub}"]
            assert texts(sample) == [("user", prompt), ("assistant", caption)]
            (image,) = sample.images
            assert image.name == f"img{sub}.jpg" and sample.notes["images"] == want["json"]["images"][sub]
            assert want["byte_start"] <= image.start and image.start + image.size <= want["byte_end"]
            assert sha(picture_of(image)) == want["jpg_sha256"][sub]
            decoded = open_image(image)
            assert list(decoded.size) == want["image_sizes_wh"][sub]
            assert sha(np.asarray(decoded).tobytes()) == want["decoded_rgb_sha256_pillow"][sub]
    assert len(list(reader)) == 25
    order = ["pretrain-000001.tar", "pretrain-000000.tar"]  # as split.yaml lists them
    assert list(dict.fromkeys(sample.id.split("/")[0] for sample in samples.values())) == order


def test_multimixqa_reads_as_the_reference_does():
    reader = opened(GOLDEN / "mixqa")
    samples = {sample.id: sample for sample in (reader[row] for row in range(len(reader)))}
    assert set(samples) == {f"{want['shard']}/{key}" for key, want in EXPECTED["mixqa"].items()}
    for key, want in EXPECTED["mixqa"].items():
        sample = samples[f"{want['shard']}/{key}"]
        system = [("system", want["system"])] if want["system"] is not None else []
        assert texts(sample) == system + [(turn["role"], turn["content"]) for turn in want["messages"]]
        assert [image.name for image in sample.images] == want["json"].get("name", [])
        assert [list(open_image(image).size) for image in sample.images] == want["image_sizes_wh"]
        assert [sha(picture_of(image)) for image in sample.images] == want["image_sha256"]
        assert sample.images == () or want["byte_start"] < sample.images[0].start < want["byte_end"]


def test_prompts_ignored_is_captioning():
    reader = opened(GOLDEN / "packed", prompts="ignore")
    asked = {reader[row].messages[0] for row in range(len(reader))}
    assert asked == {Message(role="user", text="<image>")}
    assert reader.fingerprint() != opened(GOLDEN / "packed").fingerprint() == opened(GOLDEN / "packed").fingerprint()
    mixed = opened(GOLDEN / "mixqa", prompts="ignore")
    with pytest.raises(SampleError, match="role_order: 4 turns"):
        mixed[6]


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ([2, 5], ["08", "09", "10"]),
        ([10, "end"], ["04", "05"]),
        (["25%", "50%"], ["09", "10", "11"]),
        ({"absolute": [4, 12], "share": [0.5, 1.0]}, ["02", "03", "04", "05"]),
    ],
)
def test_a_range_counts_samples_in_the_order_of_the_split(value, keys):
    reader = opened(GOLDEN / "mixqa", range=value)
    assert [reader[row].id.split("_")[-1].zfill(2) for row in range(len(reader))] == keys
    whole = opened(GOLDEN / "packed")
    packs = list(dict.fromkeys(whole[row].id.split("#")[0] for row in range(len(whole))))
    half = opened(GOLDEN / "packed", range=["50%", "100%"])
    assert list(dict.fromkeys(half[row].id.split("#")[0] for row in range(len(half)))) == packs[6:]


def test_no_python_of_a_dataset_is_run(tmp_path):
    folder, proof = tmp_path / "ds", tmp_path / "ran"
    shutil.copytree(GOLDEN / "mixqa", folder)
    (folder / ".nv-meta" / "sample_loader.py").write_text(f"open({str(proof)!r}, 'w')\n")
    told = (folder / ".nv-meta" / "dataset.yaml").read_text()
    evil = f"evil: !!python/object/apply:os.system ['touch {proof}']\nodd: !mine {{a: [1]}}\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(told + evil)
    assert len(opened(folder)) == 12
    assert read_yaml(str(folder / ".nv-meta" / "dataset.yaml"))["odd"] == {"a": [1]}
    assert not proof.exists()


BMR = {
    "prompts": [["<image><image>Which?", "Sure?"], ["Only text"], ["<image>One"]],
    "captions": [["Left", "Yes"], ["So be it"], ["1"]],
    "images": [["img000_sub000.jpg", "img000_sub001.jpg"], [], ["img002_sub000.jpg"]],
}


@pytest.mark.parametrize(
    "names", [("img0_0", "img0_1", "img2_0"), ("img000_sub000", "img000_sub001", "img002_sub000")], ids=["wds", "raw"]
)
def test_packs_of_conversations(tmp_path, names):
    pictures = {f"{name}.jpg": jpeg(10 + i) for i, name in enumerate(names)}
    reader = opened(shard(tmp_path / "a.tar", {"ps_00000000": {**pictures, "json": BMR}}))
    first, second, third = (reader[row] for row in range(3))
    assert texts(first) == [
        ("user", "<image><image>Which?"),
        ("assistant", "Left"),
        ("user", "Sure?"),
        ("assistant", "Yes"),
    ]
    assert [open_image(image).width for image in (*first.images, *third.images)] == [10, 11, 12]
    assert second.images == () and texts(second)[0] == ("user", "Only text")
    assert third.id == "a.tar/ps_00000000#2"


def turns(*texts_: str, first: str = "user") -> list[dict[str, str]]:
    roles = [first, *(("assistant", "user") if first == "user" else ("user", "assistant")) * 9]
    return [{"role": role, "content": text} for role, text in zip(roles, texts_, strict=False)]


def test_the_rule_of_the_odd_number_of_turns(tmp_path):
    rows = {
        "a": {"json": {"texts": turns("Be brief.", "Hi", "Hello", first="system"), "media": "text"}},
        "b": {"json": {"texts": [*turns("Be brief."), *turns("Hi", "Hello")], "media": "text"}},
        "c": {"json": {"texts": turns("Hi", "Hello", "Bye"), "media": "text"}},
    }
    reader = opened(shard(tmp_path / "a.tar", rows))
    assert texts(reader[0]) == texts(reader[1]) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    assert texts(reader[2])[0] == ("user", "Hi")  # lacks its last answer; the user's words are not learned


def test_captioning_and_vqa_by_field_map(tmp_path):
    shard(
        tmp_path / "c" / "x.tar", {"k": {"jpg": jpeg(), "json": {"caption": "A cat", "size": 3, "deep": {"t": ["x"]}}}}
    )
    meta = tmp_path / "c" / ".nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CaptioningWebdataset\n"
        "field_map: {image: 'png,jpg', caption: 'txt,json[deep][t][0]'}\n"
    )
    (meta / "split.yaml").write_text("split_parts: {train: ['{x,y}.tar']}\nexclude: [y.tar]\n")
    (meta / ".info.json").write_text('{"shard_counts": {"x.tar": 1}, "energon_version": "7.0.0"}')
    caption = opened(tmp_path / "c")[0]
    assert texts(caption) == [("user", "<image>"), ("assistant", "x")] and caption.notes["size"] == 3
    (meta / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: VQASample}\n"
        "field_map: {image: jpg, context: 'json[caption]', answers: 'json[deep][t]'}\n"
    )
    assert texts(opened(tmp_path / "c")[0]) == [("user", "<image>\nA cat"), ("assistant", "x")]


def test_tars_without_anything_beside_are_recognised(tmp_path):
    shard(tmp_path / "d" / "1.tar", {"a": {"jpg": jpeg(), "txt": b"A cat"}, "b": {"jpg": jpeg(), "txt": b"A dog"}})
    shard(tmp_path / "d" / "in" / "2.tar", {"a": {"webp": jpeg(), "txt": b"A cow"}})
    for index in (tmp_path / "d").rglob("*.idx"):
        index.unlink()
    reader = opened(tmp_path / "d")
    assert [texts(reader[row])[1][1] for row in range(3)] == ["A cat", "A dog", "A cow"]
    assert reader[2].id == "in/2.tar/a"
    as_list = opened(shard(tmp_path / "l.tar", {"a": {"jpg": jpeg(), "json": turns("<image>Hi", "Ho")}}))
    assert texts(as_list[0])[0] == ("user", "<image>Hi") and as_list[0].images[0].name == "jpg"
    vqa = opened(shard(tmp_path / "v.tar", {"a": {"jpg": jpeg(), "json": {"question": "Q", "answers": ["A", "B"]}}}))
    assert texts(vqa[0])[1] == ("assistant", "A") and vqa[0].notes == {"answers": ["A", "B"]}


def test_crude_data_is_refused_unless_it_is_recognised(tmp_path):
    meta = tmp_path / "ds" / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    shard(tmp_path / "ds" / "a.tar", {"k": {"jpg": jpeg(), "json": {"whatever": 1}}})
    with pytest.raises(ValueError, match=r"'CrudeWebdataset', whose layout only its own code knows, .*option `kind`"):
        opened(tmp_path / "ds")
    shard(tmp_path / "ds" / "a.tar", {"k": {"jpg": jpeg(), "json": {"caption": "ok"}}})
    assert texts(opened(tmp_path / "ds")[0])[1] == ("assistant", "ok")


BAD_ROWS = {
    "no_json": ({"0_a.jpg": b""}, "row_unreadable", "no part 'json', only 0_a.jpg"),
    "not_json": ({"json": b"{"}, "row_unreadable", "part 'json' .byte"),
    "bad_utf8": ({"json": b'{"texts": "\xff"}'}, "row_unreadable", "part 'json'"),
    "no_texts": ({"json": {"texts": []}}, "row_unreadable", "no list `texts`"),
    "not_text": ({"json": {"texts": [{"role": "user", "content": 3}]}}, "row_unreadable", "turn 0 has no text"),
    "role": ({"json": {"texts": [{"role": "bot", "content": ""}]}}, "role_order", "turn 0 is from 'bot'"),
    "video": ({"json": {"texts": turns("a", "b"), "media": "video"}}, "row_unreadable", "media is 'video'"),
    "gone": ({"json": {"texts": turns("<image>", "b"), "media": "image", "name": ["0_a.jpg"]}}, "image_missing", "0_a"),
    "names": ({"json": {"texts": turns("a", "b"), "media": "image", "name": 3}}, "row_unreadable", "name is 3"),
}


def test_broken_samples_are_faults_of_their_rows(tmp_path):
    good = {"json": {"texts": turns("a", "b"), "media": "text"}}
    rows = {"good": good, **{key: parts for key, (parts, _, _) in BAD_ROWS.items()}, "last": good}
    reader = opened(shard(tmp_path / "a.tar", rows))
    assert len(reader) == len(rows) and reader[0].messages and reader[len(rows) - 1].messages
    for row, (key, (_, code, reason)) in enumerate(BAD_ROWS.items(), 1):
        with pytest.raises(SampleError, match=reason) as error:
            reader[row]
        fault = error.value.fault
        assert (fault.code, fault.row, fault.id) == (code, row, f"a.tar/{key}")
        assert fault.path.endswith("a.tar")


def test_parts_and_texts_that_are_too_large_are_faults(tmp_path):
    tar = tmp_path / "a.tar"
    huge = tarfile.TarInfo("b.json")
    huge.size = 9 << 30  # a hole in the file
    with open(tar, "wb") as out:
        small = shard(tmp_path / "s.tar", {"a": {"json": {"texts": turns("a", "b" * (9 << 20)), "media": "text"}}})
        out.write(small.read_bytes()[:-1024] + huge.tobuf())
        out.truncate(out.tell() + huge.size)
    reader = opened(tar)
    with pytest.raises(SampleError, match="more than 8,388,608 characters"):
        reader[0]
    with pytest.raises(SampleError, match="'json' has 9663676416 bytes"):
        reader[1]


BAD_PACKS = [
    ({"prompts": ["<image>"], "captions": ["a", "b"], "images": ["x"]}, 2, "differ in length"),
    ({"prompts": [], "captions": [], "images": []}, 1, "are empty"),
    ({"prompts": [3], "captions": ["a"], "images": ["x"]}, 1, r"prompts\[0\] is 3"),
    ({"prompts": [["a", "b"]], "captions": [["c"]], "images": [[]]}, 1, "2 prompts and 1 captions"),
    ({"prompts": ["<image>"], "captions": ["a"], "images": ["x"]}, 1, "no part 'img0.jpg'"),
    ({"prompts": 3}, 1, "no lists prompts"),
]


def test_broken_packs_are_faults_of_their_rows(tmp_path):
    good = {"img0.jpg": jpeg(), "json": {"prompts": ["<image>"], "captions": ["a"], "images": ["x"]}}
    rows = {"good": good, **{f"k{i}": {"json": value} for i, (value, _, _) in enumerate(BAD_PACKS)}}
    reader = opened(shard(tmp_path / "a.tar", rows))
    assert len(reader) == 1 + sum(count for _, count, _ in BAD_PACKS)
    row = 1
    for _, count, reason in BAD_PACKS:
        with pytest.raises(SampleError, match=reason):
            reader[row]
        row += count


@pytest.fixture
def mixqa(tmp_path) -> Path:
    folder = tmp_path / "mixqa"
    shutil.copytree(GOLDEN / "mixqa", folder)
    return folder


def test_what_is_wrong_with_a_shard_is_said_with_its_name(mixqa, capsys):
    tar, index = mixqa / "pretrain-0.tar", mixqa / "pretrain-0.tar.idx"
    whole, offsets = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(whole[:20000])
    with pytest.raises(ValueError, match=r"pretrain-0\.tar: torn: its \.idx says .* the tar has 20000\. Fetch both"):
        opened(mixqa)
    index.unlink()
    with pytest.raises(ValueError, match=r"pretrain-0\.tar: torn at byte \d+: .*Fetch the shard again"):
        opened(mixqa)
    tar.write_bytes(whole)
    assert len(opened(mixqa)) == 12  # found by scanning
    assert "have no .idx" in capsys.readouterr().err
    index.write_bytes(offsets[:-16] + offsets[-8:])
    with pytest.raises(ValueError, match=r"pretrain-0\.tar: 5 samples by its \.idx, 6 by the dataset's info file"):
        opened(mixqa)
    tar.unlink()
    with pytest.raises(ValueError, match=r"pretrain-0\.tar"):
        opened(mixqa)


def test_a_shard_of_another_schema_is_named(mixqa):
    shard(mixqa / "pretrain-0.tar", {f"k{i}": {"jpg": jpeg(), "txt": b"A cat"} for i in range(6)})
    with pytest.raises(ValueError, match=r"pretrain-0\.tar: its samples look like 'caption', .*'mixqa'"):
        opened(mixqa)


def test_shards_that_end_early_are_warned_of(tmp_path, capsys):
    tar = shard(tmp_path / "a.tar", {"a": {"txt": b"A", "jpg": jpeg()}})
    tar.write_bytes(tar.read_bytes()[:-1024])
    Path(f"{tar}.idx").unlink()
    assert len(opened(tar)) == 1
    assert "without the empty blocks" in capsys.readouterr().err


def test_a_row_whose_shard_breaks_later_is_a_fault(mixqa):
    reader = opened(mixqa)
    (mixqa / "pretrain-1.tar").write_bytes(b"\1" * 40960)
    with pytest.raises(SampleError, match=r"row_unreadable: .*pretrain-1\.tar: torn at byte 0"):
        reader[0]
    assert reader[6].id == "pretrain-0.tar/image_0"


def test_splits_excludes_and_options(mixqa):
    split = mixqa / ".nv-meta" / "split.yaml"
    split.write_text(
        "split_parts: {train: ['pretrain-{0..1}.tar'], val: [pretrain-1.tar]}\nexclude: [pretrain-0.tar/text_3]\n"
    )
    reader = opened(mixqa)
    assert [reader[row].id for row in range(len(reader))][2:4] == ["pretrain-0.tar/text_2", "pretrain-0.tar/text_4"]
    assert len(reader) == 11 and len(opened(mixqa, split="val")) == 6
    with pytest.raises(ValueError, match=r"no split 'test'\. Splits: train, val"):
        opened(mixqa, split="test")
    with pytest.raises(ValueError, match="no option 'shuffle'"):
        opened(mixqa, shuffle=True)
    with pytest.raises(ValueError, match="choose 'packed', 'mixqa', 'vqa', 'caption'"):
        opened(mixqa, kind="ocr")
    with pytest.raises(ValueError, match="range"):
        opened(mixqa, range=[0, 99])
    with pytest.raises(ValueError, match="no dataset folder"):
        opened(mixqa / "nothing")


def test_the_table_of_rows_is_kept_and_follows_its_shards(mixqa, tmp_path):
    cache = tmp_path / "cache"
    first = open_source(str(mixqa), "energon", cache=cache)
    (kept,) = cache.glob("*.bin")
    assert kept.stat().st_size == 12 * 24
    again = open_source(str(mixqa), "energon", cache=cache)
    assert again.fingerprint() == first.fingerprint() and list(cache.glob("*.bin")) == [kept]
    assert len(pickle.dumps(again)) < 3000  # the rows stay in their file
    os.utime(mixqa / "pretrain-0.tar", (1, 1))
    assert open_source(str(mixqa), "energon", cache=cache).fingerprint() != first.fingerprint()
    assert len(list(cache.glob("*.bin"))) == 2


def test_many_shards_are_looked_at_in_parallel(tmp_path):
    for i in range(12):
        pack = {"prompts": ["<image>"] * i, "captions": [f"{i}"] * i, "images": ["x"] * i}
        shard(tmp_path / f"{i:02d}.tar", {"k": {**{f"img{j}.jpg": jpeg() for j in range(i)}, "json": pack}})
    reader = opened(tmp_path)
    assert [texts(reader[row])[1][1] for row in range(1, len(reader))] == [
        str(i) for i in range(1, 12) for _ in range(i)
    ]


def test_a_dataset_afar_reads_like_one_here(mixqa, monkeypatch):
    for path in files.listed(mixqa):
        with files.fsspec.open(f"memory://far{path.split(str(mixqa))[1]}", "wb") as out:
            out.write(Path(path).read_bytes())
    far, near = opened("memory://far"), opened(mixqa)
    for row in range(12):
        assert far[row].messages == near[row].messages and far[row].id == near[row].id
        assert [picture_of(a) for a in far[row].images] == [picture_of(a) for a in near[row].images]
    assert open_image(far[0].images[0]).size == open_image(near[0].images[0]).size
    asked, read = [], files.read
    monkeypatch.setattr(files, "read", lambda *place: asked.append(place) or read(*place))
    far = opened("memory://far")
    asked.clear()
    assert len(far[6].images) == 2
    assert [path for path, *_ in asked] == ["memory://far/pretrain-0.tar"]  # one request; the pictures are not opened
    monkeypatch.undo()
    files.fsspec.filesystem("memory").rm("/far/.nv-meta", recursive=True)
    for index in files.listed("memory://far", ".idx"):
        files.fsspec.filesystem("memory").rm(index)
    assert opened("memory://far")[0].id == "pretrain-0.tar/image_0"


@pytest.mark.parametrize("name", ["packed", "mixqa"])
def test_mutated_shards_are_faults_or_errors_that_name_them(tmp_path, name):
    """120 mutations of each dataset: bytes changed, pieces cut out or doubled, in the tar, its index, its metadata."""
    rng = np.random.default_rng(15)
    seen = {"error": 0, "fault": 0, "fine": 0}
    targets = ["*0.tar", "*0.tar", "*0.tar.idx", ".nv-meta/*.yaml", ".nv-meta/.info.yaml"]
    for number in range(120):
        folder = tmp_path / str(number)
        shutil.copytree(GOLDEN / name, folder)
        paths = sorted(folder.glob(targets[number % len(targets)]))
        path = paths[int(rng.integers(len(paths)))]
        data = bytearray(path.read_bytes())
        at, end = sorted(rng.integers(0, len(data), 2).tolist())
        if number % 3 == 0:
            data[at] ^= int(rng.integers(1, 256))
        elif number % 3 == 1:
            del data[at:end]
        else:
            data[at:at] = data[at:end]
        if ".idx" not in path.name and number % 2:
            for index in folder.glob("*.idx"):
                index.unlink()
        path.write_bytes(data)
        outcome = "fine"
        try:
            reader = opened(folder)
            for row in range(len(reader)):
                try:
                    assert reader[row].messages
                except SampleError as error:
                    outcome = "fault"
                    assert error.fault.row == row
        except ValueError as error:
            outcome = "error"
            assert str(folder) in str(error) or "samples in its" in str(error)
        seen[outcome] += 1
    assert seen["error"] > 20 and seen["fine"] > 5 and sum(seen.values()) == 120


BLEND = """
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
      - {weight: 3, path: ./mixqa, subset: {range: [2, 10]}}
      - {weight: 0, path: never}
      - {weight: 1, path: more/inner.yaml, subset: {range: [50%, 100%]}, split_part: train}
  val: {path: ./mixqa, split_part: val}
  twice:
    blend_epochized:
      - {repetitions: 2, path: mixqa, split_part: train}
      - {repetitions: 0.5, path: more/inner.yaml, split_part: twice}
"""
INNER = """
__class__: MetadatasetV2
splits:
  train:
    blend: [{weight: 1, path: ../packed, subset: {range: [0%, 50%]}}, {weight: 3, path: /abs/olute}]
  twice: {blend_epochized: [{repetitions: 3, path: ../packed, split_part: train}]}
"""


@pytest.fixture
def blend(mixqa, tmp_path) -> Path:
    shutil.copytree(GOLDEN / "packed", tmp_path / "packed")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "inner.yaml").write_text(INNER)
    (tmp_path / "blend.yaml").write_text(BLEND)
    return tmp_path / "blend.yaml"


def test_a_blend_is_laid_flat(blend):
    folder = str(blend.parent)
    first, second, third = expand(str(blend))
    assert [Path(os.path.normpath(part.path)) for part in (first, second, third)] == [
        blend.parent / "mixqa",
        blend.parent / "packed",
        Path("/abs/olute"),
    ]
    assert [part.weight for part in (first, second, third)] == [0.75, 0.0625, 0.1875]
    assert first.options() == {"split": "train", "range": {"absolute": [2, 10]}}
    assert second.options()["range"] == {"share": [0.25, 0.5]} and third.options()["range"] == {"share": [0.5, 1.0]}
    (val,) = expand(str(blend), "val")
    assert (val.weight, val.repetitions, val.split) == (None, None, "val")
    assert [part.repetitions for part in expand(str(blend), "twice")] == [2.0, 1.5]
    assert all(part.path.startswith(folder) for part in expand(str(blend), "twice"))


def test_a_blend_opened_as_one_is_its_datasets_in_a_row(blend):
    reader = open_source(str(blend), "energon", name="all", options={"split": "twice"})
    assert len(reader) == len(list(reader)) == 12 + 25
    reader = pickle.loads(pickle.dumps(reader))
    sample = reader[12]
    assert (sample.row, sample.source, sample.id) == (12, "all", "pretrain-000001.tar/ps_00022083#0")
    (blend.parent / "packed" / "pretrain-000001.tar").write_bytes(b"\1" * 71680)
    with pytest.raises(SampleError, match="all:13"):
        reader[13]


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ("{blend: [{path: self.yaml}]}", "the blend contains itself"),
        ("{join: [{path: a}], joiner: {__module__: os, __class__: system}}", "joined datasets need code"),
        ("{blend: [{weight: -1, path: a}]}", "weight -1 is no number"),
        ("{blend: [{weight: 0, path: a}]}", "all 0"),
        ("{blend: []}", "a blend is a list"),
        ("{blend_epochized: [{repetitions: 0, path: a}]}", "repeats nothing"),
        ("{blend: [{weight: 1}]}", "none of path"),
        ("{path: a, subset: {range: [1, 2%]}}", "subset: range"),
        ("{blend: [{path: a}], subset: {range: [1, 2]}}", "use percent"),
        ("{blend: [{path: self.yaml, split_part: e}]}", "cannot be mixed"),
    ],
)
def test_blends_that_cannot_be(tmp_path, train, reason):
    path = tmp_path / "self.yaml"
    path.write_text(f"splits:\n  train: {train}\n  e: {{blend_epochized: [{{path: a}}]}}\n")
    with pytest.raises(ValueError, match=reason):
        expand(str(path))


def test_files_that_are_no_blend(tmp_path):
    path = tmp_path / "b.yaml"
    with pytest.raises(ValueError, match="no such blend file"):
        expand(str(path))
    path.write_text("a: [")
    with pytest.raises(ValueError, match="cannot be read as yaml"):
        expand(str(path))
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no mapping `splits`"):
        expand(str(path))
    path.write_text("splits: {train: {path: a}}")
    with pytest.raises(ValueError, match=r"no split 'val'\. Splits: train"):
        expand(str(path), "val")


def test_braces():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{x,y}/{1..0}.tar")) == ["x/1.tar", "x/0.tar", "y/1.tar", "y/0.tar"]
    assert list(expand_braces("{0..4..2}")) == ["0", "2", "4"]
    assert list(expand_braces("a{b}.tar")) == ["a{b}.tar"]
