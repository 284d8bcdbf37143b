"""Batches: what lies where, the same from any number of workers, and bad rows and images in their place."""

from __future__ import annotations

import pickle
import random

import numpy as np
import PIL.Image
import pytest
import torch

from tests.data.small import IMAGE_TOKEN, make_language, turns
from vistune.data.batch import Batch, Planned, collate, read_item
from vistune.data.formats import open_source
from vistune.data.index import build_index
from vistune.data.loader import _Steps, load
from vistune.data.plan import Plan
from vistune.data.tokenize import tokenize

LENGTH = 160


@pytest.fixture
def rows():
    random.seed(0)
    names = [["a.png"], ["b.jpg"], [], ["a.png", "c.png"]]
    return [
        {"id": str(i), "conversations": turns("<image>\n" * len(images) + "What?", "so " * random.randint(1, 30))}
        | ({"image": images} if images else {})
        for i, images in enumerate(random.choice(names) for _ in range(60))
    ]


@pytest.fixture
def source(write_rows, pictures, rows):
    return open_source(str(write_rows(rows)), images=str(pictures), name="mine")


def same(one: Batch, two: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in ("ids", "positions", "rows", "targets")
    )
    pixels = torch.equal(one.pixels, two.pixels) if one.pixels is not None else two.pixels is None
    rest = ("lengths", "samples", "tokens", "keys", "faults")
    return tensors and pixels and all(getattr(one, name) == getattr(two, name) for name in rest)


@pytest.mark.parametrize("pad_to", [1, 64])
def test_a_batch_holds_its_samples_end_to_end(source, language, pad_to):
    index = build_index([source], language, LENGTH)
    plan = Plan(index, batch=12, length=LENGTH)
    seen = 0
    for k, micros in enumerate(load(plan, [source], language, packs_per_micro=2, pad_to=pad_to)):
        positions = [p for micro in plan.micro_batches(k, 0, 1, 2) for pack in micro for p in pack]
        assert [key for batch in micros for key in batch.keys] == [(0, int(index.row[p])) for p in positions]
        for batch in micros:
            total = len(batch.ids)
            assert sum(batch.lengths) == total and total % pad_to == 0 and total - batch.tokens < pad_to
            assert len(batch.lengths) == batch.samples + (total > batch.tokens)
            assert batch.positions.tolist() == [i for length in batch.lengths for i in range(length)]
            targets, ids, pixels, start = [], [], [], 0
            for _, row in batch.keys:
                tokens = tokenize(source[row], language, LENGTH)
                ids += tokens.ids.tolist()
                pixels += [language.layout.prepare(open_rgb(image.path)) for image in source[row].images]
                learned = np.flatnonzero(tokens.loss_mask)
                targets += [(start + i - 1, tokens.ids[i]) for i in learned if i]
                start += len(tokens.ids)
            assert batch.ids.tolist() == ids + [0] * (total - batch.tokens)
            assert list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)) == targets
            assert int((batch.ids == IMAGE_TOKEN).sum()) == 4 * len(pixels)
            if pixels:
                assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
                assert np.array_equal(batch.pixels.numpy(), np.stack(pixels))
            seen += batch.samples
    assert seen == 60


def open_rgb(path):
    return PIL.Image.open(path).convert("RGB")


@pytest.mark.parametrize("unit", ["samples", "packs"])
def test_workers_give_the_same_bytes(source, language, tmp_path, unit):
    index = build_index([source], language, LENGTH, cache=tmp_path / "cache")
    plan = Plan(index, batch=8, unit=unit, length=LENGTH, epochs=2.0)
    here = list(load(plan, [source], language, packs_per_micro=2, pad_to=32))
    state = torch.get_rng_state()
    there = list(load(plan, [source], language, packs_per_micro=2, pad_to=32, workers=2))
    assert torch.equal(torch.get_rng_state(), state)  # dropout after it must not depend on the workers
    assert len(here) == len(there) == plan.steps
    assert all(len(a) == len(b) and all(map(same, a, b)) for a, b in zip(here, there, strict=True))
    resumed = list(load(plan, [source], language, packs_per_micro=2, pad_to=32, start_step=3, stop_step=5))
    assert len(resumed) == 2 and all(map(same, resumed[0] + resumed[1], here[3] + here[4]))


def test_what_a_worker_is_sent_works_there(source, language, tmp_path):
    """Started by spawn a worker gets it all pickled; starting one takes too long for a test."""
    plan = Plan(build_index([source], language, LENGTH, cache=tmp_path / "cache"), batch=8, length=LENGTH)
    steps = _Steps(plan, (source,), language, 0, 1, 2, 32)
    there = pickle.loads(pickle.dumps(steps))
    assert all(map(same, steps.batches(1), there.batches(1)))


def test_ranks_together_see_the_step(source, language):
    plan = Plan(build_index([source], language, LENGTH), batch=10, length=LENGTH)
    alone = list(load(plan, [source], language))
    ranks = [list(load(plan, [source], language, rank=rank, world=4)) for rank in range(4)]
    for k in range(plan.steps):
        assert len({len(rank[k]) for rank in ranks}) == 1
        together = [key for rank in ranks for batch in rank[k] for key in batch.keys]
        assert sorted(together) == sorted(key for batch in alone[k] for key in batch.keys)


def test_an_empty_micro_batch_is_padding(language):
    batch = collate([], pad_to=16)
    assert (batch.lengths, batch.samples, batch.tokens) == ([16], 0, 0)
    assert batch.pixels is None and len(batch.rows) == 0 and batch.ids.tolist() == [0] * 16
    assert batch.to("cpu").positions.tolist() == list(range(16))


def test_broken_images_leave_the_sample_in_its_place(source, pictures, language):
    index = build_index([source], language, LENGTH)
    plan = Plan(index, batch=60, length=LENGTH)
    (before,) = list(load(plan, [source], language, packs_per_micro=100))
    (pictures / "b.jpg").write_bytes((pictures / "torn.jpg").read_bytes())
    (pictures / "c.png").unlink()
    (after,) = list(load(plan, [source], language, packs_per_micro=100, workers=1))
    one, two = before[0], after[0]
    assert torch.equal(one.ids, two.ids) and one.lengths == two.lengths and one.keys == two.keys
    bad = {fault.row: fault.code for fault in two.faults}
    names = {row: [image.path.rsplit("/")[-1] for image in source[row].images] for row in range(60)}
    expected = {
        row: "image_broken" if "b.jpg" in n else "image_missing"
        for row, n in names.items()
        if {"b.jpg", "c.png"} & {*n}
    }
    assert bad == expected and len(bad) > 10
    assert one.pixels is not None and two.pixels is not None
    image, start = 0, 0
    kept = set(two.rows.tolist())
    for (_, row), length in zip(two.keys, two.lengths, strict=True):
        for name in names[row]:
            good = name == "a.png"
            assert torch.equal(
                two.pixels[image], one.pixels[image] if good else torch.from_numpy(language.layout.blank())
            )
            image += 1
        learned = [p for p in one.rows.tolist() if start <= p < start + length]
        assert kept & set(learned) == (set() if row in bad else set(learned))
        start += length


def test_a_row_that_changed_is_replaced_by_placeholders(source, write_rows, pictures, rows, language):
    planned = Planned(
        source=0, row=1, tokens=len(tokenize(source[1], language, LENGTH).ids), images=len(source[1].images)
    )
    good = read_item(source, planned, language, LENGTH)
    assert not good.faults and good.tokens.supervised
    changes = [
        ({"conversations": turns("Other", "words, and more of them than before, as it happens")}, "the row changed"),
        ({"conversations": turns("Hi", "")}, "empty"),
        ("no row", "expected an object"),
    ]
    for change, reason in changes:
        reader = open_source(str(write_rows([rows[0], change], name="changed.jsonl", lines=True)), images=str(pictures))
        item = read_item(reader, planned, language, LENGTH)
        assert item.key == good.key and len(item.tokens.ids) == planned.tokens
        assert item.pixels == [] and item.tokens.supervised == 0
        assert len(item.faults) == 1 and reason in item.faults[0].reason and item.faults[0].row == 1
        batch = collate([good, item, good])
        assert batch.samples == 3 and len(batch.rows) == 2 * good.tokens.supervised


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_worker_come_as_they_are(source, language, workers):
    class Failing:
        name = "failing"

        def __len__(self):
            return 60

        def __getitem__(self, row):
            raise ValueError("shard 7 is torn")

        def fingerprint(self):
            return ""

    plan = Plan(build_index([source], language, LENGTH), batch=8, length=LENGTH)
    with pytest.raises(ValueError, match=r"^shard 7 is torn$"):
        list(load(plan, [Failing()], language, workers=workers))


def test_images_of_differing_size_in_tokens(source):
    language = make_language(needs_size=True)
    plan = Plan(build_index([source], language, LENGTH), batch=60, length=LENGTH)
    for batch in next(load(plan, [source], language)):
        widths = {"a.png": 4, "b.jpg": 6, "c.png": 8}
        expected = sum(widths[image.path.rsplit("/")[-1]] for _, row in batch.keys for image in source[row].images)
        assert int((batch.ids == IMAGE_TOKEN).sum()) == expected
