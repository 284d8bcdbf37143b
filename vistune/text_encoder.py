"""Text to token ids with the place of every token in the text, as the reference cuts and tokenizes it.

Knows BOS, SentencePiece's prefix space and `legacy`; knows nothing of messages or templates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from vistune.samples import IMAGE_ID, IMAGE_MARK
from vistune.templates import Space
from vistune.word_cache import WordCache, fits

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids, and where in the text each begins and ends (in characters; begin = end for what stands for no text)."""

_METASPACE = "▁"


def open_encoder(folder: Path | str, placeholder: str | None = None) -> TextEncoder:
    """The encoder of a tokenizer's or a model's folder. Raises ValueError when there is no fast tokenizer in it."""
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer {folder}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"tokenizer {folder}: cannot be opened ({reason}); a tokenizer.json is needed") from error
    return TextEncoder(tokenizer, placeholder)


def prefixes(tokenizer: Any) -> Space:
    """What a fast tokenizer prefixes by itself to a string ("first") or to each piece between special tokens ("each").

    An old-style `Prepend` normalizer adds to each piece whatever it begins with, so nothing is left to correct: "none".
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = spec.get("pretokenizers", [spec])
    schemes = [step.get("prepend_scheme") for step in steps if step.get("type") == "Metaspace"]
    return {"first": "first", "always": "each"}.get(schemes[0], "none") if schemes else "none"  # type: ignore[return-value]


class TextEncoder:
    """Wraps a `transformers` fast tokenizer.

    `placeholder` is the token that the model takes for a piece of an image, where it is not the mark itself. Neither it
    nor the mark is ever made from text.
    """

    def __init__(self, tokenizer: Any, placeholder: str | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; offsets of tokens are needed")
        self.tokenizer = tokenizer
        self.space = prefixes(tokenizer)
        self.legacy = self.space != "none" and bool(getattr(tokenizer, "legacy", False))
        none = np.zeros(0, np.int64)
        self._opening: tuple[str | None, Tokens] = None, (none, none, none)
        self._hidden = {IMAGE_MARK, placeholder or IMAGE_MARK, getattr(tokenizer, "image_token", None) or IMAGE_MARK}

    def encode(self, text: str, *, has_images: bool, whole: bool = False, cuts: Sequence[int] = ()) -> Tokens:
        """Tokenizes `text`, with special tokens; with `has_images` each mark becomes one `IMAGE_ID`.

        Text between images is tokenized chunk by chunk as the reference does, and cut before the characters `cuts` as
        well; `whole` makes one pass, as the stock processor does.
        """
        if whole:
            return self._whole(text, has_images)
        parts: list[Tokens] = []
        for start, end in pairwise((0, *cuts, len(text))):
            position = start
            for number, chunk in enumerate(text[start:end].split(IMAGE_MARK) if has_images else [text[start:end]]):
                if number:
                    parts.append((np.array([IMAGE_ID]), np.array([position]), np.array([position])))
                    position += len(IMAGE_MARK)
                parts.append(self._part(chunk, position, first=not parts))
                position += len(chunk)
        ids, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, starts, ends

    def make_ready(self, *, whole: bool) -> None:
        """Make now what the first text would wait for: worker processes that are forked then share it."""
        for has_images in (True, False):
            self.encode("a", has_images=has_images, whole=whole)

    def _part(self, text: str, position: int, *, first: bool) -> Tokens:
        if first and text != self._opening[0]:
            self._opening = text, self.chunk(text)  # what stands before the first image is nearly always the same
        ids, starts, ends = self._opening[1] if first else self.chunk(text)
        skip = 0 if first or not self._adds_bos else 1
        return ids[skip:], starts[skip:] + position, ends[skip:] + position

    def chunk(self, text: str) -> Tokens:
        """Tokenizes one string by itself, with special tokens, as the slow tokenizers of the reference did."""
        if self._by_word is not None and self._by_word.takes(text):
            return self._by_word.encode(text)
        # A fast tokenizer adds no prefix to text that begins with a space; a slow one always does.
        bare = self.space == "first" and not self.legacy and text[:1] in (" ", _METASPACE)
        return _placed(self._by_chunk.encode(" " + text if bare else text), len(text), int(bare))

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens shown, `IMAGE_ID` as the mark."""
        backend = self.tokenizer.backend_tokenizer
        # What begins a new piece; with `legacy` each piece got a prefix and loses it when decoded alone.
        alone = {IMAGE_ID, *(backend.get_added_tokens_decoder() if self.legacy else ())}
        shown: list[str] = []
        for cut, piece in groupby(ids, key=alone.__contains__):
            if cut:
                shown += [IMAGE_MARK if id == IMAGE_ID else backend.id_to_token(id) for id in piece]
            else:
                shown.append(backend.decode(list(piece), skip_special_tokens=False))
        return "".join(shown)

    def _whole(self, text: str, has_images: bool) -> Tokens:
        backend = self._marked if has_images else self._unmarked
        bos = self.tokenizer.bos_token
        written = bool(bos) and text.startswith(bos)  # by the template; the stock processor adds no second one
        ids, starts, ends = _placed(backend.encode(text, add_special_tokens=not written), len(text), 0)
        if has_images:
            ids = np.where(ids == backend.token_to_id(IMAGE_MARK), IMAGE_ID, ids)
        return ids, starts, ends

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies of the tokenizer that a worker process makes itself."""
        return {key: value for key, value in vars(self).items() if not isinstance(value, Tokenizer | WordCache)}

    @cached_property
    def _adds_bos(self) -> bool:
        ids, starts, ends = self.chunk("a")
        return bool(ids[0] == self.tokenizer.bos_token_id and starts[0] == ends[0])

    @cached_property
    def _by_chunk(self) -> Tokenizer:
        return self._backend(self._hidden, legacy=self.legacy)

    @cached_property
    def _by_word(self) -> WordCache | None:
        spec = json.loads(self._by_chunk.to_str())
        return WordCache(self._by_chunk, spec) if fits(self._by_chunk, spec) else None

    @cached_property
    def _unmarked(self) -> Tokenizer:
        return self._backend(self._hidden, legacy=False)

    @cached_property
    def _marked(self) -> Tokenizer:
        backend = self._backend(self._hidden - {IMAGE_MARK}, legacy=False)
        backend.add_special_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)])
        return backend

    def _backend(self, hidden: set[str], *, legacy: bool) -> Tokenizer:
        """A copy of the tokenizer's backend: never truncates or pads, exact offsets, `hidden` tokens out of reach."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        around = {key: _untrimmed(value) for key, value in spec.items() if key not in ("model", "added_tokens")}
        spec |= around | {"truncation": None, "padding": None}
        for token in spec["added_tokens"]:
            if token["content"] in hidden:  # renamed, not removed: the ids of the others must not move
                token["content"] = f"\U000f0000{token['id']}\U000f0000"
        if legacy:
            prepend = {"type": "Prepend", "prepend": _METASPACE}
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
            before = [spec["normalizer"]] if spec["normalizer"] else []
            spec["normalizer"] = {"type": "Sequence", "normalizers": [*before, prepend, replace]}
            spec["pre_tokenizer"] = None
        backend = Tokenizer.from_str(json.dumps(spec))
        assert all(backend.token_to_id(token["content"]) == token["id"] for token in spec["added_tokens"])
        return backend


def _placed(encoding: Any, length: int, shift: int) -> Tokens:
    """Ids and offsets in the original text, which was encoded with `shift` characters more at its start."""
    ids = np.array(encoding.ids, dtype=np.int64)
    flat = chain.from_iterable(encoding.offsets)
    offsets = np.fromiter(flat, dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    starts = np.minimum(np.maximum(offsets[:, 0] - shift, 0), length)
    # A prefix space has no character of its own: it goes with the first one.
    ends = np.minimum(np.maximum(offsets[:, 1] - shift, starts + 1), length)
    added = np.array(encoding.special_tokens_mask, dtype=bool)
    return ids, starts, np.where(added, starts, ends)


def _untrimmed(spec: Any) -> Any:
    """Byte-level tokenizers may report offsets without the spaces of a token; a space belongs to its token here."""
    if isinstance(spec, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(value) for key, value in spec.items()}
    return [_untrimmed(value) for value in spec] if isinstance(spec, list) else spec
