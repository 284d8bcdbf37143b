"""Downloads from a server that drops, lies, refuses ranges and is busy: the bytes are right, or the error names why."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import zipfile
from threading import Thread
from time import sleep

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import Page, Server, serving

from vistune.data.fetching import download as module
from vistune.data.fetching.download import DownloadError, Patience, asked_to_wait, download
from vistune.data.fetching.threads import Stopped
from vistune.data.fetching.unpack import is_whole_zip

BODY = np.random.default_rng(0).bytes(200_000)
SOON = Patience(timeout=5, tries=4, wait=0.001)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "CHUNK", 4096)
    with serving() as up:
        yield up


def fetch(server: Server, page: Page, to, **known):
    server.pages["/file"] = page
    download(server.link("/file"), to, patience=known.pop("patience", SOON), **known)
    assert not list(to.parent.glob("*.part*"))
    return to.read_bytes()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.bin", BODY)
    return buffer.getvalue()


def test_a_dropped_connection_goes_on_where_it_was_cut(server, tmp_path):
    heard = []
    page = Page(body=BODY, drops=[50_000, 60_000, 1])
    got = fetch(server, page, tmp_path / "f", heard=lambda have, total: heard.append((have, total)))
    assert got == BODY
    spans = [span for _, span in server.log]
    assert spans == ["", "bytes=50000-", "bytes=110000-", "bytes=110001-"]
    assert heard[-1] == (len(BODY), len(BODY))


def test_more_drops_than_tries_are_fine_as_long_as_bytes_come(server, tmp_path):
    assert fetch(server, Page(body=BODY, drops=[5_000] * 12), tmp_path / "f") == BODY


def test_a_later_call_goes_on(server, tmp_path):
    server.pages["/file"] = Page(body=BODY, drops=[70_000], statuses=[])
    with pytest.raises(DownloadError, match="1 tries without progress"):
        server.pages["/file"].statuses = [503]
        download(server.link("/file"), tmp_path / "f", patience=Patience(tries=1, wait=0))
    with pytest.raises(DownloadError, match="70,000 of 200,000 bytes came"):
        download(server.link("/file"), tmp_path / "f", patience=Patience(tries=1, wait=0))
    assert (tmp_path / "f.part").read_bytes() == BODY[:70_000]
    assert not (tmp_path / "f").exists()
    download(server.link("/file"), tmp_path / "f", patience=SOON)
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.log[-1] == ("/file", "bytes=70000-")


def test_a_file_that_changed_meanwhile_is_begun_again(server, tmp_path):
    server.pages["/file"] = Page(body=BODY, drops=[70_000])
    with pytest.raises(DownloadError):
        download(server.link("/file"), tmp_path / "f", patience=Patience(tries=1, wait=0))
    other = BODY[::-1]
    assert fetch(server, Page(body=other, etag='"two"'), tmp_path / "f") == other
    # The same without anything to tell the versions apart but their length.
    server.pages["/file"] = Page(body=BODY, drops=[70_000], etag="")
    with pytest.raises(DownloadError):
        download(server.link("/file"), tmp_path / "g", patience=Patience(tries=1, wait=0))
    assert fetch(server, Page(body=other[:150_000], etag=""), tmp_path / "g") == other[:150_000]


def test_a_server_without_ranges_begins_again(server, tmp_path):
    assert fetch(server, Page(body=BODY, ranges=False, drops=[90_000, 20_000]), tmp_path / "f") == BODY


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}])
def test_busy_twice_then_served(server, tmp_path, headers):
    assert fetch(server, Page(body=BODY, statuses=[503, 429], headers=headers), tmp_path / "f") == BODY
    assert server.asked["/file"] == 3


def test_busy_for_ever_is_given_up(server, tmp_path):
    with pytest.raises(DownloadError, match="given up after 4 tries without progress: the server answered 503"):
        fetch(server, Page(body=BODY, statuses=[503] * 9), tmp_path / "f")
    assert server.asked["/file"] == 4


@pytest.mark.parametrize("status", [404, 403])
def test_what_will_not_come_is_named_at_once(server, tmp_path, status):
    with pytest.raises(DownloadError, match=rf"/file: the server answered {status}") as error:
        fetch(server, Page(statuses=[status] * 9), tmp_path / "f")
    assert error.value.gone == (status == 404)
    assert server.asked["/file"] == 1


def test_a_length_that_is_too_long_each_time(server, tmp_path):
    """The content decides: a whole zip of fewer bytes than promised is taken, half a zip is not."""
    whole = zipped()
    got = fetch(
        server, Page(body=whole, ranges=False, always_says=len(whole) + 999), tmp_path / "f", check=is_whole_zip
    )
    assert got == whole
    with pytest.raises(DownloadError, match=r"given up after 4 tries.*5,000 of"):
        page = Page(body=whole[:5000], ranges=False, always_says=len(whole))
        fetch(server, page, tmp_path / "g", check=is_whole_zip)
    with pytest.raises(DownloadError, match="bytes came"):  # nothing says what is right: never taken for whole
        fetch(server, Page(body=BODY, ranges=False, always_says=len(BODY) + 9), tmp_path / "h")


def test_a_length_that_is_too_short_at_first(server, tmp_path):
    whole = zipped()
    assert fetch(server, Page(body=whole, lengths=[1000]), tmp_path / "f", check=is_whole_zip) == whole
    assert fetch(server, Page(body=BODY, lengths=[1000]), tmp_path / "g", size=len(BODY)) == BODY
    assert [span for _, span in server.log] == ["", "bytes=1000-"] * 2


def test_size_and_sum_that_are_known_beforehand(server, tmp_path):
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert fetch(server, Page(body=BODY), tmp_path / "f", size=len(BODY), sha256=sha256) == BODY
    with pytest.raises(DownloadError, match="the file has 200,001"):
        fetch(server, Page(body=BODY), tmp_path / "g", size=len(BODY) + 1)
    with pytest.raises(DownloadError, match="its SHA-256 is"):
        fetch(server, Page(body=BODY[::-1]), tmp_path / "h", size=len(BODY), sha256=sha256)
    assert not list(tmp_path.glob("[gh]"))


def test_a_page_in_place_of_an_archive(server, tmp_path):
    with pytest.raises(DownloadError, match="a web page"):
        fetch(
            server,
            Page(body=b"<!doctype html><p>Do you really want it?", kind="text/html"),
            tmp_path / "f",
            check=is_whole_zip,
        )


def test_whole_but_not_yet_renamed(server, tmp_path):
    server.pages["/file"] = Page(body=BODY)
    download(server.link("/file"), tmp_path / "f", size=len(BODY), patience=SOON)
    (tmp_path / "f").rename(tmp_path / "f.part")
    (tmp_path / "f.part.json").write_text(json.dumps({"address": server.link("/file"), "total": len(BODY)}))
    download(server.link("/file"), tmp_path / "f", size=len(BODY), patience=SOON)
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.asked["/file"] == 1


def test_what_is_there_of_another_address_is_not_gone_on_with(server, tmp_path):
    server.pages["/other"] = Page(body=BODY[::-1], drops=[100])
    with pytest.raises(DownloadError):
        download(server.link("/other"), tmp_path / "f", patience=Patience(tries=1, wait=0))
    assert fetch(server, Page(body=BODY), tmp_path / "f") == BODY


@pytest.mark.parametrize("address", ["file:" + "///etc/hosts", "ftp://127.0.0.1/a", "no address", "http://[half/a"])
def test_only_the_web_is_asked(tmp_path, address):
    with pytest.raises(DownloadError, match=r"not an http|Invalid IPv6"):
        download(address, tmp_path / "f", patience=SOON)


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        link = server.link("/file")
    with pytest.raises(DownloadError, match=r"given up after 4 tries.*refused"):
        download(link, tmp_path / "f", patience=SOON)


def test_stopping_keeps_what_came(server, tmp_path):
    patience = Patience(timeout=5, tries=4, wait=30)
    server.pages["/file"] = Page(body=BODY, drops=[60_000], statuses=[])
    caught = []

    def run() -> None:
        try:
            download(server.link("/file"), tmp_path / "f", patience=patience)
        except Stopped as error:
            caught.append(error)

    thread = Thread(target=run)
    thread.start()
    while not (tmp_path / "f.part").exists() or (tmp_path / "f.part").stat().st_size < 60_000:
        sleep(0.005)
    patience.stop.set()  # it waits for its second try, half a minute long
    thread.join(5)
    assert caught and not thread.is_alive()
    assert (tmp_path / "f.part").read_bytes() == BODY[:60_000]


def test_a_full_disk_is_not_the_servers_fault(server, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module._Transfer, "_receive", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(server, Page(body=BODY), tmp_path / "f")
    assert server.asked["/file"] == 1


def test_retry_after():
    assert asked_to_wait({"Retry-After": "7"}) == 7
    assert asked_to_wait({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked_to_wait({"Retry-After": "soon"}) is None
    assert asked_to_wait({}) is None


def zipped_small() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.bin", BODY[:2000])
    return buffer.getvalue()


SMALL = zipped_small()
BYTES = st.integers(0, len(SMALL) - 1)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drops=st.lists(BYTES, max_size=4),
    lengths=st.lists(st.integers(0, 2 * len(SMALL)), max_size=3),
    statuses=st.lists(st.sampled_from([503, 500, 429]), max_size=2),
    ranges=st.booleans(),
    etag=st.sampled_from(["", '"one"']),
    known=st.booleans(),
)
def test_whatever_the_server_does_the_file_is_right_or_not_there(
    server, tmp_path_factory, drops, lengths, statuses, ranges, etag, known
):
    to = tmp_path_factory.mktemp("any") / "f"
    server.pages["/file"] = Page(body=SMALL, drops=drops, lengths=lengths, statuses=statuses, ranges=ranges, etag=etag)
    honest = not lengths
    size = len(SMALL) if known else None
    try:
        patience = Patience(timeout=5, tries=9, wait=0)
        download(server.link("/file"), to, size=size, check=is_whole_zip, patience=patience)
    except DownloadError:
        assert not honest and not known
        assert not to.exists()
        return
    assert to.read_bytes() == SMALL
