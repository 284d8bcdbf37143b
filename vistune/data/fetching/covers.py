"""The pictures of OCR-VQA, which are published as links: fetched in parallel, dead links listed, nothing tried twice.

Every picture is saved as KEY.jpg with the bytes that came, GIF and PNG too, as LLaVA's JSON names them.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vistune import console
from vistune.data.fetching.download import (
    AGAIN,
    BROKEN_NET,
    DISK_FULL,
    DownloadError,
    Patience,
    asked_to_wait,
    refused,
    request,
)
from vistune.data.fetching.threads import Stopped, spread
from vistune.images import ImageError, image_size
from vistune.samples import Image

LARGEST = 64 << 20  # bytes; a book's cover has some ten thousand
IN_A_ROW = 50  # links that fail for the moment, one after the other, before it is the net and not the links


class _Refused(DownloadError):
    """An answer that is neither a picture nor a word that there is none."""


@dataclass(kw_only=True)
class Fetched:
    """What came of the links: counts, and `later`: links that the next call tries again, and why they failed."""

    wanted: int = 0
    came: int = 0
    dead: int = 0
    unknown: int = 0  # keys without a link
    later: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    key: str
    address: str
    state: Literal["came", "dead", "later", "refused"]
    reason: str = ""


def read_links(path: Path) -> dict[str, str]:
    """Key -> address of `dataset.json`: an object of objects with `imageURL`. Raises ValueError for anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: expected an object of books by key, as in OCR-VQA's dataset.json")
    links = {key: book.get("imageURL") for key, book in data.items() if isinstance(book, dict)}
    found = {key: link for key, link in links.items() if isinstance(link, str) and link}
    if not found:
        raise ValueError(f"{path}: no entry of it has an imageURL")
    return found


def is_links_file(path: Path) -> None:
    """Raises ValueError for what is no `dataset.json`, such as the page that asks whether one really wants it."""
    with open(path, "rb") as file:
        if file.read(200).lstrip()[:1] == b"<":
            raise ValueError("a web page came in place of the file")
    read_links(path)


def fetch_covers(
    links: dict[str, str], keys: Iterable[str], folder: Path, dead_list: Path, *, workers: int, patience: Patience
) -> Fetched:
    """Fetch the pictures of `keys` into `folder` as KEY.jpg.

    `dead_list` is a JSON lines file (key, address, reason) of links that will not come back; what is in it is not asked
    for again unless its address has changed. Links that fail for the moment, or are refused (a status such as 403, a
    page in place of a picture: it may be a proxy that speaks) are left for the next call. Raises DownloadError when so
    many fail in a row that it must be the net.
    """
    known_dead = {(line["key"], line["address"]) for line in read_dead(dead_list)}
    keys = sorted(keys)
    result = Fetched(wanted=len(keys), unknown=sum(key not in links for key in keys))
    asked = [(key, links[key]) for key in keys if key in links and (key, links[key]) not in known_dead]
    result.dead = result.wanted - result.unknown - len(asked)
    folder.mkdir(parents=True, exist_ok=True)
    dead_list.parent.mkdir(parents=True, exist_ok=True)
    in_a_row = 0
    with console.progress() as bar, open(dead_list, "a", encoding="utf-8") as dead:
        task = bar.add_task("pictures by their links", total=len(asked))
        for outcome in spread(partial(_fetch_one, folder, patience), asked, workers, patience.stop):
            bar.advance(task)
            in_a_row = in_a_row + 1 if outcome.state == "later" else 0
            _count(result, outcome, dead)
            if in_a_row >= IN_A_ROW:
                raise DownloadError(outcome.address, f"{in_a_row} links failed in a row: {outcome.reason}")
    return result


def read_dead(dead_list: Path) -> list[dict[str, str]]:
    """The lines of a list of dead links; a torn last line is not one."""
    found = []
    for line in dead_list.read_text(encoding="utf-8").splitlines() if dead_list.exists() else []:
        try:
            entry = json.loads(line)
            found.append({name: str(entry[name]) for name in ("key", "address", "reason")})
        except (ValueError, KeyError, TypeError):
            console.warn(f"{dead_list}: a torn line is passed over, its link is tried again: {line[:80]}")
    return found


def _count(result: Fetched, outcome: _Outcome, dead: Any) -> None:
    if outcome.state == "came":
        result.came += 1
    elif outcome.state != "dead":
        result.later.append((outcome.key, f"{outcome.address}: {outcome.reason}"))
    else:
        result.dead += 1
        line = {"key": outcome.key, "address": outcome.address, "reason": outcome.reason}
        dead.write(json.dumps(line, ensure_ascii=False) + "\n")
        dead.flush()


def _fetch_one(folder: Path, patience: Patience, asked: tuple[str, str]) -> _Outcome:
    key, address = asked
    to = folder / f"{key}.jpg"
    if to.resolve().parent != folder.resolve():
        return _Outcome(key=key, address=address, state="dead", reason="its key is no file name")
    try:
        data = _bytes_of(address, patience)
        _is_picture(address, data)
    except _Refused as error:
        return _Outcome(key=key, address=address, state="refused", reason=error.reason)
    except DownloadError as error:
        return _Outcome(key=key, address=address, state="dead" if error.gone else "later", reason=error.reason)
    half = to.with_name(f".{to.name}.half")
    half.write_bytes(data)
    os.replace(half, to)
    return _Outcome(key=key, address=address, state="came")


def _bytes_of(address: str, patience: Patience) -> bytes:
    """All of a small file. Raises DownloadError: gone for a status that will not pass or for what is too large."""
    asked, reason = None, ""
    for failed in range(patience.tries):
        if patience.stop.is_set():
            raise Stopped
        if failed:
            patience.pause(failed, asked)
        try:
            with urllib.request.urlopen(request(address), timeout=patience.timeout) as answer:
                data = bytes(answer.read(LARGEST + 1))
                length = answer.headers.get("Content-Length", "")
        except urllib.error.HTTPError as error:
            if error.code not in AGAIN:
                failure = refused(address, error)
                raise failure if failure.gone else _Refused(address, failure.reason) from None
            asked, reason = asked_to_wait(error.headers), f"the server answered {error.code} {error.reason}"
            error.close()
            continue
        except (*BROKEN_NET, UnicodeError) as error:
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            asked, reason = None, f"{type(error).__name__}: {error}"
            continue
        if len(data) > LARGEST:
            raise DownloadError(address, f"more than {LARGEST:,} bytes", gone=True)
        if not length.isdigit() or len(data) >= int(length):
            return data
        asked, reason = None, f"{len(data):,} of {int(length):,} bytes came"
    raise DownloadError(address, reason)


def _is_picture(address: str, data: bytes) -> None:
    """Raises _Refused for a page; DownloadError, gone, for an empty answer or the one pixel that some servers send for
    a lost picture."""
    try:
        width, height = image_size(Image(data=data))
    except ImageError as error:
        if data.lstrip()[:1] == b"<":
            raise _Refused(address, "a web page came in place of a picture") from None
        raise DownloadError(address, f"what came is no picture: {error.reason}", gone=True) from None
    if width * height <= 1:
        raise DownloadError(address, f"what came is a picture of {width} x {height}", gone=True)
