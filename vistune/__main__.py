"""What `vistune`, `python -m vistune` and `torchrun -m vistune` start: on the standard library alone until the verb is
known, so that `vistune doctor` runs where nothing else imports."""

from __future__ import annotations

import os
import sys

from vistune import limits


def main(arguments: list[str] | None = None) -> None:
    """Keep the threads within the limits, then hand over to the verb, and leave with its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    limits.apply()
    if words[:1] == ["doctor"]:
        from vistune.doctor import run

        sys.exit(run.main(words[1:]))
    try:
        from vistune import cli

        cli.main(words)
    except ImportError as error:
        if os.environ.get("VISTUNE_TRACEBACK"):
            raise
        print(f"error: {_sentence(error)} `vistune doctor` finds out more.", file=sys.stderr)
        sys.exit(2)


def _sentence(error: ImportError) -> str:
    """What does not import, and what it says."""
    said = " ".join(str(error).split())
    return f"a package that vistune needs does not import: {said.rstrip('.')}."


if __name__ == "__main__":
    main()
