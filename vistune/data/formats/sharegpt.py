"""ShareGPT conversations: a JSON list, or one object a line, of turns from people and from several models; no pictures.

It is read as it lies there, with rows that are empty or out of order: what is left out, `drop_invalid` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.json_members import BadRow, Rows, digest, want
from vistune.samples import Fault, Message, Role, Sample, SampleError

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


class ShareGpt:
    """Rows `{"id", "conversations": [{"from", "value"}]}`, in older copies `items` instead of `conversations`."""

    def __init__(self, rows: Rows, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        id = str(row)
        try:
            _, value = self.rows[row]
            if isinstance(value, dict) and isinstance(value.get("id"), str | int):
                id = str(value["id"])
            turns = want(value, "items" if isinstance(value, dict) and "items" in value else "conversations", list)
            messages = tuple(_message(number, turn) for number, turn in enumerate(turns))
        except BadRow as error:
            fault = Fault(source=self.name, row=row, id=id, code=error.code, reason=error.reason)
            raise SampleError(fault) from None
        return Sample(id=id, source=self.name, row=row, messages=messages)

    def fingerprint(self) -> str:
        return digest(self.rows.facts, self.name)


def _message(number: int, turn: Any) -> Message:
    speaker = want(turn, "from", str)
    if speaker not in ROLES:
        raise BadRow(f"turn {number} is from {speaker!r}, expected one of {', '.join(ROLES)}", "role_order")
    return Message(role=ROLES[speaker], text=want(turn, "value", str))


@register("sharegpt")
def open_sharegpt(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> ShareGpt:
    refuse_unknown(path, "sharegpt", options)
    return ShareGpt(Rows(path, (), cache), name)
