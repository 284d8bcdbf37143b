"""What differs between runs: recipes, data, machines; only keys that are not the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vistune.report.mixture import Mixture

Row = tuple[str, list[Any]]
"""A key, and what each run has there; None where a run has no such key."""

_PLACE = ("run",)
"""Keys of a recipe that differ between any two runs and say nothing."""


def recipes(trees: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Keys of the recipes that differ, as they are said on the command line; keys of lists by number."""
    return [row for row in _differing(trees) if row[0] not in _PLACE]


def environments(trees: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Keys of environment.json that differ; the data has a table of its own, and a peak is measured anew every time."""
    return [row for row in _differing(trees) if row[0] not in ("data_index", "peak_flops")]


def data(mixtures: Sequence[Mixture | None]) -> list[Row]:
    """What differs in the data that was trained on: totals, then sources by name. Nothing when the index is the same
    everywhere and so are the shares."""
    rows: list[Row] = [("index", [None if one is None else one.hash[:16] for one in mixtures])]
    for name, attribute in (("rows", "rows"), ("usable", "usable"), ("samples an epoch", "samples")):
        rows.append((name, [None if one is None else one.total(attribute) for one in mixtures]))
    for name in ("tokens", "supervised"):
        rows.append((f"{name} an epoch", [None if one is None else round(one.total(name)) for one in mixtures]))
    names = dict.fromkeys(source.name for one in mixtures if one for source in one.sources)
    for name in names:
        rows.append((f"{name}: usable", [_of_source(one, name, "usable") for one in mixtures]))
        rows.append((f"{name}: samples an epoch", [_of_source(one, name, "samples") for one in mixtures]))
    return [row for row in rows if _differs(row[1])]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    if isinstance(tree, Mapping) and tree:
        return {key: leaf for name, sub in tree.items() for key, leaf in flat(sub, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and any(isinstance(one, Mapping | list) for one in tree):
        return {key: leaf for i, sub in enumerate(tree) for key, leaf in flat(sub, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): tree}


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[Row]:
    leaves = [flat(tree) for tree in trees]
    keys = dict.fromkeys(key for one in leaves for key in one if key)
    rows = [(key, [one.get(key) for one in leaves]) for key in keys]
    return [row for row in rows if _differs(row[1])]


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _of_source(mixture: Mixture | None, name: str, attribute: str) -> Any:
    if mixture is None:
        return None
    found = [getattr(source, attribute) for source in mixture.sources if source.name == name]
    return sum(found) if found else None
