"""How a server is reached: its options, the guard that they make, its socket, its address.

Knows nothing of models, and what it imports neither: a process that passes requests on begins in no time.
"""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass

from vistune.serve.door import hosts
from vistune.serve.door.exchange import App
from vistune.serve.door.guard import Guard
from vistune.serve.door.keys import Keys
from vistune.serve.door.lines import Lines
from vistune.serve.door.listening import on_file, on_port
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server is reached, and what it shows beside the interface. Nothing here costs memory or time."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str = ""
    """A Unix socket instead of host and port; only this user may connect to it."""
    keys: tuple[str, ...] = ()
    new_key: str = ""
    """The one of `keys` that was made for this start, and is shown."""
    root_path: str = ""
    """The prefix under which a proxy shows this server."""
    behind_proxy: bool = False
    """X-Forwarded-Host is a proxy's word and may be trusted; so it is with `root_path`."""
    allow_hosts: tuple[str, ...] = ()
    """Names beside the loopback's under which the server may be asked without a key, and pages of which may ask."""
    page: bool = True
    votes: str = ""
    """A JSON-lines file; without it there is no voting."""
    log: bool = True
    """A line for every request."""
    llava: bool = False
    """Speak LLaVA's controller and worker protocol too."""
    llava_controller: str = ""
    """A LLaVA controller elsewhere, with which this server registers as a worker."""
    llava_address: str = ""
    """Where clients of that protocol, and that controller, find this server; empty: where it is asked."""
    llava_allow: tuple[str, ...] = ()
    """Hosts beside the loopback from which other workers may register here."""
    llava_dispatch: str = "shortest_queue"
    """Or lottery: how one of several workers of a model is chosen."""

    def __post_init__(self) -> None:
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise ValueError(
                f"--root-path {self.root_path}: it begins with / and does not end with one, such as /lab/x"
            )
        for name in ("llava_controller", "llava_address"):
            if (url := getattr(self, name)) and not url.startswith(("http://", "https://")):
                option = {"llava_address": "llava-worker-address"}.get(name, name.replace("_", "-"))
                raise ValueError(f"--{option} {url}: an address such as http://localhost:10000 is needed")
        if self.llava_dispatch not in (known := ("shortest_queue", "lottery")):
            raise ValueError(f"--llava-dispatch {self.llava_dispatch}: one of {', '.join(known)}")
        if not (self.keys or self.uds or hosts.loopback(self.host)):
            raise ValueError(
                f"--host {self.host}: everybody who reaches this machine could ask. Add --api-key new, which makes a "
                "key and prints it (or --api-key-file FILE), or stay on 127.0.0.1 and come through ssh -L"
            )


def guarded(app: App, limits: Limits, options: Options, metrics: Metrics | None = None) -> Guard:
    """An application with everything around it that the options ask for."""
    return Guard(
        app,
        limits,
        metrics or Metrics(),
        keys=Keys(options.keys),
        names=options.allow_hosts,
        root=options.root_path,
        behind=options.behind_proxy,
        anywhere=bool(options.uds),
        say=Lines() if options.log else None,
    )


def bound(options: Options) -> socket.socket:
    """The socket that the options name. ValueError."""
    return on_file(options.uds) if options.uds else on_port(options.host, options.port)


def address(options: Options, place: socket.socket) -> str:
    """Where the server is asked from this machine, without a slash at the end."""
    if options.uds:
        return f"unix:{options.uds}:"
    host, port = place.getsockname()[:2]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}{options.root_path}"


def reached(options: Options, place: socket.socket) -> list[str]:
    """What to do next, line by line: addresses, the key, and how to come from another machine."""
    at = address(options, place)
    lines = [f"  page  {at}/"] if options.page else []
    lines += [f"  api   {at}/v1", f"  key   {_key(options)}"]
    if not options.uds and hosts.loopback(options.host):
        port = place.getsockname()[1]
        far = f"ssh -N -L {port}:127.0.0.1:{port} {_who()}@{socket.gethostname()}"
        lines.append(f"  from your own machine: {far}, then http://127.0.0.1:{port}{options.root_path}/")
    return lines


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "USER"


def _key(options: Options) -> str:
    if options.new_key:
        return f"{options.new_key} (a browser asks for it as a password, with any user name)"
    if options.keys:
        return "as you gave it (a browser asks for it as a password, with any user name)"
    return "none is needed: whoever uses this machine can ask"
