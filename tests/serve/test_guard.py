"""What the guard lets in: keys, hosts, origins, paths, and what the log may say of it."""

from __future__ import annotations

import base64
import hmac

import pytest

from tests.serve.guarded import Place, guarded, until
from vistune.serve.door import hosts
from vistune.serve.door.keys import Keys

KEYS = ("first-key-of-the-server", "second-key-of-the-server", "third-key-of-the-server")


@pytest.fixture(scope="module")
def locked():
    with guarded(KEYS) as place:
        yield place


@pytest.fixture(scope="module")
def unlocked():
    with guarded(options={"names": ("lab.example.org",)}) as place:
        yield place


def basic(word: str) -> str:
    return f"Authorization: Basic {base64.b64encode(word.encode()).decode()}"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer {}", "BEARER  {} "])
def test_every_key_opens(locked: Place, key: str, scheme: str) -> None:
    assert locked.get("/x", f"Authorization: {scheme.format(key)}").status == 200


@pytest.mark.parametrize("user", ["", "anybody", "a b"])
def test_a_browser_sends_it_as_a_password(locked: Place, user: str) -> None:
    assert locked.get("/x", basic(f"{user}:{KEYS[1]}")).status == 200


WRONG = {
    "none": (),
    "wrong": ("Authorization: Bearer fourth-key-of-the-server",),
    "empty": ("Authorization: Bearer ",),
    "nothing": ("Authorization:",),
    "a part": (f"Authorization: Bearer {KEYS[0][:-1]}",),
    "more": (f"Authorization: Bearer {KEYS[0]}x",),
    "two in one": (f"Authorization: Bearer {KEYS[0]} {KEYS[1]}",),
    "said twice": (f"Authorization: Bearer {KEYS[0]}", "Authorization: Bearer x"),
    "another scheme": (f"Authorization: Digest {KEYS[0]}",),
    "no scheme": (f"Authorization: {KEYS[0]}",),
    "as the user": (basic(f"{KEYS[0]}:"),),
    "no base64": (f"Authorization: Basic {KEYS[0]}!",),
    "not whole base64": ("Authorization: Basic abc",),
    "bytes": ("Authorization: Bearer \xff\xfe",),
    "another header": (f"X-API-Key: {KEYS[0]}", f"Cookie: key={KEYS[0]}"),
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_wrong_and_missing_keys_are_told_the_same(locked: Place, headers: tuple[str, ...]) -> None:
    before = len(locked.small.paths)
    found, none = locked.get("/x?key=" + KEYS[0], *headers), locked.get("/x")
    assert (found.status, found.body) == (none.status, none.body) == (401, none.body)
    assert found.headers["www-authenticate"].startswith("Bearer")
    assert found.error() == {
        "message": "a key is needed: Authorization: Bearer KEY",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert len(locked.small.paths) == before


def test_only_who_wants_a_page_is_asked_for_a_password(locked: Place) -> None:
    asked = locked.get("/", "Accept: text/html,application/xhtml+xml,*/*;q=0.8")
    assert asked.status == 401 and asked.headers["www-authenticate"].startswith("Basic realm=")


def test_health_alone_needs_no_key(locked: Place) -> None:
    assert locked.get("/health").status == 200
    for path in ("/ready", "/metrics", "/", "/health/", "/health/x", "/healthx", "//health", "/x/../health", "/HEALTH"):
        assert locked.get(path).status in (400, 401), path
    for path in ("/v1/%2e%2e/health", "/health%2f..%2fv1", "/health%00", "/health;/v1", "/%68ealth/", "/health%3f"):
        assert locked.get(path).status in (400, 401), path


@pytest.mark.parametrize("given", [b"Bearer wrong", b"Bearer " + KEYS[0].encode(), b"", None])
def test_all_keys_are_compared_in_constant_time(monkeypatch, given: bytes | None) -> None:
    seen, real = [], hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return real(one, other)

    keys = Keys(KEYS)
    monkeypatch.setattr(hmac, "compare_digest", counted)
    opened = keys.open([] if given is None else [(b"authorization", given)])
    assert opened == (given == b"Bearer " + KEYS[0].encode())
    assert seen == [(32, 32)] * 3  # digests of one length, each of them, whether or not an earlier one was right


def test_no_key_lets_everybody_in_and_an_empty_one_nobody() -> None:
    assert Keys().open([]) and not Keys()
    assert not Keys(("right",)).open([(b"authorization", b"Bearer")])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LocalHost", "[::1]:8000", "lab.example.org", "localhost."]
)
def test_hosts_that_are_ours(unlocked: Place, host: str) -> None:
    assert unlocked.get("/x", f"Host: {host}").status == 200


FOREIGN = (
    "evil.example 127.0.0.1.evil.example localhost.evil.example:8000 evil.example:80 127.0.0.2 0.0.0.0 ::1 [::1 "
    "localhost@evil.example localhost:x user:pass@localhost localhost:80:80"
)


@pytest.mark.parametrize("host", ["", *FOREIGN.split()])
def test_hosts_that_resolve_here_but_are_not_ours(unlocked: Place, host: str) -> None:
    found = unlocked.get("/x", f"Host: {host}")
    assert found.status == 403 and found.error()["code"] == "unknown_host"
    assert "--api-key" in found.error()["message"] and "--allow-host" in found.error()["message"]


def test_a_key_makes_every_host_ours(locked: Place) -> None:
    assert locked.get("/x", "Host: anything.example", f"Authorization: Bearer {KEYS[0]}").status == 200


def test_no_host_at_all(unlocked: Place) -> None:
    assert unlocked.ask(b"GET /x HTTP/1.0\r\n\r\n").status == 403
    assert unlocked.ask(b"GET /x HTTP/1.1\r\n\r\n").status == 400
    assert unlocked.ask(b"GET /x HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").status == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://", "", "http://["])
def test_pages_from_elsewhere_change_nothing(unlocked: Place, method: str, origin: str) -> None:
    found = unlocked.get("/x", f"Origin: {origin}", method=method)
    assert found.status == 403 and found.error()["code"] == "foreign_origin"


def test_our_own_pages_may(unlocked: Place) -> None:
    for origin in (f"http://127.0.0.1:{unlocked.port}", "https://lab.example.org", "https://lab.example.org:8443"):
        assert unlocked.get("/x", f"Origin: {origin}", method="POST").status == 200
    assert unlocked.get("/x", "Origin: https://evil.example").status == 200  # what it reads it is not given
    assert "access-control-allow-origin" not in unlocked.get("/x", "Origin: https://evil.example").headers


OWN = [
    ("example.org", "https://example.org", "", False, True),
    ("example.org:443", "https://example.org", "", False, True),
    ("example.org:8443", "https://example.org", "", False, False),
    ("localhost:8000", "https://hub.example.org", "hub.example.org", False, False),
    ("localhost:8000", "https://hub.example.org", "hub.example.org", True, True),
    ("localhost:8000", "https://hub.example.org", "hub.example.org, inner", True, True),
    ("localhost:8000", "https://evil.example", "hub.example.org", True, False),
    ("localhost:8000", "https://hub.example.org/path", "hub.example.org", True, False),
]


@pytest.mark.parametrize(("host", "origin", "forwarded", "behind", "own"), OWN)
def test_behind_a_proxy_the_forwarded_host_counts(host, origin, forwarded, behind, own) -> None:
    headers = [(b"host", host.encode()), (b"origin", origin.encode()), (b"x-forwarded-host", forwarded.encode())]
    assert hosts.own(headers, (), behind) is own


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert hosts.loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org", "127.1"])
def test_not_loopback(host: str) -> None:
    assert not hosts.loopback(host)


@pytest.mark.parametrize("root", ["/x", "/user/anna/proxy/8000"])
def test_with_and_without_the_prefix(root: str) -> None:
    with guarded(options={"root": root}) as place:
        for path in (f"{root}/v1/models", "/v1/models"):
            assert place.get(path).body == b"/v1/models"
        assert place.get(root).body == place.get(f"{root}/").body == place.get("/").body == b"/"
        assert place.get(f"{root}y/v1").body == f"{root}y/v1".encode()
        assert place.get(f"{root}/health", "Host: evil.example").status == 200
        assert place.get(f"{root}{root}/health", "Host: evil.example").status == 403  # the prefix goes once
        assert place.get("/x", "X-Forwarded-Host: hub.org", "Origin: https://hub.org", method="POST").status == 200


PATHS = [
    "/v1/../x",
    "/..",
    "/.",
    "/v1/%2e%2e/x",
    "/v1/%2E%2E%2Fx",
    "/a\\b",
    "/%5c..",
    "/%00",
    "/%0d%0aX:%20y",
    "/a/./b",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_with_tricks(unlocked: Place, path: str) -> None:
    assert unlocked.get(path).status == 400


def test_targets_that_are_no_paths(unlocked: Place) -> None:
    for target in ("http://evil.example/x", "evil.example:443", "*", "x"):
        assert unlocked.get(target).status == 400, target
    assert unlocked.get("//v1").body == b"//v1"  # no known route; nothing is made of it


def test_the_log_says_nothing_of_contents(unlocked: Place) -> None:
    canary = "canary"
    before = len(unlocked.lines)
    unlocked.get("/echo?q=canary", "X-Thing: canary", "Cookie: canary", method="POST", body=canary.encode() * 9)
    unlocked.get("/fail?canary")
    unlocked.get("/a%20b%0b" + "c" * 300)
    unlocked.get("/%1b%5b31m")
    unlocked.get("/x", method="QWERTYUIOPASDFGHJKLZXCVBNM")
    assert until(lambda: len(unlocked.lines) == before + 5)
    lines = unlocked.lines[before:]
    assert not [line for line in lines if canary in line]
    assert lines[0].startswith("POST /echo 200 0.") and lines[0].endswith("s 2B a%20model")
    assert " 500 " in lines[1]
    assert max(map(len, lines)) < 200
    assert all(line.isprintable() and len(line.split()) in (5, 6) for line in lines)


def test_probes_are_in_the_log_only_when_amiss(locked: Place) -> None:
    locked.get("/last-before")
    assert until(lambda: locked.lines and "/last-before" in locked.lines[-1])
    before = len(locked.lines)
    locked.get("/health")
    locked.get("/ready", f"Authorization: Bearer {KEYS[0]}")
    locked.get("/ready")
    assert until(lambda: len(locked.lines) > before)
    assert [" GET /ready 401 " in f" {line}" for line in locked.lines[before:]] == [True]


def test_a_fault_is_ours_to_see_and_not_the_askers(unlocked: Place, capfd) -> None:
    found = unlocked.get("/fail?canary")
    assert found.status == 500 and found.error()["type"] == "server_error"
    said = "".join(capfd.readouterr())
    assert "ValueError" in said and "guarded.py" in said
    assert "canary" not in said + found.body.decode()


def test_headers_of_every_answer(unlocked: Place) -> None:
    for path in ("/x", "/fail", "/.."):
        headers = unlocked.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers
