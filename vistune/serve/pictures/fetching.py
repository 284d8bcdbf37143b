"""Fetching a picture from a host that was allowed: over https, from an address that was looked up once and is a public
one, every redirect like the first, within seconds and bytes.

Knows nothing of pictures and of requests. Blocks: call it in a thread.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from vistune.serve.limits import Limits
from vistune.serve.refused import Refused

LONGEST = 4_096
"""Characters of an address."""
ADDRESSES = 3
"""Of a name that has several: so many are tried."""
LOOKING_UP = 4
"""Names that are looked up at once; a lookup cannot be ended, only left."""

REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
_SAFE = "/%:@!$&'()*+,;=~-._?"

Resolve = Callable[[str, int], Sequence[str]]
"""Name and port -> addresses as numbers. Raises OSError."""

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_CLOSED = tuple(
    ip_network(net)
    for net in (
        "192.0.0.0/24",  # protocols' own; a cloud's machines ask there about themselves
        "192.88.99.0/24",  # relays into IPv6
        "168.63.129.16/32",  # another cloud's, on a public number
        "2001::/23",  # tunnels (Teredo) and other protocols' own
        "2001:db8::/32",
        "2002::/16",  # 6to4: any IPv4 address, also a private one
        "3fff::/20",
    )
)
_GLOBAL_6 = ip_network("2000::/3")  # mapped and translated IPv4 (::ffff:0:0/96, 64:ff9b::/96) lie outside


def public(address: str) -> bool:
    """Whether an address is one of the open Internet and of one machine: no loopback, no private or local network, no
    multicast, none that holds another address in itself."""
    found: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(found, IPv6Address) and (found.scope_id or found not in _GLOBAL_6):
        return False
    closed = any(found in net for net in _CLOSED if net.version == found.version)
    return found.is_global and not (closed or found.is_multicast or found.is_reserved)


def looked_up(name: str, port: int) -> list[str]:
    """All addresses of a name, as the machine looks names up."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(place[4][0]) for place in found))


@dataclass(frozen=True)
class Place:
    """What an address says: `host` in ASCII, and path with query."""

    host: str
    port: int
    target: str


@dataclass(frozen=True)
class Allowed:
    """A line of the allow-list. `name` "*.example.org" stands for what is below it."""

    name: str
    port: int

    def takes(self, place: Place) -> bool:
        below = self.name.startswith("*.") and place.host.endswith(self.name[1:])
        return (below or place.host == self.name) and place.port == self.port


def allowed(entry: str) -> Allowed:
    """`host`, `*.host`, either with `:port` (else 443). ValueError with what is wrong."""
    name, _, port = entry.strip().partition(":")
    wild, bare = name.startswith("*."), name.removeprefix("*.")
    try:
        host = _host(bare)
        number = int(port) if port else 443
    except ValueError as error:
        raise ValueError(f"--picture-host {entry}: give names of hosts, as pictures.example.org") from error
    if _is_number(host) or (wild and "." not in host) or not 0 < number < 65536:
        raise ValueError(f"--picture-host {entry}: a name is needed, as pictures.example.org or *.example.org:8443")
    return Allowed("*." * wild + host, number)


class Fetcher:
    """See the module. Looks names up with `resolve`, goes to addresses that are `reachable`, believes `context`'s
    certificates (None: the machine's). ValueError when `limits.hosts` has what is no host."""

    def __init__(
        self,
        limits: Limits,
        *,
        resolve: Resolve | None = None,
        reachable: Callable[[str], bool] | None = None,
        context: ssl.SSLContext | None = None,
    ):
        self.limits = limits
        self.hosts = [allowed(entry) for entry in limits.hosts]
        self.resolve, self.reachable = resolve or looked_up, reachable or public
        self.context = context or ssl.create_default_context()
        self.names = ThreadPoolExecutor(LOOKING_UP, "names")

    def look(self, url: str, param: str) -> Place:
        """What an address says, if pictures may come from there. Refused: 400, 403."""
        try:
            place = _place(url)
        except ValueError as error:
            raise Refused(400, f"no address of a picture: {error}", param=param, code="picture_url") from error
        if not any(entry.takes(place) for entry in self.hosts):
            said = f"pictures are not fetched from {place.host}:{place.port}: this server does not allow it"
            raise Refused(403, said, param=param, code="host_not_allowed")
        return place


class Trip:
    """The fetches of one request: so many seconds from now and so many bytes for all of them together. `fetch` may
    be called in several threads."""

    def __init__(self, fetcher: Fetcher, seconds: float, most: int):
        self.fetcher, self.until, self.most = fetcher, time.monotonic() + seconds, most
        self._bytes, self._lock = 0, threading.Lock()

    def left(self) -> float:
        """Seconds. TimeoutError when there are none."""
        if (left := self.until - time.monotonic()) <= 0:
            raise TimeoutError
        return left

    def fetch(self, url: str, param: str) -> bytes:
        """What lies there. Refused: 400 or 403 for what may not be fetched or is not there, 413 for too much, 502 for
        what the other host or the way to it does wrong, 504 when it takes too long."""
        try:
            return self._followed(url, param)
        except Refused:
            raise
        except TimeoutError as error:
            raise Refused(504, "fetching pictures took too long", param=param, code="fetch_timeout") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failed("the picture's host cannot be reached, or answers what is no HTTP", param) from error

    def _followed(self, url: str, param: str) -> bytes:
        place = self.fetcher.look(url, param)
        for _ in range(self.fetcher.limits.redirects + 1):
            with self._asked(place, param) as reply:
                if reply.status not in REDIRECTS:
                    return self._body(reply, param)
                url = urljoin(url, reply.getheader("Location", ""))
            try:
                place = self.fetcher.look(url, param)
            except Refused as error:  # nothing is said of where it leads: the asker does not know
                said = "the picture's host sends on to an address from which none are fetched"
                raise Refused(403, said, param=param, code="redirect_not_allowed") from error
        raise Refused(400, "the picture's host sends on too often", param=param, code="fetch_redirects")

    @contextmanager
    def _asked(self, place: Place, param: str) -> Iterator[http.client.HTTPResponse]:
        """What the host answers, its headers read."""
        with self._connected(place, self._addresses(place, param)) as wire:
            host = place.host if place.port == 443 else f"{place.host}:{place.port}"
            asking = f"GET {place.target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: vistune\r\nAccept: image/*\r\n"
            wire.settimeout(self.left())
            wire.sendall(f"{asking}Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii"))
            with http.client.HTTPResponse(cast(Any, _Read(wire, self)), method="GET") as reply:
                reply.begin()
                yield reply

    def _addresses(self, place: Place, param: str) -> Sequence[str]:
        """Asked for once: what is checked is what is gone to."""
        found = self.fetcher.names.submit(self.fetcher.resolve, place.host, place.port).result(self.left())
        if not all(self.fetcher.reachable(address) for address in found):
            said = f"{place.host} is not on the open Internet, so no picture is fetched from it"
            raise Refused(403, said, param=param, code="address_not_allowed")
        return found[:ADDRESSES]

    def _connected(self, place: Place, addresses: Sequence[str]) -> ssl.SSLSocket:
        """Each address gets its share of the time. OSError when none answers, or not as who it should be."""
        for tried, address in enumerate(addresses):
            wait = self.left() / (len(addresses) - tried)
            try:
                raw = socket.create_connection((address, place.port), wait)
            except OSError:
                continue
            raw.settimeout(self.left())
            return self.fetcher.context.wrap_socket(raw, server_hostname=place.host)
        self.left()
        raise OSError("no address answers")

    def _body(self, reply: http.client.HTTPResponse, param: str) -> bytes:
        if 400 <= reply.status < 500:
            said = f"the picture's host answers {reply.status}"
            raise Refused(400, said, param=param, code="fetch_status")
        if reply.status != 200:
            raise _failed(f"the picture's host answers {reply.status}", param)
        if reply.getheader("Content-Encoding", "identity").strip().lower() != "identity":
            raise _failed("the picture's host sends it compressed, which was not asked for", param)
        most, declared = self.fetcher.limits.picture_bytes, reply.length
        if (declared or 0) > most:
            raise _too_long(f"a picture may have {most:,} bytes", param)
        parts, got = [], 0
        while part := reply.read(_CHUNK):
            parts.append(part)
            got += len(part)
            if got > most:
                raise _too_long(f"a picture may have {most:,} bytes", param)
            self._count(len(part), param)
        if declared is not None and got != declared:
            raise _failed("the picture's host sends less than it says", param)
        return b"".join(parts)

    def _count(self, got: int, param: str) -> None:
        with self._lock:
            self._bytes += got
            if self._bytes > self.most:
                raise _too_long(f"the fetched pictures of a request may have {self.most:,} bytes together", param)


class _Read(io.RawIOBase):
    """What a socket brings, as long as the trip may last: a host that sends a byte a second gains nothing."""

    def __init__(self, wire: ssl.SSLSocket, trip: Trip):
        self.wire, self.trip = wire, trip

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` asks a socket for."""
        assert mode == "rb"
        return io.BufferedReader(self, _CHUNK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.wire.settimeout(self.trip.left())
        return self.wire.recv_into(buffer)


def _place(url: str) -> Place:
    """ValueError with a reason that repeats nothing."""
    if len(url) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} characters")
    if not url.isprintable() or " " in url or "\\" in url:
        raise ValueError("white space, control characters or backslashes in it")
    try:
        parts = urlsplit(url)
        host, port = _host(parts.hostname or ""), parts.port
    except ValueError:
        raise ValueError("no name of a host, or no number of a port") from None
    if parts.scheme != "https":
        raise ValueError("https is needed")
    if "@" in parts.netloc:
        raise ValueError("a user or a password in it")
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return Place(host, 443 if port is None else port, target)


def _host(name: str) -> str:
    """A host's name in ASCII. ValueError when it is none."""
    name = name.removesuffix(".").lower()
    found = name if name.isascii() else name.encode("idna").decode("ascii")
    if len(found) > 253 or not all(_LABEL.fullmatch(label) for label in found.split(".")):
        raise ValueError("no name of a host")
    return found


def _is_number(host: str) -> bool:
    """Whether programs take a host for an IPv4 address, however it is written."""
    return bool(re.fullmatch(r"\d+|0x[0-9a-f]*", host.rpartition(".")[2]))


def _failed(said: str, param: str) -> Refused:
    return Refused(502, said, param=param, code="fetch_failed")


def _too_long(said: str, param: str) -> Refused:
    return Refused(413, said, param=param, code="picture_bytes")
