"""Imports one module after the other and says which file and version each was, or the error with all that it came
from. Ends at the first that fails, since what it leaves behind would fail others."""

from __future__ import annotations

import faulthandler
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


def main(patience: float, names: list[str]) -> None:
    """Facts: `underway`: the module that is imported now; `done`: module -> `file` and `version`, or `errors`,
    outermost first. A module that takes longer than `patience` seconds ends the process."""
    done: dict[str, dict[str, object]] = {}
    for name in names:
        tell(underway=name)
        faulthandler.dump_traceback_later(patience, exit=True)
        try:
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            tell(done=done | {name: {"errors": causes(error)}})
            return
        faulthandler.cancel_dump_traceback_later()
        done[name] = {"file": getattr(module, "__file__", "") or "", "version": str(getattr(module, "__version__", ""))}
        tell(done=done)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
