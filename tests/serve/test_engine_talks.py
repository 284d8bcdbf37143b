"""Conversations that go on: most of each is not read again, and nobody can tell by the words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.each_family import each_family, folders_in
from tests.made import WORDS, noise_in, stage0
from tests.serve.loads import Listener, asked, check_parity
from vistune.models.load import Loaded, load
from vistune.samples import Image
from vistune.serve.answering.engine import Engine
from vistune.serve.limits import Limits
from vistune.serve.work import Work

SIZES = [(70, 40), (56, 56)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return noise_in(tmp_path_factory.mktemp("pictures"), SIZES)


def talks(loaded: Loaded, pictures: Sequence[Image], seed: int) -> list[list[Work]]:
    """Conversations that go on, with pictures from the first question on; each is answered before the next is asked."""
    made = random.Random(seed)
    found = []
    for number in range(5):
        turns = [" ".join(made.choices(WORDS.split(), k=made.randint(5, 30))) for _ in range(5)]
        seen = pictures[: number % 3]
        found.append([asked(loaded, turns[: 2 * i + 1], seen, max_new_tokens=10) for i in range(3)])
    return found


def check_talks(loaded: Loaded, pictures: Sequence[Image], **limits: Any) -> Engine:
    """Several at a time: what they say is what each question alone is told, though most of it is not read again."""
    engine = Engine(loaded, Limits(rows=4, prefill_ms=5, **limits), "tiny")
    engine.start()
    for works in zip(*talks(loaded, pictures, 3), strict=True):
        heard = [Listener() for _ in works]
        for work, one in zip(works, heard, strict=True):
            engine.submit(work, one)
        check_parity(loaded, works, heard)
    engine.stop()
    return engine


def test_conversations_that_go_on_are_answered_as_if_they_were_read_whole(tmp_path, pictures):
    loaded = load(stage0(tmp_path / "model"))
    engine = check_talks(loaded, pictures)
    state = engine.state()
    asked_for = sum(len(work.ids) for one in talks(loaded, pictures, 3) for work in one)
    assert asked_for / 4 < state.tokens_again < asked_for and state.prefix_tokens % 32 == 0 < state.prefix_tokens
    assert check_talks(loaded, pictures, prefixes=0).state().tokens_again == 0


@pytest.mark.slow
@each_family
def test_conversations_that_go_on_in_every_family(name, tmp_path_factory, pictures):
    loaded = load(folders_in(tmp_path_factory.mktemp("families"))(name))
    assert check_talks(loaded, pictures).state().tokens_again > 100
