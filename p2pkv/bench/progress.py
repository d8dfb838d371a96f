"""Where a long run stands, on standard error: standard output is the report's."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

EVERY_S: Final = 5.0
"""Lines of a log; on a terminal one line is rewritten ten times a second instead."""
EVERY_TERMINAL_S: Final = 0.1


class Progress:
    """Says what is being done, how far, and how long it took. Not thread-safe."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._terminal = self._out.isatty()
        self._said_at = time.monotonic()
        self._open_line = False

    def say(self, text: str) -> None:
        """A line that stays."""
        self._break_line()
        print(text, file=self._out, flush=True)

    def step(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total``; shown now and then, and gone when all is done."""
        now = time.monotonic()
        if done >= total:
            self._break_line()
            return
        if now - self._said_at < (EVERY_TERMINAL_S if self._terminal else EVERY_S):
            return
        self._said_at = now
        text = f"{what}: {done} of {total}"
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=self._out, flush=True)
            self._open_line = True
        else:
            print(text, file=self._out, flush=True)

    def _break_line(self) -> None:
        if self._open_line:
            print("\r\033[K", end="", file=self._out, flush=True)
            self._open_line = False
