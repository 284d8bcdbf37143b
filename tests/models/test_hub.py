"""Repositories fetched from a hub on loopback: whole or not at all, resumed, and an error at once without a network."""

from __future__ import annotations

import json
import os
import time

import pytest
from huggingface_hub import constants

from tests.data.loopback import Page, serving
from vistune.models import hub

COMMIT = "c0ffee" * 6 + "c0de"
BIG = os.urandom(12 << 20)  # more than what huggingface_hub holds before it writes
FILES = {
    "config.json": b'{"model_type": "llava"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}}',
    "mm_projector.bin": b"a connector",
    "onnx/model.onnx": b"others' weights",
}


def publish(server, files=None, name="me/it", branch="main", **page):
    """What a hub answers about a repository and its files."""
    files = FILES if files is None else files
    listed = [{"rfilename": file, "size": len(body)} for file, body in files.items()]
    told = Page(body=json.dumps({"id": name, "sha": COMMIT, "siblings": listed}).encode(), kind="application/json")
    for path in (f"/api/models/{name}", f"/api/models/{name}/revision/{branch}"):
        server.pages[f"{path}?blobs=true"] = server.pages[f"{path}?blobs=True"] = told
    for file, body in files.items():
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{file}-{len(body)}"', "X-Linked-Size": str(len(body))}
        for at in (COMMIT, branch):
            server.pages[f"/{name}/resolve/{at}/{file}"] = Page(body=body, headers=headers, **page)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving() as told:
        monkeypatch.setenv("HF_ENDPOINT", told.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        publish(told)
        yield told


def held(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_repository_becomes_a_folder_with_each_weight_once(server, tmp_path):
    out = hub.fetch("me/it", tmp_path / "out")
    wanted = {"config.json", "model.safetensors", "model.safetensors.index.json", "mm_projector.bin"}
    assert held(out) == wanted | {hub.FETCHED}
    assert all((out / file).read_bytes() == FILES[file] for file in wanted)
    assert json.loads((out / hub.FETCHED).read_text())["commit"] == COMMIT
    assert not (tmp_path / "out.fetching").exists()


def test_the_same_fetch_again_asks_for_no_file(server, tmp_path):
    hub.fetch("me/it", tmp_path / "out")
    before = len(server.log)
    assert hub.fetch("me/it", tmp_path / "out") == tmp_path / "out"
    assert len(server.log) == before + 1  # what there is, once
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and is not me/it at c0ffee"):
        hub.fetch("me/it", tmp_path / "out")


def test_a_branch(server, tmp_path):
    publish(server, {"config.json": b"{}", "model.safetensors": b"of the branch"}, branch="trial")
    out = hub.fetch("me/it", tmp_path / "out", revision="trial")
    assert (out / "model.safetensors").read_bytes() == b"of the branch"


def test_an_interrupted_fetch_looks_like_none_and_goes_on_where_it_was(server, tmp_path):
    publish(server, FILES | {"model.safetensors": BIG})
    path = f"/me/it/resolve/{COMMIT}/model.safetensors"
    server.pages[path].statuses, server.pages[path].drops = [200, 500], [11 << 20]
    with pytest.raises(ValueError, match=r"me/it: interrupted .*vistune fetch me/it --out .*goes on from there"):
        hub.fetch("me/it", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.fetching" / "model.safetensors").exists()
    server.log.clear()
    out = hub.fetch("me/it", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == BIG
    assert [span for asked, span in server.log if asked == path] == [f"bytes={10 << 20}-"]
    others = [asked for asked, _ in server.log if asked not in (path, "/api/models/me/it?blobs=true")]
    assert not [asked for asked in others if asked.startswith("/me/it/resolve")]


def test_a_signal_ends_all_files_at_once_and_what_has_come_is_kept(server, tmp_path, monkeypatch):
    publish(server, FILES | {"model.safetensors": BIG})

    def interrupted(*given, **said):
        while hub._arrived(tmp_path / "out.fetching") < 10 << 20:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "wait", interrupted)
        patch.setattr(hub._Part, "write", slow(hub._Part.write))
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            hub.fetch("me/it", tmp_path / "out")
        assert time.monotonic() - began < 5
    assert not (tmp_path / "out").exists()
    assert (hub.fetch("me/it", tmp_path / "out") / "model.safetensors").read_bytes() == BIG
    assert server.log[-1] == (f"/me/it/resolve/{COMMIT}/model.safetensors", f"bytes={10 << 20}-")


def slow(write):
    """The block after the first is written late, so that the signal comes between them."""

    def waits(self, block):
        if self.tell():
            self.stop.wait(10)
        return write(self, block)

    return waits


def test_a_dropped_connection_is_taken_up_in_the_same_call(server, tmp_path):
    publish(server, FILES | {"model.safetensors": BIG})
    path = f"/me/it/resolve/{COMMIT}/model.safetensors"
    server.pages[path].drops = [11 << 20]
    assert (hub.fetch("me/it", tmp_path / "out") / "model.safetensors").read_bytes() == BIG
    assert [span for asked, span in server.log if asked == path] == ["", f"bytes={10 << 20}-"]


def test_a_file_of_another_size_than_the_hub_says(server, tmp_path):
    publish(server)
    listing = server.pages["/api/models/me/it?blobs=true"]
    listing.body = listing.body.replace(b'"model.safetensors", "size": 7', b'"model.safetensors", "size": 9')
    with pytest.raises(ValueError, match=r"1 files did not come whole: model.safetensors \(7 of 9 bytes\)"):
        hub.fetch("me/it", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.fetching" / "model.safetensors").exists()


def test_names_that_would_lie_outside(server, tmp_path):
    publish(server, {"../evil.json": b"{}", "model.safetensors": b""})
    with pytest.raises(ValueError, match="outside its folder"):
        hub.fetch("me/it", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_repository_that_is_not_there_and_a_name_that_is_none(server, tmp_path):
    with pytest.raises(ValueError, match=r"fetch: me/nothing could not be had from the hub \(.*404"):
        hub.fetch("me/nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="one is called OWNER/NAME"):
        hub.fetch("../me", tmp_path / "out")


def test_what_is_in_the_way_stays(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="give another folder, or remove it"):
        hub.fetch("me/it", tmp_path / "out")
    assert held(tmp_path) == {"out/thesis.txt"}


def test_what_is_needed_of_a_repository():
    """The files of original LLaVA checkpoints are not duplicates: connector, LoRA's other half, old weights."""
    original = ["config.json", "mm_projector.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    assert hub.needed(original) == original
    pair = ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"]
    assert hub.needed(pair) == pair
    assert hub.needed([*pair, "adapter_model.safetensors"]) == [
        *("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin")
    ]
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert hub.needed([*shards, *original[2:], "consolidated.safetensors", "tf_model.h5", "original/x.pth"]) == shards


def test_a_part_is_a_folder_a_run_or_a_file(tmp_path):
    for folder in ("plain", "run/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert hub.resolve(tmp_path / "plain", "model") == tmp_path / "plain"
    assert hub.resolve(tmp_path / "run", "model") == tmp_path / "run" / "model"
    assert hub.resolve(tmp_path / "run" / "model" / "config.json", "model").is_file()
    with pytest.raises(ValueError, match=r"vision: .*none/such/place: no such folder"):
        hub.resolve(tmp_path / "none/such/place", "vision")


def test_an_id_is_downloaded_once_into_the_cache(server):
    folder = hub.resolve("me/it", "vision")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "pytorch_model.bin").exists()
    server.log.clear()
    assert hub.resolve("me/it", "vision") == folder
    assert not server.log


def test_a_cache_with_half_of_a_repository_is_not_taken_for_it(server):
    from huggingface_hub import hf_hub_download

    hf_hub_download("me/it", "config.json", endpoint=server.address)
    assert (hub.resolve("me/it", "vision") / "model.safetensors").exists()


@pytest.mark.parametrize("why", ["no network", "offline"])
def test_without_a_network_the_error_comes_at_once_and_says_what_to_do(server, tmp_path, monkeypatch, why):
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"vision: 'me/it' is neither a folder .*vistune fetch me/it --out DIR"):
        hub.resolve("me/it", "vision")
    with pytest.raises(ValueError, match=r"Where there is a network: vistune fetch me/it --out DIR"):
        hub.fetch("me/it", tmp_path / "out")
    assert time.monotonic() - began < 5
    assert not server.log and not (tmp_path / "out.fetching").exists()
