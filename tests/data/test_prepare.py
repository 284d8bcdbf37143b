"""A data set of eleven pictures brought from a server that misbehaves, or from a disk, into LLaVA's layout; counted."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from loopback import Page, serving

from tests.data.small import turns
from vistune.data.fetching import archives, unpack
from vistune.data.fetching.archives import DATASETS, HUB, DataSet, Part
from vistune.data.fetching.download import Patience
from vistune.data.fetching.prepare import prepare
from vistune.data.formats import open_source

SOON = Patience(timeout=5, tries=3, wait=0.001)


def picture(seed: int, kind: str = "JPEG", size: int = 24) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    PIL.Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


COCO = {f"train2017/{i}.jpg": picture(i) for i in range(4)}
GQA = {f"images/{i}.jpg": picture(i) for i in (10, 11)}
VG = {f"VG_100K/{i}.jpg": picture(i) for i in (10, 12)}
BOOKS = ["111", "222", "333", "444", "555"]
ROWS = [
    *({"image": f"coco/train2017/{i}.jpg", "conversations": turns("<image>\nWhat?", "This.")} for i in (0, 1, 2, 3, 0)),
    *({"image": f"gqa/images/{i}.jpg", "conversations": turns("<image>\nWhat?", "This.")} for i in (10, 11)),
    *({"image": f"vg/VG_100K/{i}.jpg", "conversations": turns("<image>\nWhat?", "This.")} for i in (10, 12)),
    *({"image": f"ocr_vqa/images/{key}.jpg", "conversations": turns("<image>\nWhat?", "This.")} for key in BOOKS),
    {"conversations": turns("Hi", "Hello")},
]


def part(server, name, kind, path, folder, file, **known) -> Part:
    return Part(name=name, kind=kind, address=server.link(path), folder=folder, file=file, **known)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as up:
        rows = json.dumps(ROWS).encode()
        sha256 = hashlib.sha256(rows).hexdigest()
        up.pages = {
            "/datasets/some/rows.json": Page(
                body=rows, drops=[100], headers={"X-Linked-Size": str(len(rows)), "X-Linked-ETag": f'"{sha256}"'}
            ),
            "/train2017.zip": Page(body=packed(COCO), drops=[3000], statuses=[503, 503]),
            "/gqa/images.zip": Page(body=packed(GQA), ranges=False, drops=[500]),
            "/vg/images.zip": Page(body=packed(VG), always_says=10**6),
            "/dataset.json": Page(
                body=json.dumps({key: {"imageURL": up.link(f"/books/{key}.jpg"), "split": 1} for key in BOOKS}).encode()
            ),
            "/books/111.jpg": Page(body=picture(111)),
            "/books/222.jpg": Page(body=picture(222, "GIF"), drops=[40]),
            "/books/444.jpg": Page(body=picture(0, "GIF", size=1)),
            "/books/555.jpg": Page(body=picture(555, "PNG"), statuses=[503, 503]),
        }  # 333 is not there
        monkeypatch.setenv("HF_ENDPOINT", up.address)
        parts = (
            Part(name="rows", kind="rows", address=f"{HUB}/datasets/some/rows.json", file="tiny.json", folder=""),
            part(up, "coco", "archive", "/train2017.zip", "coco/train2017", "coco.zip", size=len(packed(COCO))),
            part(up, "gqa", "archive", "/gqa/images.zip", "gqa/images", "gqa.zip"),
            part(up, "vg", "archive", "/vg/images.zip", "vg/VG_100K", "vg.zip"),
            part(up, "ocr_vqa", "covers", "/dataset.json", "ocr_vqa/images", "dataset.json"),
            part(up, "ocr_zip", "archive", "/ocr.zip", "ocr_vqa/images", "ocr.zip", by_default=False),
        )
        monkeypatch.setitem(DATASETS, "tiny", DataSet(name="tiny", rows=len(ROWS), images="", parts=parts))
        yield up


def table(report) -> dict[str, tuple[int, ...]]:
    return {line["folder"] if "folder" in line else line["name"]: tuple(line.values())[1:] for line in report.folders}


def test_from_nothing_to_a_folder_that_opens(server, tmp_path):
    report = prepare("tiny", tmp_path / "data", patience=SOON, workers=3)
    assert table(report) == {  # rows, wanted, present, missing, broken
        "coco/train2017": (5, 4, 4, 0, 0),
        "gqa/images": (2, 2, 2, 0, 0),
        "ocr_vqa/images": (5, 5, 3, 2, 0),
        "vg/VG_100K": (2, 2, 2, 0, 0),
    }
    assert (report.rows, report.text_rows, report.rows_without_picture) == (15, 1, 2)
    assert report.ok and report.failures == []  # two of fifteen rows: below the least cap of a run
    root = tmp_path / "data"
    assert (root / "coco/train2017/3.jpg").read_bytes() == COCO["train2017/3.jpg"]
    assert (root / "ocr_vqa/images/222.jpg").read_bytes() == picture(222, "GIF")  # its bytes, whatever its name
    assert (root / ".prepare/tiny.missing.txt").read_text().split() == [
        "ocr_vqa/images/333.jpg",
        "ocr_vqa/images/444.jpg",
    ]
    dead = [json.loads(line) for line in (root / "ocr_vqa/dead_links.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in dead} == {
        "333": "the server answered 404 Not Found",
        "444": "what came is a picture of 1 x 1",
    }
    assert not list(root.rglob("*.zip")) and not list(root.rglob("*unpacking*")) and not list(root.rglob("*.half"))
    reader = open_source(str(root / "tiny.json"), images=str(root))
    assert len(reader) == 15 and reader[0].images[0].path == str(root / "coco/train2017/0.jpg")


def test_a_second_call_asks_for_nothing(server, tmp_path):
    first = prepare("tiny", tmp_path, patience=SOON, workers=3)
    server.asked.clear()
    again = prepare("tiny", tmp_path, patience=SOON, workers=3)
    assert not server.asked
    assert again.folders == first.folders
    # Only the dead, when asked; only what is missing, when something went.
    (tmp_path / "gqa/images/11.jpg").unlink()
    (tmp_path / "ocr_vqa/images/111.jpg").unlink()
    server.pages["/books/333.jpg"] = Page(body=picture(333))
    report = prepare("tiny", tmp_path, patience=SOON, workers=3, retry_dead=True)
    assert set(server.asked) == {"/gqa/images.zip", "/books/111.jpg", "/books/333.jpg", "/books/444.jpg"}
    assert report.rows_without_picture == 1


def test_what_does_not_come_is_named_and_the_rest_comes(server, tmp_path):
    del server.pages["/gqa/images.zip"]
    server.pages["/vg/images.zip"] = Page(body=b"<html>gone</html>", kind="text/html")
    server.pages["/books/555.jpg"] = Page(statuses=[503] * 9)
    server.pages["/books/111.jpg"] = Page(statuses=[403])
    report = prepare("tiny", tmp_path, patience=SOON, workers=2)
    reasons = dict(report.failures)
    assert set(reasons) == {"gqa", "vg", "ocr_vqa"} and not report.ok
    assert "404" in reasons["gqa"] and server.link("/gqa/images.zip") in reasons["gqa"]
    assert "a web page" in reasons["vg"] and "--from" in reasons["vg"]
    assert "2 links failed for the moment" in reasons["ocr_vqa"]
    assert table(report)["gqa/images"] == (2, 2, 0, 2, 0) and table(report)["coco/train2017"][2] == 4
    assert not (tmp_path / "gqa/images").exists()
    server.pages["/gqa/images.zip"] = Page(body=packed(GQA))
    server.pages["/vg/images.zip"] = Page(body=packed(VG))
    server.pages["/books/555.jpg"] = server.pages["/books/111.jpg"] = Page(body=picture(1))
    server.asked.clear()
    assert prepare("tiny", tmp_path, patience=SOON, workers=2).ok
    assert set(server.asked) == {"/gqa/images.zip", "/vg/images.zip", "/books/111.jpg", "/books/555.jpg"}


def test_the_hub_tells_size_and_sum_before_it_points_elsewhere(server, tmp_path):
    page = server.pages["/datasets/some/rows.json"]
    page.headers |= {"Location": "http://127.0.0.1:9/store"}  # where nobody may be asked by HEAD
    assert prepare("tiny", tmp_path / "a", patience=SOON, only=["coco"]).rows == 15
    page.headers |= {"X-Linked-ETag": f'"{"0" * 64}"'}
    report = prepare("tiny", tmp_path / "b", patience=SOON, only=["coco"])
    assert "its SHA-256 is" in dict(report.failures)["rows"]
    assert "without the JSON nothing can be counted" in report.notes and not report.ok
    assert (tmp_path / "b/coco/train2017/0.jpg").exists()  # the others come all the same


def test_a_list_of_links_that_does_not_come_says_what_to_do(server, tmp_path):
    server.pages["/dataset.json"] = Page(body=b"<html>Really?</html>", kind="text/html")
    reason = dict(prepare("tiny", tmp_path, patience=SOON, only=["ocr_vqa"]).failures)["ocr_vqa"]
    assert "a web page came" in reason and f"save it as {tmp_path}/ocr_vqa/dataset.json" in reason


def test_a_torn_member_is_named_and_nothing_is_in_place(server, tmp_path):
    data = bytearray(packed(COCO))
    data[data.index(COCO["train2017/2.jpg"]) + 700] ^= 255
    server.pages["/train2017.zip"] = Page(body=bytes(data))
    report = prepare("tiny", tmp_path, patience=SOON, only=["coco"])
    assert "train2017/2.jpg in it is broken" in dict(report.failures)["coco"]
    assert not (tmp_path / "coco/train2017").exists() and not list((tmp_path / ".prepare").glob("*.zip"))
    server.pages["/train2017.zip"] = Page(body=packed(COCO))
    assert table(prepare("tiny", tmp_path, patience=SOON, only=["coco"]))["coco/train2017"] == (5, 4, 4, 0, 0)


def test_an_archive_of_something_else_is_said_once_and_not_fetched_again(server, tmp_path):
    server.pages["/gqa/images.zip"] = Page(body=packed({"images/77.jpg": picture(77)}))
    report = prepare("tiny", tmp_path, patience=SOON, only=["gqa"])
    assert report.failures == [("gqa", "it came, and has none of the 2 pictures that are missing")]
    server.asked.clear()
    assert table(prepare("tiny", tmp_path, patience=SOON, only=["gqa"]))["gqa/images"] == (2, 2, 0, 2, 0)
    assert not server.asked
    server.pages["/vg/images.zip"] = Page(body=packed({}))
    report = prepare("tiny", tmp_path, patience=SOON, only=["vg"])
    assert "without a file in it" in dict(report.failures)["vg"]


def test_archives_carried_in_on_a_disk(server, tmp_path):
    """Told by what is in them, whatever they are called; the net is not asked and the disk is left as it was."""
    disk = tmp_path / "disk"
    (disk / "deep").mkdir(parents=True)
    (disk / "images (1).zip").write_bytes(packed(GQA))
    (disk / "deep" / "images.zip").write_bytes(packed(VG))
    (disk / "train2017.zip").write_bytes(packed({name.removeprefix("train2017/"): data for name, data in COCO.items()}))
    (disk / "covers.zip").write_bytes(packed({f"images/{key}.jpg": picture(int(key)) for key in BOOKS}))
    (disk / "tiny.json").write_bytes(json.dumps(ROWS).encode())
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    report = prepare("tiny", tmp_path / "data", source=disk, patience=SOON)
    assert report.ok and report.rows_without_picture == 0
    assert [line[3] for line in table(report).values()] == [0, 0, 0, 0]
    assert not server.asked
    assert before == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}


def test_a_disk_that_lacks_some(server, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "tiny.json").write_bytes(json.dumps(ROWS).encode())
    (disk / "images.zip").write_bytes(packed(GQA))
    report = prepare("tiny", tmp_path / "data", source=disk, patience=SOON)
    reasons = dict(report.failures)
    assert set(reasons) == {"coco", "vg"} and "none of its 1 zip archives holds vg/VG_100K" in reasons["vg"]
    assert table(report)["gqa/images"] == (2, 2, 2, 0, 0) and not server.asked
    assert "ocr_vqa: 5 more come by their links, which are not asked with --from" in report.notes
    assert not report.complete  # eleven rows of fifteen have no picture
    with pytest.raises(ValueError, match="no such folder"):
        prepare("tiny", tmp_path / "data", source=tmp_path / "nowhere")


def test_data_that_lies_there_already_is_not_fetched_again(server, tmp_path):
    for name, data in COCO.items():
        (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / name).write_bytes(data)
    prepare("tiny", tmp_path, patience=SOON, only=["coco"])
    assert not server.asked["/train2017.zip"]
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"mine, and of another size")
    (tmp_path / "coco/train2017/2.jpg").unlink()
    report = prepare("tiny", tmp_path, patience=SOON, only=["coco"])
    assert table(report)["coco/train2017"] == (5, 4, 4, 0, 0)
    assert (tmp_path / "coco/train2017/1.jpg.replaced").read_bytes() == b"mine, and of another size"


def test_broken_pictures_are_counted_and_listed(server, tmp_path):
    prepare("tiny", tmp_path, patience=SOON, only=["coco"])
    (tmp_path / "coco/train2017/0.jpg").write_bytes(b"")
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"no picture")
    (tmp_path / "coco/train2017/2.jpg").write_bytes(COCO["train2017/2.jpg"][:-300])
    headers = prepare("tiny", tmp_path, patience=SOON, only=["coco"], workers=2)
    assert table(headers)["coco/train2017"] == (5, 4, 4, 0, 2)
    pixels = prepare("tiny", tmp_path, patience=SOON, only=["coco"], decode=True)
    assert table(pixels)["coco/train2017"] == (5, 4, 4, 0, 3)
    assert pixels.rows_without_picture == 4 + 9  # two rows share picture 0; nine are of other folders
    assert not pixels.complete
    lines = (tmp_path / ".prepare/tiny.broken.txt").read_text().splitlines()
    assert lines[1] == "coco/train2017/1.jpg\tnot an image that Pillow knows"


def test_renamed_before_anything_is_fetched_and_back(server, tmp_path):
    folder = tmp_path / "ocr_vqa/images"
    folder.mkdir(parents=True)
    for key, ending in zip(BOOKS, ("jpg", "gif", "png", "jpeg", "JPG"), strict=True):
        (folder / f"{key}.{ending}").write_bytes(picture(int(key)))
    names = {path.name for path in folder.iterdir()}
    report = prepare("tiny", tmp_path, patience=SOON, rename=True)
    assert report.renamed == 4 and not [path for path in server.asked if path.startswith("/books")]
    assert {path.name for path in folder.iterdir()} == {f"{key}.jpg" for key in BOOKS}
    back = prepare("tiny", tmp_path, undo=True)
    assert back.ok and {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize(
    "member", ["../escape.jpg", "/etc/escape.jpg", "a/../../escape.jpg", "..\\escape.jpg", "C:\\x"]
)
def test_an_archive_that_points_outside_is_refused_whole(tmp_path, member):
    archive = tmp_path / "a.zip"
    archive.write_bytes(packed({"fine.jpg": b"x", member: b"x"}))
    with pytest.raises(ValueError, match="points outside its folder; nothing was unpacked"):
        unpack.unpack(archive, tmp_path / "to" / "images")
    assert not (tmp_path / "to").exists()


def test_a_link_in_an_archive_is_refused(tmp_path):
    link = zipfile.ZipInfo("images/a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="points outside"):
        unpack.unpack(tmp_path / "a.zip", tmp_path / "images")


def test_unpacking_goes_on_after_a_crash(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(packed(COCO))
    written = []
    real = unpack._write

    def dies(file, entry, to, archive):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(to.name)
        real(file, entry, to, archive)

    monkeypatch.setattr(unpack, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        unpack.unpack(tmp_path / "a.zip", tmp_path / "train2017")
    assert not (tmp_path / "train2017").exists()
    monkeypatch.setattr(unpack, "_write", lambda *job: (written.append(job[2].name), real(*job)))
    assert unpack.unpack(tmp_path / "a.zip", tmp_path / "train2017") == 4
    assert written == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "train2017").iterdir()} == {
        name.removeprefix("train2017/"): data for name, data in COCO.items()
    }


def test_too_small_a_disk_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    tiny = DATASETS["tiny"]
    big = tuple(replace(p, size=None, about=20 * archives.GB) if p.name == "gqa" else p for p in tiny.parts)
    monkeypatch.setitem(DATASETS, "tiny", replace(tiny, parts=big))
    with pytest.raises(ValueError, match=r"0\.0 GB free.*need about 40\.0 GB \(and vg, of unknown size\)"):
        prepare("tiny", tmp_path, patience=SOON)
    assert not [path for path in server.asked if path.endswith(".zip")]


def test_links_and_names(monkeypatch, capsys):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    report = prepare("mix665k", "data", listing=True)
    links = {part["name"]: part["link"] for part in report.parts}
    assert links["coco"] == "http://images.cocodataset.org/zips/train2017.zip"
    assert links["rows"].startswith(f"{HUB}/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/")
    assert {part["name"] for part in report.parts if part["comes"] == "when named"} == {"ocr_vqa_zip"}
    report.show()
    out = capsys.readouterr().out
    assert "curl -L -C - --retry 9 -o gqa_images.zip" in out and "  out=vg_images2.zip" in out
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    mirrored = prepare("llava_pretrain", "data", listing=True)
    assert {part["link"].split("/datasets")[0] for part in mirrored.parts} == {"https://mirror.example"}
    with pytest.raises(ValueError, match="there are: llava_pretrain, mix665k"):
        prepare("mix", "data")
    with pytest.raises(ValueError, match="no part 'laion'; its parts: rows, coco"):
        prepare("mix665k", "data", only=["laion"])


def test_the_table_of_published_parts():
    """Every part goes to a folder of LLaVA's layout, under a file name of its own."""
    folders = {name: {part.folder for part in data.parts if part.kind != "rows"} for name, data in DATASETS.items()}
    assert folders["mix665k"] == {
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    }
    mix = DATASETS["mix665k"]
    assert mix.folder_of("vg/VG_100K_2/1.jpg") == "vg/VG_100K_2"
    assert DATASETS["llava_pretrain"].folder_of("00453/004539375.jpg") == "LLaVA-Pretrain/images"
    assert mix.folder_of("elsewhere/deep/1.jpg") == "elsewhere/deep"
    for data in DATASETS.values():
        assert len({part.file for part in data.parts}) == len({part.name for part in data.parts}) == len(data.parts)
