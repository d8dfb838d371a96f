"""How much may be on its way to this node at once, and who comes next when that is not enough. Pure.

Requests take turns, one piece each (round robin), so that a request for a long prefix does not hold up those for short
ones that came after it. What is brought ahead of need (*background*) gets room only while nobody else waits, and never
more than its share.

Not thread-safe. Callbacks come from inside the calls; they only take note.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

BACKGROUND_SHARE: Final = 0.25


class Admission:
    """The budget of one agent.

    Args:
        limit_bytes: in flight at once. A single piece that is larger is let in when nothing else is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used = 0
        self._background_used = 0
        self._waiting: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._background_waiting: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        """What is let in now."""
        return self._used

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting) + len(self._background_waiting)

    def take(self, who: Hashable, size: int, on_room: Callable[[], None], *, background: bool = False) -> bool:
        """Let a piece in: True, and :meth:`give_back` follows. Else ``who`` waits in line, and ``on_room`` is called
        when it may be its turn to ask again, until it has been let in or calls :meth:`leave`."""
        queue = self._background_waiting if background else self._waiting
        first = next(iter(queue), who) == who
        if first and self._fits(size, background) and not (background and self._waiting):
            queue.pop(who, None)
            self._used += size
            self._background_used += size if background else 0
            self._call()
            return True
        queue.setdefault(who, on_room)
        return False

    def give_back(self, size: int, *, background: bool = False) -> None:
        """So many bytes are on their way no more."""
        self._used -= size
        self._background_used -= size if background else 0
        self._call()

    def leave(self, who: Hashable) -> None:
        """It does not wait any more, if it did."""
        waited = self._waiting.pop(who, None) or self._background_waiting.pop(who, None)
        if waited is not None:
            self._call()

    def _fits(self, size: int, background: bool) -> bool:
        if background and self._background_used and self._background_used + size > BACKGROUND_SHARE * self.limit_bytes:
            return False
        return self._used == 0 or self._used + size <= self.limit_bytes

    def _call(self) -> None:
        """The first in line may try."""
        queue = self._waiting or self._background_waiting
        if queue:
            next(iter(queue.values()))()
