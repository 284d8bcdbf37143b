"""One file from the web to disk: resumed, retried, checked. Knows nothing of archives or data sets.

What has arrived lies beside as `NAME.part`; the file takes its name when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import random
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from time import time
from typing import Any

from vistune.data.fetching.threads import Stopped

CHUNK = 1 << 20
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the back-off or the server says
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})  # statuses that pass
AGENT = {"User-Agent": "vistune", "Accept-Encoding": "identity"}
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
BROKEN_NET = (urllib.error.URLError, http.client.HTTPException, OSError)

Check = Callable[[Path], None]
Heard = Callable[[int, int | None], None]


class DownloadError(ValueError):
    """A file that did not come. `gone`: the server said so, and asking again will not help."""

    def __init__(self, address: str, reason: str, gone: bool = False):
        self.address, self.reason, self.gone = address, reason, gone
        super().__init__(f"{address}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.reason, self.gone)


@dataclass(kw_only=True)
class Patience:
    """How long and how often: seconds of silence, tries without progress, the first wait between two."""

    timeout: float = 60.0
    tries: int = 6
    wait: float = 1.0
    stop: Event = field(default_factory=Event)

    def pause(self, failed: int, asked: float | None = None) -> None:
        """Wait before try `failed` + 1: as long as the server asked, else twice as long each time. Raises Stopped."""
        seconds = self.wait * 2 ** (failed - 1) * random.uniform(0.8, 1.2) if asked is None else asked
        if self.stop.wait(min(seconds, LONGEST_WAIT)):
            raise Stopped


def asked_to_wait(headers: Any) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as seconds or as a date."""
    value = (headers.get("Retry-After") or "").strip() if headers else ""
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time()) if value else None
    except ValueError:
        return None


def request(address: str, headers: dict[str, str] | None = None, method: str = "GET") -> urllib.request.Request:
    """Raises DownloadError for what is no web address: links come from files, and `file:` is one too."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise DownloadError(address, str(error), gone=True) from None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise DownloadError(address, "not an http or https address", gone=True)
    # Links in the wild have spaces and letters outside ASCII; what is quoted already stays.
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    clean = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))
    return urllib.request.Request(clean, headers=AGENT | (headers or {}), method=method)


def refused(address: str, error: urllib.error.HTTPError) -> DownloadError:
    """What a status that will not pass means."""
    error.close()
    return DownloadError(address, f"the server answered {error.code} {error.reason}", gone=error.code in (404, 410))


@dataclass
class _Part:
    """What has arrived so far, and what the server said of the whole."""

    path: Path
    address: str
    note: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def found(cls, to: Path, address: str) -> _Part:
        part = cls(to.with_name(to.name + ".part"), address)
        try:
            part.note = json.loads(part._notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            part.note = {}
        if part.note.get("address") != address:
            part.drop()
        return part

    @property
    def _notes(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)
        self.note = {"address": self.address}

    def keep(self, headers: Any, total: int | None) -> None:
        etag = headers.get("ETag") or ""
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified") or ""
        self.note = {"address": self.address, "validator": validator, "total": total}
        self._notes.write_text(json.dumps(self.note), encoding="utf-8")

    def finish(self, to: Path) -> None:
        os.replace(self.path, to)
        self._notes.unlink(missing_ok=True)


class _Transfer:
    """One file's way here: tries until it is whole, or until nothing moves any more."""

    def __init__(self, address: str, to: Path, size: int | None, check: Check | None, heard: Heard, patience: Patience):
        self.address, self.to, self.size = address, to, size
        self.check, self.heard, self.patience = check, heard, patience
        self.part = _Part.found(to, address)
        self.ended_at: list[int] = []  # where the server ended too early, once for each time
        self.doubted: set[int] = set()  # sizes at which the content was found wrong
        self.restarts = 0

    def run(self) -> None:
        failed, best = 0, self.part.size
        # A call that was stopped between the last byte and the last rename has nothing left to ask for.
        if best and best == (self.size or self.part.note.get("total")) and not self._checked():
            self.part.finish(self.to)
            return
        while True:
            try:
                asked, reason = self._once()
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN:
                    raise refused(self.address, error) from None
                error.close()
                asked, reason = asked_to_wait(error.headers), f"the server answered {error.code} {error.reason}"
            except BROKEN_NET as error:
                if getattr(error, "errno", None) in DISK_FULL:
                    raise
                asked, reason = None, f"{type(error).__name__}: {error}"
            if not reason:
                self.part.finish(self.to)
                return
            if self.part.size > best:
                failed, best = 0, self.part.size
            failed += 1
            if failed >= self.patience.tries:
                raise DownloadError(self.address, f"given up after {failed} tries without progress: {reason}")
            self.patience.pause(failed, asked)

    def _once(self) -> tuple[float | None, str]:
        """One connection. Returns (seconds to wait or None, why it is not whole yet or "")."""
        start = self.part.size
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and self.part.note.get("validator"):
            headers["If-Range"] = self.part.note["validator"]
        try:
            answer = urllib.request.urlopen(request(self.address, headers), timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            error.close()
            return 0.0, self._nothing_more(_total_of(error.headers.get("Content-Range")))
        with answer:
            start, total = self._begin(answer, start)
            if start < 0:
                return 0.0, "the file changed on the server; begun again"
            self._receive(answer, start, total)
        return None, self._verdict(total)

    def _begin(self, answer: Any, start: int) -> tuple[int, int | None]:
        """Where the body begins in the file, -1 when what is here does not go with it; and the whole's size."""
        if start and answer.status == 206:
            span = answer.headers.get("Content-Range") or ""
            total, known = _total_of(span), self.part.note.get("total")
            # Another total is another file, unless the first was the lie.
            changed = known and total and total not in (known, self.size) and start not in self.doubted
            if changed or not span.startswith(f"bytes {start}-"):
                self.part.drop()
                return -1, None
        else:  # the whole of it, asked for or not
            start, length = 0, answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            self.part.drop()
        self.part.keep(answer.headers, total)
        return start, total

    def _receive(self, answer: Any, start: int, total: int | None) -> None:
        whole = self.size or total
        said = answer.headers.get("Content-Length", "")
        left = int(said) if said.isdigit() else None
        with open(self.part.path, "ab" if start else "wb") as file:
            self.heard(start, whole)
            while block := _read(answer, left):
                if self.patience.stop.is_set():
                    raise Stopped
                left = None if left is None else left - len(block)
                file.write(block)
                start += len(block)
                self.heard(start, whole)

    def _verdict(self, total: int | None) -> str:
        """Why what is here is not the whole, or ""."""
        have = self.part.size
        if self.size is not None and have != self.size:
            if have > self.size:
                self.part.drop()
            return f"{have:,} bytes came, the file has {self.size:,}"
        if self.size is None and total is not None and have < total:
            # A server that ends at one place twice may have no more, whatever it promised: the content decides.
            self.ended_at.append(have)
            whole = self.check is not None and self.ended_at.count(have) > 1 and not self._wrong()
            return "" if whole else f"{have:,} of {total:,} bytes came"
        return self._checked()

    def _nothing_more(self, total: int | None) -> str:
        """The server says that nothing comes after what is here."""
        have = self.part.size
        expected = self.size if self.size is not None else total
        if expected is not None and have != expected:
            self.part.drop()
            return f"{have:,} bytes were here and no more are to come, the file has {expected:,}; begun again"
        return self._checked(final=True)

    def _checked(self, final: bool = False) -> str:
        """ "" when what is here is right, else why not.

        When it is wrong at a size that nobody knew beforehand, the next try asks whether there is more; what is wrong
        for certain is fetched anew once, then it is the server's fault.
        """
        have = self.part.size
        reason = self._wrong()
        if reason:
            if final or have in self.doubted or have == self.size:
                self.part.drop()
                self.restarts += 1
            self.doubted.add(have)
            if self.restarts > 1:
                raise DownloadError(self.address, f"what comes is not what it should be: {reason}")
        return reason

    def _wrong(self) -> str:
        """What the content says against itself, or ""."""
        try:
            if self.check:
                self.check(self.part.path)
        except ValueError as error:
            return str(error) or type(error).__name__
        return ""


def download(
    address: str,
    to: Path,
    *,
    size: int | None = None,
    sha256: str = "",
    check: Check | None = None,
    heard: Heard = lambda have, total: None,
    patience: Patience | None = None,
) -> None:
    """Fetch `address` to the file `to`, going on where an earlier call stopped.

    `size` (bytes) and `sha256` are what is known of it beforehand; `check` raises ValueError for content that is not
    what it should be; `heard(bytes here, bytes in all or None)` is called as they come. A server that ignores ranges,
    drops the connection, or promises another length than it sends costs tries, not data: a try that brings bytes does
    not count. Raises DownloadError, Stopped; OSError for the disk.
    """

    def whole(path: Path) -> None:
        if sha256 and (found := digest(path)) != sha256:
            raise ValueError(f"its SHA-256 is {found}, expected {sha256}")
        if check:
            check(path)

    to.parent.mkdir(parents=True, exist_ok=True)
    _Transfer(address, to, size, whole if sha256 or check else None, heard, patience or Patience()).run()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(answer: Any, left: int | None) -> bytes:
    """What has come, without waiting for a whole block of it: a stalled connection then costs none of it."""
    if left == 0:  # the server may hold the connection open after the last byte
        return b""
    return bytes(answer.read1(CHUNK if left is None else min(CHUNK, left)))


def _total_of(content_range: str | None) -> int | None:
    """`bytes 5-9/10` or `bytes */10` -> 10."""
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None
