"""What the guard and its connections do with clients that send too much, too slowly, or what is no HTTP."""

from __future__ import annotations

import socket
import time

import pytest

from tests.serve.guarded import Answer, Place, closed, guarded, read, until

STALL = 0.3


@pytest.fixture(scope="module")
def small():
    """Bodies of 1000 bytes, a third of a second to send or to take more."""
    with guarded(body=1000, stall=STALL, deadline=5.0) as place:
        yield place


def refusal(found: Answer, status: int, code: str) -> None:
    assert (found.status, found.error()["code"]) == (status, code)
    kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
    assert found.error()["type"] == kind and found.error()["message"]


def counted(place: Place, status: int, code: str) -> bool:
    found = place.guard.metrics.registry.get_sample_value(
        "vistune_refused_total", {"status": str(status), "code": code}
    )
    return bool(found)


def post(place: Place, *lines: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"Host: 127.0.0.1:{place.port}", *lines))
    return f"POST /echo HTTP/1.1\r\n{head}\r\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_a_body_at_its_most(small: Place) -> None:
    assert small.get("/echo", method="POST", body=b"x" * 1000).body == b"1000"
    with small.connect() as wire:
        wire.sendall(post(small, "Transfer-Encoding: chunked") + 10 * chunk(b"y" * 100) + chunk(b""))
        assert read(wire).body == b"1000"


def test_a_body_that_says_it_is_too_large_is_not_read(small: Place) -> None:
    before = len(small.small.paths)
    with small.connect() as wire:
        wire.sendall(post(small, "Content-Length: 1001"))
        found = read(wire)  # before any of it was sent
        refusal(found, 413, "too_large")
        assert found.headers["connection"] == "close" and closed(wire)
    assert len(small.small.paths) == before and counted(small, 413, "too_large")


def test_a_large_body_on_its_way_does_not_lose_the_answer(small: Place) -> None:
    body = b"x" * 4_000_000  # a connection that is closed while these come is reset, and sending fails
    refusal(small.get("/echo", method="POST", body=body), 413, "too_large")


def test_who_waits_to_be_told_sends_nothing(small: Place) -> None:
    began = time.monotonic()
    with small.connect() as wire:
        wire.sendall(post(small, "Content-Length: 5000", "Expect: 100-continue"))
        refusal(read(wire), 413, "too_large")
        assert closed(wire) and time.monotonic() - began < STALL


def test_a_body_in_pieces_that_comes_to_too_much(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(post(small, "Transfer-Encoding: chunked") + 11 * chunk(b"y" * 100))
        refusal(read(wire), 413, "too_large")
        assert closed(wire)


@pytest.mark.parametrize("length", ["Content-Length: 900", "Transfer-Encoding: chunked"])
def test_a_sender_that_stalls(small: Place, length: str) -> None:
    with small.connect() as wire:
        wire.sendall(post(small, length) + (chunk(b"x" * 9) if "chunked" in length else b"x" * 9))
        began = time.monotonic()
        refusal(read(wire), 408, "stalled")
        assert time.monotonic() - began > STALL * 0.9 and closed(wire)


@pytest.mark.slow
def test_a_sender_that_drips_is_bounded_by_the_deadline() -> None:
    with guarded(stall=0.3, deadline=0.6) as place, place.connect() as wire:
        wire.sendall(post(place, "Content-Length: 1000"))
        wire.settimeout(0.1)
        began, found = time.monotonic(), None
        while found is None and time.monotonic() - began < 5:
            wire.sendall(b"x")
            try:
                found = read(wire)
            except TimeoutError:
                continue
        assert found is not None
        refusal(found, 408, "stalled")


def test_bytes_of_all_requests_together() -> None:
    with guarded(body=1000, waiting_bytes=1500, stall=5.0) as place, place.connect() as first:
        first.sendall(post(place, "Content-Length: 1000") + b"x" * 999)
        assert until(lambda: place.guard._held.bytes == 999)
        found = place.get("/echo", method="POST", body=b"y" * 800)
        refusal(found, 429, "busy")
        assert found.headers["retry-after"] == "1"
        first.sendall(b"x")
        assert read(first).body == b"1000"
        assert place.get("/echo", method="POST", body=b"y" * 800).body == b"800"


def test_requests_at_once() -> None:
    with guarded(connections=2) as place, place.connect() as one, place.connect() as other:
        for wire in (one, other):
            wire.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert until(lambda: place.guard.open == 2)
        found = place.get("/x")
        refusal(found, 503, "busy")
        assert found.headers["retry-after"] == "1"
        assert place.get("/health").status == 200  # whoever watches is answered all the same
        place.small.gate.set()
        assert read(one).status == read(other).status == 200
        assert until(lambda: not place.guard.open) and place.get("/x").status == 200


def test_connections_at_once() -> None:
    with guarded(connections=1) as place:
        wires = [place.connect() for _ in range(65)]
        try:
            with place.connect() as more:
                found = read(more)
                refusal(found, 503, "busy")
                assert closed(more)
        finally:
            for wire in wires:
                wire.close()
        assert until(lambda: place.get("/x").status == 200)


def test_a_stopping_server_begins_nothing(small: Place) -> None:
    small.guard.draining = True
    try:
        found = small.get("/x")
        refusal(found, 503, "stopping")
        assert found.headers["connection"] == "close" and int(found.headers["retry-after"]) >= 1
        assert small.get("/health").status == 200
        assert small.get("/health").headers["connection"] == "close"
    finally:
        small.guard.draining = False
    assert small.get("/x").status == 200


def test_a_reader_that_takes_nothing_is_dropped(small: Place) -> None:
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", small.port))
        wire.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert until(lambda: small.small.flooding == 1)
        assert until(lambda: small.small.flooding == 0, 10 * STALL)  # the request was told, and is over
    assert until(lambda: small.guard.open == 0)


@pytest.mark.slow
def test_a_reader_that_takes_is_not(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end = time.monotonic() + 4 * STALL
        while time.monotonic() < end:
            assert wire.recv(1 << 20)
            time.sleep(0.02)
        assert small.small.flooding == 1
    assert until(lambda: small.small.flooding == 0)


def test_a_head_that_does_not_come(small: Place) -> None:
    with small.connect() as silent, small.connect() as slow:
        slow.sendall(b"GET /x HTTP/1.1\r\nHost: loc")
        began, found = time.monotonic(), None
        slow.settimeout(STALL / 4)
        while found is None and time.monotonic() - began < 10 * STALL:
            try:
                slow.sendall(b"a")  # a byte now and then does not buy more time
                found = read(slow)
            except TimeoutError:
                continue
        assert found is not None
        refusal(found, 408, "stalled")
        refusal(read(silent), 408, "stalled")
        assert closed(silent) and closed(slow)


@pytest.mark.slow
def test_a_second_head_that_does_not_come(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read(wire).status == 200
        time.sleep(2 * STALL)  # between requests a connection may be silent
        wire.sendall(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read(wire).status == 200
        wire.sendall(b"GET /x HT")
        refusal(read(wire), 408, "stalled")
        assert closed(wire)


@pytest.mark.slow
def test_an_answer_that_takes_long_is_waited_for(small: Place) -> None:
    small.small.gate.clear()
    with small.connect() as wire:
        wire.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3 * STALL)
        small.small.gate.set()
        assert read(wire).body == b"/wait"


def test_a_body_that_nobody_reads(small: Place) -> None:
    found = small.get("/ignore", method="POST", body=b"x" * 900)
    assert found.status == 200
    with small.connect() as wire:
        wire.sendall(b"POST /ignore HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n")
        found = read(wire)
        assert found.status == 200 and found.headers["connection"] == "close" and closed(wire)


SMUGGLED = {
    "both lengths": "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "both lengths, other order": "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "two lengths": "Content-Length: 5\r\nContent-Length: 6",
    "a list of lengths": "Content-Length: 5, 6",
    "a signed length": "Content-Length: +5",
    "a negative length": "Content-Length: -5",
    "a hexadecimal length": "Content-Length: 0x5",
    "no number": "Content-Length: five",
    "space before the colon": "Content-Length : 5",
    "an unknown coding": "Transfer-Encoding: xchunked",
    "two codings": "Transfer-Encoding: chunked, identity",
    "gzip": "Transfer-Encoding: gzip, chunked",
    "two transfer codings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "a NUL": "X-A: b\x00c",
    "a bare CR": "X-A: b\rContent-Length: 5",
    "no colon": "GET /health HTTP/1.1",
    "an empty name": ": 5",
    "a name with a space": "X A: 5",
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=SMUGGLED)
def test_what_two_servers_may_read_differently(small: Place, lines: str) -> None:
    before = len(small.small.paths)
    inner = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with small.connect() as wire:
        wire.sendall(f"POST /echo HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n".encode("latin-1") + inner)
        found = read(wire)
        refusal(found, 400, "malformed")
        assert found.headers["connection"] == "close" and closed(wire)
    assert "/smuggled" not in small.small.paths[before:] and len(small.small.paths) == before


BROKEN = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"GET /x\r\n\r\n", b"GET /x HTTP/9\r\n\r\n"]
BROKEN += [b"G\x00T /x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"]
BROKEN += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /x HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000]


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_http(small: Place, data: bytes) -> None:
    with small.connect() as wire:
        wire.sendall(data)
        found = read(wire)
        refusal(found, 400, "malformed")
        assert closed(wire)


def test_a_bad_chunk_in_the_midst(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(post(small, "Transfer-Encoding: chunked") + chunk(b"x") + b"zz\r\n")
        refusal(read(wire), 400, "malformed")
        assert closed(wire)
    assert until(lambda: small.guard.open == 0)


def test_rubbish_after_an_answer_has_begun(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(b"POST /flood HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"200 OK" in wire.recv(100)
        wire.sendall(b"zz\r\n")
        assert closed(wire)
    assert until(lambda: small.small.flooding == 0)


def test_requests_one_after_the_other_in_one_piece(small: Place) -> None:
    with small.connect() as wire:
        wire.sendall(3 * b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"GET /.. HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while piece := wire.recv(1 << 16):
            found += piece
        assert found.count(b"HTTP/1.1 200") == 3 and found.count(b"HTTP/1.1 400") == 1


def test_websockets_are_not_spoken(small: Place) -> None:
    found = small.get("/x", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==")
    assert found.status == 200 and "upgrade" not in found.headers  # an upgrade that is not taken is a plain request
