"""Under which names a server may be asked, and from which pages: what stops a foreign page in a user's own browser.

Pure functions of headers. Knows nothing of keys.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

Headers = Iterable[tuple[bytes, bytes]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def one(headers: Headers, name: bytes) -> str:
    """The header's only value; empty where it is absent, said twice, or no ASCII."""
    said = [value for key, value in headers if key == name]
    return said[0].decode("ascii", "replace").strip() if len(said) == 1 else ""


def by_browser(headers: Headers) -> bool:
    """Whether a browser asks, for a page that somebody shall see."""
    return any(name == b"accept" and b"text/html" in value for name, value in headers)


def bare(host: str) -> str:
    """A Host header's name without its port, lower case; empty for what is no name."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::\d{1,5})?", host.lower())
    return found[1].rstrip(".") if found else ""


def known(headers: Headers, names: Iterable[str]) -> bool:
    """Whether the request asks for a name of the loopback or one of `names`, on whichever port.

    A page that a stranger's name resolves to this machine for (DNS rebinding) says that name here.
    """
    return bare(one(headers, b"host")) in {*LOOPBACK, *(name.lower() for name in names)}


def own(headers: Headers, names: Iterable[str], behind: bool) -> bool:
    """Whether the request comes from no page, from one of this server's own, or from one on a host in `names`.

    `behind` a proxy, X-Forwarded-Host is what the browser asked for.
    """
    headers = list(headers)
    if not any(name == b"origin" for name, _ in headers):
        return True
    origin = _place(one(headers, b"origin"))
    if not origin:
        return False
    here = {_plain(one(headers, b"host"))}
    if behind:
        here.add(_plain(one(headers, b"x-forwarded-host").partition(",")[0].strip()))
    return origin in here or bare(origin) in {name.lower() for name in names}


def _place(origin: str) -> str:
    """The host and port of an origin; empty for "null" and what is no web page's."""
    try:
        found = urlsplit(origin)
    except ValueError:
        return ""
    return _plain(found.netloc) if found.scheme in ("http", "https") and not found.path else ""


def _plain(host: str) -> str:
    return re.sub(r":(80|443)$", "", host.lower())


def loopback(host: str) -> bool:
    """Whether what is bound to `host` can be reached from this machine alone. A name other than localhost is not taken
    for one: what it resolves to may change."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def local(scope: Mapping[str, Any]) -> str:
    """The path without the prefix under which the server is known outside."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
