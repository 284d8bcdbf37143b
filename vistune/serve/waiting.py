"""What a server says while its models are read, to those who would go away for good: people, and LLaVA's workers."""

from __future__ import annotations

from collections.abc import Callable

from vistune.serve.door.exchange import App
from vistune.serve.door.options import Options
from vistune.serve.llava.opening import patient
from vistune.serve.page.opening import meanwhile


def waiting(app: App, options: Options, reading: Callable[[], bool] = lambda: True) -> App:
    """`app`, which answers everybody else, and these too once nothing is `reading()` any more."""
    if options.page:
        app = meanwhile(app, reading)
    if options.llava or options.llava_controller:
        app = patient(app, reading)
    return app
