"""Asks a server for /health again and again on a connection of its own, and prints when, how long it took, what came.

    python benchmarks/serve_probe.py PORT SECONDS_BETWEEN

A process of its own, so that what loads the server does not slow its watch down. Standard library only.
"""

from __future__ import annotations

import http.client
import sys
import time


def main(port: int, every: float) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    due = time.time()
    while True:
        began, status = time.perf_counter(), 0
        try:
            connection.request("GET", "/health")
            with connection.getresponse() as reply:
                reply.read()
                status = reply.status
        except (OSError, http.client.HTTPException):
            connection.close()  # opened again by the next request
        print(f"{time.time():.3f} {time.perf_counter() - began:.6f} {status}", flush=True)
        due = max(due + every, time.time())
        time.sleep(max(due - time.time(), 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
