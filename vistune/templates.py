"""The table of chat templates, and the same templates as Jinja text for an exported model folder.

Knows nothing of tokenizers: which spaces a tokenizer needs after an image is told to `jinja`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vistune.samples import IMAGE_MARK

Space = Literal["none", "first", "each"]
"""What a tokenizer prefixes to text by itself: nothing, a space at the start of a string, a space at each piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How messages become one string. A conversation is

    `system_before + system + system_after`, then for each exchange
    `user_before + question + user_after + answer_before + [answer_lead + answer + stop]`, with `between` after each
    answer and `end` after the last; what stands in brackets is supervised.
    """

    name: str
    system: str = ""  # the default; a leading system message replaces it
    system_before: str = ""
    system_after: str = ""
    system_inside: bool = False  # the system text stands inside the first question, and vanishes when empty
    user_before: str = ""
    user_after: str = ""
    answer_before: str = ""
    answer_lead: str = ""
    stop: str = ""
    between: str = ""
    end: str = ""
    image: str = IMAGE_MARK  # what a mark becomes; contains the mark once
    images_first: bool = True  # the mark moves to the front of its turn (reference: preprocess_multimodal)
    greeting: bool = False  # a first turn of the assistant stays; else it is dropped
    caption: bool = False  # exactly one exchange; the question's text is dropped, only its images stay
    question: bool = False  # of a caption template: the question stays where it is, and is learned with the caption
    empty_answers: bool = False  # an answer without text is learned too: when to stop at once
    answer_images: bool = False  # an answer may have images; what stands for them is not learned
    apart: bool = False  # question and answer are tokenized as strings of their own, so that no token spans both
    own: bool = False  # the tokenizer's own chat template: every field above is unused

    @property
    def stop_string(self) -> str:
        """The text at which a generated answer ends, without the spaces around it."""
        return self.stop.strip() or self.stop

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What the tokenizer must know as single tokens for this template to make sense."""
        written = "".join(getattr(self, field.name) for field in fields(self) if field.type == "str")
        return tuple(token for token in _CONTROL_TOKENS if token in written)


_CONTROL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
# Meta's default for Llama-2-chat, with the two spaces after "safe." that the published weights saw.
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_IN_TAGS = f"<Image>{IMAGE_MARK}</Image>"


def _v1(name: str, system: str, image: str = IMAGE_MARK) -> Template:
    return Template(
        name=name,
        system=system,
        system_after=" ",
        user_before="USER: ",
        user_after=" ",
        answer_before="ASSISTANT:",
        answer_lead=" ",
        stop="</s>",
        image=image,
    )


def _v0(name: str, system: str, image: str = IMAGE_MARK) -> Template:
    # The layout the reference trains, for generation too; "###" both ends an answer and opens the next turn.
    return Template(
        name=name,
        system=system,
        system_after="\n\n### ",
        user_before="Human: ",
        user_after="\n### ",
        answer_before="Assistant:",
        answer_lead=" ",
        stop="\n###",
        between=" ",
        end=" ",
        greeting=True,
        image=image,
    )


def _llama_2(name: str, system: str, between: str) -> Template:
    return Template(
        name=name,
        system=system,
        system_before="<<SYS>>\n",
        system_after="\n<</SYS>>\n\n",
        system_inside=True,
        user_before="[INST] ",
        user_after=" [/INST]",
        answer_lead=" ",
        stop=" </s>",
        between=between,
    )


def _chatml(name: str, system: str, *, line: str = "", stop_line: str = "", **more: str | bool) -> Template:
    # `line` ends every part but an answer; `stop_line` is the part of it that is supervised after an answer.
    return Template(
        name=name,
        system=system,
        system_before="<|im_start|>system\n",
        system_after="<|im_end|>" + line,
        user_before="<|im_start|>user\n",
        user_after="<|im_end|>" + line,
        answer_before="<|im_start|>assistant\n",
        stop="<|im_end|>" + stop_line,
        **more,  # type: ignore[arg-type]
    )


_HELPFUL = "You are a helpful assistant."
_VISION_TAGS = f"<|vision_start|>{IMAGE_MARK}<|vision_end|>"


def _qwen2_vl(name: str, **more: Any) -> Template:
    return _chatml(
        name,
        _HELPFUL,
        line="\n",
        between="\n",
        image=_VISION_TAGS,
        images_first=False,
        empty_answers=True,
        answer_images=True,
        **more,
    )


def _qwen2_vl_caption(name: str, **more: Any) -> Template:
    return Template(name=name, stop="<|im_end|>", image=_VISION_TAGS, caption=True, empty_answers=True, **more)


TEMPLATES: dict[str, Template] = {
    each.name: each
    for each in (
        Template(name="plain", stop="\n", caption=True),
        Template(name="v0_plain", stop="\n", caption=True),
        _v0("v0", _CHAT.format("human")),
        _v0("llava_v0", _CHAT.format("human")),
        _v0("v0_mmtag", _MMTAG, _IN_TAGS),
        _v1("v1", _CHAT.format("user")),
        _v1("vicuna_v1", _CHAT.format("user")),
        _v1("llava_v1", _CHAT.format("human")),
        _v1("v1_mmtag", _MMTAG, _IN_TAGS),
        _llama_2("llama_2", _LLAMA_2, "<s>"),
        _llama_2("llava_llama_2", _VISION, "<s>"),
        _llama_2("mistral_instruct", "", ""),
        _chatml("mpt", _MPT),
        _chatml("chatml_direct", "Answer the questions."),
        _chatml("mistral_direct", "Answer the questions."),
        _chatml("qwen_2", _HELPFUL, line="\n", stop_line="\n"),
        _qwen2_vl("qwen2-vl"),
        _qwen2_vl("qwen2-vl-turns", apart=True),
        _qwen2_vl_caption("qwen2-vl-caption"),
        _qwen2_vl_caption("qwen2-vl-caption-question", question=True),
        Template(name="tokenizer", own=True),
    )
}


def template(name: str) -> Template:
    """The template called `name`. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"template: there is no {name!r}. Choose one of: {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]


IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


def in_ends(template: Template) -> Template:
    """The template with a token before each image and one after it (the original's mm_use_im_start_end).

    ValueError for the template `tokenizer`: it is the tokenizer's own text, into which nothing can be put.
    """
    if template.own:
        raise ValueError(
            f"template {template.name!r} is the tokenizer's own and knows nothing of {IMAGE_START} and {IMAGE_END}; "
            "name one of vistune's templates"
        )
    return replace(template, image=template.image.replace(IMAGE_MARK, IMAGE_START + IMAGE_MARK + IMAGE_END))


def jinja(template: Template, space: Space, placeholder: str = IMAGE_MARK) -> str:
    """`template` as a Jinja chat template for `transformers`.

    It takes content as a string (with marks) or as a list of `{"type": "image"}` and `{"type": "text", "text": ...}`
    (and `{"type": "video"}`, where `placeholder` is Qwen2-VL's, whose other token stands for it),
    a leading system message, and `add_generation_prompt`; answers are wrapped in `{% generation %}`. It writes no BOS:
    the processor adds it. `space` makes one pass over the whole prompt give the ids of a pass per chunk. `placeholder`
    is what the processor expands for an image.
    """
    assert not template.own
    written = [field.name for field in fields(template) if field.name not in _UNWRITTEN]
    values = {name: getattr(template, name) for name in written}
    values |= {"image": template.image.replace(IMAGE_MARK, placeholder), "mark": IMAGE_MARK, "space": space}
    values["video"] = values["image"].replace("image", "video") if "<|image_pad|>" in placeholder else ""
    head = "".join(f"{{%- set {key} = {_literal(value)} -%}}\n" for key, value in values.items())
    return head + _MACROS + (_CAPTION if template.caption else _EXCHANGES)


_UNWRITTEN = ("name", "own", "apart", "empty_answers")  # what Jinja text cannot do, or need not


def _literal(value: str | bool) -> str:
    return repr(value) if isinstance(value, str) else str(value).lower()


# `_LEARNED`: each of `pieces` wrapped, an image between two (no macro: inside one the wrapped places are lost).
# `flat`: content -> one string with marks. `turn`: the rule of `vistune.chat` for marks in a question.
# `spaced`: with a prefixing tokenizer the text after an image was trained as a fresh string, so it begins with a space;
# a tokenizer that prefixes each piece adds that space itself, but not to text that has one already.
_MACROS = r"""
{%- macro flat(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{{- mark -}}
{%- elif part['type'] == 'video' -%}
{{- video or raise_exception('This model takes no videos.') -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}

{%- macro turn(text) -%}
{%- set pieces = text.split(mark) -%}
{%- if pieces | length == 1 or not images_first -%}
{{- text.replace(mark, image) -}}
{%- elif pieces | length == 2 -%}
{{- (mark ~ '\n' ~ (pieces | join('')).strip()).strip().replace(mark, image) -}}
{%- else -%}
{%- set kept = namespace(lines=[]) -%}
{%- for piece in pieces -%}
{%- set kept.lines = kept.lines + ([] if loop.first else [image]) + ([piece.strip()] if piece.strip() else []) -%}
{%- endfor -%}
{{- kept.lines | join('\n') -}}
{%- endif -%}
{%- endmacro -%}

{%- macro spaced(text) -%}
{%- if space == 'first' -%}
{{- text.replace(mark, mark ~ ' ') -}}
{%- elif space == 'each' -%}
{{- text.replace(mark ~ ' ', mark ~ '  ') -}}
{%- else -%}
{{- text -}}
{%- endif -%}
{%- endmacro -%}

{%- set chat = namespace(system=system, start=0) -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set chat.system = flat(messages[0]['content']) -%}
{%- set chat.start = 1 -%}
{%- endif -%}
{%- set greeted = messages | length > chat.start and messages[chat.start]['role'] == 'assistant' -%}
{%- if greeted and not greeting -%}
{%- set chat.start = chat.start + 1 -%}
{%- endif -%}
{%- for message in messages[chat.start:] -%}
{%- if message['role'] != ['user', 'assistant'][(loop.index0 + (greeted and greeting)) % 2] -%}
{{- raise_exception('Turns must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- endfor -%}
"""

_LEARNED = r"""
{%- for piece in pieces -%}
{{- '' if loop.first else image -}}
{%- if piece -%}
{%- generation -%}
{{- piece -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""

_EXCHANGES = (
    r"""
{%- if not system_inside -%}
{{- ' ' if space != 'none' and (system_before ~ chat.system)[:1] in [' ', '▁'] -}}
{{- system_before ~ chat.system ~ system_after -}}
{%- endif -%}
{%- for message in messages[chat.start:] -%}
{%- set text = flat(message['content']) -%}
{%- if message['role'] == 'user' -%}
{{- user_before -}}
{{- system_before ~ chat.system ~ system_after if system_inside and chat.system and loop.first -}}
{{- spaced(turn(text) ~ user_after) -}}
{%- else -%}
{{- answer_before -}}
{%- set answer = answer_lead ~ text ~ stop -%}
{%- set pieces = answer.split(mark) if answer_images else [answer] -%}
"""
    + _LEARNED
    + r"""
{{- end if loop.last else between -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- answer_before -}}
{%- endif -%}
"""
)

_CAPTION = (
    r"""
{%- for message in messages[chat.start:] -%}
{%- set text = flat(message['content']) -%}
{%- if loop.index0 == 0 -%}
{%- set count = text.split(mark) | length - 1 -%}
{%- if chat.start or count < 1 or loop.length > 2 -%}
{{- raise_exception('This template takes one user turn with an image and one answer: its caption.') -}}
{%- endif -%}
{{- '' if question else image * count -}}
{%- set pieces = text.split(mark) if question else [] -%}
"""
    + _LEARNED
    + r"""
{%- else -%}
{{- ' ' if space == 'first' or (space == 'each' and text[:1] in [' ', '▁']) -}}
{%- generation -%}
{{- text ~ stop -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
)
