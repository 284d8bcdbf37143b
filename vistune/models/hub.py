"""Repositories of a model hub as folders: fetched whole or not at all, or found in the local cache.

Honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN as `huggingface_hub` does. Knows files, nothing of models.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from vistune import console

FETCHED, PARTS = ".vistune-fetched.json", ".parts"
"""In a fetched folder: which repository and commit it is, and the size of every file. While it is being fetched: the
files that have come in part, which `huggingface_hub` itself would throw away."""

PATIENCE = 10.0  # seconds for the first answer; without a network the failure comes at once
STREAMS = 4  # files that come at the same time
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# What nothing here reads: other frameworks' files, and other people's copies of the same weights.
_OTHER = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.tflite", "*.ot", "*.pth", "*.mlmodel"),
    *("original/*", "onnx/*", "openvino/*", "coreml/*", "*.mlpackage/*", "flax_model*", "tf_model*"),
)
# Weights of `name` are held twice when the first and the second are there; then the second is left.
_TWICE = (
    ("model*.safetensors", "pytorch_model*.bin*"),
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("model*.safetensors", "consolidated*"),
)


def needed(files: Iterable[str]) -> list[str]:
    """The files of a repository that are worth having: no other framework's, and no weights twice."""
    found = [file for file in files if not any(fnmatch.fnmatchcase(file, other) for other in _OTHER)]
    for kept, left in _TWICE:
        if any(fnmatch.fnmatchcase(file, kept) for file in found):
            found = [file for file in found if not fnmatch.fnmatchcase(file, left)]
    return sorted(found)


def fetch(name: str, out: Path | str, revision: str | None = None) -> Path:
    """Download repository `name` (at `revision`: a branch, tag or commit) into the folder `out`.

    What arrives lies in `<out>.fetching`, which takes the name `out` when every file has its size; the same call takes
    an interrupted one up again. ValueError when it cannot be had, and when `out` holds something else.
    """
    out = Path(out)
    if not _ID.fullmatch(name):
        raise ValueError(f"fetch: {name!r} is no repository of a hub; one is called OWNER/NAME")
    commit, sizes = _ask(name, revision, f"fetch: {name}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _note(out) == {"id": name, "commit": commit, "files": sizes} and not _wrong(out, sizes):
            console.say(f"{out}: holds {name} already, whole")
            return out
        raise ValueError(f"{out}: exists and is not {name} at {commit[:12]}; give another folder, or remove it")
    part = _begin(out.with_name(out.name + ".fetching"), {"id": name, "commit": commit, "files": sizes})
    again = f"What has arrived is kept: vistune fetch {name} --out {out} goes on from there"
    with _told(name, again):
        _transfer_all(name, commit, sizes, part)
    if wrong := _wrong(part, sizes):
        for file, _ in wrong:
            (part / file).unlink(missing_ok=True)
        told = ", ".join(f"{file} ({why})" for file, why in wrong[:5])
        raise ValueError(f"{name}: {len(wrong)} files did not come whole: {told}; fetch again, and only they are asked")
    shutil.rmtree(part / PARTS, ignore_errors=True)
    if out.exists():
        out.rmdir()
    part.rename(out)
    console.say(f"{out}: {name} at {commit[:12]}, {len(sizes)} files, {sum(sizes.values()) / 1e9:.3g} GB")
    return out


def resolve(part: str | Path, what: str) -> Path:
    """The folder (or file) that `part` names: as given, the `model` in it when it is a run's, or a hub id's snapshot,
    from the local cache, else downloaded into it. `what` it is for begins the error. ValueError, at once, when neither.
    """
    path, name = Path(part), str(part)
    if path.exists():
        run = (path / "model" / "config.json").exists() and not (path / "config.json").exists()
        return path / "model" if run else path
    if not _ID.fullmatch(name):
        raise ValueError(f"{what}: {name}: no such folder")
    if (found := cached(name)) is not None:
        return found
    _, sizes = _ask(name, None, f"{what}: {name!r} is neither a folder nor whole in the local cache, and")
    with _told(name, "Whole files are kept in the cache; try again"):
        for file in sizes:
            hf_hub_download(name, file, endpoint=_endpoint())
    found = cached(name)
    if found is None:
        raise ValueError(f"{what}: {name} holds no weights in a format that is read here: {', '.join(sizes)}")
    return found


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _ask(name: str, revision: str | None, who: str) -> tuple[str, dict[str, int]]:
    """The commit of a repository and its files that are worth having, with their bytes. ValueError, after `who`."""
    try:
        info = HfApi(endpoint=_endpoint()).model_info(name, revision=revision, timeout=PATIENCE, files_metadata=True)
    except Exception as error:
        raise ValueError(
            f"{who} could not be had from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Where there is a network: vistune fetch {name} --out DIR; then copy DIR here and give it instead. "
            "A mirror is named by HF_ENDPOINT, a token for what is not public by HF_TOKEN"
        ) from error
    listed: dict[str, Any] = {file.rfilename: file.size for file in info.siblings or []}
    for file in listed:
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{name}: a file of it is called {file!r}, which would lie outside its folder")
    return str(info.sha), {file: int(listed[file] or 0) for file in needed(listed)}


def _begin(part: Path, note: Mapping[str, Any]) -> Path:
    """The folder that what arrives goes into; emptied when what is in it is of another commit."""
    if part.exists() and _note(part) != note:
        if _note(part) is None:
            raise ValueError(f"{part}: is in the way and not ours; move it, or give another folder")
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    (part / FETCHED).write_text(json.dumps(note, indent=2), encoding="utf-8")
    return part


def _transfer_all(name: str, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Every file, a few at a time, under a bar of bytes. What breaks, or a signal, ends the others too."""
    stop = Event()
    with console.progress() as bar, _no_other_bars(), ThreadPoolExecutor(STREAMS) as streams:
        task = bar.add_task(name, total=sum(sizes.values()))
        left = {streams.submit(_transfer, name, commit, file, sizes[file], folder, stop) for file in sizes}
        try:
            while left:
                done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(task, completed=_arrived(folder))
                for one in done:
                    one.result()
        finally:
            stop.set()
            streams.shutdown(wait=True, cancel_futures=True)


class _Part(FileIO):
    """A file that takes no more when told to stop."""

    def __init__(self, path: Path, mode: str, stop: Event):
        super().__init__(path, mode)
        self.stop = stop

    def write(self, block: Any) -> int:
        if self.stop.is_set():
            raise InterruptedError("told to stop")
        left = memoryview(block)
        while left:  # a disk that fills up takes only some of it
            left = left[super().write(left) :]
        return len(block)


def _transfer(name: str, commit: str, file: str, size: int, folder: Path, stop: Event) -> None:
    """One file of a commit, which never changes: what has come of it already is not asked for again."""
    target, part = folder / file, folder / PARTS / file
    if target.exists() and target.stat().st_size == size:
        return
    for one in (target, part):
        one.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    with _Part(part, "r+" if 0 < have <= size else "w", stop) as opened:
        start = opened.seek(0, os.SEEK_END)
        if start < size or not size:
            url = hf_hub_url(name, file, revision=commit, endpoint=_endpoint())
            http_get(url, opened, resume_size=start, headers=build_hf_headers())
    os.replace(part, target)


@contextmanager
def _told(name: str, again: str) -> Iterator[None]:
    """Whatever breaks on the way is one sentence, which ends with what to do."""
    try:
        yield
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"{name}: interrupted ({type(error).__name__}: {why}). {again}") from error


def _arrived(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def _no_other_bars() -> Iterator[None]:
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _note(folder: Path) -> Any:
    file = folder / FETCHED
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _wrong(folder: Path, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Files that are not what the hub says, and why."""
    found = []
    for file, size in sizes.items():
        have = (folder / file).stat().st_size if (folder / file).is_file() else None
        if have != size:
            found.append((file, "missing" if have is None else f"{have:,} of {size:,} bytes"))
    return found


def cached(name: str) -> Path | None:
    """A repository's snapshot in the local cache, if its weights are there: asking for a config makes one too."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, OSError):
        return None
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, and every shard that an index of its names."""
    indexes = list(folder.glob("*.index.json"))
    for index in indexes:
        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if shards and all((folder / shard).exists() for shard in shards):
            return True
    return not indexes and any(True for kind in ("*.safetensors", "*.bin", "*.pt") for _ in folder.glob(kind))
