"""Many questions at once: read in threads ahead of the model, answered in batches of near lengths, longest first.

Knows nothing of benchmarks: a question is a text with pictures. Answers come as they are made.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch

from vistune import console, images
from vistune.decoding import Prompt, Settings, Shown, asked, decode, laid, marked, shown
from vistune.models.load import Loaded
from vistune.samples import IMAGE_ID, Image, Message
from vistune.speech import spoken

Question = tuple[str, Sequence[Image]]
"""A question with its images. Marks in the text say where they go; without marks they come first."""

WINDOW = 8192
"""Questions that are put in order at a time: enough to find those of one length, few enough to begin at once and to
hold."""
AHEAD = 4
"""Batches whose pictures are read before the model needs them."""
HELD = 1 << 29
"""Bytes of pictures that are remembered, for questions about the same one."""
THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Said:
    """What was said to a question. `tokens`: how many; `margin`: the smallest gap between the two best logits of its
    steps, None where nobody knows; `error`: why nothing was said."""

    text: str = ""
    tokens: int = 0
    margin: float | None = None
    error: str = ""


@dataclass
class _Asked:
    """One question on its way: where it stands, its ids with `IMAGE_ID` for each picture, its length with them laid."""

    at: int
    ids: array[int]
    pictures: Sequence[Image]
    length: int
    reading: list[Future[Shown]] = field(default_factory=list)


def answers(
    loaded: Loaded, questions: Sequence[Question], max_new_tokens: int = 128, batch: int = 8
) -> Iterator[tuple[int, Said]]:
    """Greedy answers with the places of their questions, as they are made; they do not depend on `batch`.

    A question that cannot be asked (a picture that cannot be read, marks that do not match) gives its error, and the
    others go on. Where the memory does not hold a batch, smaller ones are asked. ValueError when it holds not even one.
    """
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "pictures")
    try:
        reader = _Reader(loaded, pool)
        for start in range(0, len(questions), WINDOW):
            ready: list[_Asked] = []
            for found in _put(loaded, questions, range(start, min(start + WINDOW, len(questions))), reader):
                if isinstance(found, _Asked):
                    ready.append(found)
                else:
                    yield found
            ready.sort(key=lambda one: -one.length)
            for some in _read_ahead([ready[i : i + batch] for i in range(0, len(ready), batch)], reader):
                yield from _answered(loaded, some, Settings(max_new_tokens=max_new_tokens))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _put(
    loaded: Loaded, questions: Sequence[Question], places: range, reader: _Reader
) -> Iterator[_Asked | tuple[int, Said]]:
    """Each of these questions as it is put to the model; or, with its place, why it cannot be."""
    lengths = reader.lengths([picture for at in places for picture in questions[at][1]])
    for at in places:
        words, pictures = questions[at]
        try:
            ids = asked(loaded, [Message(role="user", text=marked(words, pictures))], len(pictures))
            length = len(ids) - ids.count(IMAGE_ID) + sum(lengths[picture].result() for picture in pictures)
        except ValueError as error:
            yield at, Said(error=str(error))
        else:
            yield _Asked(at, array("q", ids), pictures, length)


class _Reader:
    """Pictures read in threads; one that is asked about again, while it is remembered, is not read again."""

    def __init__(self, loaded: Loaded, pool: ThreadPoolExecutor):
        self.loaded, self.pool = loaded, pool
        self.known: OrderedDict[Image, Future[Shown]] = OrderedDict()
        self.held, self.lock = 0, Lock()

    def lengths(self, pictures: Sequence[Image]) -> dict[Image, Future[int]]:
        """How many tokens each becomes, from its header where that matters."""
        layout = self.loaded.layout
        if not layout.needs_size:
            same: Future[int] = Future()
            same.set_result(layout.tokens(0, 0))
            return dict.fromkeys(pictures, same)
        each = dict.fromkeys(pictures)
        return {one: self.pool.submit(_tokens, layout, one) for one in each}

    def read(self, picture: Image) -> Future[Shown]:
        """The picture, soon. Those least recently wanted are forgotten when too much is held."""
        found = self.known.get(picture)
        if found is None:
            found = self.known[picture] = self.pool.submit(shown, self.loaded, picture)
            found.add_done_callback(self._count)
        self.known.move_to_end(picture)
        while self.held > HELD and (oldest := next(iter(self.known.values()))) is not found and oldest.done():
            self.known.popitem(last=False)
            with self.lock:
                self.held -= _bytes(oldest)
        return found

    def _count(self, done: Future[Shown]) -> None:
        with self.lock:
            self.held += _bytes(done)


def _tokens(layout: images.Layout, picture: Image) -> int:
    return layout.tokens(*images.image_size(picture))


def _bytes(read: Future[Shown]) -> int:
    """What a picture that was read holds; nothing when it is not there."""
    there = read.done() and not read.cancelled() and read.exception() is None
    return read.result().pixels.nbytes if there else 0


def _read_ahead(batches: Sequence[list[_Asked]], reader: _Reader) -> Iterator[list[_Asked]]:
    """The batches, while the pictures of those that follow are being read."""
    waiting: deque[list[_Asked]] = deque()
    for some in batches:
        for one in some:
            one.reading = [reader.read(picture) for picture in one.pictures]
        waiting.append(some)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _answered(loaded: Loaded, some: Sequence[_Asked], settings: Settings) -> Iterator[tuple[int, Said]]:
    """The answers of one batch, and the errors of those whose pictures could not be read."""
    prompts: list[tuple[int, Prompt]] = []
    for one in some:
        try:
            seen = [reading.result() for reading in one.reading]
        except ValueError as error:
            yield one.at, Said(error=str(error))
        else:
            prompts.append((one.at, laid(loaded, one.ids, seen)))
        one.reading = []  # what the model has seen need not be held
    yield from _fitting(loaded, prompts, settings)


def _fitting(loaded: Loaded, prompts: Sequence[tuple[int, Prompt]], settings: Settings) -> Iterator[tuple[int, Said]]:
    """The answers, in as many batches as the memory makes necessary."""
    if not prompts:
        return
    try:
        found = decode(loaded, [one for _, one in prompts], settings)
    except torch.OutOfMemoryError:
        found = []
    if not found:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        if len(prompts) == 1:
            raise ValueError(
                f"out of memory over one question of {len(prompts[0][1].ids):,} tokens; add --quantize 4bit, "
                "or ask where there is more memory"
            )
        console.warn(f"out of memory over {len(prompts)} questions at once; they are asked in two halves")
        half = (len(prompts) + 1) // 2
        for part in (prompts[:half], prompts[half:]):
            yield from _fitting(loaded, part, settings)
        return
    for (at, _), new in zip(prompts, found, strict=True):
        yield at, Said(text=spoken(loaded, new.ids), tokens=len(new.ids), margin=new.margin)
