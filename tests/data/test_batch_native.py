"""Batches of pictures at their own size: patches, grids, what breaks; the same from workers; fixed shapes."""

from __future__ import annotations

import builtins
import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch

from tests.data.small import IMAGE_TOKEN, make_language, turns
from vistune import files
from vistune.data.batch import Batch, Planned, collate, read_item
from vistune.data.formats import open_source
from vistune.data.index import build_index
from vistune.data.loader import load
from vistune.data.plan import Plan
from vistune.data.tokenize import Language, tokenize
from vistune.images import open_image
from vistune.native import NativeLayout
from vistune.samples import Image, Message, Sample, SampleError

LENGTH = 200
LAYOUT = NativeLayout(max_pixels=28 * 28 * 12)


@pytest.fixture(scope="module")
def language() -> Language:
    chat = make_language("qwen2_like", "qwen_2")
    return Language(chat.template, chat.encoder, LAYOUT, IMAGE_TOKEN)


@pytest.fixture
def source(write_rows, pictures):
    noise = np.random.default_rng(3).integers(0, 255, (90, 200, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(pictures / "wide.jpg")
    names = [["a.png"], [], ["wide.jpg", "c.png"], ["b.jpg"]]
    rows = [
        {"id": str(i), "conversations": turns("<image>\n" * len(names[i % 4]) + "What?", "so " * (i + 1))}
        | ({"image": names[i % 4]} if names[i % 4] else {})
        for i in range(16)
    ]
    return open_source(str(write_rows(rows)), images=str(pictures), name="mine")


def plan_of(source, language) -> Plan:
    return Plan(build_index([source], language, LENGTH), batch=8, length=LENGTH)


def same(one: Batch, two: Batch) -> bool:
    names = ("ids", "positions", "rows", "targets", "pixels", "grids")
    pairs = [(getattr(one, name), getattr(two, name)) for name in names]
    tensors = all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)
    return tensors and (one.lengths, one.keys, one.faults) == (two.lengths, two.keys, two.faults)


def planned_of(source, language, row: int) -> Planned:
    tokens = tokenize(source[row], language, LENGTH)
    return Planned(source=0, row=row, tokens=len(tokens.ids), images=len(tokens.images))


def test_a_batch_has_patches_and_grids_in_the_order_of_the_placeholders(source, language):
    seen = 0
    for micros in load(plan_of(source, language), [source], language, packs_per_micro=2):
        for batch in micros:
            images = [image for _, row in batch.keys for image in source[row].images]
            if not images:
                assert batch.pixels is None and batch.grids is None and batch.images == 0
                continue
            wanted = [LAYOUT.prepare(open_image(image)) for image in images]
            assert batch.pixels is not None and batch.grids is not None and batch.images == len(images)
            assert np.array_equal(batch.pixels.numpy(), np.concatenate(wanted))
            assert batch.grids.dtype == torch.int64 and batch.grids.prod(1).tolist() == [len(one) for one in wanted]
            assert int((batch.ids == IMAGE_TOKEN).sum()) * 4 == len(batch.pixels)
            assert same(batch, batch.to("cpu"))
            seen += len(images)
    assert seen == 16


def test_workers_give_the_same_bytes(source, language):
    plan = plan_of(source, language)
    here = list(load(plan, [source], language, packs_per_micro=2))
    there = list(load(plan, [source], language, packs_per_micro=2, workers=1))
    assert len(here) == len(there) == plan.steps
    assert all(len(a) == len(b) and all(map(same, a, b)) for a, b in zip(here, there, strict=True))


def test_each_file_is_opened_once(source, language, monkeypatch):
    planned = planned_of(source, language, 2)
    opened: Counter[str] = Counter()

    def counting(path, *args, **kwargs):
        opened[str(path).rsplit("/")[-1]] += str(path).endswith((".png", ".jpg"))
        return real(path, *args, **kwargs)

    real = builtins.open
    monkeypatch.setattr(builtins, "open", counting)
    monkeypatch.setattr(files, "open", counting, raising=False)
    item = read_item(source, planned, language, LENGTH)
    assert not item.faults and len(item.pixels) == 2
    assert {name: times for name, times in opened.items() if times} == {"wide.jpg": 1, "c.png": 1}


def test_a_body_that_broke_leaves_blank_patches_of_its_size(source, pictures, language):
    planned = planned_of(source, language, 2)
    good = read_item(source, planned, language, LENGTH)
    whole = (pictures / "wide.jpg").read_bytes()
    (pictures / "wide.jpg").write_bytes(whole[: len(whole) // 3])
    item = read_item(source, planned, language, LENGTH)
    assert [fault.code for fault in item.faults] == ["image_broken"] and item.faults[0].path.endswith("wide.jpg")
    assert item.grids == good.grids and item.tokens.supervised == 0
    assert np.array_equal(item.tokens.ids, good.tokens.ids)
    assert np.array_equal(item.pixels[0], LAYOUT.blank(200, 90)) and np.array_equal(item.pixels[1], good.pixels[1])
    assert collate([item]).images == 2


@pytest.mark.parametrize("change", ["gone", "no header", "another size", "too thin"])
def test_a_header_that_broke_leaves_the_place_alone(source, pictures, language, change):
    planned = planned_of(source, language, 2)
    path = pictures / "wide.jpg"
    if change == "gone":
        path.unlink()
    elif change == "no header":
        path.write_bytes(b"\xff\xd8" + bytes(50))
    else:
        PIL.Image.new("RGB", (28, 28) if change == "another size" else (300, 1)).save(path)
    item = read_item(source, planned, language, LENGTH)
    assert len(item.tokens.ids) == planned.tokens and IMAGE_TOKEN not in item.tokens.ids
    assert item.pixels == [] and item.grids == [] and item.tokens.supervised == 0
    codes = {"gone": "image_missing", "another size": "row_unreadable"}
    assert [fault.code for fault in item.faults] == [codes.get(change, "image_broken")]
    batch = collate([item, read_item(source, planned_of(source, language, 0), language, LENGTH)])
    assert batch.images == 1 and int((batch.ids == IMAGE_TOKEN).sum()) * 4 == len(batch.pixels)


def test_too_thin_is_found_by_the_index(write_rows, pictures, language):
    PIL.Image.new("RGB", (2010, 10)).save(pictures / "thin.png")
    rows = [{"id": "thin", "image": "thin.png", "conversations": turns("<image>\nWhat?", "A line.")}]
    source = open_source(str(write_rows(rows)), images=str(pictures))
    with pytest.raises(SampleError, match="2010 x 10 pixels") as caught:
        tokenize(source[0], language, LENGTH)
    assert caught.value.fault.code == "image_broken" and caught.value.fault.path.endswith("thin.png")


@dataclass
class One:
    """A reader of one row with one picture."""

    image: Image
    name: str = "one"

    def __getitem__(self, row: int) -> Sample:
        said = Message(role="user", text="<image>\nQ"), Message(role="assistant", text="A")
        return Sample(id="x", source=self.name, row=row, messages=said, images=(self.image,))


def test_pictures_in_a_container_and_behind_a_uri(pictures, language):
    data = (pictures / "b.jpg").read_bytes()
    with files.fsspec.open("memory://shards/one.tar", "wb") as out:
        out.write(bytes(1000) + data + bytes(1000))
    with files.fsspec.open("memory://shards/b.jpg", "wb") as out:
        out.write(data)
    local = Image(path=str(pictures / "b.jpg"))
    inside = Image(path="memory://shards/one.tar", start=1000, size=len(data), name="b.jpg")

    planned = planned_of(One(local), language, 0)
    wanted = read_item(One(local), planned, language, LENGTH)
    for image in (inside, Image(path="memory://shards/b.jpg"), Image(data=data)):
        assert planned_of(One(image), language, 0) == planned
        item = read_item(One(image), planned, language, LENGTH)
        assert not item.faults and np.array_equal(item.pixels[0], wanted.pixels[0])
    with pytest.raises(SampleError, match="image_missing"):
        planned_of(One(Image(path="memory://shards/none.jpg")), language, 0)


def test_shapes_are_fixed_when_padded_to_the_length(source, language):
    plan = Plan(build_index([source], language, LENGTH), batch=5, length=LENGTH)
    sizes, empty = set(), 0
    for rank in range(4):
        for micros in load(plan, [source], language, rank=rank, world=4, packs_per_micro=2, pad_to=2 * LENGTH):
            sizes |= {len(batch.ids) for batch in micros}
            empty += sum(batch.samples == 0 for batch in micros)
    assert sizes == {2 * LENGTH} and empty


def test_a_language_that_has_encoded_is_as_small_to_send(language):
    fresh = make_language.__wrapped__("qwen2_like", "qwen_2")
    before = len(pickle.dumps(fresh))
    encoded = fresh.encoder.encode("<image> a", has_images=True)
    assert len(pickle.dumps(fresh)) < before + 500
    again = pickle.loads(pickle.dumps(fresh)).encoder.encode("<image> a", has_images=True)
    assert all(np.array_equal(a, b) for a, b in zip(encoded, again, strict=True))
