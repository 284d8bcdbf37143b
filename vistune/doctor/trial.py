"""Trying something in a process of its own: what it printed as facts, how it ended, and whether it ended at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MARK = "@facts "
"""Before each line of JSON that a probe prints; other lines are a library's chatter."""


@dataclass(frozen=True, slots=True)
class Trial:
    """`code` is the exit code, None when it was ended after `seconds`; negative: the signal that killed it."""

    code: int | None
    facts: dict[str, Any] = field(default_factory=dict)
    stderr: str = ""
    seconds: float = 0.0

    @property
    def hung(self) -> bool:
        return self.code is None

    @property
    def killer(self) -> str:
        """The name of the signal that ended it, or nothing."""
        if self.code is None or self.code >= 0:
            return ""
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    @property
    def last_line(self) -> str:
        """What a process that died said last."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def probe(name: str, *words: str, timeout: float, environment: Mapping[str, str] | None = None) -> Trial:
    """Run `vistune.doctor.probes.NAME` with this interpreter and its search path."""
    command = [sys.executable, *flags(), "-P", "-X", "faulthandler", "-m", f"vistune.doctor.probes.{name}", *words]
    path = os.pathsep.join(place for place in sys.path if place)
    return run(command, timeout, {**os.environ, **(environment or {}), "PYTHONPATH": path})


def flags() -> list[str]:
    """What this interpreter was started with that decides what it finds."""
    return [flag for flag, on in (("-S", sys.flags.no_site), ("-s", sys.flags.no_user_site)) if on]


def run(command: list[str], timeout: float, environment: Mapping[str, str] | None = None) -> Trial:
    """Run `command` and read its facts; after `timeout` seconds it and its children are ended."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=dict(environment) if environment is not None else None,
            start_new_session=True,
        )
    except OSError as error:  # no such program, or no more processes
        return Trial(127, stderr=str(error))
    code: int | None
    try:
        out, err = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        code = None
    return Trial(code, read_facts(out), err, time.monotonic() - began)


def read_facts(out: str) -> dict[str, Any]:
    """What a probe printed, later lines over earlier ones; a line cut short by its death is left out."""
    facts: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith(MARK):
            try:
                facts |= json.loads(line.removeprefix(MARK))
            except ValueError:
                facts["cut"] = line
    return facts


def tell(**facts: Any) -> None:
    """Called in a probe: print facts at once, so that they are known even if what follows kills it."""
    print(MARK + json.dumps(facts, default=str), flush=True)


def output(command: list[str], timeout: float = 20.0) -> tuple[int | None, str]:
    """Exit code (None: it hung, 127: not there) and everything that a program of the system printed."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout
