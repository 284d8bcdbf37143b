"""The `.nv-meta` folder of an energon dataset, read as data: no Python that lies in it is ever run.

Knows kinds of samples by the names of their classes, and shards by their places; opens no shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from vistune import files

FOLDER = ".nv-meta"
Kind = Literal["packed", "mixqa", "vqa", "caption"]
KINDS: dict[str, Kind] = {
    "PackedCaptioningSample": "packed",
    "MultiMixQASample": "mixqa",
    "VQASample": "vqa",
    "VQAWebdataset": "vqa",
    "CaptioningSample": "caption",
    "CaptioningWebdataset": "caption",
}
_BRACES = re.compile(r"\{(?P<first>-?\d+)\.\.(?P<last>-?\d+)(?:\.\.(?P<step>-?\d+))?\}|\{(?P<names>[^{}]*,[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Meta:
    """What a dataset says of itself. `kind` None: its samples must be recognised by what is in them, since `why`."""

    kind: Kind | None
    why: str
    fields: Mapping[str, str]  # of a `field_map`: sample field -> part of the tar, such as json[caption]
    splits: Mapping[str, list[str]] | None  # None: no split file
    excluded: frozenset[str] = field(default=frozenset())
    counts: Mapping[str, int] | None = None  # samples of each shard


def read_meta(folder: str, dataset_config: str = "dataset.yaml", split_config: str = "split.yaml") -> Meta:
    """The meta folder of the dataset `folder`. Raises ValueError for files that do not say what they must."""
    place = files.join(folder, FOLDER)
    dataset = _mapping(place, dataset_config, required=False)
    splits = _mapping(place, split_config, required=split_config != "split.yaml") or _mapping(place, "split.json")
    info = _mapping(place, ".info.json") or _mapping(place, ".info.yaml")
    kind, why = _kind(dataset or {})
    return Meta(
        kind=kind,
        why=why,
        fields=_fields(f"{place}/{dataset_config}", dataset or {}),
        splits=_splits(f"{place}/{split_config}", splits),
        excluded=frozenset(name for entry in (splits or {}).get("exclude") or [] for name in expand_braces(str(entry))),
        counts=_counts(place, info),
    )


def read_yaml(path: str) -> Any:
    """A YAML or JSON file as plain data; unknown tags are read over. Raises ValueError when it is neither, OSError."""
    raw = files.read(path)
    try:
        return json.loads(raw) if path.endswith(".json") else yaml.load(raw, _Plain)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as {path.rsplit('.', 1)[-1]}: {error}") from None


class _Plain(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Builds dicts, lists and scalars, whatever tag a node carries: a tag can name code to be run."""


def _plain(loader: Any, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Plain.add_multi_constructor("", _plain)


def expand_braces(name: str) -> Iterator[str]:
    """`a-{000..002}.tar`, `{a,b}.tar` -> each name that is meant, in order."""
    found = _BRACES.search(name)
    if found is None:
        yield name
        return
    if found["first"] is None:
        inner = found["names"].split(",")
    else:
        first, last, step = int(found["first"]), int(found["last"]), abs(int(found["step"] or 1)) or 1
        padded = "0" in (found["first"][:1], found["last"][:1])
        width = max(len(found["first"]), len(found["last"])) if padded else 0
        way = 1 if last >= first else -1
        inner = [f"{n:0{width}d}" for n in range(first, last + way, step * way)]
    for text in inner:
        yield from expand_braces(name[: found.start()] + text + name[found.end() :])


def _mapping(place: str, name: str, required: bool = False) -> dict[str, Any] | None:
    path = files.join(place, name)
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        if required:
            raise ValueError(f"{path}: no such file") from None
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping at its top")
    return value


def _kind(dataset: Mapping[str, Any]) -> tuple[Kind | None, str]:
    named = dataset.get("sample_type", dataset)
    name = named.get("__class__") if isinstance(named, dict) else None
    if name is None:
        return None, "its dataset.yaml names no sample class"
    if name in KINDS:
        return KINDS[name], ""
    return None, f"its samples are of class {name!r}, whose layout only its own code knows"


def _fields(path: str, dataset: Mapping[str, Any]) -> dict[str, str]:
    fields = dataset.get("field_map") or {}
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{path}: field_map is no mapping of names to parts")
    return fields


def _splits(path: str, value: Mapping[str, Any] | None) -> dict[str, list[str]] | None:
    if value is None:
        return None
    parts = value.get("split_parts")
    if not isinstance(parts, dict) or not all(isinstance(names, list) for names in parts.values()):
        raise ValueError(f"{path}: split_parts is no mapping of splits to lists of shards")
    return {str(split): [n for name in names for n in expand_braces(str(name))] for split, names in parts.items()}


def _counts(place: str, info: Mapping[str, Any] | None) -> dict[str, int] | None:
    counts = (info or {}).get("shard_counts")
    if counts is None:
        return None
    if not isinstance(counts, dict) or not all(isinstance(n, int) and n >= 0 for n in counts.values()):
        raise ValueError(f"{place}: the info file's shard_counts is no mapping of shards to numbers of samples")
    return counts
