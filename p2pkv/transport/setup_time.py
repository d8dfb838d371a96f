"""How long it takes until a node that we are not connected to can be asked. Pure.

One estimate for all nodes: what it depends on most, the kind of transport and this host, they share.
"""

from __future__ import annotations

from typing import Final

WEIGHT: Final = 0.3
"""Of one connection in the mean."""
SURPRISE_MAX: Final = 8.0
"""One connection counts as at most so many times slower than was expected: this process may have stood still meanwhile,
and an hour in the mean would keep it from every node that it does not know yet."""


class SetupTime:
    """A moving mean.

    Args:
        expected_s: before there was any connection.
    """

    def __init__(self, expected_s: float) -> None:
        self.expected_s = expected_s
        """Seconds, of the next one."""

    def learn(self, took_s: float) -> None:
        """A connection was there after so long."""
        self.expected_s += WEIGHT * (min(took_s, SURPRISE_MAX * self.expected_s) - self.expected_s)
