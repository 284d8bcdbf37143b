"""Chat completions as OpenAI's clients write them: fields that are honoured, that must say nothing, that are refused.

Knows nothing of models and pictures' bytes. No error repeats what a request holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from vistune.serve.interface import bodies
from vistune.serve.refused import Refused

THREAD_BYTES = 16_000
"""Larger bodies are parsed in a thread: a picture of 20 MB takes tens of milliseconds, and others must not wait."""
GREEDY = 1e-5
"""Temperatures below this are 0: dividing logits by less overflows in fp32."""

_ONE_ANSWER = "one answer is given to a request; ask again for another"
_AS_DRAWN = "the model's probabilities are taken as they are; leave it out, or give 0"
_NO_TOOLS = "these models call no tools; leave it out"
_NO_LOGPROBS = "probabilities are not given; leave it out"
_NO_SOUND = "these models answer in text alone; leave it out"
_KEPT_NOWHERE = "no answer is stored here; leave it out"

NOTHING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # field: the values beside null that change nothing, and why others are refused
    "n": ((1,), _ONE_ANSWER),
    "frequency_penalty": ((0, 0.0), _AS_DRAWN),
    "presence_penalty": ((0, 0.0), _AS_DRAWN),
    "logit_bias": (({},), "the model's probabilities are taken as they are; leave it out"),
    "logprobs": ((False,), _NO_LOGPROBS),
    "top_logprobs": ((0,), _NO_LOGPROBS),
    "response_format": (({"type": "text"},), 'answers are not held to a format; only {"type": "text"} is'),
    "tools": (([],), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "audio": ((), _NO_SOUND),
    "modalities": ((["text"],), _NO_SOUND),
    "store": ((False,), _KEPT_NOWHERE),
    "metadata": (({},), _KEPT_NOWHERE),
    "prediction": ((), "answers are not foretold here; leave it out"),
    "reasoning_effort": (("none",), "these models have no reasoning that could be set; leave it out"),
    "verbosity": (("medium",), "how much is said is the prompt's business here; leave it out"),
    "service_tier": (("auto", "default"), "there is one tier; leave it out"),
    "web_search_options": ((), "nothing is searched for; leave it out"),
    "moderation": ((), "nothing is moderated here; leave it out"),
    "prompt_cache_options": (({},), "what is remembered of a prompt cannot be set; leave it out"),
    "prompt_cache_retention": (("in_memory",), "nothing outlives this process; leave it out"),
}
"""OpenAI's documented fields that are taken only when they say nothing."""

_LABEL = Annotated[str, StringConstraints(max_length=512)]


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ImageUrl(_Said):
    url: str
    detail: str | None = None

    @field_validator("detail")
    @classmethod
    def _whole(cls, said: str | None) -> str | None:
        if said not in (None, "auto", "high"):
            raise _Unsupported(
                "pictures are always seen as the model's own layout has them; say auto, high, or nothing"
            )
        return said


class TextPart(_Said):
    type: Literal["text"]
    text: str


class ImagePart(_Said):
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("~bare")] | Annotated[ImageUrl, Tag("~whole")],
        Discriminator(lambda said: "~bare" if isinstance(said, str) else "~whole"),
    ]

    @property
    def link(self) -> tuple[str, str]:
        """What the parameter's path ends in, and the URL."""
        said = self.image_url
        return ("image_url", said) if isinstance(said, str) else ("image_url.url", said.url)


def _kind(said: Any) -> str | None:
    kind = said.get("type") if isinstance(said, dict) else getattr(said, "type", None)
    return f"~{kind}" if kind in ("text", "image_url") else None


def _shape(said: Any) -> str | None:
    return "~text" if isinstance(said, str) else "~parts" if isinstance(said, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImagePart, Tag("~image_url")],
    Discriminator(
        _kind,
        custom_error_type="unsupported",
        custom_error_message="a part has the type text or image_url; nothing else is understood",
    ),
]
Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[Annotated[list[Part], Field(min_length=1)], Tag("~parts")],
    Discriminator(
        _shape,
        custom_error_type="shape",
        custom_error_message="should be a string, or a list of text and image_url parts",
    ),
]


class Turn(_Said):
    """One message. What answers carry beside their text may come back with them, as long as it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None

    @field_validator("name", "refusal", "annotations", "audio", "function_call", "tool_calls")
    @classmethod
    def _empty(cls, said: Any, info: ValidationInfo) -> None:
        if said is not None and not (said == [] and info.field_name in ("annotations", "tool_calls")):
            raise _Unsupported("the model's template has no place for it; leave it out")


class StreamOptions(_Said):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _plain(cls, said: bool | None) -> bool | None:
        if said:
            raise _Unsupported("chunks are not padded; leave it out")
        return said


class Asked(_Said):
    """A request. Without `temperature` it is 1, as OpenAI documents; 0 is greedy."""

    model: Annotated[str, StringConstraints(max_length=256)] = ""
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: _LABEL | None = None
    safety_identifier: _LABEL | None = None
    prompt_cache_key: _LABEL | None = None

    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    audio: Any = None
    modalities: Any = None
    store: Any = None
    metadata: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None
    web_search_options: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @field_validator(*NOTHING)
    @classmethod
    def _says_nothing(cls, said: Any, info: ValidationInfo) -> None:
        accepted, why = NOTHING[str(info.field_name)]
        if said is not None and not any(said == one and type(said) is type(one) for one in accepted):
            raise _Unsupported(why)

    @field_validator("stop")
    @classmethod
    def _stops(cls, said: Any) -> tuple[str, ...]:
        found = [said] if isinstance(said, str) else [] if said is None else said
        fits = isinstance(found, list) and len(found) <= 4
        if not fits or not all(isinstance(one, str) and 0 < len(one) <= 256 for one in found):
            raise ValueError("should be a string, or up to 4 of them, of 1 to 256 characters each")
        return tuple(found)

    @property
    def tokens(self) -> int | None:
        """The most tokens that are asked for."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def usage(self) -> bool:
        """Whether a stream says at its end how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def greedy(self) -> bool:
        return (self.temperature is not None and self.temperature < GREEDY) or self.top_p == 0


class _Unsupported(ValueError):
    """A field that says something where it may not."""


async def parse(body: bytes) -> Asked:
    """The request that a body holds. Refused: 400."""
    return read(body) if len(body) <= THREAD_BYTES else await asyncio.to_thread(read, body)


def read(body: bytes) -> Asked:
    """See `parse`."""
    bodies.check_count(body)
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    both = (asked.max_tokens, asked.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise wrong("max_tokens and max_completion_tokens differ; give one", "max_tokens", "invalid_value")
    if asked.stream_options is not None and not asked.stream:
        why = "stream_options is for streams; leave it out, or ask with stream true"
        raise wrong(why, "stream_options", "invalid_value")
    return asked


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_value",
    "json_invalid": "invalid_json",
}


_TO_SAY = {
    "missing": "is needed",
    "extra_forbidden": "is not known here; leave it out",
    "too_short": "is empty",
    "model_type": "should be an object",
}


def refusal(error: ValidationError) -> Refused:
    """The first thing that is wrong with a request, without anything that stands in it but the names of fields."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, param = first["type"], path(first["loc"])
    if kind == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['ctx']['error']}", code=_CODES[kind])
    if not param:
        return Refused(400, "the body should be a JSON object", code="invalid_type")
    ours = first["ctx"]["error"] if kind == "value_error" else None
    kind = "unsupported" if isinstance(ours, _Unsupported) else kind
    why = str(ours or _TO_SAY.get(kind) or first["msg"].replace("Input should", "should"))
    return Refused(400, f"{param}: {why}", param=param, code=_CODES.get(kind, "invalid_value"))


def path(steps: Sequence[str | int]) -> str:
    """A field as OpenAI writes it: messages[0].content[1].image_url.url. Names are cut to what a name may be."""
    found = ""
    for step in steps:
        if isinstance(step, int):
            found += f"[{step}]"
        elif not step.startswith("~"):
            name = "".join(letter if letter.isprintable() else "?" for letter in step[:64])
            found += f".{name}" if found else name
    return found[:200]


def wrong(message: str, param: str, code: str) -> Refused:
    """A field that is not as it should be."""
    return Refused(400, message, param=param, code=code)
