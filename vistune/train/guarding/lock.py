"""One run at a time in a run folder: a file that names who is at work there, and is known for stale when nobody is.

Knows processes and files; nothing of what is done in the folder.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vistune import console, ranks
from vistune.train.keeping import checkpoint

NAME = "running.json"
SIGN = 5.0  # seconds between two signs of life of the holder: the file's time
STALE = 16.0  # seconds without one, after which a holder on another machine is gone


@dataclass(frozen=True)
class Holder:
    """A process, told from one of the same number that came after it, and on which machine its number counts."""

    host: str
    pid: int
    started: str  # in ticks since the machine's start; empty where that cannot be known
    machine: str  # start of the machine and namespace of process numbers

    @classmethod
    def here(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine())

    def gone(self) -> bool:
        """Whether it certainly does not run any more. False where that cannot be seen from here."""
        if self == Holder.here():  # a run of this very process, which did not come to its end
            return True
        return self.machine == _machine() and not (_runs(self.pid) and _started(self.pid) == self.started)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Rank 0 holds the folder's lock. ValueError on every rank if another run is at work there, or the folder is
    something else."""
    held: list[Lock] = []
    ranks.on_first(lambda: held.append(Lock(folder)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def refuse_foreign(folder: Path) -> None:
    """ValueError for a folder that holds something else than a run."""
    known = ("index", NAME)  # an index may be there before: other verbs make it too
    others = [file for file in folder.iterdir() if file.name not in known] if folder.is_dir() else []
    if others and not (folder / "recipe.toml").exists():
        raise ValueError(f"run {folder}: is not empty and is no run of vistune; choose another with run=DIR")


class Lock:
    """Held from its making to `release`; a thread gives signs of life for those who look from another machine."""

    def __init__(self, folder: Path):
        refuse_foreign(folder)
        self.path, self.holder = folder / NAME, Holder.here()
        with checkpoint.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            while not self._take():
                self._refuse_unless_stale()
                self.path.unlink(missing_ok=True)
        self._released = threading.Event()
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if read(self.path) == self.holder:
            self.path.unlink()

    def _take(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(asdict(self.holder), file)
        except FileExistsError:
            return False
        return read(self.path) == self.holder  # and not one who found the same stale lock, a moment later

    def _refuse_unless_stale(self) -> None:
        holder = read(self.path)
        if holder is not None and holder.gone():
            return
        seen, here = _sign(self.path), holder is not None and holder.machine == _machine()
        if not here:
            console.say(f"{self.path}: looking for {STALE:.0f} s whether its run is alive")
        ends = time.monotonic() + STALE
        while not here and _sign(self.path) == seen:
            if time.monotonic() > ends:
                console.warn(f"{self.path}: no sign of life of {_name(holder)}; taken over")
                return
            time.sleep(min(0.5, STALE / 8))
        if not here and not self.path.exists():
            return
        raise ValueError(
            f"run {self.path.parent}: another run is at work there ({_name(holder)}). "
            f"Wait for it or stop it, or choose another folder with run=DIR. It is gone? Then remove {self.path}."
        )

    def _live(self) -> None:
        while not self._released.wait(SIGN):
            try:
                os.utime(self.path)
            except OSError as error:
                if not self._released.is_set():  # removed by hand, or its disk: then another may come
                    console.warn(f"{self.path}: the run cannot show any more that it is at work here ({error})")
                return


def read(path: Path) -> Holder | None:
    """Who holds the lock; None for nobody, and for one who is writing it."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _name(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "whoever made it"


def _sign(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return _status(pid)[:1] not in (["Z"], ["X"])  # dead, and its parent has not looked yet


def _started(pid: int) -> str:
    status = _status(pid)
    return status[19] if len(status) > 19 else ""


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # a program's name may hold anything


def _machine() -> str:
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {os.readlink(space)}"
    except OSError:
        return socket.gethostname()
