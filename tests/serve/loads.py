"""Requests to an engine, many at once, and what each of them is told alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.made import WORDS
from vistune.decoding import Prompt, Settings, decode, marked, prompt, shown
from vistune.models.load import Loaded
from vistune.samples import Image, Message
from vistune.serve.answering.engine import Engine
from vistune.serve.limits import Limits
from vistune.serve.work import Ended, Piece, Work
from vistune.speech import spoken


class Listener:
    """Hears an answer, in the engine's thread."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ends: list[Ended] = []
        self.over = threading.Event()

    def __call__(self, said: Piece | Ended) -> None:
        assert not self.ends
        if isinstance(said, Ended):
            self.ends.append(said)
            self.over.set()
        else:
            self.pieces.append(said)

    @property
    def text(self) -> str:
        return "".join(one.text for one in self.pieces)

    def end(self, seconds: float = 60.0) -> Ended:
        assert self.over.wait(seconds), "never ended"
        return self.ends[0]


def asked(loaded: Loaded, turns: Sequence[str], seen: Sequence[Image], **how: Any) -> Work:
    """A conversation whose pictures come with its first question."""
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role=role, text=text) for role, text in zip(roles, turns, strict=False)]
    messages[0] = replace(messages[0], text=marked(messages[0].text, seen))
    made = prompt(loaded, messages, seen)
    settings = Settings(**{key: how.pop(key) for key in list(how) if key in vars(Settings())})
    each = tuple(shown(loaded, one) for one in seen)
    digests = tuple(str(one.path).encode() for one in seen)
    return Work(ids=made.ids, settings=settings, pictures=each, digests=digests, **how)


def alone(loaded: Loaded, work: Work) -> tuple[str, int, float]:
    """The text of one request's `decode`, its tokens and its margin."""
    made = Prompt(work.ids, [one.pixels for one in work.pictures], [one.grid for one in work.pictures if one.grid])
    new = decode(loaded, [made], work.settings)[0]
    return spoken(loaded, new.ids), len(new.ids), new.margin


def some(loaded: Loaded, pictures: Sequence[Image], count: int, seed: int, most: int = 24) -> list[Work]:
    """Requests with and without pictures, of one to three turns, greedy and sampled."""
    made = random.Random(seed)
    found = []
    for i in range(count):
        turns = [" ".join(made.choices(WORDS.split(), k=made.randint(1, 40))) for _ in range(made.choice([1, 1, 3]))]
        seen = [made.choice(pictures) for _ in range(made.choice([0, 1, 1, 2]))]
        how = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 5 == 4 else {}
        found.append(asked(loaded, turns, seen, max_new_tokens=made.randint(1, most), **how))
    return found


@dataclass
class Seen:
    """What a reader was asked to see."""

    calls: list[int]

    @classmethod
    def by(cls, engine: Engine) -> Seen:
        see: Any = engine.reader.see
        seen = cls([])

        def counted(pictures: Any) -> Any:
            seen.calls.append(len(pictures))
            return see(pictures)

        engine.reader.see = counted  # type: ignore[method-assign]
        return seen


def at_load(loaded: Loaded, works: Sequence[Work], **limits: Any) -> tuple[Engine, list[Listener]]:
    """All of them from four threads, at random times, beside others that leave on the way."""
    engine = Engine(loaded, Limits(**limits), "tiny")
    engine.start()
    heard = [Listener() for _ in works]

    def sends(number: int) -> None:
        pause = random.Random(number)
        for i in range(number, len(works), 4):
            engine.submit(works[i], heard[i])
            leaves = Listener()
            ticket = engine.submit(replace(works[i], settings=Settings(max_new_tokens=50)), leaves)
            time.sleep(pause.random() * 0.02)
            ticket.leave()

    threads = [threading.Thread(target=sends, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in heard:
        one.end()
    return engine, heard


def check_parity(loaded: Loaded, works: Sequence[Work], heard: Sequence[Listener]) -> None:
    near = 0
    for work, one in zip(works, heard, strict=True):
        text, tokens, margin = alone(loaded, work)
        end = one.end()
        if work.settings.temperature == 0 and min(margin, end.margin) < 1e-4:
            near += 1
            continue
        assert one.text == text and end.tokens == tokens
        assert end.reason == "stop" or (end.reason == "length" and tokens == work.settings.max_new_tokens)
        if work.settings.temperature == 0:
            assert end.margin == pytest.approx(margin, abs=1e-4)
    assert near <= 1
