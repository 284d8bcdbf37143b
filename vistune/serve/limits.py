"""What a server allows: how much at once, how large, how long. Every number can be set when it is started.

Knows nothing of models and requests.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_PREFIXES = 0.9
"""The rest is for the answers themselves."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds, bytes, pixels and tokens. ValueError for a number that cannot be."""

    rows: int = 32
    """Requests of a model that are answered at once."""
    kv_bytes: int = 0
    """Memory of a model's keys and values, all rows together; 0: what is free decides."""
    prefixes: float = 0.125
    """Share of that memory in which read prompts and answers are remembered, for requests that begin alike."""
    context: int = 0
    """Tokens of a prompt with its answer; 0: as many as the model was made for."""
    prefill_ms: float = 100.0
    """For so long at most, but for the smallest piece that can be read, running answers wait while others are read."""
    pictures_held: int = 1 << 29
    """Bytes of encoded pictures that are remembered, for requests about the same ones."""
    queue: int = 128
    """Requests that wait for a row; more are told to come again (429)."""
    waiting_bytes: int = 2 << 30
    """Bytes of bodies and decoded pictures of requests that no model has read yet; more are told to come again."""
    connections: int = 1024
    deadline: float = 300.0
    """Seconds from a request's arrival to the end of its answer."""
    stall: float = 30.0
    """Seconds that a client may take to send the next bytes of its body, or to take the next ones of its answer."""
    drain: float = 30.0
    """Seconds that answers have to end after SIGTERM."""
    body: int = 32 << 20
    messages: int = 256
    pictures: int = 16
    """Pictures of a conversation, all turns together."""
    picture_bytes: int = 20 << 20
    picture_pixels: int = 40_000_000
    new_tokens: int = 4096
    """The most that a request may ask for."""
    new_tokens_unasked: int = 1024
    """What a request gets that does not say, or what its context leaves."""
    hosts: tuple[str, ...] = ()
    """Hosts from which pictures are fetched, over https alone; none: pictures come inside requests."""
    fetch: float = 10.0
    """Seconds that fetching all pictures of a request may take."""
    redirects: int = 3

    def __post_init__(self) -> None:
        may_be_nothing = {"kv_bytes", "prefixes", "context", "pictures_held", "queue", "redirects"}
        for name, value in vars(self).items():
            if name != "hosts" and value < (0 if name in may_be_nothing else 1e-9):
                needed = "0 or more" if name in may_be_nothing else "more than 0"
                raise ValueError(f"--{name.replace('_', '-')} {value}: {needed} is needed")
        if not self.prefixes <= MOST_PREFIXES:  # nor what is no number
            raise ValueError(f"--prefixes {self.prefixes}: a share of at most {MOST_PREFIXES} is needed")
