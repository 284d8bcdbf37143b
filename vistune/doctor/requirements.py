"""Requirements as packages write them (`torch>=2.11,<2.14`), read and compared without the `packaging` library."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
CLAUSE = re.compile(r"(>=|<=|==|!=|~=|>|<)\s*([\w.*+!-]+)")


@dataclass(frozen=True, slots=True)
class Requirement:
    """`name` is normalised; `wanted` is what stands behind it; `extra` where only an extra asks for it."""

    name: str
    wanted: str
    extra: str = ""


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(text: str) -> Requirement | None:
    """One requirement, or None where its marker does not concern this Python (only extras are looked at)."""
    found = NAME.match(text)
    if not found:
        return None
    name, wanted, marker = found.group(1), found.group(2).strip(), found.group(3) or ""
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
    if marker.strip() and not extra:
        return None
    return Requirement(normal(name), wanted.replace(" ", ""), extra.group(1) if extra else "")


def of_distribution(name: str) -> list[Requirement]:
    """What an installed distribution asks for; nothing where it is not installed."""
    try:
        asked = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [one for text in asked if (one := parse(text))]


def own() -> list[Requirement]:
    """What vistune asks for: of the source tree that runs, else of the installed package."""
    project = Path(__file__).parent.parent.parent / "pyproject.toml"
    if not project.is_file():
        return of_distribution("vistune")
    said = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    plain = [one for text in said["dependencies"] if (one := parse(text))]
    extras = said.get("optional-dependencies", {})
    more = [(extra, one) for extra, texts in extras.items() for text in texts if (one := parse(text))]
    return plain + [Requirement(one.name, one.wanted, extra) for extra, one in more if extra != "dev"]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 2.11.0a0+vendor -> (2, 11, 0)."""
    found = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def suffix(version: str) -> str:
    """What stands behind the plus sign: a build's own mark."""
    return version.partition("+")[2]


def is_early(version: str) -> bool:
    """Whether it is a version before the one it names, as pip sees it: 2.11.0a0, 2.11.0rc1, 2.11.0.dev1."""
    return bool(re.match(r"v?[\d.]+\d(?:\.?(?:a|b|rc|dev|alpha|beta)\d*)", version.split("+")[0]))


def fits(version: str, wanted: str) -> bool:
    """Whether the numbers of `version` are in the range `wanted`; its build and whether it is early do not count."""
    have = release(version)
    return all(_holds(have, sign, limit) for sign, limit in CLAUSE.findall(wanted))


def _holds(have: tuple[int, ...], sign: str, limit: str) -> bool:
    want = release(limit)
    if limit.endswith("*") or sign == "~=":
        count = len(want) - (sign == "~=")
        same = _padded(have, count)[:count] == want[:count]
        return not same if sign == "!=" else same and (sign != "~=" or _padded(have, len(want)) >= want)
    length = max(len(have), len(want))
    left, right = _padded(have, length), _padded(want, length)
    signs = {
        ">=": left >= right,
        "<=": left <= right,
        "==": left == right,
        "!=": left != right,
        ">": left > right,
        "<": left < right,
    }
    return signs[sign]


def _padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
    return numbers + (0,) * (length - len(numbers))
