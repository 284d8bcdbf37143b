"""Which files a table of rows consists of: one file, a pattern, a folder of shards, or a folder that `datasets` saved.

Looks at names and at the small JSON files `datasets` writes; opens no shard.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

from vistune import files

Kind = Literal["parquet", "arrow", "json"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
    "json": (".jsonl", ".ndjson", ".json"),
}
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "info.json")
_SPLITS = re.compile(r"(train|training|test|testing|validation|valid|val|dev|eval)([-_.\d].*)?\Z", re.IGNORECASE)


def find_shards(path: str, split: str = "") -> tuple[Kind, list[str]]:
    """The files of `path`, in the order of their names, and of what kind they are.

    `split` keeps those that `datasets` and the hub would count to it: `train-00000-of-00002.parquet`, `train/x.arrow`.
    Raises ValueError when there are none, several kinds, or several splits and none is chosen.
    """
    if "*" in path or "?" in path:
        return _one_kind(path, _matching(path))
    if not files.is_folder(path):
        if not files.exists(path):
            raise ValueError(f"{path}: the data file cannot be opened: no such file or folder")
        return _one_kind(path, [path])
    if files.exists(files.join(path, "dataset_dict.json")):
        return find_shards(_of_dict(path, split))
    if files.exists(files.join(path, "state.json")):
        return "arrow", _saved(path)
    return _one_kind(path, _of_split(path, split, [file for file in files.listed(path) if _is_rows(path, file)]))


def kind_of(path: str) -> Kind | None:
    """By the name's ending; None for any other."""
    name = path.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def _is_rows(folder: str, file: str) -> bool:
    parts = PurePosixPath(file[len(folder) :]).parts
    return parts[-1] not in _NOT_ROWS and kind_of(file) is not None and not any(part.startswith(".") for part in parts)


def _one_kind(path: str, found: Sequence[str]) -> tuple[Kind, list[str]]:
    by_kind = {kind: [file for file in found if kind_of(file) == kind] for kind in SUFFIXES}
    # A folder of tables often has a JSON file or two beside them that say what they are.
    if by_kind["parquet"] or by_kind["arrow"]:
        by_kind["json"] = [file for file in by_kind["json"] if not file.lower().endswith(".json")]
    kinds = [kind for kind, members in by_kind.items() if members]
    if not kinds:
        endings = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise ValueError(f"{path}: no file of rows; expected one that ends with {endings}")
    if len(kinds) > 1:
        raise ValueError(
            f"{path}: files of {' and '.join(kinds)} side by side; name one kind with a pattern, such as "
            f"{path}/*.parquet"
        )
    return kinds[0], by_kind[kinds[0]]


def _of_dict(path: str, split: str) -> str:
    splits = _said(files.join(path, "dataset_dict.json"), "splits")
    if split not in splits:
        problem = f"no split {split!r}" if split else f"{len(splits)} splits"
        raise ValueError(f"{path}: {problem}; say options.split, one of {', '.join(map(str, splits))}")
    return files.join(path, split)


def _saved(path: str) -> list[str]:
    """The shards that `Dataset.save_to_disk` lists."""
    listed = _said(files.join(path, "state.json"), "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    if not names or not all(isinstance(name, str) and "/" not in name and "\\" not in name for name in names):
        raise ValueError(f"{path}/state.json: _data_files names no files in this folder; save the data set again")
    shards = [files.join(path, str(name)) for name in names]
    for shard in shards:
        if not files.exists(shard):
            raise ValueError(f"{shard}: listed in state.json and not there; copy it again, or save the data set again")
    return shards


def _said(path: str, key: str) -> list[object]:
    try:
        value = json.loads(files.read(path))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no list {key!r} can be read from it: {type(error).__name__} {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"{path}: {key!r} is no list")
    return value


def _of_split(path: str, split: str, found: list[str]) -> list[str]:
    named = {file: _split_names(file[len(path) :]) for file in found}
    if split:
        wanted = [file for file, names in named.items() if split.lower() in names]
        if not wanted:
            raise ValueError(f"{path}: no file of split {split!r}; splits seen: {_several(named) or 'none'}")
        return wanted
    splits = {name for names in named.values() for name in names}
    if len(splits) > 1:
        raise ValueError(f"{path}: several splits; say options.split, one of {_several(named)}")
    return found


def _split_names(inner: str) -> set[str]:
    """`data/train-00000-of-00002.parquet` -> train; `plain_text/test/0.parquet` -> test."""
    parts = PurePosixPath(inner).parts
    stem = PurePosixPath(parts[-1]).stem
    sharded = re.match(r"(.+?)-\d{5}-of-\d{5}", stem)
    found = [sharded[1]] if sharded else [match[1] for part in (stem, *parts[:-1]) if (match := _SPLITS.match(part))]
    return {name.lower() for name in found[:1]}


def _several(named: dict[str, set[str]]) -> str:
    return ", ".join(sorted({name for names in named.values() for name in names}))


def _matching(pattern: str) -> list[str]:
    """Files by a pattern whose `*` and `?` stay within a folder; `**` is any number of folders."""
    scheme, mark, rest = pattern.rpartition("://")
    parts = rest.split("/")
    first = next(i for i, part in enumerate(parts) if "*" in part or "?" in part)
    folder = scheme + mark + ("/".join(parts[:first]) or ("" if mark else "/" if rest.startswith("/") else "."))
    return [
        file for file in files.listed(folder) if _fits(file[len(folder) :].lstrip("/").split("/"), tuple(parts[first:]))
    ]


def _fits(names: list[str], pattern: tuple[str, ...]) -> bool:
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or _fits(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])
