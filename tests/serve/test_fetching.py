"""Fetching from hosts that were allowed: what is allowed, where it leads, and hosts that do their worst."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import PIL.Image
import pytest

from vistune.serve.limits import Limits
from vistune.serve.pictures.fetching import Fetcher, Place, Trip, allowed, public
from vistune.serve.pictures.media import Media
from vistune.serve.refused import Refused

MADE = Path(__file__).parent.parent / "golden" / "serve"  # an authority made for tests, and a host's name by it
OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"a picture, let us say"
Answer = Callable[[ssl.SSLSocket], None]


class Host:
    """A host with TLS on the loopback: what it answers at a path is bytes, or a function of the connection."""

    def __init__(self) -> None:
        self.place = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.place.getsockname()[1]
        self.answers: dict[str, bytes | Answer] = {"/a": OK + b"Content-Length: 21\r\n\r\n" + BODY}
        self.asked: Counter[str] = Counter()
        self.heads: list[str] = []
        self.over = threading.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(MADE / "host.pem")
        self.names: list[str | None] = []
        self.context.sni_callback = lambda _, name, __: self.names.append(name)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.place.accept()[:1], daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError), self.context.wrap_socket(raw, server_side=True) as wire:
            wire.settimeout(10)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += wire.recv(1)
            path = head.split()[1].decode()
            self.asked[path] += 1
            self.heads.append(head.decode())
            answer = self.answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            wire.sendall(answer) if isinstance(answer, bytes) else answer(wire)

    def redirect(self, path: str, location: str, status: int = 302) -> None:
        self.answers[path] = f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()

    def url(self, path: str, name: str = "pictures.test") -> str:
        return f"https://{name}:{self.port}{path}"

    def close(self) -> None:
        self.over.set()
        self.place.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


class Names:
    """What a name's addresses are, one answer after the other; the last for ever."""

    def __init__(self, **answers: list[list[str]]):
        self.answers, self.asked = answers, Counter[str]()

    def __call__(self, name: str, port: int) -> list[str]:
        self.asked[name] += 1
        known = self.answers.get(name.split(".")[0], [["127.0.0.1"]])
        return known.pop(0) if len(known) > 1 else known[0]


def fetcher(host: Host, resolve: Names | None = None, **limits: object) -> Fetcher:
    """Believes in the made authority, and that 127.0.0.1 is the open Internet."""
    hosts = tuple(f"{name}:{host.port}" for name in ("pictures.test", "*.pictures.test", "inside.test", "wrong.test"))
    context = ssl.create_default_context(cafile=str(MADE / "ca.pem"))
    known = Limits(**{"hosts": hosts, "fetch": 5.0, **limits})
    return Fetcher(known, resolve=resolve or Names(), reachable=lambda one: one == "127.0.0.1", context=context)


def fetched(made: Fetcher, url: str) -> bytes:
    return Trip(made, made.limits.fetch, made.limits.body).fetch(url, "here")


def refused(made: Fetcher, url: str, status: int, code: str) -> Refused:
    with pytest.raises(Refused) as caught:
        fetched(made, url)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "here")
    assert "Sesame" not in str(caught.value.body())
    return caught.value


def test_a_picture_comes_over_https_from_the_address_that_was_looked_up(host: Host) -> None:
    names = Names()
    host.answers["/a?size=b%20c"] = host.answers["/a"]
    assert fetched(fetcher(host, names), host.url("/a?size=b%20c#part", "Pictures.TEST.")) == BODY
    head = host.heads[-1]
    assert f"Host: pictures.test:{host.port}\r\n" in head and "Accept-Encoding: identity" in head
    assert "cookie" not in head.lower() and "authorization" not in head.lower()
    assert host.names[-1] == "pictures.test"


def test_no_proxy_of_the_environment_is_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetched(fetcher(host), host.url("/a")) == BODY


def test_a_body_may_come_in_chunks_or_until_the_end(host: Host) -> None:
    host.answers["/chunks"] = OK + b"Transfer-Encoding: chunked\r\n\r\n15\r\n" + BODY + b"\r\n0\r\n\r\n"
    host.answers["/end"] = OK + b"\r\n" + BODY
    assert fetched(fetcher(host), host.url("/chunks")) == fetched(fetcher(host), host.url("/end")) == BODY


# What is allowed


@pytest.mark.parametrize(
    ("entry", "url", "takes"),
    [
        ("example.org", "https://example.org/a", True),
        ("example.org", "https://example.org:443/a", True),
        ("Example.ORG", "https://EXAMPLE.org./a", True),
        ("example.org", "https://example.org:8443/a", False),
        ("example.org:8443", "https://example.org:8443/a", True),
        ("example.org:8443", "https://example.org/a", False),
        ("example.org", "https://a.example.org/", False),
        ("example.org", "https://example.org.evil.net/", False),
        ("example.org", "https://evilexample.org/", False),
        ("*.example.org", "https://a.b.example.org/", True),
        ("*.example.org", "https://example.org/", False),
        ("*.example.org", "https://evilexample.org/", False),
        ("b\u00fccher.example", "https://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "https://B\u00dcCHER.example/", True),
        ("example.org", "https://example\u3002org/", True),
        ("example.org", "https://127.0.0.1/", False),
        ("example.org", "https://[::1]/", None),
        ("example.org", "https://2130706433/", False),
        ("example.org", "https:///a", None),
        ("example.org", "https://user@example.org/", None),
        ("example.org", "https://example.org@127.0.0.1/", None),
        ("example.org", "https://example.org:secret@127.0.0.1/", None),
        ("example.org", "https://example.org\\@127.0.0.1/", None),
        ("example.org", "https://127.0.0.1\\.example.org/", None),
        ("example.org", "https://example.org/\r\nHost: other", None),
        ("example.org", "https://exam\tple.org/", None),
        ("example.org", "https://example.org:99999/", None),
        ("example.org", "https://example.org:x/", None),
        ("example.org", "https://example.org:0/", False),
        ("example.org", "https://exam%70le.org/", None),
        ("example.org", "https://example..org/", None),
        ("example.org", "https://[example.org/", None),
        ("example.org", "https://example.org/" + "a" * 5000, None),
        ("example.org", "http://example.org/", None),
    ],
)
def test_only_hosts_of_the_list_are_gone_to(entry: str, url: str, takes: bool | None) -> None:
    """None: it is no address at all."""
    made = Fetcher(Limits(hosts=(entry,)), resolve=Names())
    if takes:
        assert isinstance(made.look(url, "here"), Place)
        return
    with pytest.raises(Refused) as caught:
        made.look(url, "here")
    assert (caught.value.status, caught.value.code) == (
        (400, "picture_url") if takes is None else (403, "host_not_allowed")
    )
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.org",
        "https://example.org",
        "example.org/a",
        "127.0.0.1",
        "::1",
        "0x7f.1",
        "a b",
        "a:0",
        "a:x",
        "a..b",
    ],
)
def test_a_list_of_what_is_no_host_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match="--picture-host"):
        Media(Limits(hosts=("example.org", entry)))


def test_an_entry_says_its_port() -> None:
    assert (allowed("*.Example.org:8443").name, allowed("example.org").port) == ("*.example.org", 443)


# Where names lead

# fmt: off
CLOSED = [
    "127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.5.4", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1",
    "198.51.100.7", "203.0.113.9", "192.88.99.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "::1", "::", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::1", "2002:808:808::1", "2001:0:7f00::1", "2001:db8::1",
    "3fff::1", "fe80::1", "fe80::1%1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "5f00::1",
    "4000::1",
]
# fmt: on


@pytest.mark.parametrize("address", CLOSED)
def test_addresses_that_are_not_of_the_open_internet(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450::1"])
def test_addresses_that_are(address: str) -> None:
    assert public(address)


def test_the_loopback_is_out_of_reach_unless_somebody_says_otherwise(host: Host) -> None:
    """As it is served: names are looked up as the machine does, and where they lead is looked at."""
    made = Fetcher(Limits(hosts=(f"localhost:{host.port}",)))
    assert "localhost" in refused(made, host.url("/a", "localhost"), 403, "address_not_allowed").message
    assert not host.heads


def test_every_address_of_a_name_must_be_one(host: Host) -> None:
    made = fetcher(host, Names(pictures=[["127.0.0.1", "10.0.0.1"]]))
    refused(made, host.url("/a"), 403, "address_not_allowed")
    assert not host.heads


def test_a_name_that_leads_elsewhere_the_second_time_is_not_asked_twice(host: Host) -> None:
    names = Names(pictures=[["127.0.0.1"], ["10.0.0.1"]])
    assert fetched(fetcher(host, names), host.url("/a")) == BODY
    assert names.asked["pictures.test"] == 1


def test_a_name_that_nobody_knows(host: Host) -> None:
    made = fetcher(host)

    def unknown(name: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Sesame")

    made.resolve = unknown
    refused(made, host.url("/a"), 502, "fetch_failed")


def test_a_lookup_that_never_ends_is_left(host: Host) -> None:
    made, over = fetcher(host, fetch=0.3), threading.Event()

    def stuck(name: str, port: int) -> list[str]:
        over.wait(10)
        return []

    made.resolve = stuck
    refused(made, host.url("/a"), 504, "fetch_timeout")
    over.set()


# Redirects


def test_a_redirect_is_followed(host: Host) -> None:
    for status, path in ((301, "/1"), (302, "/2"), (303, "/3"), (307, "/4"), (308, "/5")):
        host.redirect(path, "a" if status == 301 else host.url("/a", "more.pictures.test"), status)
        assert fetched(fetcher(host), host.url(path)) == BODY
    assert host.names[-1] == "more.pictures.test"


@pytest.mark.parametrize(
    "location",
    [
        "http://pictures.test/a",
        "https://elsewhere.test/Sesame",
        "https://pictures.test/a",
        "https://127.0.0.1/latest",
        "file://localhost/etc/hosts",
        "//169.254.169.254/latest/meta-data",
        "javascript:Sesame",
        "https://user@pictures.test/",
    ],
)
def test_a_redirect_to_where_nobody_may_go(host: Host, location: str) -> None:
    host.redirect("/away", location)
    refused(fetcher(host), host.url("/away"), 403, "redirect_not_allowed")
    assert sum(host.asked.values()) == 1


def test_a_redirect_to_a_name_that_leads_inside(host: Host) -> None:
    host.redirect("/in", host.url("/a", "inside.test"))
    refused(fetcher(host, Names(inside=[["192.168.0.1"]])), host.url("/in"), 403, "address_not_allowed")
    assert host.asked == {"/in": 1}


def test_a_redirect_to_the_same_name_is_looked_up_again_and_checked(host: Host) -> None:
    host.redirect("/again", "/a")
    made = fetcher(host, Names(pictures=[["127.0.0.1"], ["10.0.0.1"]]))
    refused(made, host.url("/again"), 403, "address_not_allowed")
    assert host.asked == {"/again": 1}


def test_redirects_in_a_circle_end(host: Host) -> None:
    host.redirect("/round", "/round")
    refused(fetcher(host), host.url("/round"), 400, "fetch_redirects")
    assert host.asked["/round"] == Limits().redirects + 1
    host.answers["/nowhere"] = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"
    refused(fetcher(host, redirects=0), host.url("/nowhere"), 400, "fetch_redirects")


# Hosts that do their worst


def dripping(start: bytes, host: Host) -> Answer:
    def drip(wire: ssl.SSLSocket) -> None:
        wire.sendall(start)
        while not host.over.wait(0.02):
            wire.sendall(b"x")

    return drip


@pytest.mark.parametrize(
    "start",
    [b"", OK + b"X-", OK + b"Content-Length: 1000\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n"],
    ids=["status", "header", "body", "chunk"],
)
@pytest.mark.slow
def test_a_drip_is_cut(host: Host, start: bytes) -> None:
    host.answers["/drip"] = dripping(start, host)
    began = time.monotonic()
    refused(fetcher(host, fetch=0.4), host.url("/drip"), 504, "fetch_timeout")
    assert time.monotonic() - began < 3


def test_a_host_that_takes_connections_and_says_nothing(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = fetcher(host, fetch=0.3)
        made.hosts = [allowed(f"pictures.test:{silent.getsockname()[1]}")]
        refused(made, f"https://pictures.test:{silent.getsockname()[1]}/", 504, "fetch_timeout")


def test_a_body_without_end_is_cut(host: Host) -> None:
    def endless(wire: ssl.SSLSocket) -> None:
        wire.sendall(OK + b"\r\n")
        while True:
            wire.sendall(bytes(1 << 14))

    host.answers["/endless"] = endless
    refused(fetcher(host, picture_bytes=100_000), host.url("/endless"), 413, "picture_bytes")


def test_a_length_that_is_too_much_is_not_read(host: Host) -> None:
    host.answers["/much"] = dripping(OK + b"Content-Length: 100001\r\n\r\n", host)
    refused(fetcher(host, picture_bytes=100_000), host.url("/much"), 413, "picture_bytes")


def test_pictures_of_a_request_count_together(host: Host) -> None:
    made = fetcher(host)
    trip = Trip(made, 5, 50)
    assert trip.fetch(host.url("/a"), "1") == trip.fetch(host.url("/a"), "2") == BODY
    with pytest.raises(Refused, match="50 bytes together"):
        trip.fetch(host.url("/a"), "3")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (OK + b"Content-Length: 22\r\n\r\n" + BODY, 502, "fetch_failed"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n" + BODY, 502, "fetch_failed"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nSesame\r\n" + BODY, 502, "fetch_failed"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 21\r\n\r\n" + BODY, 502, "fetch_failed"),
        (b"HTTP/1.1 500 Sesame\r\nContent-Length: 0\r\n\r\n", 502, "fetch_failed"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 21\r\n\r\n" + BODY, 502, "fetch_failed"),
        (b"HTTP/1.1 404 Sesame\r\nContent-Length: 0\r\n\r\n", 400, "fetch_status"),
        (b"Sesame\r\n\r\n", 502, "fetch_failed"),
        (b"", 502, "fetch_failed"),
        (OK + b"X: " + b"x" * 70_000, 502, "fetch_failed"),
        (OK + b"X: y\r\n" * 200 + b"\r\n", 502, "fetch_failed"),
    ],
    ids=[
        "short",
        "chunk",
        "no chunk",
        "gzip",
        "500",
        "206",
        "404",
        "no HTTP",
        "nothing",
        "long header",
        "many headers",
    ],
)
def test_answers_that_are_no_picture(host: Host, answer: bytes, status: int, code: str) -> None:
    host.answers["/"] = answer
    refused(fetcher(host), host.url("/"), status, code)


def test_a_certificate_of_another_name_or_of_nobody(host: Host) -> None:
    refused(fetcher(host), host.url("/a", "wrong.test"), 502, "fetch_failed")
    made = fetcher(host)
    made.context = ssl.create_default_context()
    refused(made, host.url("/a"), 502, "fetch_failed")
    assert not host.heads


def test_nobody_listens(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    made = fetcher(host)
    made.hosts = [allowed(f"pictures.test:{port}")]
    refused(made, f"https://pictures.test:{port}/", 502, "fetch_failed")


# Through the door


def test_pictures_are_fetched_once_and_checked_as_all_are(host: Host) -> None:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (30, 20)).save(buffer, "PNG")
    host.answers["/p"] = OK + b"Content-Type: text/html\r\n\r\n" + buffer.getvalue()
    made = fetcher(host)
    media = Media(made.limits, made)
    one, two = asyncio.run(media.gather([("0", host.url("/p")), ("1", host.url("/p"))]))
    assert (one.width, one.height) == (30, 20) and one == two and host.asked == {"/p": 1}
    for url, status, code in (
        (host.url("/a"), 400, "picture_broken"),
        (host.url("/404"), 400, "fetch_status"),
        ("https://elsewhere.test/", 403, "host_not_allowed"),
        ("http://pictures.test/", 400, "picture_url"),
        ("/etc/hosts", 400, "picture_url"),
    ):
        with pytest.raises(Refused) as caught:
            asyncio.run(media.gather([("0", host.url("/p")), ("1", url)]))
        assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "1")


def test_who_waits_for_a_thread_waits_no_longer_than_fetching_may_take(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vistune.serve.pictures.media.FETCHED_AT_ONCE", 1)
    monkeypatch.setattr("vistune.serve.pictures.media._GRACE", 0.0)
    over = threading.Event()
    made = fetcher(host, fetch=0.3)
    media = Media(made.limits, made)
    busy = media._fetching.submit(over.wait, 10)
    with pytest.raises(Refused) as caught:
        asyncio.run(media.gather([("0", host.url("/a"))]))
    assert (caught.value.status, caught.value.code) == (504, "fetch_timeout")
    over.set()
    assert busy.result() and not host.heads
