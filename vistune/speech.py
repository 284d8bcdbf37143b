"""New tokens to text, one at a time: what is certain is said at once, at a cost that does not grow with the answer.

Knows tokenizers and what ends an answer; nothing of models that draw the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from vistune.models.load import Loaded

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_HALF = "\ufffd"
_LONG = 16
"""Tokens of a window that has no border yet, from which on one is looked for inside it."""
_REWRITTEN = 8
"""Characters at the end of a text that a tokenizer which is not local may still change."""


def stop_ids(loaded: Loaded) -> set[int]:
    """Ids that end an answer: the model's and tokenizer's end, and the template's stop where that is one token."""
    model: Any = loaded.model
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {loaded.tokenizer.eos_token_id}
    found.add(loaded.tokenizer.get_added_vocab().get(loaded.template.stop_string))
    return {one for one in found if one is not None}


def spoken(loaded: Loaded, ids: Sequence[int]) -> str:
    """What the ids say, up to what ends an answer, without spaces around it."""
    ends = stop_ids(loaded)
    length = next((i for i, one in enumerate(ids) if one in ends), len(ids))
    said = loaded.tokenizer.decode(ids[:length], skip_special_tokens=True).lstrip()
    stop = loaded.template.stop_string
    return (said.partition(stop)[0] if stop else said).rstrip()


class Tongue:
    """A model's way of speaking: its tokenizer, the ids and the string that end an answer. One serves all answers."""

    def __init__(self, loaded: Loaded):
        self.tokenizer, self.ends = loaded.tokenizer, stop_ids(loaded)
        self.stop = loaded.template.stop_string
        rust: Any = getattr(loaded.tokenizer, "backend_tokenizer", None)
        added = rust.get_added_tokens_decoder() if rust else {}
        self.unheard = {one for one, token in added.items() if token.special}
        self.local = rust is not None and not _cleans(loaded.tokenizer)
        """Whether a token changes nothing of the text but near itself."""
        own = getattr(type(loaded.tokenizer), "_decode", None) is not PreTrainedTokenizerFast._decode
        self._decode = loaded.tokenizer.decode if own or not self.local else rust.decode
        self._alone: dict[int, tuple[str, str]] = {}

    def text(self, ids: Sequence[int]) -> str:
        return str(self._decode(ids, skip_special_tokens=True))

    def alone(self, one: int) -> tuple[str, str]:
        """A token as the vocabulary writes it, empty when it says nothing; and its text where it stands alone."""
        found = self._alone.get(one)
        if found is None:
            token = "" if one in self.unheard else self.tokenizer.convert_ids_to_tokens(one) or ""
            found = self._alone[one] = token, self.text([one])
        return found


def _cleans(tokenizer: Any) -> bool:
    """Whether spaces before marks are taken out of the finished text (of BPE, transformers leaves them)."""
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(tokenizer.clean_up_tokenization_spaces) and (not bpe or forced)


class Speech:
    """One answer. All that `add` and `close` give, joined, is what `spoken` says of the ids, cut before the first of
    `stops`; each piece is certain: no half characters, no beginning of a stop, no space that may end the answer.

    The text is decoded in a window that begins with one token whose text is known, so that a decoder which treats the
    first token otherwise treats that one so. It moves on when no token after it can change what was said before.
    """

    def __init__(self, tongue: Tongue, stops: Sequence[str] = ()):
        self.tongue, self.ended = tongue, False
        self._window: list[int] = []
        self._known = ""  # of the window's text, this is settled
        self._cut = _Cut([stop for stop in (tongue.stop, *stops) if stop])

    def add(self, one: int) -> str:
        """One more token: the text that has become certain. `ended` when it ended the answer; what follows is not
        heard."""
        if self.ended:
            return ""
        if one in self.tongue.ends:
            return self.close()
        token, alone = self.tongue.alone(one)
        if not token and self.tongue.local:
            return ""
        self._window.append(one)
        if token.startswith("<0x") and _BYTE.fullmatch(token):
            return self._byte()
        text = self.tongue.text(self._window)
        sure = self._sure(text, token)
        piece = self._settle(sure)
        if self.tongue.local and not self.ended:
            if len(sure) == len(text):
                self._window, self._known = [one], alone
            elif len(self._window) > _LONG:
                piece += self._split(text)
        return piece

    def close(self) -> str:
        """No more tokens come: the rest of the text."""
        if self.ended:
            return ""
        piece = self._settle(self.tongue.text(self._window)) if self._window else ""
        if not self.ended:
            piece += self._cut.rest()
            self.ended = True
        return piece

    def _sure(self, text: str, token: str) -> str:
        """What no token can change that follows: all but a character that may be a half one."""
        if not self.tongue.local:
            return text[:-_REWRITTEN].rstrip(_HALF)
        return text if _HALF in token else text.rstrip(_HALF)

    def _settle(self, sure: str) -> str:
        """The window's text is certain so far."""
        if len(sure) <= len(self._known):
            return ""
        more, self._known = sure[len(self._known) :], sure
        piece, self.ended = self._cut.add(more)
        return piece

    def _byte(self) -> str:
        """What single bytes say depends on those that follow; only a stop ends the waiting."""
        if not self._cut.stops or not self._cut.within(self.tongue.text(self._window[-self._cut.reach :])):
            return ""
        text = self.tongue.text(self._window)
        return self._settle(text) if self._cut.within(text[len(self._known) :]) else ""

    def _split(self, text: str) -> str:
        """A border inside a long window of broken characters: where both sides say apart what they say together, no
        character lies across it."""
        for border in range(len(self._window) - 1, len(self._window) - 5, -1):
            left, right = self.tongue.text(self._window[:border]), self.tongue.text(self._window[border:])
            first = self.tongue.text([self._window[border - 1]])
            if left + right == text and self.tongue.text(self._window[border - 1 :]) == first + right:
                piece = self._settle(left)
                self._window = self._window[border - 1 :]
                self._known = first + self._known[len(left) :]
                return piece
        return ""


class _Cut:
    """Text up to the first stop that is complete in it, without spaces around it; what may begin a stop, or be a space
    at the end, waits. The stops' beginnings are followed as Knuth, Morris and Pratt do, so long ones cost no more."""

    def __init__(self, stops: Sequence[str]):
        self.stops = list(dict.fromkeys(stops))
        self.back = [_borders(stop) for stop in self.stops]
        self.at = [0] * len(self.stops)  # so many characters of each stop end the text
        self.waits, self.begun = "", False
        self.reach = max((2 * len(stop.encode()) + 8 for stop in self.stops), default=0)

    def add(self, text: str) -> tuple[str, bool]:
        """More text: what of it is certain, and whether it has come to a stop."""
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        found = self._stop(text)
        self.waits += text if found is None else text[: found[0]]
        if found is not None:
            self.waits = self.waits[: len(self.waits) - found[1]]
            return self.rest(), True
        held = max(self.at, default=0)
        sure = self.waits[: len(self.waits) - held].rstrip()
        self.waits = self.waits[len(sure) :]
        return sure, False

    def rest(self) -> str:
        """All that waits, when nothing follows."""
        piece, self.waits = self.waits.rstrip(), ""
        return piece

    def within(self, text: str) -> bool:
        whole = self.waits + text
        return any(stop in whole for stop in self.stops)

    def _stop(self, text: str) -> tuple[int, int] | None:
        """Where in `text` the first stop ends, and its length (of several that end there, the longest)."""
        first: tuple[int, int] | None = None
        for i, stop in enumerate(self.stops):
            end = self._follow(i, stop, text)
            if end is not None and (first is None or (end, -len(stop)) < (first[0], -first[1])):
                first = (end, len(stop))
        return first

    def _follow(self, i: int, stop: str, text: str) -> int | None:
        at, back = self.at[i], self.back[i]
        if not at and stop[0] not in text:
            return None
        for place, letter in enumerate(text):
            while at and stop[at] != letter:
                at = back[at - 1]
            at += stop[at] == letter
            if at == len(stop):
                return place + 1
        self.at[i] = at
        return None


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of the longest shorter beginning that ends it."""
    found, at = [0], 0
    for letter in stop[1:]:
        while at and stop[at] != letter:
            at = found[at - 1]
        at += stop[at] == letter
        found.append(at)
    return found
