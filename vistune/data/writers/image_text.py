"""Writes a folder of pictures, each with its text beside it: a caption in a `.txt`, a conversation in a `.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from vistune.data.converting.staged import Staged
from vistune.data.reading.picture_bytes import PictureFolder, own_name, read_picture
from vistune.data.writers import NotHeld, register
from vistune.samples import IMAGE_MARK, Sample


class ImageText:
    """Holds samples of one picture. `prompts` "ignore" writes captions alone: a question beside the picture is lost."""

    def __init__(self, out: Path, prompts: str = "use"):
        if prompts not in ("use", "ignore"):
            raise ValueError(f"{out}: prompts = {prompts!r} is unknown; choose 'use' or 'ignore'")
        self.report: dict[str, Any] = {"samples": 0}
        self._staged = Staged(out)
        self._folder = self._staged[out]
        self._folder.mkdir()
        self._pictures = PictureFolder(self._folder)
        self._prompts = prompts

    def add(self, sample: Sample) -> None:
        if len(sample.images) != 1:
            raise NotHeld(f"{len(sample.images)} pictures; it holds one with each text")
        suffix, text = self._text(sample)
        below = self._pictures.put(read_picture(sample.images[0]), own_name(sample.images[0]))
        (self._folder / below).with_suffix(suffix).write_text(text, encoding="utf-8")
        self.report["samples"] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._staged.commit()
        else:
            self._staged.abandon()

    def _text(self, sample: Sample) -> tuple[str, str]:
        roles = [message.role for message in sample.messages]
        captioned = roles == ["user", "assistant"]
        if captioned and (self._prompts == "ignore" or sample.messages[0].text == IMAGE_MARK):
            return ".txt", sample.messages[1].text
        if self._prompts == "ignore":
            raise NotHeld(f"turns {', '.join(roles)}; a caption is one answer")
        turns = [{"role": message.role, "content": message.text} for message in sample.messages]
        return ".json", json.dumps({"id": sample.id, "messages": turns}, ensure_ascii=False)


@register("image_text")
def open_image_text(out: Path, prompts: str = "use") -> ImageText:
    return ImageText(out, prompts)
