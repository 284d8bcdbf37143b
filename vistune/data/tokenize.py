"""Sample -> token ids and loss mask, with every image laid out as its placeholders. Knows no model and no batch."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vistune import files
from vistune.chat import ChatError, Encoded, Template, TextEncoder, encode
from vistune.images import ImageError, Layout, image_size
from vistune.samples import IMAGE_ID, IMAGE_MARK, Fault, FaultCode, Image, Message, Sample, SampleError


@dataclass(frozen=True, slots=True)
class Language:
    """What turns a conversation into ids: template, tokenizer, and how many placeholders an image takes."""

    template: Template
    encoder: TextEncoder
    layout: Layout
    image_token_id: int

    def fingerprint(self) -> str:
        """Changes when the ids of any sample may change."""
        tokenizer = self.encoder.tokenizer
        parts = (
            repr(self.template),
            tokenizer.backend_tokenizer.to_str(),
            str(getattr(tokenizer, "chat_template", None)),
            str(self.encoder.legacy),
            repr(self.layout),
            str(self.image_token_id),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample as the model sees it. `images`: (first placeholder, number of placeholders) of every image kept."""

    ids: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n]: this token is learned
    images: list[tuple[int, int]]
    shortened: bool = False

    @property
    def supervised(self) -> int:
        """Targets: tokens that are learned and have one before them to be predicted from."""
        return int(self.loss_mask[1:].sum())


def tokenize(
    sample: Sample,
    language: Language,
    length: int,
    *,
    look: bool = True,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Tokens:
    """At most `length` ids of `sample`.

    A sample that is longer loses whole rounds from its end; if its first round alone is too long, that round's answer
    is cut. Nothing is cut inside or before an image. The images' files are looked at, unless `sizes` brings (width,
    height) of each, or `look` is False and the layout needs no size: then they are taken as good.

    Raises `SampleError`: the codes of `ChatError`, `image_missing`, `image_broken`, `image_without_mark`,
    `mark_without_image`, `image_does_not_fit`, `nothing_supervised`.
    """
    check_marks(sample, in_answers=language.template.answer_images)
    layout = language.layout
    if sizes is not None:
        counts = [_count(image, sample, layout, size) for image, size in zip(sample.images, sizes, strict=True)]
    elif look or layout.needs_size:
        counts = [_placeholders(image, sample, layout) for image in sample.images]
    else:
        counts = [layout.tokens(0, 0)] * len(sample.images)
    whole = _encode(sample, sample.messages, language)
    marks = whole.ids.count(IMAGE_ID)
    if marks != len(counts):
        code: FaultCode = "mark_without_image" if marks > len(counts) else "image_without_mark"
        raise fault(sample, code, f"{len(counts)} image(s), {marks} place(s) for one in the conversation")
    tokens = expand(whole, counts, language.image_token_id)
    if len(tokens.ids) > length:
        tokens = _shorten(sample, counts, language, length)
    if not tokens.supervised:
        reason = f"no answer is left within length {length}" if tokens.shortened else "no token of it is learned"
        raise fault(sample, "nothing_supervised", reason)
    return tokens


def check_marks(sample: Sample, *, in_answers: bool = False) -> None:
    """Raises `SampleError` unless the user's turns, and the answers with `in_answers`, have as many marks as the sample
    has images.

    In a sample without images a mark is plain text, as it is to LLaVA, unless a turn starts with "<image>\\n" or ends
    with "\\n<image>" (or is nothing else): that was meant as a picture, and is a fault.
    """
    asked = [message.text for message in sample.messages if message.role == "user"]
    seen = [message.text for message in sample.messages if message.role == "assistant"] if in_answers else []
    images, marks = len(sample.images), sum(text.count(IMAGE_MARK) for text in [*asked, *seen])
    if images and marks != images:
        code: FaultCode = "mark_without_image" if marks > images else "image_without_mark"
        where = "the turns" if in_answers else "the user's turns"
        raise fault(sample, code, f"{images} image(s), {marks} {IMAGE_MARK} in {where}")
    if not images and any(_meant_as_picture(text) for text in asked):
        raise fault(sample, "mark_without_image", f"a turn has {IMAGE_MARK}, the row names no image")


def _meant_as_picture(text: str) -> bool:
    return text.startswith(IMAGE_MARK + "\n") or text.endswith("\n" + IMAGE_MARK) or text.strip() == IMAGE_MARK


def expand(encoded: Encoded, counts: list[int], image_token_id: int) -> Tokens:
    """Each `IMAGE_ID` becomes as many placeholders as `counts` says, in order; extra counts are left over."""
    ids = np.array(encoded.ids, np.int32)
    mask = np.array(encoded.loss_mask, np.bool_)
    assert image_token_id not in ids, "text was tokenized to the image placeholder"
    places = np.flatnonzero(ids == IMAGE_ID)
    counts = counts[: len(places)]
    repeats = np.ones(len(ids), np.int64)
    repeats[places] = counts
    starts = (np.cumsum(repeats) - repeats)[places]
    ids = np.repeat(np.where(ids == IMAGE_ID, np.int32(image_token_id), ids), repeats)
    images = [(int(start), count) for start, count in zip(starts, counts, strict=True)]
    return Tokens(ids, np.repeat(mask, repeats), images)


def fault(sample: Sample, code: FaultCode, reason: str, path: str = "") -> SampleError:
    return SampleError(
        Fault(source=sample.source, row=sample.row, id=sample.id, code=code, reason=reason, path=path),
    )


def _shorten(sample: Sample, counts: list[int], language: Language, length: int) -> Tokens:
    """The most rounds that fit; else the first one, its answer cut at `length`."""
    roles = [message.role for message in sample.messages]
    ends = [i + 1 for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
    if not ends:
        raise fault(sample, "nothing_supervised", "there is no answer in it")

    def first(rounds: int) -> Tokens:
        part = _encode(sample, sample.messages[: ends[rounds - 1]], language)
        tokens = expand(part, counts, language.image_token_id)
        return Tokens(tokens.ids, tokens.loss_mask, tokens.images, shortened=True)

    fits, too_long = 0, len(ends)  # more rounds are longer, so halving finds the most that fit
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if len(first(middle).ids) <= length else (fits, middle)
    return first(fits) if fits else _cut(sample, first(1), length)


def _cut(sample: Sample, tokens: Tokens, length: int) -> Tokens:
    if tokens.images and sum(tokens.images[-1]) > length:
        reason = f"the first round needs {sum(tokens.images[-1])} tokens up to its last image, length is {length}"
        raise fault(sample, "image_does_not_fit", reason, sample.images[len(tokens.images) - 1].path)
    return Tokens(tokens.ids[:length], tokens.loss_mask[:length], tokens.images, shortened=True)


def _encode(sample: Sample, messages: tuple[Message, ...], language: Language) -> Encoded:
    try:
        return encode(language.template, language.encoder, messages, has_images=bool(sample.images))
    except ChatError as error:
        raise fault(sample, error.code, error.reason) from None
    except UnicodeEncodeError as error:
        raise fault(sample, "row_unreadable", f"its text is no Unicode text: {error}") from None


def _placeholders(image: Image, sample: Sample, layout: Layout) -> int:
    """Tokens of `image`, from its header where the layout wants the size; else it is only seen to be there."""
    if image.data is None and image.size is None:
        _seen(image, sample)
    if not layout.needs_size:
        return layout.tokens(0, 0)
    return _count(image, sample, layout)


def _count(image: Image, sample: Sample, layout: Layout, size: tuple[int, int] | None = None) -> int:
    try:
        return layout.tokens(*(size or image_size(image)))
    except ImageError as error:
        raise fault(sample, error.code, error.reason, image.path) from None


def _seen(image: Image, sample: Sample) -> None:
    """Raises `SampleError` unless there is a file with something in it."""
    remote = files.is_remote(image.path)
    try:
        mode, size = (stat.S_IFREG, files.size(image.path)) if remote else _facts(image.path)
    except (OSError, ValueError, ImportError) as error:  # no path at all, or of a system that is not installed
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or "cannot be read"
        raise fault(sample, "image_missing", reason, image.path) from None
    if not stat.S_ISREG(mode):
        raise fault(sample, "image_broken", "a folder, a pipe or a device, no file", image.path)
    if not size:
        raise fault(sample, "image_broken", "the file is empty", image.path)


def _facts(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_mode, found.st_size
