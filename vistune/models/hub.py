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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vistune import console

FETCHED = ".vistune-fetched.json"
"""In a fetched folder: which repository and commit it is, and the size of every file."""

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
    commit, sizes = _ask(name, revision, name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _note(out) == {"id": name, "commit": commit, "files": sizes} and not _wrong(out, sizes):
            console.say(f"{out}: holds {name} already, whole")
            return out
        raise ValueError(f"{out}: exists and is not {name} at {commit[:12]}; give another folder, or remove it")
    part = out.with_name(out.name + ".fetching")
    part.mkdir(parents=True, exist_ok=True)
    _bring(name, commit, sizes, part, again=f"vistune fetch {name} --out {out}")
    if wrong := _wrong(part, sizes):
        for file, _ in wrong:
            (part / file).unlink(missing_ok=True)
        told = ", ".join(f"{file} ({why})" for file, why in wrong[:5])
        raise ValueError(f"{name}: {len(wrong)} files did not come whole: {told}; fetch again, and only they are asked")
    shutil.rmtree(part / ".cache", ignore_errors=True)
    (part / FETCHED).write_text(json.dumps({"id": name, "commit": commit, "files": sizes}, indent=2), encoding="utf-8")
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
    if cached := _cached(name):
        return cached
    _, sizes = _ask(name, None, f"{what}: {name!r} is neither a folder nor whole in the local cache, and")
    _bring(name, None, sizes, None, again="the same command")
    found = _cached(name)
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


def _bring(name: str, revision: str | None, sizes: Mapping[str, int], folder: Path | None, again: str) -> None:
    """Every file, into `folder` or else the cache; what was there is not asked for again. ValueError with `again`."""
    where = {"local_dir": folder} if folder else {}
    with console.progress() as bar, _no_other_bars(), ThreadPoolExecutor(STREAMS) as streams:
        task = bar.add_task(name, total=sum(sizes.values()))
        tasks = {
            streams.submit(hf_hub_download, name, file, revision=revision, endpoint=_endpoint(), **where)
            for file in sizes
        }
        try:
            while tasks:
                done, tasks = wait(tasks, timeout=0.5, return_when="FIRST_EXCEPTION")
                bar.update(task, completed=_arrived(folder) if folder else 0)
                for one in done:
                    one.result()
        except Exception as error:
            raise ValueError(
                f"{name}: interrupted ({type(error).__name__}: {str(error).splitlines()[0]}). "
                f"What has arrived is kept: {again} goes on from there"
            ) from error
        finally:
            streams.shutdown(wait=True, cancel_futures=True)


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


def _cached(name: str) -> Path | None:
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
