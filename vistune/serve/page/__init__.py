"""The chat page: its HTML, modules and words as they are sent. Nothing on it comes from elsewhere.

Knows nothing of models, nor of what the page asks; what is light to import is here.
"""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from vistune import pages

HERE = Path(__file__).parent
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
HTML = "text/html; charset=utf-8"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""`no-cache`: kept, but asked about each time, so that a newer server's page is never mixed with an older one's."""


@dataclass(frozen=True)
class File:
    data: bytes
    kind: str
    tag: str


def files() -> dict[str, File]:
    """By name: the page's own, and the sheet that all of vistune's pages share."""
    found = [*sorted(HERE.iterdir()), pages.HERE / "style.css"]
    return {path.name: file(path.read_bytes(), TYPES[path.suffix]) for path in found if path.suffix in TYPES}


def file(data: bytes, kind: str) -> File:
    return File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"')


def written(name: str) -> str:
    """A page as it stands here, with the head that all of them share."""
    head = (HERE / "head.html").read_text(encoding="utf-8").rstrip()
    return (HERE / name).read_text(encoding="utf-8").replace("{head}", head)


def at(text: str, root: str) -> str:
    """A page with its files' addresses: below `root` where one is known, else beside the page."""
    return text.replace("{root}", html.escape(f"{root.rstrip('/')}/", quote=True) if root.strip("/") else "")


def sent(request: Request, one: File) -> Response:
    """The file, or that what the browser has is still right (304)."""
    headers = {**HEADERS, "ETag": one.tag}
    tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if one.tag in tags:
        return Response(status_code=304, headers=headers)
    return Response(one.data, media_type=one.kind, headers=headers)
