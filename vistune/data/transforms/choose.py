"""Transforms that choose rows: n of them, at most n of a picture, and all but the invalid ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from vistune import console
from vistune.data.order import Permutation
from vistune.data.reading.json_members import hash64
from vistune.data.transforms import register
from vistune.data.transforms.rounds import image_key, signed
from vistune.data.transforms.scan import Scan
from vistune.data.transforms.step import Step, Table
from vistune.samples import Message, Sample


@register("sample")
class TakeSome(Step):
    """`n` rows chosen by chance, in their order; all when there are no more."""

    n: int = Field(ge=1)
    seed: int = 0

    def table(self, scan: Scan) -> Table:
        rows = len(scan)
        if self.n > rows:
            console.warn(f"{scan.reader.name}: sample n = {self.n:,}, but there are {rows:,} rows; all are taken")
        chosen = Permutation(rows, "sample", self.seed)(np.arange(min(self.n, rows)))
        return Table(np.sort(chosen))


@register("per_image")
class PerImage(Step):
    """At most `n` rows of the same picture, chosen by chance, in their order. Rows without a picture all stay."""

    n: int = Field(ge=1)
    seed: int = 0

    def table(self, scan: Scan) -> Table:
        found, unusable = scan(_image_key_of, 2)
        keys, free = found[:, 0], unusable | (found[:, 1] == 0)
        chance = Permutation(len(scan), "per_image", self.seed)(np.arange(len(scan)))
        order = np.lexsort((chance, keys, free))
        place = _place_in_group(keys[order])
        stays = order[free[order] | (place < self.n)]
        return Table(np.sort(stays), left_out=_some({"more of the same picture": len(scan) - len(stays)}))


def _image_key_of(sample: Sample) -> tuple[int, int]:
    return image_key(sample.images), len(sample.images)


def _place_in_group(keys: np.ndarray) -> np.ndarray:
    """int64: 0, 1, 2, ... within every run of equal keys."""
    begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.int64)
    return np.arange(len(keys)) - np.repeat(begins, np.diff(np.append(begins, len(keys))))


Reason = Literal[
    "unreadable",
    "too_short",
    "first_turn",
    "role_order",
    "empty_turn",
    "no_answer",
    "markup",
    "page_remains",
    "special_tokens",
    "words",
    "duplicate",
]

DROPS: tuple[Reason, ...] = get_args(Reason)[1:]  # all but "unreadable"
"""What is left out unless `drops` says otherwise. A row has the first of the reasons that it fits."""

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_MARKUP = re.compile(
    r"</?(?:div|span|p|br|ol|ul|li|pre|code|table|thead|tbody|tr|td|th|svg|path|button|a|h[1-6]|strong|em)"
    r"(?:\s[^<>]*)?/?>|&(?:nbsp|lt|gt|amp|quot|#\d+);",
    re.IGNORECASE,
)
_PAGE = re.compile(
    r"\A\s*\d+ / \d+(?=\n|\Z|[A-Z])|Copy\d+ chars / \d+ words|(?:```\w*|^\w+)Copy code|^Copy code$|^Share Prompt$",
    re.MULTILINE,
)
_SPECIAL = re.compile(r"</?s>|<\|(?:endoftext|im_start|im_end|eot_id)\|>|\[/?INST\]|<<SYS>>|<unk>")


def _turns(sample: Sample) -> tuple[Message, ...]:
    return sample.messages[1:] if sample.messages and sample.messages[0].role == "system" else sample.messages


def _prose(sample: Sample) -> str:
    """What is said, code apart: a tag in a code block is no remains of a web page."""
    return "\n\n".join(_CODE.sub("", message.text) for message in sample.messages)


_FITS: dict[Reason, Callable[[Sample], bool]] = {
    "too_short": lambda sample: len(_turns(sample)) < 2,
    "first_turn": lambda sample: any(turn.role != "user" for turn in _turns(sample)[:1]),
    "role_order": lambda sample: any(
        turn.role != ("user", "assistant")[number % 2] for number, turn in enumerate(_turns(sample))
    ),
    "empty_turn": lambda sample: any(not turn.text.strip() for turn in _turns(sample)),
    "no_answer": lambda sample: not any(turn.role == "assistant" and turn.text.strip() for turn in _turns(sample)),
    "markup": lambda sample: _MARKUP.search(_prose(sample)) is not None,
    "page_remains": lambda sample: any(_PAGE.search(turn.text) for turn in _turns(sample)),
    "special_tokens": lambda sample: any(_SPECIAL.search(turn.text) for turn in sample.messages),
}


@register("drop_invalid")
class DropInvalid(Step):
    """Leaves out conversations for the reasons in `drops`; how many for which is told and kept.

    `words`: with the reason of that name, conversations in which any of them occurs, in whatever letters.
    """

    drops: list[Reason] = Field(default_factory=lambda: list(DROPS))
    words: list[str] = Field(default_factory=list)

    def table(self, scan: Scan) -> Table:
        found, unusable = scan(self.look, 2)
        why, keys = found[:, 0], found[:, 1]
        if "duplicate" in self.drops:
            why = np.where(
                (why == 0) & ~unusable & _seen_before(keys, (why == 0) & ~unusable), self._of("duplicate"), why
            )
        if "unreadable" in self.drops:
            why = np.where(unusable, self._of("unreadable"), why)
        counts = {reason: int((why == self._of(reason)).sum()) for reason in self.drops}
        return Table(np.flatnonzero(why == 0), left_out=_some(counts))

    def look(self, sample: Sample) -> tuple[int, int]:
        """(1 + place of the reason in `drops`, or 0; a hash of what is said, and of the pictures)."""
        turns = "\0".join(f"{message.role}\0{message.text}" for message in sample.messages)
        said = signed(hash64(f"{image_key(sample.images)}\0{turns}"))
        for reason in self.drops:
            fits = self._has_word if reason == "words" else _FITS.get(reason)
            if fits is not None and fits(sample):
                return self._of(reason), said
        return 0, said

    def _of(self, reason: Reason) -> int:
        return 1 + self.drops.index(reason)

    def _has_word(self, sample: Sample) -> bool:
        words = [word.casefold() for word in self.words]
        return any(word in text for text in (m.text.casefold() for m in sample.messages) for word in words)


def _seen_before(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool: whether the key stands at an earlier place already; only places in `among` count."""
    places = np.flatnonzero(among)
    _, first = np.unique(keys[places], return_index=True)
    again = among.copy()
    again[places[first]] = False
    return again


def _some(counts: Mapping[Any, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}
