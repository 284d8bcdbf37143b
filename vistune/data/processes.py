"""How worker processes are started: by fork where the system can, since that copies nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from multiprocessing.context import BaseContext


def context() -> BaseContext:
    """`fork` if there is one, else `spawn`. Set VISTUNE_WORKERS=spawn where forking is not safe."""
    # Tokenizers warn on every fork unless told that threads of theirs are not wanted; workers are the threads here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wanted = os.environ.get("VISTUNE_WORKERS", "fork")
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(wanted if wanted in methods else "spawn")


def leave_with_parent() -> None:
    """Called in a worker: it ends soon after its parent, even one that was killed and could not say so; and what its
    parent had is not collected here."""
    # A process group among the parent's garbage would be ended by joining threads that did not come along: it may wait
    # for ever. Untouched, memory also stays shared.
    gc.freeze()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="leave with parent", daemon=True).start()
