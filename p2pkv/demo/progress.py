"""Saying what goes on, and that it still goes on when it takes long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

Progress = Callable[[str], None]
"""Takes one line. May be called from another thread than the one that works."""

EVERY_S: Final = 10.0


@contextlib.contextmanager
def working(progress: Progress, what: str) -> Iterator[None]:
    """Name a step, and say every ten seconds how long it has been going on."""
    started = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        while not over.wait(EVERY_S):
            progress(f"  {what} ... {time.monotonic() - started:.0f} s")

    progress(what)
    heart = threading.Thread(target=beat, name="progress", daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
