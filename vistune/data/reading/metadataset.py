"""Blends of datasets as energon's MetadatasetV2 writes them, laid out flat; and ranges of samples as it counts them.

Reads YAML alone: which dataset comes how often, never what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vistune import files
from vistune.data.reading.nv_meta import read_yaml


@dataclass(frozen=True, slots=True)
class Subset:
    """Part of a dataset's samples: first samples `absolute` (start, end), then of those the `share` (from, to)."""

    absolute: tuple[int, int | None] | None = None
    share: tuple[float, float] | None = None

    def of(self, total: int) -> tuple[int, int]:
        """First sample and one past the last, of `total`. Raises ValueError when there are not as many."""
        start, end = 0, total
        if self.absolute is not None:
            start, end = self.absolute[0], total if self.absolute[1] is None else self.absolute[1]
            if not 0 <= start <= end <= total:
                raise ValueError(f"range {list(self.absolute)} is not within the {total} samples there are")
        if self.share is not None:
            start, end = start + int((end - start) * self.share[0]), start + int((end - start) * self.share[1])
        return start, end

    def within(self, outer: Subset) -> Subset:
        """This subset, of which `outer` then takes a share. Raises ValueError for an outer range of samples."""
        if outer.absolute is not None:
            raise ValueError("a range of sample numbers is for a dataset, not for a blend of them; use percent")
        if outer.share is None:
            return self
        low, high = self.share or (0.0, 1.0)
        return replace(self, share=(low + outer.share[0] * (high - low), low + outer.share[1] * (high - low)))

    def as_option(self) -> dict[str, Any]:
        """As the `range` option of the format "energon" takes it."""
        return {name: list(value) for name in ("absolute", "share") if (value := getattr(self, name)) is not None}


def read_range(value: Any) -> Subset:
    """[25%, 75%], [100, 200], [100, end], or what `as_option` gives. Raises ValueError for anything else."""
    if isinstance(value, Mapping) and set(value) <= {"absolute", "share"}:
        absolute, share = value.get("absolute"), value.get("share")
        return Subset(tuple(absolute) if absolute else None, tuple(share) if share else None)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        start, end = value
        if type(start) is int and (type(end) is int or end == "end"):
            return Subset(absolute=(start, None if end == "end" else end))
        if (low := _percent(start)) is not None and (high := _percent(end)) is not None and low <= high:
            return Subset(share=(low, high))
    raise ValueError(f"range {value!r} is neither [first, end] in samples nor like ['25%', '75%']")


def _percent(value: Any) -> float | None:
    try:
        share = float(value.removesuffix("%")) / 100 if isinstance(value, str) and value.endswith("%") else -1.0
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


@dataclass(frozen=True, slots=True)
class Part:
    """One dataset of a blend. Either `weight` (they add up to 1) or `repetitions` (an epoch has that many) is set."""

    path: str
    weight: float | None
    repetitions: float | None
    split: str
    subset: Subset | None = None
    configs: tuple[tuple[str, str], ...] = ()  # names of other dataset.yaml and split.yaml files, where it says so

    def options(self) -> dict[str, Any]:
        """For the format "energon"."""
        ranged = {"range": self.subset.as_option()} if self.subset else {}
        return {"split": self.split, **ranged, **dict(self.configs)}


def is_metadataset(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


def expand(path: str, split: str = "train") -> list[Part]:
    """The datasets that the blend file `path` names for `split`, blends in blends laid flat.

    Relative paths are relative to the file that names them; what weighs or repeats 0 is left out. Raises ValueError
    for a file that is no blend, a split it does not have, a blend that contains itself, or what only code can do
    (`join`).
    """
    parts = list(_file(path, split, ()))
    if not parts:
        raise ValueError(f"{path}: the blend of {split!r} repeats nothing")
    return parts


def _file(path: str, split: str, above: tuple[str, ...]) -> Iterator[Part]:
    here = f"{path} ({split})"
    if here in above:
        raise ValueError(f"{path}: the blend contains itself: {' -> '.join([*above, here])}")
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such blend file") from None
    splits = value.get("splits") if isinstance(value, dict) else None
    if not isinstance(splits, dict):
        raise ValueError(f"{path}: no blend of energon datasets: it has no mapping `splits`")
    if split not in splits:
        raise ValueError(f"{path}: has no split {split!r}. Splits: {', '.join(map(str, splits))}")
    yield from _node(path, splits[split], split, (*above, here))


def _node(path: str, node: Any, split: str, above: tuple[str, ...]) -> Iterator[Part]:
    """What one entry stands for: a blend, or one dataset or blend file."""
    if not isinstance(node, dict):
        raise ValueError(f"{path}: {node!r} is no dataset and no blend")
    outer = _subset(path, node)
    split = str(node.get("split_part") or split)
    if "join" in node:
        raise ValueError(f"{path}: joined datasets need code to join them; write them as one dataset first")
    if "blend_epochized" in node:
        parts = _repeated(path, node["blend_epochized"], split, above)
    elif "blend" in node or "datasets" in node:
        parts = _weighted(path, node.get("blend", node.get("datasets")), split, above)
    elif isinstance(node.get("path"), str):
        parts = _leaf(path, node, split, above)
    else:
        raise ValueError(f"{path}: an entry has none of path, blend, blend_epochized: {str(node)[:80]}")
    for part in parts:
        try:
            yield part if outer is None else replace(part, subset=_inside(part, outer, node))
        except ValueError as error:
            raise ValueError(f"{path}: {part.path}: {error}") from None


def _inside(part: Part, outer: Subset, node: Mapping[str, Any]) -> Subset:
    own = "path" in node and not is_metadataset(node["path"])  # a dataset's own range may count samples
    return outer if own else (part.subset or Subset()).within(outer)


def _leaf(path: str, node: Mapping[str, Any], split: str, above: tuple[str, ...]) -> Iterator[Part]:
    inner = files.join(path.rsplit("/", 1)[0] if "/" in path else ".", node["path"])
    if is_metadataset(inner):
        yield from _file(inner, split, above)
        return
    configs = tuple((key, str(node[key])) for key in ("dataset_config", "split_config") if node.get(key))
    yield Part(inner, None, None, split, None, configs)


def _weighted(path: str, entries: Any, split: str, above: tuple[str, ...]) -> Iterator[Part]:
    weights = [_number(path, entry, "weight") for entry in _entries(path, entries)]
    if not sum(weights):
        raise ValueError(f"{path}: the weights of a blend are all 0")
    for entry, weight in zip(entries, weights, strict=True):
        if not weight:
            continue  # never drawn from
        for part in _node(path, entry, split, above):
            if part.repetitions is not None:
                raise ValueError(f"{path}: blend has a blend_epochized in it; they cannot be mixed")
            yield replace(part, weight=weight / sum(weights) * (1.0 if part.weight is None else part.weight))


def _repeated(path: str, entries: Any, split: str, above: tuple[str, ...]) -> Iterator[Part]:
    for entry in _entries(path, entries):
        repetitions = _number(path, entry, "repetitions")
        if not repetitions:
            continue
        for part in _node(path, entry, split, above):
            if part.weight is not None:
                raise ValueError(f"{path}: blend_epochized has a blend in it; they cannot be mixed")
            inner = 1.0 if part.repetitions is None else part.repetitions
            yield replace(part, repetitions=repetitions * inner)


def _entries(path: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a blend is a list of datasets")
    return entries


def _number(path: str, entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{path}: {key} {value!r} is no number from 0 up")
    return float(value)


def _subset(path: str, node: Mapping[str, Any]) -> Subset | None:
    value = node.get("subset")
    if value is None:
        return None
    try:
        return read_range(value["range"] if isinstance(value, dict) and set(value) == {"range"} else value)
    except ValueError as error:
        raise ValueError(f"{path}: subset: {error}") from None
