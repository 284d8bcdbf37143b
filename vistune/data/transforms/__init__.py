"""The transforms of a mixture, found by exact name: one file of this package for each family of them.

A transform maps the rows of a reader to samples of its own; the result is a reader again.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vistune.data.formats import Reader
from vistune.data.transforms.step import Step, Transformed

TRANSFORMS: dict[str, type[Step]] = {}
S = TypeVar("S", bound=type[Step])


def register(name: str) -> Callable[[S], S]:
    """Decorator: the transform `name`. Raises ValueError for a name that is taken."""

    def add(step: S) -> S:
        if name in TRANSFORMS:
            raise ValueError(f"transform {name!r} is registered twice. Registered: {', '.join(sorted(TRANSFORMS))}")
        TRANSFORMS[name] = step
        step.do = name
        return step

    return add


def apply(reader: Reader, steps: Sequence[Mapping[str, Any]], cache: Path | None = None, *, workers: int = 0) -> Reader:
    """`reader` seen through the steps, one after another; each is `{"do": NAME, **its options}`.

    Tables of rows are made once, in `workers` processes, and kept in `cache` when there is one. Raises ValueError for
    an unknown transform, and for an option that it does not take (transform, option, value).
    """
    for step in [build(step, reader.name) for step in steps]:
        reader = Transformed(reader, step, cache, workers)
    return reader


def build(step: Mapping[str, Any], source: str) -> Step:
    """One step from its table in a recipe; `source` is named in errors. Raises ValueError."""
    options = dict(step)
    name = options.pop("do", None)
    if name not in TRANSFORMS:
        known = ", ".join(sorted(TRANSFORMS))
        reason = f"there is no transform {name!r}" if name else f"{step!r} names no transform"
        raise ValueError(f"{source}: {reason}; write do = NAME. Transforms: {known}")
    try:
        return TRANSFORMS[name].model_validate(options)
    except ValidationError as error:
        lines = [_explain(name, found) for found in error.errors()]
        raise ValueError("\n".join(f"{source}: {line}" for line in lines)) from None


def _explain(name: str, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    known = ", ".join(TRANSFORMS[name].model_fields) or "none"
    if error["type"] == "extra_forbidden":
        return f"transform {name!r} has no option {where} (= {error['input']!r}); it takes {known}"
    if error["type"] == "missing":
        return f"transform {name!r}: option {where} is missing; add it"
    given = f" = {error['input']!r}" if where else ""
    option = f"option {where}{given}: " if where else ""
    return f"transform {name!r}: {option}{error['msg'].removeprefix('Value error, ')}"


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
