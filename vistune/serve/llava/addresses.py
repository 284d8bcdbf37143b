"""Which addresses may be registered as workers: those that clients are sent to, and that this server asks by itself.

Pure functions of strings. Knows nothing of who registers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from vistune.serve.refused import Refused

LONGEST = 300


def worker_address(said: object, hosts: Sequence[str], param: str = "worker_name") -> str:
    """`http://host:port` or with a path, without a slash at its end. `hosts`: beside the loopback. Refused: 400
    for what is no address, 403 where its host is not among those."""
    text = said if isinstance(said, str) else ""
    try:
        found = urlsplit(text)
        host, _ = (found.hostname or "").lower(), found.port
    except ValueError:
        host = ""
    plain = re.fullmatch(r"https?://[A-Za-z0-9.\-_~:\[\]/%]+", text) and len(text) <= LONGEST
    if not (plain and host) or "@" in found.netloc:
        raise Refused(400, "an address such as http://localhost:40000 is needed", param=param, code="invalid_address")
    if not (_loopback(host) or host in {one.lower().strip("[]") for one in hosts}):
        said = f"workers of this host are not taken here: start the server with --llava-allow {host}"
        raise Refused(403, said, param=param, code="foreign_worker")
    return text.rstrip("/")


def _loopback(host: str) -> bool:
    """A name other than localhost is not taken for it: what it resolves to may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
