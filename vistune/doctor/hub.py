"""The Hugging Face cache, the switches that keep it offline, and what is told to it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vistune.doctor.findings import Finding, ok, problem, size, warning
from vistune.doctor.storage import Place, gather

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
ON = ("1", "on", "yes", "true")
PATIENCE = 2.0
"""Seconds after which the size of a big cache is given as a lower bound."""


@dataclass(frozen=True, slots=True)
class Cache:
    """`held`: bytes of models and data sets in it; `whole`: whether all of it was counted."""

    folder: Path
    exists: bool
    held: int
    whole: bool
    place: Place


def look(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    folder = cache_folder(environment)
    held, whole = measured(folder)
    return findings(Cache(folder, folder.is_dir(), held, whole, gather(folder)), environment)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps models: HF_HUB_CACHE, else in HF_HOME, else in XDG_CACHE_HOME, else at home."""
    own = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if own:
        return Path(own).expanduser()
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"


def measured(folder: Path, patience: float = PATIENCE) -> tuple[int, bool]:
    """Bytes of the files under `folder` (links are not followed), and whether there was time for all of them."""
    until, total = time.monotonic() + patience, 0
    for inner, _, names in os.walk(folder):
        for name in names:
            file = Path(inner) / name
            total += file.lstat().st_size if os.path.lexists(file) else 0
        if time.monotonic() > until:
            return total, False
    return total, True


def findings(cache: Cache, environment: Mapping[str, str]) -> list[Finding]:
    title, text = "Hugging Face cache", str(cache.folder)
    off = [name for name in OFFLINE if environment.get(name, "").lower() in ON]
    held = f"{'' if cache.whole else 'more than '}{size(cache.held)}" if cache.exists else "not there yet"
    if cache.place.error and not off:
        fix = "export HF_HOME=a folder that this user may write to"
        found = [problem(title, f"{text}: cannot write ({cache.place.error})", fix)]
    elif cache.place.error:
        found = [ok(title, f"{text}: {held}, only read, which is enough offline")]
    else:
        found = [ok(title, f"{text}: {held}, {size(cache.place.free)} free")]
    return [*found, *_offline(off, cache), *_told(environment)]


def _offline(off: list[str], cache: Cache) -> list[Finding]:
    if not off:
        return []
    if not cache.held:
        text = f"{', '.join(off)} set and the cache is empty: models can only be given as folders"
        return [warning("offline", text, f"unset {' '.join(off)}, or fetch the models elsewhere first")]
    return [ok("offline", f"{', '.join(off)} set: only what is in the cache is found")]


def _told(environment: Mapping[str, str]) -> list[Finding]:
    """An endpoint other than the hub's own, and whether there is a token (never the token)."""
    said = [f"HF_ENDPOINT={environment['HF_ENDPOINT']}"] if environment.get("HF_ENDPOINT") else []
    said += ["a token is set"] if environment.get("HF_TOKEN") else []
    return [ok("hub", ", ".join(said))] if said else []
