"""Rows of a data file as training sees them: prompt, ids, labels and the text that is supervised.

Opens no picture: one image is one `IMAGE_ID`. Knows no length and no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from vistune.chat import ChatError, Encoded, Template, TextEncoder, encode, supervised_text
from vistune.data.formats import Reader
from vistune.samples import IMAGE_ID, NO_LOSS, SampleError

COLOURS = {"image": "black on cyan", "supervised": "green", "text": "bright_black"}


def rows(reader: Reader, template: Template, encoder: TextEncoder) -> Iterator[dict[str, Any]]:
    """One dict a row: id, prompt, ids, labels, supervised_text; or id and the fault that keeps the row out."""
    for row in range(len(reader)):
        try:
            sample = reader[row]
            encoded = encode(template, encoder, sample.messages, has_images=bool(sample.images))
        except SampleError as error:
            fault = error.fault
            yield {"id": fault.id or str(row), "row": row, "fault": fault.code, "reason": fault.reason}
            continue
        except ChatError as error:
            yield {"id": sample.id, "row": row, "fault": error.code, "reason": str(error)}
            continue
        yield {
            "id": sample.id,
            "row": row,
            "prompt": encoded.prompt,
            "ids": encoded.ids,
            "labels": labels(encoded),
            "supervised_text": supervised_text(encoded, encoder),
            **_images(encoded, len(sample.images)),
        }


def labels(encoded: Encoded) -> list[int]:
    """The ids where there is loss, NO_LOSS elsewhere."""
    return [i if learned else NO_LOSS for i, learned in zip(encoded.ids, encoded.loss_mask, strict=True)]


def _images(encoded: Encoded, given: int) -> dict[str, Any]:
    """A fault when the row names another number of images than its text has places for."""
    places = encoded.ids.count(IMAGE_ID)
    if places == given:
        return {}
    code = "mark_without_image" if places > given else "image_without_mark"
    return {"fault": code, "reason": f"{given} image(s), {places} place(s) for one in the conversation"}


def coloured(shown: dict[str, Any], encoder: TextEncoder) -> Text:
    """One row for the terminal: green is supervised, gray is not, cyan is an image."""
    text = Text(f"{shown['id']}\n", style="bold")
    if "fault" in shown:
        text.append(f"set aside: {shown['fault']}: {shown['reason']}\n", style="red")
    for kind, piece in _pieces(shown, encoder):
        text.append(piece, style=COLOURS[kind])
    return text


def _pieces(shown: dict[str, Any], encoder: TextEncoder) -> Iterator[tuple[str, str]]:
    """Runs of tokens of one kind, decoded."""
    run: list[int] = []
    kind = ""
    for token, label in zip(shown.get("ids", ()), shown.get("labels", ()), strict=True):
        now = "image" if token == IMAGE_ID else "supervised" if label != NO_LOSS else "text"
        if now != kind and run:
            yield kind, encoder.decode(run) if kind != "image" else " image " * len(run)
            run = []
        kind = now
        run.append(token)
    if run:
        yield kind, encoder.decode(run) if kind != "image" else " image " * len(run)
