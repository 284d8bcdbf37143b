"""Messages and pictures to what an engine takes, by the same steps as one-request `generate`. Runs in threads.

Knows nothing of HTTP and of engines.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vistune.chat import IMAGE_END, IMAGE_START, ChatError
from vistune.decoding import Settings, Shown, asked, laid, shown
from vistune.models.load import Loaded
from vistune.samples import IMAGE_MARK, Message
from vistune.serve.pictures.media import Taken
from vistune.serve.refused import Refused
from vistune.serve.work import Work

_SLICE = 1 << 16
"""Characters that are counted at a time, of a text that may be too long."""
_SEAM = 16
"""Tokens that cutting a text may add to it, for certain more than any tokenizer's."""
_encoding = threading.Lock()
"""An encoder remembers words and the text before a first picture, for one thread at a time."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """How an answer is wanted; see `Work`. `context`: tokens that prompt and answer may have together, 0: any number;
    with `fits` the answer gets what is left of it. `params` names each picture for errors, `timed` hears the seconds
    that each took, `told` ends it between two.
    """

    settings: Settings
    stops: tuple[str, ...] = ()
    adapter: str = ""
    until: float = math.inf
    context: int = 0
    fits: bool = False
    params: tuple[str, ...] = ()
    told: threading.Event | None = None
    timed: Callable[[float], None] | None = None


def prepare(loaded: Loaded, messages: Sequence[Message], taken: Sequence[Taken], order: Order) -> Work:
    """The work of a conversation whose last turn is a question, with a mark for each picture. How long it is, is known
    before a picture is decoded. Refused: 400, and 504 after `order.until`."""
    _check_text([message.text for message in messages], loaded, order, pictures=bool(taken))
    try:
        with _encoding:
            ids = asked(loaded, messages, len(taken))
    except ChatError as error:
        raise Refused(400, error.reason[:300], param="messages", code=error.code) from error
    return _laid(loaded, ids, taken, order)


def prepare_prompt(loaded: Loaded, prompt: str, taken: Sequence[Taken], order: Order) -> Work:
    """The work of a prompt that is templated already, its ids those of LLaVA's `tokenizer_image_token`: what stands
    between pictures is tokenized by itself. Refused: as by `prepare`, and 400 for more or fewer marks than pictures."""
    marks = prompt.count(IMAGE_MARK)
    if marks != len(taken):
        raise Refused(400, f"{len(taken)} pictures for {marks} {IMAGE_MARK} in the prompt", param="images")
    _check_text(prompt.split(IMAGE_MARK), loaded, order, pictures=bool(taken))
    if loaded.start_end:
        prompt = prompt.replace(IMAGE_MARK, IMAGE_START + IMAGE_MARK + IMAGE_END)
    with _encoding:
        ids = loaded.encoder.encode(prompt, has_images=bool(taken), whole=loaded.template.own)[0].tolist()
    return _laid(loaded, ids, taken, order)


def _laid(loaded: Loaded, ids: list[int], taken: Sequence[Taken], order: Order) -> Work:
    if loaded.image_token_id in ids:
        raise Refused(400, "the text has the token that stands for a piece of a picture", code="picture_mark")
    names = list(order.params) or [f"pictures[{number}]" for number in range(len(taken))]
    each = list(zip(taken, names, strict=True))
    length = len(ids) - len(taken) + sum(_tokens(loaded, one, name) for one, name in each)
    tokens = _room(length, order.settings.max_new_tokens, order)
    seen = [_seen(loaded, one, name, order) for one, name in each]
    made = laid(loaded, ids, seen)
    if len(made.ids) != length:
        raise Refused(400, "a picture's pixels are not what its header says", param="messages", code="picture_broken")
    return Work(
        ids=made.ids,
        settings=replace(order.settings, max_new_tokens=tokens),
        pictures=tuple(seen),
        digests=tuple(one.digest for one in taken),
        stops=order.stops,
        adapter=order.adapter,
        until=order.until,
    )


def _tokens(loaded: Loaded, one: Taken, name: str) -> int:
    try:
        return loaded.layout.tokens(one.width, one.height)
    except ValueError as error:
        raise _unusable(error, name) from error


def _seen(loaded: Loaded, one: Taken, name: str, order: Order) -> Shown:
    _check_wanted(order)
    began = time.perf_counter()
    try:
        found = shown(loaded, one.image)
    except ValueError as error:
        raise _unusable(error, name) from error
    if order.timed is not None:
        order.timed(time.perf_counter() - began)
    return found


def _check_wanted(order: Order) -> None:
    if order.told is not None and order.told.is_set():
        raise Refused(499, "the asker has gone", code="left")
    if time.monotonic() > order.until:
        raise Refused(504, "there was no time left to make the request ready", code="deadline")


def _unusable(error: ValueError, name: str) -> Refused:
    reason = getattr(error, "reason", "") or str(error)
    return Refused(400, f"{name}: {reason[:200]}", param=name, code="picture_broken")


def _room(length: int, wanted: int, order: Order) -> int:
    """How many tokens the answer may have. Refused: 400 when there is no room for it."""
    left = order.context - length if order.context else wanted
    if order.fits and left > 0:
        return min(wanted, left)
    if wanted > left:
        raise Refused(
            400,
            f"this model's context is {order.context:,} tokens: the prompt has {length:,}, pictures too, and up to "
            f"{wanted:,} are asked for; shorten the conversation, or ask for fewer",
            param="messages",
            code="context_length_exceeded",
        )
    return wanted


def _check_text(texts: Sequence[str], loaded: Loaded, order: Order, *, pictures: bool) -> None:
    """Refuse what would be taken for a picture, and, before the whole of it is tokenized, what is far too long."""
    tokens = {loaded.family.image_token, getattr(loaded.tokenizer, "image_token", None) or IMAGE_MARK} - {IMAGE_MARK}
    if pictures and (found := next((token for token in tokens for text in texts if token in text), None)):
        why = f"the text has {found}, which stands for a piece of a picture; write it otherwise"
        raise Refused(400, why, param="messages", code="picture_mark")
    context = order.context
    if context and sum(map(len, texts)) > context:
        backend, count = loaded.tokenizer.backend_tokenizer, 0
        for text in texts:
            for start in range(0, len(text), _SLICE):
                _check_wanted(order)
                # `encode` of one text would keep every other thread waiting meanwhile
                piece = backend.encode_batch([text[start : start + _SLICE]], add_special_tokens=False)[0]
                count += max(len(piece) - _SEAM, 0)
                if count > context:
                    raise Refused(
                        400,
                        f"this model's context is {context:,} tokens, and the text alone has more; shorten it",
                        param="messages",
                        code="context_length_exceeded",
                    )
