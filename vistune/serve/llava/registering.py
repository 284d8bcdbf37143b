"""This server as a worker of a LLaVA controller somewhere: it registers, and says every so often that it is there.

Knows nothing of what it serves but its names and how much it has to do.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx

from vistune import console
from vistune.serve.door.options import Options, address
from vistune.serve.llava.status import Status

BEAT = 15.0
"""Seconds between two (WORKER_HEART_BEAT_INTERVAL); a controller forgets who is silent for 30."""
AGAIN = 5.0
"""Seconds before what failed is tried again."""
ANSWER = 5.0


def register(options: Options, place: socket.socket, status: Callable[[], Status]) -> None:
    """Begin, where the options name a controller; it goes on until the process ends. `place`: where this server
    listens."""
    if options.llava_controller:
        if options.keys:
            console.warn("LLaVA's controllers and clients send no key: they will be refused here")
        Registering(options.llava_controller, options.llava_address or address(options, place), status).start()


class Registering:
    """A thread. `controller` and `address` (ours, as clients and the controller reach it) are URLs."""

    def __init__(
        self, controller: str, address: str, status: Callable[[], Status], beat: float = BEAT, again: float = AGAIN
    ):
        self.controller, self.address = controller.rstrip("/"), address.rstrip("/")
        self._status, self._beat, self._again = status, beat, again
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registering", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The protocol has no farewell: the controller forgets us."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER)

    def _run(self) -> None:
        known, lost = False, False
        with httpx.Client(trust_env=False, timeout=ANSWER) as client:
            while not self._ending.is_set():
                try:
                    known = self._said(client) if known else self._registered(client)
                    if lost:
                        console.warn(f"the controller at {self.controller} answers again")
                    lost, pause = False, self._beat if known else 0.0
                except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                    if not lost:
                        console.warn(f"the controller at {self.controller} does not answer: {type(error).__name__}")
                    lost, pause = True, self._again
                self._ending.wait(pause)

    def _registered(self, client: httpx.Client) -> bool:
        said = {"worker_name": self.address, "check_heart_beat": True, "worker_status": self._status().body()}
        self._post(client, "/register_worker", said).raise_for_status()
        return True

    def _said(self, client: httpx.Client) -> bool:
        """Whether the controller still knows us; one that was started again does not."""
        said = {"worker_name": self.address, "queue_length": self._status().queue_length}
        return bool(self._post(client, "/receive_heart_beat", said).raise_for_status().json()["exist"])

    def _post(self, client: httpx.Client, path: str, said: dict[str, Any]) -> httpx.Response:
        return client.post(self.controller + path, json=said)
