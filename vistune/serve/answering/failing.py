"""What goes wrong while requests are answered, as their askers hear it and as the log has it.

Knows nothing of what was computed.
"""

from __future__ import annotations

import traceback

import torch

from vistune import console
from vistune.serve.answering.lane import Ticket
from vistune.serve.refused import Refused
from vistune.serve.work import Ended, Piece


def explained(error: Exception) -> Refused:
    """For those whom it concerns; the log gets all of it. Neither has anything of a request."""
    console.warn("".join(traceback.format_exception(error)))
    return Refused(500, f"the model failed: {type(error).__name__}: {error}"[:500], code="engine_error")


def no_memory() -> Refused:
    return Refused(503, "the memory does not hold this answer now", code="out_of_memory", retry_after=1.0)


def free_memory() -> None:
    """What the device's allocator holds for later is there for everything again."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def told(ticket: Ticket, said: Piece | Ended) -> None:
    """Tell its asker; one who cannot hear has gone."""
    try:
        ticket.hear(said)
    except Exception as error:  # noqa: BLE001 - whatever an asker does, the others are answered
        console.warn(f"an asker could not hear its answer: {type(error).__name__}")
        ticket.leave()
