"""Pages of HTML that need nothing beside them: one look for all, every text escaped, pictures inside.

Knows nothing of what a page shows: a room brings its own templates, which extend `frame.html`.
"""

from __future__ import annotations

import base64
import functools
import io
import os
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

from vistune.pages import words

HERE = Path(__file__).parent


def write(out: Path, template: Path, **values: Any) -> Path:
    """Render the file `template` into `out`, beside first and then renamed. Its neighbours can be included."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    text = _templates(template.parent).get_template(template.name).render(**values)
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(beside, out)
    return out


def data_uri(picture: PIL.Image.Image, side: int) -> str:
    """The picture as a JPEG in a data URI, at most `side` pixels long."""
    small = picture.copy() if picture.mode == "RGB" else picture.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


@functools.cache
def _templates(folder: Path) -> jinja2.Environment:
    """Templates of a room, and those that all rooms share."""
    made = jinja2.Environment(loader=jinja2.FileSystemLoader([folder, HERE]), autoescape=True, trim_blocks=True)
    made.filters |= {"figure": words.figure, "count": words.count, "bytes": words.size, "duration": words.duration}
    return made
