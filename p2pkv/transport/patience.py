"""How long to wait for a peer's first byte before it counts as dead. Pure.

A process that is killed keeps its sockets open until its memory has been taken down: 0.2 s for each GiB of arena,
during which it looks alive to TCP. An owner that lives answers in well under a millisecond. So the wait is a multiple
of the slowest recent answer, with a floor that a loaded but living peer stays under, and a ceiling for peers that are
unknown.
"""

from __future__ import annotations

from typing import Final

FLOOR_S: Final = 0.08
FACTOR: Final = 4.0
"""Times the recent maximum: an answer that takes so much longer than any before is not coming."""
FORGET: Final = 0.95
"""Per answer: one slow answer is remembered for about 50."""
NODES_MAX: Final = 4096


class Patience:
    """One estimate per node.

    Args:
        ceiling_s: for nodes that have not answered yet, and the most for any.
    """

    def __init__(self, ceiling_s: float) -> None:
        self._ceiling_s = ceiling_s
        self._slowest: dict[int, float] = {}

    def of(self, node: int) -> float:
        """Seconds to wait for the node's first byte."""
        slowest = self._slowest.get(node)
        if slowest is None:
            return self._ceiling_s
        return min(self._ceiling_s, max(FLOOR_S, FACTOR * slowest))

    def slowest(self, node: int) -> float:
        """The slowest recent answer that is remembered; 0 if there is none."""
        return self._slowest.get(node, 0.0)

    def learn(self, node: int, waited_s: float) -> None:
        """The node's first byte came after this long; 0 = it did not come, which says nothing."""
        if waited_s <= 0:
            return
        if node not in self._slowest and len(self._slowest) >= NODES_MAX:
            self._slowest.pop(next(iter(self._slowest)))
        self._slowest[node] = max(waited_s, self._slowest.get(node, 0.0) * FORGET)

    def forget(self, node: int) -> None:
        """The node has gone; when it is back it may be slower."""
        self._slowest.pop(node, None)
