"""Transforms that change what belongs to one conversation: merged, split, repeated, shortened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field, model_validator

from vistune.data.reading.json_members import hash64
from vistune.data.transforms import register
from vistune.data.transforms.rounds import (
    Rounds,
    image_key,
    marked,
    rounds_of,
    signed,
    unmarked,
    with_rounds,
)
from vistune.data.transforms.scan import Scan
from vistune.data.transforms.step import Step, Table, Unfit
from vistune.samples import IMAGE_MARK, Sample


@register("merge_by_image")
class MergeByImage(Step):
    """The rounds of all rows with the same picture as one conversation, its mark once, in the first question.

    `rounds`: no conversation has more (0: no limit); what is over begins another one. `apart`: a note that must be the
    same too, such as `repeat`. Rows without pictures, and rows that are no questions with answers, stay as they are.
    """

    rounds: int = Field(0, ge=0)
    apart: str = ""

    def table(self, scan: Scan) -> Table:
        found, unusable = scan(self.look, 2)
        keys, rounds = found[:, 0], found[:, 1]
        alone = np.flatnonzero(unusable | (rounds == 0))
        groups = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        groups[alone] = groups.max(initial=-1) + 1 + np.arange(len(alone))
        order = np.argsort(groups, kind="stable")
        begins = np.flatnonzero(np.append(True, groups[order][1:] != groups[order][:-1])) if len(order) else alone
        if self.rounds:
            begins = self._cut(begins, rounds[order])
        return _in_order_of_first(order, begins)

    def look(self, sample: Sample) -> tuple[int, int]:
        """(key of what is merged with it, its rounds; 0 for a row that is merged with none)."""
        rounds = rounds_of(sample)
        if rounds is None or not sample.images:
            return 0, 0
        apart = repr(sample.notes.get(self.apart)) if self.apart else ""
        system = rounds.system[0].text if rounds.system else ""
        return signed(hash64(f"{image_key(sample.images)}\0{apart}\0{system}")), len(rounds.pairs)

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        first = samples[0]
        if len(samples) == 1:
            return first
        if any(sample.images != first.images for sample in samples):
            raise Unfit("pictures changed since the table was made; remove it from the cache")
        several = [rounds_of(sample) for sample in samples]
        if any(rounds is None for rounds in several):
            raise Unfit("a row is no longer questions with answers; remove the table from the cache")
        whole = [rounds for rounds in several if rounds is not None]
        pairs = [
            (question if not number else unmarked(question), answer)
            for number, rounds in enumerate(whole)
            for question, answer in rounds.pairs
        ]
        if pairs[0][0].count(IMAGE_MARK) != len(first.images):
            pairs = [(unmarked(question), answer) for question, answer in pairs]
            pairs[0] = (marked(pairs[0][0], len(first.images)), pairs[0][1])
        notes = [note for rounds in whole for note in rounds.notes]
        shared = {key: value for key, value in first.notes.items() if _same(key, value, samples)}
        return with_rounds(replace(first, notes=shared), Rounds(whole[0].system, pairs, notes))

    def _cut(self, begins: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        """Where conversations begin when none may have more rounds than `rounds`; a longer row stays whole."""
        new, total, starts = [], 0, set(begins.tolist())
        for place, count in enumerate(rounds.tolist()):
            if place in starts or total + count > self.rounds:
                new.append(place)
                total = 0
            total += count
        return np.array(new, np.int64)


def _same(key: str, value: object, samples: Sequence[Sample]) -> bool:
    return all(key in sample.notes and sample.notes[key] == value for sample in samples)


def _in_order_of_first(order: np.ndarray, begins: np.ndarray) -> Table:
    """Groups of rows, `order[begins[g] : begins[g + 1]]`, sorted by their first row."""
    counts = np.diff(np.append(begins, len(order)))
    by_first = np.argsort(order[begins], kind="stable")
    starts = np.append(0, np.cumsum(counts[by_first])).astype(np.int64)
    within = np.arange(len(order)) - np.repeat(starts[:-1], counts[by_first])
    return Table(order[np.repeat(begins[by_first], counts[by_first]) + within], starts)


@register("split_turns")
class SplitTurns(Step):
    """Conversations of `rounds` rounds or more in segments of fewer. Each segment has the system text, and shows in its
    first question the pictures that were shown before it."""

    rounds: int = Field(ge=2)

    def table(self, scan: Scan) -> Table:
        found, unusable = scan(_rounds_in, 1)
        pieces = np.maximum(1, -(-found[:, 0] // (self.rounds - 1)))
        pieces[unusable] = 1
        parents = np.repeat(np.arange(len(scan)), pieces)
        parts = np.arange(len(parents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return Table(parents, parts=parts.astype(np.int32))

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        rounds = rounds_of(sample)
        if rounds is None or len(rounds.pairs) < self.rounds:
            return sample
        start, stop = part * (self.rounds - 1), (part + 1) * (self.rounds - 1)
        if start >= len(rounds.pairs):
            raise Unfit("it has fewer rounds than when the table was made; remove it from the cache")
        shown = sum(question.count(IMAGE_MARK) for question, _ in rounds.pairs[:start]) if sample.images else 0
        pairs = list(rounds.pairs[start:stop])
        images = sample.images[: shown + sum(question.count(IMAGE_MARK) for question, _ in pairs)]
        if shown:
            pairs[0] = ((f"{IMAGE_MARK}\n" * shown + pairs[0][0]), pairs[0][1])
        segment = Rounds(rounds.system, pairs, rounds.notes[start:stop])
        return with_rounds(sample, segment, images=images, id=f"{sample.id}/{part}" if part else sample.id)


def _rounds_in(sample: Sample) -> tuple[int]:
    rounds = rounds_of(sample)
    return (len(rounds.pairs) if rounds else 0,)


@register("repeat_choices")
class RepeatChoices(Step):
    """A multiple-choice question once for each of its options (notes `choices`, and `answer`, the right one's number).

    `rotate`: the options move on from one to the next, so that the right one stands at each place once. Rows without
    options come once. The note `repeat` counts the copies.
    """

    rotate: bool = False

    def table(self, scan: Scan) -> Table:
        found, unusable = scan(_choices_in, 1)
        copies = np.maximum(1, found[:, 0])
        copies[unusable] = 1
        parents = np.repeat(np.arange(len(scan)), copies)
        parts = np.arange(len(parents)) - np.repeat(np.cumsum(copies) - copies, copies)
        return Table(parents, parts=parts.astype(np.int32))

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        choices, answer = sample.notes.get("choices"), sample.notes.get("answer")
        notes = {**sample.notes, "repeat": part}
        if self.rotate and isinstance(choices, list | tuple) and choices:
            if not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise Unfit(f"note answer is {answer!r}, which is none of its {len(choices)} options")
            if sample.notes.get("prompted"):
                raise Unfit("its options stand in its text already; rotate them before the step 'prompt'")
            by = (answer - part) % len(choices)  # so that the right one comes to stand at `part`
            notes |= {"choices": [*choices[by:], *choices[:by]], "answer": part}
        return replace(sample, notes=notes, id=f"{sample.id}/{part}" if part else sample.id)


def _choices_in(sample: Sample) -> tuple[int]:
    choices = sample.notes.get("choices")
    return (len(choices) if isinstance(choices, list | tuple) else 0,)


@register("shorten")
class Shorten(Step):
    """Conversations without pictures lose whole rounds from their end until they have no more than `characters` or
    `words`. The first round stays, however long: `data.length` cuts it to the token."""

    characters: int = Field(0, ge=0)
    words: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_of_them(self) -> Shorten:
        if bool(self.characters) == bool(self.words):
            raise ValueError("give either characters or words, and more than 0")
        return self

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        rounds = None if sample.images else rounds_of(_answered(sample))
        if rounds is None:
            return sample
        size = sum(self._size(message.text) for message in rounds.system)
        keep = 0
        for question, answer in rounds.pairs:
            size += self._size(question) + self._size(answer)
            if keep and size > (self.characters or self.words):
                break
            keep += 1
        if keep == len(rounds.pairs):
            return sample
        return with_rounds(sample, Rounds(rounds.system, rounds.pairs[:keep], rounds.notes[:keep]))

    def _size(self, text: str) -> int:
        return len(text) if self.characters else len(text.split())


def _answered(sample: Sample) -> Sample:
    """Without a last question that has no answer: training leaves it out anyway."""
    ends_open = len(sample.messages) > 1 and sample.messages[-1].role == "user"
    return replace(sample, messages=sample.messages[:-1]) if ends_open else sample
