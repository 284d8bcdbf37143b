"""Pictures that strangers send: taken out of data URLs, or fetched from allowed hosts, and checked before anything is
decoded. Never a path, never an address that was not allowed.

Knows nothing of models. Decoding comes later; what is let through can only be read as the format it was checked as.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vistune.images import ImageError, image_size
from vistune.samples import Image
from vistune.serve.limits import Limits
from vistune.serve.pictures.fetching import Fetcher, Trip
from vistune.serve.pictures.headers import header
from vistune.serve.refused import Refused

TYPES = ("png", "jpeg", "jpg", "webp", "gif")
"""Of image/...; jpg is not registered, but many clients write it. Which of them is written decides nothing: the bytes
do, since clients name pictures by their files' endings. Parameters (;charset=...) are refused: a picture has none."""
LONGEST = 65_535
"""Pixels of a side; more than any program shows, and what JPEG can say."""
THIN = 200
"""The longer side in shorter ones: where the short side of a thinner strip is resized to a model's size, the long one
would fill the memory."""
FETCHED_AT_ONCE = 16
"""Pictures that are being fetched, for all requests together."""

_GRACE = 0.5  # fetches end by themselves; this is for those that wait for a thread
_SLICE = 1 << 20  # a multiple of 4; a millisecond of work, then other threads may go on
_PREFIX = 64  # no data URL that is taken has its comma further on
_DATA = re.compile(rf"data:image/(?:{'|'.join(TYPES)});base64,", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"(https?|file|ftp|data|blob|javascript):", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A picture that was checked. `image` has its bytes without what is no pixels, `digest` is their SHA-256; sides in
    pixels."""

    image: Image
    digest: bytes
    width: int
    height: int


class Media:
    """See the module. ValueError when `limits.hosts` has what is no host."""

    def __init__(self, limits: Limits, fetcher: Fetcher | None = None):
        self.limits = limits
        self.fetcher = fetcher or (Fetcher(limits) if limits.hosts else None)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "media")
        self._fetching = ThreadPoolExecutor(FETCHED_AT_ONCE, "fetching")

    async def gather(self, urls: Sequence[tuple[str, str]]) -> list[Taken]:
        """The pictures of a request in their order, from pairs of where a URL stands in the request and the URL. All
        URLs are looked at before any is decoded or fetched; equal addresses are fetched once.

        Refused, for the first that is wrong: 400; 403, a host or an address that is not allowed; 413, too many bytes;
        502 and 504, the other host's fault.
        """
        self._count(urls)
        starts = [self._look(url, param) for param, url in urls]
        trip = Trip(self.fetcher, self.limits.fetch, self.limits.body) if self.fetcher and not all(starts) else None
        reading: list[Future[Taken]] = []
        fetched: dict[str, Future[Taken]] = {}
        for (param, url), start in zip(urls, starts, strict=True):
            if trip is None or start:
                reading.append(self._pool.submit(self._taken, url, start, param))
                continue
            if url not in fetched:
                fetched[url] = self._fetching.submit(self._fetch, url, param, trip)
            reading.append(fetched[url])
        return await _all(reading, urls, self.limits.fetch + _GRACE if trip else None)

    async def read(self, texts: Sequence[tuple[str, str]]) -> list[Taken]:
        """The same from pairs of where a picture stands and its bytes in base64, without a data URL around them."""
        self._count(texts)
        for param, text in texts:
            self._size(len(text), param)
        return await _all([self._pool.submit(self._taken, text, 0, param) for param, text in texts], texts, None)

    def decoded(self, text: str, param: str, start: int = 0) -> bytes:
        """The bytes of a text in base64 from `start` on: the standard alphabet, padded, nothing else in it. Takes
        milliseconds for each million, so call it in a thread. Refused: 400, 413."""
        self._size(len(text) - start, param)
        try:
            return _base64(text, start)
        except ValueError as error:
            raise Refused(400, f"not base64: {error}", param=param, code="picture_base64") from error

    def check(self, data: bytes, param: str) -> Taken:
        """The picture that these bytes are, by its header; nothing is decoded. Refused: 400, 413."""
        if len(data) > self.limits.picture_bytes:
            raise _too_long(self.limits.picture_bytes, param)
        try:
            found = header(data)
        except ValueError as error:
            raise Refused(400, f"the picture cannot be read: {error}", param=param, code="picture_broken") from error
        self._measure(found.width, found.height, param)
        image = Image(data=found.bare)
        try:
            opened = image_size(image)
        except ImageError as error:
            said = f"the picture cannot be read: a broken {found.format}"
            raise Refused(400, said, param=param, code="picture_broken") from error
        if opened != (found.width, found.height):
            raise Refused(400, "the picture says two sizes", param=param, code="picture_broken")
        return Taken(image=image, digest=hashlib.sha256(found.bare).digest(), width=found.width, height=found.height)

    def close(self) -> None:
        """Nothing more is read; what is being read ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)

    def _taken(self, text: str, start: int, param: str) -> Taken:
        return self.check(self.decoded(text, param, start), param)

    def _fetch(self, url: str, param: str, trip: Trip) -> Taken:
        return self.check(trip.fetch(url, param), param)

    def _count(self, pictures: Sequence[tuple[str, str]]) -> None:
        if len(pictures) > (most := self.limits.pictures):
            said = f"{len(pictures)} pictures: a conversation may have {most}"
            raise Refused(400, said, param=pictures[most][0], code="too_many_pictures")

    def _look(self, url: str, param: str) -> int:
        """Where a data URL's base64 begins; 0 for an address from which pictures are fetched."""
        if found := _DATA.match(url, 0, _PREFIX):
            self._size(len(url) - found.end(), param)
            return found.end()
        if self.fetcher and url[:6].lower() == "https:":
            self.fetcher.look(url, param)
            return 0
        raise Refused(400, _why_not(url, bool(self.fetcher)), param=param, code="picture_url")

    def _size(self, length: int, param: str) -> None:
        """Of a text in base64."""
        if length // 4 * 3 - 2 > self.limits.picture_bytes:
            raise _too_long(self.limits.picture_bytes, param)

    def _measure(self, width: int, height: int, param: str) -> None:
        said, most = f"a picture of {width} x {height} pixels", self.limits.picture_pixels
        if width * height > most:
            raise Refused(400, f"{said}: it may have {most:,}; shrink it", param=param, code="picture_pixels")
        if max(width, height) > LONGEST or max(width, height) > THIN * min(width, height):
            said += f": it may be {LONGEST:,} long, and {THIN} times as long as wide"
            raise Refused(400, said, param=param, code="picture_shape")


async def _all(reading: list[Future[Taken]], pairs: Sequence[tuple[str, str]], seconds: float | None) -> list[Taken]:
    """The first that is wrong ends them all; so does leaving."""
    try:
        async with asyncio.timeout(seconds):
            return [await asyncio.wrap_future(one) for one in reading]
    except TimeoutError as error:
        at = next((place for place, one in enumerate(reading) if not one.done()), 0)
        raise Refused(504, "fetching pictures took too long", param=pairs[at][0], code="fetch_timeout") from error
    finally:
        for one in reading:
            one.cancel()


def _base64(text: str, start: int) -> bytes:
    """ValueError with a reason that repeats nothing."""
    length = len(text) - start
    if not length:
        raise ValueError("there is nothing")
    if length % 4:
        raise ValueError("its length is no multiple of 4; is its padding missing?")
    parts = []
    for at in range(start, len(text), _SLICE):
        piece = text[at : at + _SLICE]
        try:
            parts.append(binascii.a2b_base64(piece, strict_mode=True))
        except ValueError as error:
            raise ValueError("characters beside A-Z a-z 0-9 + / and the padding at its end") from error
        if len(piece) == _SLICE and at + _SLICE < len(text) and len(parts[-1]) != _SLICE // 4 * 3:
            raise ValueError("padding before its end")
    tail = parts[-1][-3:] if len(parts[-1]) % 3 == 0 else parts[-1][-(len(parts[-1]) % 3) :]
    if binascii.b2a_base64(tail, newline=False).decode() != text[-4:]:
        raise ValueError("its last character has bits that belong to nothing")
    return b"".join(parts)


def _too_long(most: int, param: str) -> Refused:
    return Refused(413, f"a picture may have {most:,} bytes", param=param, code="picture_bytes")


def _why_not(url: str, fetches: bool) -> str:
    taken = f"pictures are taken as data URLs: data:image/(png, jpeg, webp or gif);base64,...{_ALSO if fetches else ''}"
    if not url:
        return f"an empty address; {taken}"
    scheme = _SCHEME.match(url)
    if not scheme:
        return f"this is neither; {taken}" if fetches else f"this is no data URL; {taken}"
    name = scheme[1].lower()
    if name == "data":
        return f"a data URL of another type, or not in base64, or with parameters; {taken}"
    return f"{name}: is not taken; {taken}" + ("" if fetches or name != "https" else "; this server fetches none")


_ALSO = ", or https:// addresses of the hosts that this server allows"
