"""What flows from a data file to a batch: a sample, its messages, its images, and what is wrong with it.

Knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGE_MARK = "<image>"
"""Stands in a message's text where an image goes."""

IMAGE_ID = -200
"""Stands for one whole image in a list of token ids, before it is expanded into placeholders."""

NO_LOSS = -100
"""The label of a position that is not supervised, as `torch` and `transformers` spell it."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image: where it lies, or its encoded bytes. With `size`, it is that many bytes of `path` from `start`, as in
    a tar file; `name` is then what it is called there."""

    path: str = ""
    data: bytes | None = None
    start: int = 0
    size: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `text` carries `IMAGE_MARK` where an image goes."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation with its images, and where it was read: `row` counts from 0 within `source`.

    `notes` is what else the row said (options of a question, boxes, sizes, ...), for the transforms of a mixture.
    """

    id: str
    source: str
    row: int
    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


FaultCode = Literal[
    "row_unreadable",  # not JSON, not an object, a key missing or of the wrong type
    "role_order",  # turns do not alternate user, assistant, ... or a role is unknown
    "empty_answer",
    "image_missing",
    "image_broken",
    "image_without_mark",  # the row names an image, its text has no place for it
    "mark_without_image",  # the text has a place for an image, the row names none
    "mark_in_answer",
    "nothing_supervised",
    "image_does_not_fit",  # its tokens do not fit `length`, or it would be cut
    "template",  # the conversation does not fit the template (plain wants two turns, ...)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why one row is set aside: a line of `quarantine.jsonl`."""

    source: str
    row: int
    id: str
    code: FaultCode
    reason: str
    path: str = ""


def faults_allowed(rows: int, cap: float, strict: bool = False) -> int:
    """How many faulty rows of `rows` a run sets aside before it stops; with `strict` none."""
    return 0 if strict else max(10, int(cap * rows))


class SampleError(ValueError):
    """A row that cannot be used. Carries the `Fault`; the reader of the row knows where it stands."""

    def __init__(self, fault: Fault):
        self.fault = fault
        where = f"{fault.source}:{fault.row}" + (f" (id {fault.id})" if fault.id else "")
        super().__init__(f"{where}: {fault.code}: {fault.reason}" + (f": {fault.path}" if fault.path else ""))

    def __reduce__(self) -> tuple[type[SampleError], tuple[Fault]]:
        return type(self), (self.fault,)  # so that it crosses from a worker process
