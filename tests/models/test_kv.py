"""Rows that go on together, against the stock classes: whatever order rows are read, moved and grown in."""

from __future__ import annotations

import random

import pytest
import torch
import transformers

from tests.models.test_language_models import KINDS as ASSEMBLED
from tests.tiny import tiny_language
from vistune.models import attention
from vistune.models import language as lm
from vistune.models.attention.rows import Places
from vistune.models.folders import quiet
from vistune.models.kv import Kv

KINDS = ASSEMBLED | {
    "qwen2, some layers with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "layers": 2},
    ),
    "mpt, six heads, clipped": ("mpt", {"heads": 6, "hidden": 48, "attn_config": {"clip_qkv": 2.0}}),
}
TOKENS = 70
QUICK = ("llama-3", "mistral", "mpt, six heads, clipped", "qwen2, some layers with a window")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A causal model by name, and its clone whose attention knows rows."""
    made = {}

    def model(name):
        if name not in made:
            kind, more = KINDS[name]
            folder = tiny_language(tmp_path_factory.mktemp("language"), kind, **more)
            stock, ours = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
            with quiet():
                attention.use(ours)
            made[name] = stock, ours
        return made[name]

    return model


class Run:
    """Requests in rows, each read in pieces; every piece is compared with the stock forward of the whole request."""

    def __init__(self, stock, ours, seed=0):
        self.stock, self.ours, self.draw = stock, ours, random.Random(seed)
        self.kv, self.held, self.checked = Kv(torch.device("cpu")), {}, 0
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def joins(self, row):
        ids = torch.randint(3, 900, (TOKENS,), generator=self.generator)
        self.held[row] = ids, self.stock(ids[None]).logits[0]

    @torch.inference_mode()
    def read(self, rows, counts, width):
        starts = [self.kv.lengths[row] for row in rows]
        ids = torch.full((len(rows), width), 5)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            ids[i, :count] = self.held[row][0][start : start + count]
        embeds = self.ours.get_input_embeddings()(ids)
        for i, count in enumerate(counts):
            embeds[i, count:] = float("nan")  # nothing may see what stands in padding
        with self.kv.writing(rows, starts, counts, width) as places:
            hidden = lm.go_on(self.ours.base_model, embeds, self.kv, places)
        got = self.ours.get_output_embeddings()(hidden)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            wanted = self.held[row][1][start : start + count]
            assert ((got[i, :count] - wanted).abs() <= 1e-5).all()
            assert self.kv.lengths[row] == start + count
            self.checked += count

    def leaves(self, row):
        del self.held[row]
        self.kv.free(row)

    def trades(self, one, other):
        self.kv.swap(one, other)
        self.held = {{one: other, other: one}.get(row, row): what for row, what in self.held.items()}

    def moves(self, source, target):
        self.kv.move(source, target)
        self.held[target] = self.held.pop(source)

    def acts(self):
        """One thing that may happen between two calls of the model, by chance."""
        free, used = [row for row in range(self.kv.rows) if row not in self.held], list(self.held)
        what = self.draw.choice(["joins", "joins", "leaves", "moves", "trades", "grows", "shrinks"])
        if what == "joins" and free:
            self.joins(self.draw.choice(free))
        elif what == "leaves" and len(used) > 1:
            self.leaves(self.draw.choice(used))
        elif what == "moves" and free and used:
            self.moves(self.draw.choice(used), self.draw.choice(free))
        elif what == "trades" and self.kv.rows > 1:
            self.trades(*self.draw.sample(range(self.kv.rows), 2))
        elif what == "grows":
            self.kv.reserve(self.draw.randint(1, 6), self.draw.randint(1, TOKENS))
        elif what == "shrinks":
            self.kv.shrink(max(self.held, default=0) + 1, max(self.kv.lengths, default=0))

    def reads_some(self):
        self.kv.reserve(0, max((self.kv.lengths[row] for row in self.held), default=0) + 16)
        rows = self.draw.sample(sorted(self.held), self.draw.randint(1, len(self.held)))
        rows = sorted(rows) if self.draw.random() < 0.7 else rows
        width = self.draw.choice([1, 1, 2, 5, 16])
        left = {row: TOKENS - self.kv.lengths[row] for row in rows}
        counts = [min(self.draw.randint(1, width) if self.draw.random() < 0.5 else width, left[row]) for row in rows]
        going = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        if going:
            self.read([row for row, _ in going], [count for _, count in going], width)


@pytest.mark.parametrize("name", EACH)
def test_rows_that_come_and_go_are_each_read_as_the_stock_class_reads_them(models, name):
    run = Run(*models(name), seed=list(KINDS).index(name))
    run.kv.reserve(2, 20)
    run.joins(0)
    for _ in range(40):
        run.acts()
        if run.held:
            run.reads_some()
    assert run.checked > 150


@pytest.mark.parametrize("piece", [1, 5, 16, TOKENS])
def test_a_prompt_read_in_pieces_of_any_size_is_the_same_prompt(models, piece):
    run = Run(*models("mistral"))  # whose window of 9 ends inside pieces, and between them
    run.kv.reserve(1, TOKENS)
    run.joins(0)
    while length := TOKENS - run.kv.lengths[0]:
        run.read([0], [min(piece, length)], min(piece, length))
    assert run.checked == TOKENS


def test_rows_of_different_lengths_are_read_side_by_side(models):
    run = Run(*models("llama-3"))
    run.kv.reserve(4, TOKENS)
    for row in range(4):
        run.joins(row)
    run.read([0, 1, 2, 3], [40, 1, 33, 7], 40)
    for _ in range(20):
        run.read([0, 1, 2, 3], [1] * 4, 1)
    run.read([1, 2], [30, 9], 30)  # neighbours, not from the first on
    run.read([3, 1], [2, 2], 2)
    assert run.kv.lengths == [60, 53, 62, 29]


@pytest.mark.parametrize("name", EACH)
def test_what_was_cut_out_of_a_row_is_laid_into_another_and_goes_on(models, name):
    run = Run(*models(name))
    run.kv.reserve(2, TOKENS)
    run.joins(0)
    run.read([0], [40], 40)
    assert run.kv.alike
    pieces = [run.kv.cut(0, 0, 16), run.kv.cut(0, 16, 37)]
    for kv in (run.kv, Kv(torch.device("cpu"))):  # a row that held another request's, and one before any layer
        kv.reserve(3, 50)
        run.kv, run.held = kv, {2: run.held[0], 0: run.held[0]}
        kv.lay(2, pieces)
        run.read([2], [8], 8)
        kv.reserve(3, TOKENS)
        run.read([2], [25], 25)
        assert run.kv.lengths[2] == TOKENS
        kv.lay(2, pieces[:1])
        run.read([2], [30], 30)
        run.leaves(2)


def test_what_a_row_held_can_not_reach_the_next_request(models):
    """Not even a number that is none: what is not seen is multiplied by 0, and 0 times infinity is not 0."""
    run = Run(*models("qwen3"))
    run.kv.reserve(3, TOKENS)

    def overflows(row):
        run.kv.free(row)
        with torch.inference_mode(), run.kv.writing([row], [0], [50], 50) as places:
            lm.go_on(run.ours.base_model, torch.full((1, 50, 64), float("inf")), run.kv, places)
        assert all(tensor[row, :, :50].isnan().any() for tensor in run.kv._tensors())

    overflows(0)
    run.joins(0)
    run.kv.free(0)
    run.read([0], [30], 30)
    overflows(2)
    run.moves(0, 2)
    run.read([2], [3], 3)
    overflows(1)
    run.trades(1, 2)
    run.kv.free(2)
    for row in (0, 2):
        run.joins(row)
    run.read([0, 1, 2], [1, 1, 1], 1)


@pytest.mark.parametrize("name", ["llama-3", "mistral", "mpt"])
@pytest.mark.parametrize("piece", [3, 8])
def test_many_new_positions_attend_in_pieces(models, monkeypatch, name, piece):
    monkeypatch.setattr(attention.rows, "PIECE", piece)
    run = Run(*models(name))
    run.kv.reserve(4, TOKENS)
    for row in range(4):
        run.joins(row)
    run.read([3], [40], 40)
    run.read([0, 1, 2], [22, 1, 9], 22)
    run.read([0, 3], [17, 30], 30)
    run.read([0, 1, 2], [16, 16, 16], 16)
    assert run.checked == 40 + 32 + 47 + 48


def test_after_a_call_that_failed_rows_end_where_they_did(models):
    run = Run(*models("llama-3"))
    run.kv.reserve(2, TOKENS)
    for row in (0, 1):
        run.joins(row)
    run.read([0], [30], 30)
    layer = run.ours.base_model.layers[1]
    fails = layer.register_forward_hook(lambda *_: 1 / 0)
    for rows in ([0], [0, 1], [1]):
        with pytest.raises(ZeroDivisionError):
            run.read(rows, [20] * len(rows), 20)
    fails.remove()
    assert run.kv.lengths == [30, 0]
    run.read([0, 1], [3, 3], 3)
    run.read([0, 1], [1, 1], 1)
    run.kv.free(0)
    assert not any(tensor[0].any() for tensor in run.kv._tensors())


def test_padding_stands_where_the_last_new_position_does():
    """Not beyond it: what is made for the longest position in sight is made for none that is not there."""
    places = Places([0, 7, 30], [5, 1, 3], 5, 64, torch.device("cpu"))
    assert places.positions.tolist() == [[0, 1, 2, 3, 4], [7] * 5, [30, 31, 32, 32, 32]]
    assert places.longest == 33 and places.seen == 64
    hidden = places.mask(torch.float32, None)
    assert (hidden[:, 0] == 0).sum(2).tolist() == [[1, 2, 3, 4, 5], [8] * 5, [31, 32, 33, 33, 33]]


def test_neighbours_are_read_where_they_lie():
    kv = Kv(torch.device("cpu"))
    kv.reserve(4, 100)
    new = torch.randn(2, 3, 1, 8)
    with kv.writing([1, 2], [0, 0], [1, 1], 1):
        keys, _ = kv.update(new, new, 0)
        assert keys.untyped_storage().data_ptr() == kv._layers[0][0].untyped_storage().data_ptr()
        assert torch.equal(keys[:, :, :1], new)
    with kv.writing([3, 0], [0, 0], [1, 1], 1):
        keys, _ = kv.update(new, new, 0)
        assert keys.untyped_storage().data_ptr() != kv._layers[0][0].untyped_storage().data_ptr()
        assert torch.equal(keys[:, :, :1], new) and torch.equal(kv._layers[0][0][3, :, :1], new[0])


def test_room_is_what_was_asked_for_and_is_given_back():
    kv = Kv(torch.device("cpu"))
    kv.reserve(2, 10)
    assert kv.nbytes == 0
    with kv.writing([0], [0], [1], 1):
        for layer in range(2):
            kv.update(torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8), layer)
    one = 2 * 2 * 3 * 8 * 4
    assert (kv.rows, kv.room, kv.nbytes, len(kv)) == (2, 10, 20 * one, 2)
    kv.reserve(1, 30)
    assert (kv.rows, kv.room, kv.nbytes) == (2, 30, 60 * one)
    kv.reserve(5, 7)
    assert (kv.rows, kv.room, kv.nbytes) == (5, 30, 150 * one)
    kv.shrink(1, 1)
    assert (kv.rows, kv.room, kv.nbytes, kv.lengths) == (1, 1, one, [1])
    assert all(tensor.eq(1).all() for tensor in kv._tensors())


def test_mistakes_of_ours_are_found_at_once():
    kv = Kv(torch.device("cpu"))
    kv.reserve(2, 4)
    for rows, starts, counts in [([0, 0], [0, 0], [1, 1]), ([2], [0], [1]), ([0], [1], [1]), ([0], [0], [5])]:
        with pytest.raises(AssertionError), kv.writing(rows, starts, counts, max(counts)):
            pass
    with pytest.raises(AssertionError, match="no rows"):
        kv.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    with kv.writing([1], [0], [3], 3):
        kv.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    for rows, tokens in [(1, 4), (2, 2)]:
        with pytest.raises(AssertionError, match="in use"):
            kv.shrink(rows, tokens)
