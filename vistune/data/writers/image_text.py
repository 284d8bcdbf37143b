"""Writes a folder of pictures, each with its caption in a `.txt` of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from vistune.data.picture_bytes import PictureFolder, own_name, read_picture
from vistune.data.staged import Staged
from vistune.data.writers import NotHeld, register
from vistune.samples import IMAGE_MARK, Sample


class ImageText:
    """Holds one picture with one caption. `prompts` "ignore" lets a question beside the picture be lost."""

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
        caption = self._caption(sample)
        (image,) = sample.images
        below = self._pictures.put(read_picture(image), own_name(image))
        (self._folder / below).with_suffix(".txt").write_text(caption, encoding="utf-8")
        self.report["samples"] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._staged.commit()
        else:
            self._staged.abandon()

    def _caption(self, sample: Sample) -> str:
        roles = [message.role for message in sample.messages]
        if len(sample.images) != 1 or roles != ["user", "assistant"]:
            raise NotHeld(f"{len(sample.images)} picture(s) and {len(roles)} turns; it holds one picture, one caption")
        asked = sample.messages[0].text.replace(IMAGE_MARK, "", 1).strip()
        if asked and self._prompts == "use":
            raise NotHeld(f"its question would be lost: {asked[:60]!r}; prompts = 'ignore' allows it")
        return sample.messages[1].text


@register("image_text")
def open_image_text(out: Path, prompts: str = "use") -> ImageText:
    return ImageText(out, prompts)
