"""The chat page: a page of HTML, its modules and words, what it has to know of the server, and where votes go.

Knows nothing of models: the page asks `v1/chat/completions` as everybody does. Nothing on it comes from elsewhere.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vistune import __version__, pages
from vistune.serve.limits import Limits
from vistune.serve.page.votes import Votes, read_vote
from vistune.serve.refused import Refused

HERE = Path(__file__).parent
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
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
class _File:
    data: bytes
    kind: str
    tag: str


def router(limits: Limits, votes: Path | None = None, *, name: str = "vistune") -> APIRouter:
    """The page at `/`, its files under `/page/`, and `/votes`: without a file `votes` there is no voting.

    `name` is what the page is headed with. Addresses in it are relative, or begin with the server's `--root-path`: the
    page is then right without the slash at the end of its own address too. Raises OSError where votes cannot be kept.
    """
    files, index = _files(), (HERE / "index.html").read_text(encoding="utf-8")
    known = {"name": name, "version": __version__, "votes": votes is not None, "limits": _limits(limits)}
    kept = Votes(votes) if votes else None
    made = APIRouter(include_in_schema=False)

    @made.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        text = _at(index, request.scope.get("root_path", ""))
        return _sent(request, _file(text.encode(), "text/html; charset=utf-8"))

    @made.get("/page/settings")
    async def settings() -> Response:
        return JSONResponse(known, headers=HEADERS)

    @made.api_route("/page/{file}", methods=["GET", "HEAD"])
    async def static(request: Request, file: str) -> Response:
        if file not in files:
            raise Refused(404, "the page has no such file", code="not_found")
        return _sent(request, files[file])

    @made.post("/votes")
    async def vote(request: Request) -> Response:
        if kept is None:
            raise Refused(404, "votes are not kept here: start the server with --votes FILE", code="votes_off")
        line = (await read_vote(request)).line(_asker(request))
        await run_in_threadpool(kept.add, line)
        return JSONResponse({"tstamp": line["tstamp"]}, headers={"Cache-Control": "no-store"})

    return made


def _asker(request: Request) -> str:
    """The address that a vote comes from. Over a Unix socket, where no stranger connects, the process in front says."""
    forwarded = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return request.client.host if request.client else forwarded[:64]


def _limits(limits: Limits) -> Mapping[str, Any]:
    """What the page holds itself to, so that a picture too large is shrunk and not refused."""
    names = ("body", "messages", "pictures", "picture_bytes", "picture_pixels", "new_tokens", "new_tokens_unasked")
    return {name: getattr(limits, name) for name in names}


def _files() -> dict[str, _File]:
    """By name: the page's own, and the sheet that all of vistune's pages share."""
    found = [*sorted(HERE.iterdir()), pages.HERE / "style.css"]
    return {path.name: _file(path.read_bytes(), TYPES[path.suffix]) for path in found if path.suffix in TYPES}


def _file(data: bytes, kind: str) -> _File:
    return _File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:20]}"')


def _at(index: str, root: str) -> str:
    """The page with its files' addresses: below `root` where one is known, else beside the page."""
    return index.replace("{root}", html.escape(f"{root.rstrip('/')}/", quote=True) if root.strip("/") else "")


def _sent(request: Request, file: _File) -> Response:
    """The file, or that what the browser has is still right (304)."""
    headers = {**HEADERS, "ETag": file.tag}
    tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.tag in tags:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.kind, headers=headers)
