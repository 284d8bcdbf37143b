"""The metrics of several servers as one text: every sample gets a label that says whose it is.

Works on Prometheus' text as it is written; knows no metric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{)?")


def merged(texts: Mapping[str, str], label: str = "worker") -> str:
    """`texts`: by the value of the label, which needs no escaping. Samples of one metric stand together under its help
    and type, which are said once, as the format wants it."""
    about: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for value, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if line not in about.setdefault(name, []):
                    about[name].append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(name, []).append(_labelled(line, f'{label}="{value}"'))
    lines = [line for name in {**about, **samples} for line in (*about.get(name, []), *samples.get(name, []))]
    return "".join(f"{line}\n" for line in lines)


def _labelled(line: str, label: str) -> str:
    found = _SAMPLE.match(line)
    if not found:
        raise ValueError(f"not a line of metrics: {line!r}")
    name, braces = found.group(1), found.group(2)
    rest = line[found.end() :]
    if not braces:
        return f"{name}{{{label}}}{rest}"
    return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
