"""The keys that open a server: where they come from, and whether a request carries one. Kept as digests alone.

Knows headers, and nothing else of a request.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from vistune import console

SHORT = 16
"""Characters under which a key can be guessed; the ones made here have 43."""

Headers = Iterable[tuple[bytes, bytes]]


class Keys:
    """A request is let in with any of them; without any keys everybody is."""

    def __init__(self, keys: Sequence[str] = ()):
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, headers: Headers) -> bool:
        """Whether one of the keys is among the headers, as Bearer, or as the password of Basic. Takes as long for a
        wrong key, and for none, as for a right one: all of them are compared, by their digests."""
        given = sha256(_given(headers)).digest()
        found = 0
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return bool(found) or not self._digests


def _given(headers: Headers) -> bytes:
    """What a request says its key is; empty where it says none, or says it twice. No key is empty."""
    said = [value for name, value in headers if name == b"authorization"]
    scheme, _, rest = said[0].strip().partition(b" ") if len(said) == 1 else (b"", b"", b"")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        return _password(rest.strip())
    return b""


def _password(encoded: bytes) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def made() -> str:
    """A new key: 256 bits."""
    return secrets.token_urlsafe(32)


def gathered(words: Sequence[str], file: Path | None, environment: str) -> tuple[list[str], str]:
    """Keys from the command line (`new` makes one), a file (one a line, `#` comments) and VISTUNE_API_KEY; and the one
    that was made. ValueError for what cannot be sent in a header, and for a file without a key."""
    fresh = made() if "new" in words else ""
    found = [*(word for word in words if word != "new"), *environment.split()]
    if file is not None:
        found += _in_file(file)
    for key in found:
        _check(key)
    return [*dict.fromkeys([*found, *([fresh] if fresh else [])])], fresh


def _in_file(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {file}: {error.__class__.__name__}: it cannot be read") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {file}: there is no key in it; write one a line, or use --api-key new")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        console.warn(f"{file} can be read by others on this machine: chmod 600 {file}")
    return keys


def _check(key: str) -> None:
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("an API key is empty, or has spaces or letters beyond ASCII, which no header carries")
    if len(key) < SHORT:
        console.warn(f"an API key has {len(key)} characters and can be guessed; --api-key new makes one of 43")
