"""Text to token ids word by word, for tokenizers that provably never join two words: the same ids, at less cost.

Knows Llama-like BPE only; for any other tokenizer there is no cache, and the backend does the work.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_SPACE = "▁"
_WORD = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_HELD = 1 << 20
"""Tokens held before the cache starts anew: some 100 MB, and more words than most data has."""
_TEXT = 1 << 19
"""Room beyond that for one text; longer ones (a book in a row) go to the backend."""

_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


class WordCache:
    """Tokenizes as `Tokenizer` does, each distinct word once.

    It rests on this: a BPE piece comes from merges alone, so where no merge puts a space mark after another character,
    no piece crosses from a word to the next, and the ids of a text are those of its words in a row.
    """

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]):
        """Of a `backend` whose JSON, `spec`, `fits`."""
        self._each = bool(spec["normalizer"])  # a prefix for every piece between added tokens, else for the very first
        self._table = _Table(Tokenizer(backend.model))  # shares the merges, and nothing that is around them
        self._added = [(token["content"], token["id"]) for token in spec["added_tokens"]]
        longest_first = sorted((re.escape(content) for content, _ in self._added), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(longest_first) + ")") if longest_first else None
        self._before = _before(backend)
        self._begin()

    def _begin(self) -> None:
        self._table.clear()
        self._marks = {content: self._table.add([id], [(0, len(content))], len(content)) for content, id in self._added}
        self._start = self._table.add(self._before, [(0, 0)] * len(self._before), 0)
        self._words, self._firsts = _Words(self._table, prefixed=False), _Words(self._table, prefixed=True)

    def takes(self, text: str) -> bool:
        """Whether there is room for its words, even if all of them are new."""
        return _room(text) < _TEXT

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 ids, and where in `text` each begins and ends (characters), special tokens before them.

        The first piece gets a prefix space even where it begins with a space, as slow tokenizers gave it.
        """
        if self._table.tokens > _HELD:
            self._begin()
        found = [self._start]
        for number, piece in enumerate(self._cut.split(text) if self._cut else [text]):
            if number % 2:
                found.append(self._marks[piece])
            elif piece:
                spaced = piece.replace(" ", _SPACE)
                if self._each or not number:
                    first, *words = _WORD.findall(_SPACE + spaced)
                    found.append(self._firsts[first])
                else:
                    words = _WORD.findall(spaced)
                found += map(self._words.__getitem__, words)
        return self._table.joined(np.array(found))


def _room(text: str) -> int:
    return 4 * len(text) + 16  # a character is at most four bytes, and each at most a token


def _before(backend: Tokenizer) -> list[int]:
    """Ids that the post-processor puts in front of every text."""
    made = backend.encode("a")
    return [id for id, added in zip(made.ids, made.special_tokens_mask, strict=True) if added]


class _Table:
    """Entries, each a word with its tokens, in arrays that grow at their ends."""

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        self.clear()

    def clear(self) -> None:
        self.entries = self.tokens = 0
        self._first, self._count, self._length = (np.zeros(_HELD + _TEXT, np.int32) for _ in range(3))  # of each entry
        self._ids, self._starts, self._ends = (np.zeros(_HELD + _TEXT, np.int32) for _ in range(3))  # of each token

    def add(self, ids: list[int], places: list[tuple[int, int]], length: int) -> int:
        """The number of a new entry: tokens, where each stands in the word, and how long that is in the text."""
        number, start, stop = self.entries, self.tokens, self.tokens + len(ids)
        self._first[number], self._count[number], self._length[number] = start, len(ids), length
        if ids:
            self._ids[start:stop] = ids
            self._starts[start:stop], self._ends[start:stop] = zip(*places, strict=True)
        self.entries, self.tokens = number + 1, stop
        return number

    def joined(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 ids, starts and ends of the tokens of `entries`, one after the other."""
        counts, lengths = self._count[entries], self._length[entries]
        stops = np.cumsum(counts)
        tokens = np.repeat(self._first[entries] - (stops - counts), counts) + np.arange(stops[-1])
        places = np.repeat(np.cumsum(lengths) - lengths, counts)
        return self._ids[tokens].astype(np.int64), self._starts[tokens] + places, self._ends[tokens] + places


class _Words(dict[str, int]):
    """Word -> entry, tokenized when it is first met. `prefixed`: its first character stands for none in the text."""

    def __init__(self, table: _Table, *, prefixed: bool):
        super().__init__()
        self._table, self._prefixed = table, prefixed

    def __missing__(self, word: str) -> int:
        made = self._table.backend.encode(word, add_special_tokens=False)
        places = made.offsets
        if self._prefixed:  # the prefix space goes with the first character
            places = [(max(0, start - 1), max(1, start, end - 1)) for start, end in places]
        self[word] = number = self._table.add(made.ids, places, len(word) - self._prefixed)
        return number


def fits(backend: Tokenizer, spec: dict[str, Any]) -> bool:
    """Whether `backend`, whose JSON is `spec`, has words that are independent, and spaced in a way known here."""
    model, normalizer, cut = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
    first = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
    spaced = (normalizer is None and cut == first) or (
        cut is None and normalizer == {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
    )
    return bool(
        spaced
        and model["type"] == "BPE"
        and not any(model.get(key) for key in _NOT_THESE)
        and model.get("byte_fallback")
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and all(_plain(token, normalizer is None) for token in spec["added_tokens"])
        and len({token["normalized"] for token in spec["added_tokens"]}) <= 1
        and not any(_SPACE in _joint(merge).lstrip(_SPACE) for merge in model["merges"])
        and not backend.encode("a").special_tokens_mask[-1]  # nothing is put behind a text
    )


_NOT_THESE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def _plain(token: dict[str, Any], normalized: bool) -> bool:
    """An added token that is matched as it is written."""
    odd = token["single_word"] or token["lstrip"] or token["rstrip"] or not token["content"]
    return not odd and (normalized or not token["normalized"])


def _joint(merge: str | list[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
