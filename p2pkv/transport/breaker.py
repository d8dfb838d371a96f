"""Whether a peer is asked at all: a circuit breaker per peer (Nygard, "Release It!", 2007). Pure.

* closed: it is asked.
* open: it is not, until a pause is over that doubles each time, or until it has been heard from by other means.
* half-open: one request may find out how it is. If that goes well the breaker closes; else it opens for longer.

A process that stands still and a cable that is cut look the same: silence. It opens the breaker at once, so that both
cost their callers one deadline, once.

``now`` is in seconds, monotonic. Not thread-safe.
"""

from __future__ import annotations

import enum
import random
from typing import Final

NODES_MAX: Final = 8_192
PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
JITTER: Final = 0.25
"""Of each pause, either way: nodes that lost the same peer together do not come back to it together."""
PROBE_S: Final = 10.0
"""After so long without a word of it, a probe counts as lost: whoever made it may have been stopped."""


class Fault(enum.Enum):
    """What a peer did wrong. The value: how many of these in a row open its breaker."""

    SILENT = 1  # nothing at all within its time
    FAILED = 3  # refused, closed, broke off
    WRONG = 4  # nothing but bytes that failed their checksums


class State(enum.Enum):
    """Of one breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class _Breaker:
    __slots__ = ("faults", "opened", "probing_since", "times", "until")

    def __init__(self) -> None:
        self.faults: dict[Fault, int] = {}
        self.times = 0  # opened in a row
        self.opened = 0.0
        self.until: float | None = None  # None: closed
        self.probing_since: float | None = None


class Breakers:
    """The breakers of one agent.

    Args:
        rng: for the jitter; seeded in tests.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._breakers: dict[int, _Breaker] = {}  # those that are not as new

    def state(self, node: int, now: float) -> State:
        """How it stands with a peer."""
        breaker = self._breakers.get(node)
        if breaker is None or breaker.until is None:
            return State.CLOSED
        return State.HALF_OPEN if now >= breaker.until else State.OPEN

    def allows(self, node: int, now: float) -> bool:
        """Whether the peer may be asked; of one that is half-open, the next request alone, which is the probe.

        Call this only when the request will be made, and :meth:`good` or :meth:`bad` when it has ended.
        """
        breaker = self._breakers.get(node)
        if breaker is None or breaker.until is None:
            return True
        if now < breaker.until:
            return False
        if breaker.probing_since is not None and now - breaker.probing_since < PROBE_S:
            return False
        breaker.probing_since = now
        return True

    def good(self, node: int) -> None:
        """The peer gave what it was asked for."""
        self._breakers.pop(node, None)

    def bad(self, node: int, fault: Fault, now: float) -> bool:
        """It did not. Returns whether its breaker has opened by that."""
        breaker = self._breakers.get(node)
        if breaker is None:
            if len(self._breakers) >= NODES_MAX:
                self._breakers.pop(next(iter(self._breakers)))
            breaker = self._breakers[node] = _Breaker()
        breaker.faults[fault] = breaker.faults.get(fault, 0) + 1
        probe_failed = breaker.probing_since is not None
        breaker.probing_since = None
        if breaker.until is not None and not probe_failed:
            return False  # it was open already: a request from before that
        if not probe_failed and breaker.faults[fault] < fault.value:
            return False
        pause_s = min(PAUSE_MAX_S, PAUSE_S * 2.0**breaker.times)
        breaker.times += 1
        breaker.opened = now
        breaker.until = now + pause_s * (1.0 + JITTER * (2.0 * self._rng.random() - 1.0))
        return True

    def heard(self, node: int, at: float) -> None:
        """The peer was heard from by other means: it is worth a probe, if that was after its breaker opened. Once: who
        is heard but does not answer has another trouble, and keeps to its pauses."""
        breaker = self._breakers.get(node)
        if breaker is not None and breaker.until is not None and breaker.times == 1 and at > breaker.opened:
            breaker.until = min(breaker.until, at)

    def forget(self, node: int) -> None:
        """The node has gone, or another life of it has come."""
        self._breakers.pop(node, None)
