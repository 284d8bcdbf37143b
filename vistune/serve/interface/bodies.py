"""How many values a body in JSON has, known before it is parsed.

Knows nothing of what they are for.
"""

from __future__ import annotations

from vistune.serve.refused import Refused

QUOTES, VALUES = 100_000, 10_000
"""Of these a body has no more. Pictures and books are few long strings; millions of short ones take a parser a minute,
and it lets no other thread work meanwhile."""


def check_count(body: bytes) -> None:
    """Look for the commas and brackets of a JSON text, between its strings. Refused: 400, when they are too many."""
    values, inside = 0, False
    if body.count(b'"') <= QUOTES:
        for piece in body.split(b'"'):
            if not inside:
                values = _counted(piece, values)
            if not (inside and piece.endswith(b"\\") and _odd(piece)):  # else the quote belongs to the string
                inside = not inside
            if values > VALUES:
                break
        else:
            return
    raise Refused(400, f"more than {VALUES:,} values, or {QUOTES:,} quotes, in one request", code="too_many_values")


def _counted(piece: bytes, values: int) -> int:
    """How many there are with those of `piece`, which is not looked through to its end when they are too many."""
    for start in range(0, len(piece), 1 << 16):
        values += sum(piece.count(sign, start, start + (1 << 16)) for sign in (b",", b"[", b"{"))
        if values > VALUES:
            break
    return values


def _odd(piece: bytes) -> bool:
    return (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
