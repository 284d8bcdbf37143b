"""Tars by place: against Python's own tarfile, the golden indexes, and tars that are torn."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vistune import files
from vistune.data.reading.tar import Files, ShardWriter, TarError, members, read_index, scan, split_name

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15" / "webdataset"
SHARDS = sorted(GOLDEN.rglob("*.tar"))
LONG = "folder/" + "n" * 120 + ".name.jpg"


def listed(path: Path) -> list[tuple[str, int, int]]:
    opened = Files()
    return [(m.name, m.start, m.size) for m in members(str(path), opened.of(str(path)), 0, path.stat().st_size)]


def offsets(path: Path) -> list[int]:
    return scan(str(path), path.stat().st_size).tolist()


def write_tar(path: Path, names: list[str], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for i, name in enumerate(names):
            about = tarfile.TarInfo(name)
            about.size = 100 * i
            tar.addfile(about, io.BytesIO(bytes(about.size)))
    return path


@pytest.mark.parametrize("shard", SHARDS, ids=lambda path: path.name)
def test_scanning_finds_what_the_index_says(shard):
    assert len(SHARDS) == 4
    assert offsets(shard) == np.fromfile(f"{shard}.idx", "<u8").tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("aé.0/_", min_size=1, max_size=160).filter(lambda n: n.strip("/") == n), min_size=1, max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_sees(tmp_path, names, kind):
    path = write_tar(tmp_path / "any.tar", names, kind)
    with tarfile.open(path) as tar:
        assert listed(path) == [(m.name, m.offset_data, m.size) for m in tar]


def test_what_is_no_file_is_read_over(tmp_path):
    path = tmp_path / "kinds.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("a.txt", tarfile.REGTYPE)):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "t" * 150 if kind == tarfile.SYMTYPE else ""
            tar.addfile(about)
    assert [name for name, *_ in listed(path)] == ["a.txt"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_many_gigabytes(tmp_path, kind):
    path = tmp_path / "big.tar"
    large, small = tarfile.TarInfo("a.bin"), tarfile.TarInfo("b.txt")
    large.size = 9 << 30  # more than eleven octal digits hold; the file is a hole
    with open(path, "wb") as out:
        head = large.tobuf(kind)
        out.write(head)
        out.seek(large.size, 1)
        out.write(small.tobuf(kind) + bytes(1024))
    assert listed(path) == [("a.bin", len(head), 9 << 30), ("b.txt", path.stat().st_size - 1024, 0)]


def test_sparse_members_are_refused(tmp_path):
    about = tarfile.TarInfo("a.bin")
    about.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "s.tar").write_bytes(about.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(TarError, match="byte 0: a sparse or split member"):
        listed(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.v1/a.0_b.c.jpg", ("d.v1/a", "0_b.c.jpg")),
        ("./a.json", ("./a", "json")),
        ("nothing", None),
        ("__meta__", None),
        ("__x__/a.jpg", None),
        ("__x__y.jpg", ("__x__y", "jpg")),
        (".hidden", None),
        ("a.b/c", None),
    ],
)
def test_the_rule_that_groups_members(name, key):
    assert split_name(name) == key


def test_samples_begin_at_their_long_name_and_end_before_the_next(tmp_path):
    path = write_tar(tmp_path / "x.tar", ["__meta__", "a.txt", "a.jpg", LONG, "b", LONG.replace("jpg", "json")])
    with tarfile.open(path) as tar:
        by_name = {m.name: m for m in tar}
    after_a, end = (by_name[name].offset_data + 512 for name in ("a.jpg", LONG.replace("jpg", "json")))
    assert offsets(path) == [by_name["a.txt"].offset, after_a, end]


@pytest.mark.parametrize("cut", [100, 1024 + 100, 1536 + 1000])
def test_a_torn_tar_is_named_with_its_byte(tmp_path, cut):
    path = tmp_path / "torn.tar"
    path.write_bytes(SHARDS[0].read_bytes()[:cut])
    with pytest.raises(
        TarError, match=rf"torn\.tar: torn at byte {0 if cut < 1024 else 1024}: .*Fetch the shard again"
    ):
        offsets(path)


def test_bytes_that_are_no_tar(tmp_path):
    path = tmp_path / "no.tar"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(TarError, match=r"no\.tar: torn at byte 0"):
        offsets(path)
    flipped = bytearray(SHARDS[0].read_bytes())
    flipped[1024 + 5] ^= 1  # of the second header's name
    path.write_bytes(flipped)
    with pytest.raises(TarError, match="byte 1024: the header's checksum is wrong"):
        offsets(path)


def test_an_index_that_is_not_of_this_tar(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(SHARDS[0].read_bytes()[:2048])
    assert read_index(str(path), 2048) is None
    Path(f"{path}.idx").write_bytes(Path(f"{SHARDS[0]}.idx").read_bytes())
    with pytest.raises(TarError, match=r"its \.idx says that samples end at byte \d+, the tar has 2048"):
        read_index(str(path), 2048)
    Path(f"{path}.idx").write_bytes(b"1234567")
    with pytest.raises(TarError, match="no list of 64-bit offsets"):
        read_index(str(path), 2048)
    Path(f"{path}.idx").write_bytes(np.array([0, 512, 512], "<u8").tobytes())
    with pytest.raises(TarError, match="do not grow"):
        read_index(str(path), 2048)


def test_a_shard_is_written_as_it_is_scanned(tmp_path):
    path = tmp_path / "w.tar"
    writer = ShardWriter(path)
    parts = {"0_é.jpg": b"x" * 700, "n" * 200 + ".png": b"", "json": b"{}"}
    writer.add("a", parts)
    writer.add("dir/b", {"json": b"[]" * 256})
    writer.close()
    with tarfile.open(path) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    assert found == {**{f"a.{part}": data for part, data in parts.items()}, "dir/b.json": b"[]" * 256}
    assert offsets(path) == read_index(str(path), path.stat().st_size).tolist()
    assert len(offsets(path)) == 3


def test_files_are_read_in_another_process_and_afar(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(200)))
    opened = Files()
    assert opened.read(str(path), 5, 2) == b"\5\6"
    child = os.fork()
    if not child:
        os._exit(0 if opened.read(str(path), 7, 1) == b"\7" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert pickle.loads(pickle.dumps(opened)).read(str(path), 199, 9) == bytes([199])
    with files.fsspec.open("memory://tar/f", "wb") as far:
        far.write(b"abcdef")
    assert opened.read("memory://tar/f", 2, 3) == b"cde"
    for i in range(12):  # more than are kept open
        (tmp_path / f"{i}").write_bytes(bytes([i]))
        assert opened.read(str(tmp_path / f"{i}"), 0, 1) == bytes([i])
