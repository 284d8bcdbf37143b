"""Pictures get the names that a JSON uses, where only the ending differs: journalled first, so it can be taken back.

A name says nothing about a picture's bytes: Pillow, and so training, looks at the content. Bytes are never changed.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vistune import console

ENDINGS = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Change:
    """`old` becomes `new`; or, where the JSON wants both, `new` becomes a second name of it. Paths below the root."""

    do: Literal["rename", "link"]
    old: str
    new: str


@dataclass(kw_only=True)
class Renamed:
    """What was done: how many, and what was left alone, with why."""

    changed: int
    left: list[tuple[str, str]]


def find_changes(
    root: Path, missing: Iterable[str], wanted: Iterable[str]
) -> tuple[list[Change], list[tuple[str, str]]]:
    """What would give every path of `missing` (below `root`) its picture, and what cannot be decided, with why.

    A picture is meant when it lies in the same folder, has the same stem, and another ending (or case of it). Paths
    that lead out of `root` are passed over.
    """
    asked = set(wanted)
    folders: dict[str, dict[str, list[str]]] = {}
    changes: list[Change] = []
    left: list[tuple[str, str]] = []
    taken: set[str] = set()
    for new in sorted(path for path in missing if not os.path.isabs(path) and ".." not in path.split("/")):
        folder, stem = os.path.dirname(new), os.path.splitext(os.path.basename(new))[0]
        if folder not in folders:
            folders[folder] = _pictures(root, folder)
        found = [old for old in folders[folder].get(stem, []) if old != new]
        if len(found) > 1:
            left.append((new, f"it may be any of {', '.join(sorted(found))}"))
        elif found and found[0] in taken:
            left.append((new, f"{found[0]} already gets another name"))
        elif found:
            both = found[0] in asked
            taken.add(found[0])
            changes.append(Change(do="link" if both else "rename", old=found[0], new=new))
    return changes, left


def rename(root: Path, changes: list[Change], journal: Path) -> Renamed:
    """Do `changes`, each of them written to `journal` and on disk before the first is done.

    What an earlier call left half done is finished first; a name that is taken by then is left alone. No file is
    replaced.
    """
    for change in _read(journal):
        _finish(root / change.old, root / change.new, change.do)
    _write(journal, [(change.do, change) for change in changes])
    done = _each(root, changes, "renaming", _do)
    refused = {new for new, _ in done.left}
    _write(journal, [("left", change) for change in changes if change.new in refused])
    return done


def undo(root: Path, journal: Path) -> Renamed:
    """Take back all that `journal` tells of, last first; then it is set aside as `NAME.undone`.

    Raises ValueError when there is no journal.
    """
    if not journal.exists():
        raise ValueError(f"{journal}: there is no journal of renamed pictures, so nothing to take back")
    done = _each(root, list(reversed(_read(journal))), "renaming back", _undo)
    if not done.left:
        with open(journal.with_name(journal.name + ".undone"), "ab") as kept:
            kept.write(journal.read_bytes())
        journal.unlink()
    return done


def _each(root: Path, changes: list[Change], title: str, act: Callable[[Path, Path, str], str]) -> Renamed:
    result = Renamed(changed=0, left=[])
    with console.progress() as bar:
        for change in bar.track(changes, description=title):
            reason = act(root / change.old, root / change.new, change.do)
            if reason:
                result.left.append((change.new, reason))
            else:
                result.changed += 1
    return result


def _finish(old: Path, new: Path, do: str) -> None:
    """What a crash left: a renaming that stopped between its two steps has both names for one file."""
    _half(new).unlink(missing_ok=True)
    if do == "rename" and os.path.lexists(old) and os.path.lexists(new) and os.path.samefile(old, new):
        os.unlink(old)


def _do(old: Path, new: Path, do: str) -> str:
    """Why it was not done, or ""."""
    if not os.path.lexists(old):
        return "" if os.path.lexists(new) else f"{old.name} is gone"
    if os.path.lexists(new) and not os.path.samefile(old, new):
        return f"there is another {new.name} by now"
    try:
        if do == "link":
            _second_name(old, new)
        else:
            _new_name(old, new)
    except FileExistsError:
        return f"there is another {new.name} by now"
    return ""


def _undo(old: Path, new: Path, do: str) -> str:
    _half(new).unlink(missing_ok=True)
    if not os.path.lexists(new):
        return "" if os.path.lexists(old) else "it is gone under both names"
    if os.path.lexists(old) and not _same(old, new):
        return f"{old.name} and {new.name} are different pictures"
    if os.path.lexists(old):
        os.unlink(new)
    else:
        _new_name(new, old)
    return ""


def _same(one: Path, two: Path) -> bool:
    same_size = os.path.getsize(one) == os.path.getsize(two)
    return os.path.samefile(one, two) or (same_size and one.read_bytes() == two.read_bytes())


def _new_name(old: Path, new: Path) -> None:
    """Linking refuses to replace a file that came this very moment, which renaming would not; so link, then unlink."""
    if not os.path.lexists(new):
        try:
            os.link(old, new)
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links
            os.rename(old, new)
            return
    os.unlink(old)


def _second_name(old: Path, new: Path) -> None:
    """A link where the disk has them, else a copy."""
    if os.path.lexists(new):
        return
    try:
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:
        _half(new).write_bytes(old.read_bytes())
        os.rename(_half(new), new)


def _half(path: Path) -> Path:
    return path.with_name(path.name + ".half")


def _pictures(root: Path, folder: str) -> dict[str, list[str]]:
    """Pictures of a folder by stem, as paths below the root."""
    found: dict[str, list[str]] = defaultdict(list)
    place = root / folder
    for name in sorted(os.listdir(place)) if place.is_dir() else []:
        stem, ending = os.path.splitext(name)
        if ending.lower() in ENDINGS:
            found[stem].append(os.path.join(folder, name))
    return found


def _write(journal: Path, lines: list[tuple[str, Change]]) -> None:
    """Append and wait until it is on disk."""
    if not lines:
        return
    journal.parent.mkdir(parents=True, exist_ok=True)
    torn = journal.exists() and not journal.read_bytes().endswith(b"\n")
    text = [json.dumps({"do": do, "old": c.old, "new": c.new}, ensure_ascii=False) for do, c in lines]
    with open(journal, "ab") as file:
        file.write((("\n" if torn else "") + "\n".join(text) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _read(journal: Path) -> list[Change]:
    """What was to be done, without what was then left alone."""
    changes: dict[tuple[str, str], Change] = {}
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            told = json.loads(line)
            do, old, new = told["do"], told["old"], told["new"]
        except (ValueError, KeyError, TypeError):
            if line:
                console.warn(f"{journal}: a torn line is passed over, nothing of it was done: {line[:80]!r}")
            continue
        changes.pop((old, new), None)
        if do != "left":
            changes[old, new] = Change(do=do, old=old, new=new)
    return list(changes.values())
