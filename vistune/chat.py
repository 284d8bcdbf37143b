"""Messages to token ids and loss mask, grown together, for training and for generation.

Knows nothing of images (one `IMAGE_ID` stands for each) nor of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from vistune.samples import IMAGE_MARK, FaultCode, Message
from vistune.templates import IMAGE_END, IMAGE_START, TEMPLATES, Template, in_ends, jinja, template
from vistune.text_encoder import TextEncoder, prefixes

__all__ = [
    "IMAGE_END",
    "IMAGE_START",
    "TEMPLATES",
    "ChatError",
    "Encoded",
    "Segment",
    "Template",
    "TextEncoder",
    "chat_template",
    "check_fits",
    "encode",
    "in_ends",
    "render",
    "supervised_text",
    "template",
]


class ChatError(ValueError):
    """A conversation that does not fit; `code` says in which way, `reason` in words."""

    def __init__(self, code: FaultCode, reason: str):
        self.code: FaultCode = code
        self.reason = reason
        super().__init__(f"{code}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses from a worker to its parent
        return type(self), (self.code, self.reason)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the prompt, and whether it is learned."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens. `ids` has `IMAGE_ID` once per image; `loss_mask[i]` says that token i is learned."""

    prompt: str
    ids: list[int]
    loss_mask: list[bool]


def encode(
    template: Template,
    encoder: TextEncoder,
    messages: Sequence[Message],
    *,
    has_images: bool,
    open_turn: bool = False,
) -> Encoded:
    """Token ids and loss mask of a conversation.

    A token is supervised when one of its characters is: a token that straddles a border is learned. With `has_images`,
    marks are images; without, they are plain text. `open_turn` gives the prompt for generation: the conversation ends
    with a question and the answer is left open. Raises ChatError.
    """
    segments = render(template, messages, has_images=has_images, tokenizer=encoder.tokenizer, open_turn=open_turn)
    prompt = "".join(segment.text for segment in segments)
    learned = np.repeat([segment.supervised for segment in segments], [len(segment.text) for segment in segments])
    count = np.concatenate([[0], np.cumsum(learned)])  # of supervised characters before each character
    cuts = list(accumulate(len(segment.text) for segment in segments))[:-1] if template.apart else ()
    ids, starts, ends = encoder.encode(prompt, has_images=has_images, whole=template.own, cuts=cuts)
    loss_mask = count[ends] > count[starts]
    if not (open_turn or loss_mask.any()):
        raise ChatError("nothing_supervised", "no token of this conversation would be learned")
    return Encoded(prompt, ids.tolist(), loss_mask.tolist())


def supervised_text(encoded: Encoded, encoder: TextEncoder) -> list[str]:
    """What is learned, span by span, decoded from the token ids (not from the prompt)."""
    spans = groupby(zip(encoded.ids, encoded.loss_mask, strict=True), key=lambda pair: pair[1])
    return [encoder.decode([id for id, _ in span]) for supervised, span in spans if supervised]


def render(
    template: Template,
    messages: Sequence[Message],
    *,
    has_images: bool,
    tokenizer: Any = None,
    open_turn: bool = False,
) -> list[Segment]:
    """The prompt as segments. `tokenizer` is needed by the template `tokenizer` only. Raises ChatError.

    A first turn of the assistant is dropped, but not by v0 templates (the reference's ways); a last question without an
    answer is dropped for training. A leading system message replaces the template's system text.
    """
    system, turns = _in_order(template, messages, has_images=has_images, open_turn=open_turn)
    if not (open_turn or template.empty_answers):
        for number, turn in enumerate(turns):
            if turn.role == "assistant" and not turn.text.strip():
                raise ChatError("empty_answer", f"the answer in turn {number} is empty")
    if template.caption:
        return _caption(template, system, turns, has_images)
    if has_images:
        turns = [_with_images(template, turn) for turn in turns]
    if template.own:
        return _by_tokenizer(tokenizer, system, turns, has_images)
    return _exchanges(template, template.system if system is None else system, turns, has_images)


def _in_order(
    template: Template, messages: Sequence[Message], *, has_images: bool, open_turn: bool
) -> tuple[str | None, list[Message]]:
    """The system text, if the messages bring one, and the turns: user, assistant, user, ... (see `render`)."""
    may_show = ("user", "assistant") if template.answer_images else ("user",)
    for number, message in enumerate(messages):
        if has_images and message.role not in may_show and IMAGE_MARK in message.text:
            code: FaultCode = "mark_in_answer" if message.role == "assistant" else "template"
            reason = f"turn {number} ({message.role}) has an {IMAGE_MARK}; only {' and '.join(may_show)} turns may"
            raise ChatError(code, reason)
    turns = list(messages)
    system = turns.pop(0).text if turns and turns[0].role == "system" else None
    greeted = bool(turns) and turns[0].role == "assistant"
    if greeted and not template.greeting:
        turns.pop(0)
    for number, turn in enumerate(turns):
        wanted = ("user", "assistant")[(number + (greeted and template.greeting)) % 2]
        if turn.role != wanted:
            raise ChatError("role_order", f"turn {number} is {turn.role!r} where {wanted!r} must stand")
    return system, _last(turns, has_images=has_images, open_turn=open_turn)


def _last(turns: list[Message], *, has_images: bool, open_turn: bool) -> list[Message]:
    ends_open = bool(turns) and turns[-1].role == "user"
    if open_turn and turns and not ends_open and not turns[-1].text:
        return turns[:-1]
    if open_turn and not ends_open:
        raise ChatError("role_order", "to be answered, a conversation must end with a user turn")
    if not open_turn and ends_open:
        if has_images and IMAGE_MARK in turns[-1].text:
            raise ChatError("role_order", f"the last user turn has an {IMAGE_MARK} and no answer")
        turns = turns[:-1]
    if not turns:
        raise ChatError("nothing_supervised", "there is no answered question")
    return turns


def _with_images(template: Template, turn: Message) -> Message:
    """One mark moves to the front, on a line of its own (reference); several keep their order, a line each (ours)."""
    pieces = turn.text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return turn
    if not template.images_first:
        text = turn.text
    elif len(pieces) == 2:
        text = f"{IMAGE_MARK}\n{''.join(pieces).strip()}".strip()
    else:
        lines = [line.strip() for line in f"\0{IMAGE_MARK}\0".join(pieces).split("\0")]
        text = "\n".join(line for line in lines if line)
    return Message(role=turn.role, text=text.replace(IMAGE_MARK, template.image))


def _exchanges(template: Template, system: str, turns: list[Message], has_images: bool) -> list[Segment]:
    shown = template.system_before + system + template.system_after
    segments = [] if template.system_inside else [Segment(shown, False)]
    inside = shown if template.system_inside and system else ""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            segments.append(Segment(template.user_before + inside + turn.text + template.user_after, False))
            inside = ""
        else:
            segments.append(Segment(template.answer_before, False))
            answer = template.answer_lead + turn.text + template.stop
            segments += _learned(answer, template.image) if has_images else [Segment(answer, True)]
            segments.append(Segment(template.end if number == len(turns) - 1 else template.between, False))
    if turns[-1].role == "user":
        segments.append(Segment(template.answer_before, False))
    return segments


def _caption(template: Template, system: str | None, turns: list[Message], has_images: bool) -> list[Segment]:
    marks = turns[0].text.count(IMAGE_MARK) if has_images else 0
    if system is not None or len(turns) > 2:
        raise ChatError("template", f"template {template.name} takes one user turn and one answer, nothing else")
    if not has_images:
        raise ChatError("template", f"template {template.name} takes captions of images; this sample has no image")
    if not marks:
        raise ChatError("image_without_mark", f"the user turn has no {IMAGE_MARK}")
    asked = turns[0].text.replace(IMAGE_MARK, template.image) if template.question else template.image * marks
    shown = _learned(asked, template.image) if template.question else [Segment(asked, False)]
    return shown + [Segment(turn.text + template.stop, True) for turn in turns[1:]]


def _learned(text: str, image: str) -> list[Segment]:
    """`text` as what is learned, but for the images in it."""
    shown: list[Segment] = []
    for number, piece in enumerate(text.split(image)):
        shown += [Segment(image, False)] if number else []
        shown += [Segment(piece, True)] if piece else []
    return shown


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _by_tokenizer(tokenizer: Any, system: str | None, turns: list[Message], has_images: bool) -> list[Segment]:
    """The tokenizer's own template; answers are found by `{% generation %}`, or by rendering turn after turn."""
    own = _own_template(tokenizer)
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    chat += [{"role": turn.role, "content": turn.text} for turn in turns]
    if not _takes_strings(tokenizer, own):
        chat = [message | {"content": _parts(message["content"], has_images)} for message in chat]
    open_turn = turns[-1].role == "user"
    prompt, spans = _rendered(tokenizer, own, chat, add_generation_prompt=open_turn)
    if not _GENERATION.search(own):
        spans = list(_spans_by_prefix(tokenizer, own, chat, prompt))
    segments: list[Segment] = []
    position = 0
    for start, end in spans:
        segments += [Segment(prompt[position:start], False), Segment(prompt[start:end], True)]
        position = end
    segments.append(Segment(prompt[position:], False))
    return _placeholders_to_marks(tokenizer, segments, turns) if has_images else segments


def _own_template(tokenizer: Any) -> str:
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ValueError(
            f"template 'tokenizer': {name} has no chat template. Name one of vistune's: {', '.join(TEMPLATES)}."
        )
    return own


def _rendered(
    tokenizer: Any, own: str, chat: list[dict[str, Any]], *, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    try:
        rendered: Any = render_jinja_template(  # its annotation is wrong
            [chat],
            chat_template=own,
            return_assistant_tokens_mask=bool(_GENERATION.search(own)),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise ChatError("template", f"the tokenizer's chat template refuses this conversation: {error}") from error
    prompts, spans = rendered
    return prompts[0], spans[0] if spans else []


def _spans_by_prefix(tokenizer: Any, own: str, chat: list[dict[str, Any]], prompt: str) -> Iterator[tuple[int, int]]:
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, _ = _rendered(tokenizer, own, chat[:number], add_generation_prompt=True)
        after, _ = _rendered(tokenizer, own, chat[: number + 1], add_generation_prompt=False)
        if not (prompt.startswith(after) and after.startswith(before)):
            raise ChatError(
                "template",
                f"the tokenizer's chat template renders turn {number} differently once more turns follow, so its "
                "answer cannot be found; use a template with {% generation %}, or name one of vistune's",
            )
        yield len(before), len(after)


def _takes_strings(tokenizer: Any, own: str) -> bool:
    """Whether the template shows content that is a string; templates of processors may want a list of parts."""
    probe = "a9f3e1"
    try:
        return probe in _rendered(tokenizer, own, [{"role": "user", "content": probe}], add_generation_prompt=False)[0]
    except (ChatError, TypeError):
        return False


def _parts(text: str, has_images: bool) -> list[dict[str, str]]:
    pieces = text.split(IMAGE_MARK) if has_images else [text]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n") if len(pieces) > 1 else piece}] if piece.strip() else []
    return parts


def _placeholders_to_marks(tokenizer: Any, segments: list[Segment], turns: list[Message]) -> list[Segment]:
    """A template that writes its own image token for an image part: back to marks, one for each image."""
    token = getattr(tokenizer, "image_token", None)
    if token and token != IMAGE_MARK:
        segments = [Segment(segment.text.replace(token, IMAGE_MARK), segment.supervised) for segment in segments]
    wanted = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    found = sum(segment.text.count(IMAGE_MARK) for segment in segments)
    if found != wanted:
        raise ChatError("template", f"the tokenizer's chat template writes {found} image(s) where {wanted} stand")
    return segments


def chat_template(template: Template, tokenizer: Any, placeholder: str = IMAGE_MARK) -> str:
    """Jinja text with which the stock processor of an exported folder gives the ids that `encode` gives.

    `placeholder` is what that processor expands for an image; the folder's tokenizer must have it as a special token.
    Two exceptions are known: a Llama tokenizer with `legacy: true` needs the text after other special tokens not to
    begin with a space; and a template that tokenizes answers apart, answers not to begin with a line end.
    """
    if template.own:
        return _own_template(tokenizer)
    space = prefixes(tokenizer)
    after = template.image.partition(IMAGE_MARK)[2]
    return jinja(template, "none" if after in tokenizer.get_added_vocab() else space, placeholder)


def check_fits(template: Template, tokenizer: Any) -> None:
    """Raises ValueError when the tokenizer lacks a token that `template` writes, or a chat template of its own."""
    if template.own:
        _own_template(tokenizer)
        return
    for token in template.control_tokens:
        pieces = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).tokens
        if pieces != [token]:
            raise ValueError(
                f"template {template.name!r} needs {token!r} as one token, but the tokenizer "
                f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} cuts it into {len(pieces)}: "
                f"{' '.join(pieces)}. Choose a template made for this tokenizer, or add {token!r} to it as a special "
                "token before the model is assembled."
            )
