"""The benchmarks, found by name: one file of this package each."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from vistune.evaluate import official
from vistune.evaluate.items import Answer, Question, Result
from vistune.evaluate.judge import Reply, Request
from vistune.evaluate.official import Place

PROTOCOL = "llava-official"
"""Prompts, greedy decoding, parsing and arithmetic as LLaVA-1.5's published scores were made."""

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA-1.5 adds to a question, to have the answer in that form (arXiv 2310.03744, section 3.2)."""


class Benchmark(ABC):
    """One benchmark: where its files are, how it asks, how it scores.

    A module of this package has one or more subclasses, each under its own `name`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """As its authors write it."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other names that people type."""
    folders: ClassVar[tuple[str, ...]]
    """What LLaVA calls its folder below playground/data/eval."""
    published: ClassVar[int | None] = None
    """Questions of the published set, where it is known for certain; None otherwise."""
    max_new_tokens: ClassVar[int] = 128
    """As LLaVA's scripts give it: 128 for short answers, 1,024 for long ones."""
    protocol: ClassVar[str] = PROTOCOL
    judged: ClassVar[bool] = False
    """Scored by another model (`vistune.evaluate.judge`)."""
    server: ClassVar[str] = ""
    """Who scores what `submission` writes, where the official score is made elsewhere."""

    @abstractmethod
    def questions(self, place: Place) -> list[Question]:
        """All questions in the benchmark's order. ValueError for a file that is missing or broken."""

    @abstractmethod
    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        """What these answers score by the official rule; what the rule does with a missing or a second answer included.

        Where no answers are published (a hidden test set), `scores` is empty and `submission` is what there is.
        """

    def read(self, path: Path) -> tuple[list[Answer], list[str]]:
        """What `score` is given: a file of answers, or of reviews made elsewhere, and the lines that are neither."""
        return official.answers(path)

    def tokens(self, place: Place) -> int:
        """The longest answer in tokens; a user's own benchmark says it beside its questions."""
        return self.max_new_tokens

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """Write what the official server takes into the folder `out`; returns the files. Most have none.

        ValueError where the server would refuse it (an answer that is missing).
        """
        return []


class Judged(Benchmark):
    """A benchmark that another model scores. `score` reads a file of reviews, or has no scores without a judge."""

    judged: ClassVar[bool] = True

    @abstractmethod
    def requests(self, place: Place, answers: Sequence[Answer]) -> list[Request]:
        """What the judge is asked, one request for each answer."""

    @abstractmethod
    def reviewed(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply]) -> Result:
        """What the judge's replies (by the request's id) amount to. One that failed, or cannot be read, is counted
        under remarks["failed"] and scores nothing, neither for nor against; `answered` counts what was judged."""

    def reviews(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply], out: Path) -> list[Path]:
        """Write the replies into the folder `out` as the official scorer keeps them; returns the files."""
        return []


@cache
def benchmarks() -> dict[str, Benchmark]:
    """All of them by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    kinds = [kind for below in Benchmark.__subclasses__() for kind in _named(below)]
    return {kind.name: kind() for kind in sorted(kinds, key=lambda kind: kind.name)}


def named(name: str) -> Benchmark:
    """The benchmark of that name, case and hyphens apart. ValueError that names the nearest."""
    known = benchmarks()
    names = {_plain(other): one for one in known.values() for other in (one.name, one.title, *one.also)}
    if (found := names.get(_plain(name))) is not None:
        return found
    near = difflib.get_close_matches(_plain(name), names, n=1)
    hint = f"Did you mean {names[near[0]].name}?" if near else f"Known: {', '.join(known)}."
    raise ValueError(f"benchmark {name!r}: there is none of that name. {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _named(kind: type[Benchmark]) -> list[type[Benchmark]]:
    """`kind` and what is below it, as far as it has a name."""
    found = [one for below in kind.__subclasses__() for one in _named(below)]
    return found + ([kind] if "name" in vars(kind) else [])
