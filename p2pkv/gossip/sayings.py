"""What is said in the log about others, so seldom that strangers cannot fill it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

SAY_AGAIN_S: Final = 30.0
SAYINGS_MAX: Final = 1_024

log = logging.getLogger("p2pkv.gossip")


class Sayings:
    """Each thing at most once per whom and half minute.

    Args:
        clock: in seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[tuple[str, str], float] = {}

    def say(self, what: str, whom: str, text: str, level: int) -> None:
        """Log ``text``, unless the same was said of them just now."""
        now = self._clock()
        if now - self._said.get((what, whom), float("-inf")) < SAY_AGAIN_S:
            return
        if len(self._said) >= SAYINGS_MAX:
            self._said.clear()
        self._said[what, whom] = now
        log.log(level, "%s", text)
