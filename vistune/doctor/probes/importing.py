"""Imports one module and says which file and version it was, or the error with all that it came from."""

from __future__ import annotations

import importlib
import sys

from vistune.doctor.trial import tell


def causes(error: BaseException) -> list[str]:
    """`Type: text` of an error and of those it was raised from, outermost first."""
    said: list[str] = []
    one: BaseException | None = error
    while one is not None and len(said) < 10:
        said.append(f"{type(one).__name__}: {' '.join(str(one).split())}")
        one = one.__cause__ or one.__context__
    return said


def main(name: str) -> None:
    """Facts: `file`, `version`; or `errors`, outermost first."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        tell(errors=causes(error))
        return
    tell(file=getattr(module, "__file__", "") or "", version=str(getattr(module, "__version__", "")))


if __name__ == "__main__":
    main(sys.argv[1])
