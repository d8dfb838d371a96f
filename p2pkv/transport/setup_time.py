"""How long it takes until a node that we are not connected to can be asked. Pure.

One estimate for all nodes: what it depends on most, the kind of transport and this host, they share.
"""

from __future__ import annotations

from typing import Final

WEIGHT: Final = 0.3
"""Of one connection in the mean."""


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
        self.expected_s += WEIGHT * (took_s - self.expected_s)
