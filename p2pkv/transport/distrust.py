"""Blocks that a peer has and that are not asked of it for a while, because what it sent failed the checksum. Pure.

The owner is told and looks for itself (docs/protocol.md, SUSPECT): a block that has gone bad in its memory is dropped
there, and the whole cell hears of it; one that is good was spoilt on the way, and is asked for again.

``now`` is in seconds, monotonic. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

TTL_S: Final = 60.0
BLOCKS_MAX: Final = 4_096


class Distrust:
    """One per agent."""

    def __init__(self) -> None:
        self._nodes: Counter[tuple[int, bytes]] = Counter()  # that are not asked for this block
        self._until: OrderedDict[tuple[int, int, bytes], float] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._until)

    def add(self, node: int, namespace: int, key: bytes, now: float) -> tuple[int, int, bytes] | None:
        """The node sent something else under this name. Returns what was forgotten for it, the oldest, if there was no
        room."""
        self.lift(node, namespace, key)
        oldest = next(iter(self._until)) if len(self._until) >= BLOCKS_MAX else None
        if oldest is not None:
            self.lift(*oldest)
        self._until[node, namespace, key] = now + TTL_S
        self._nodes[namespace, key] += 1
        return oldest

    def has(self, node: int, namespace: int, key: bytes) -> bool:
        """Whether the node is not to be asked for this block."""
        return (node, namespace, key) in self._until

    def anybody(self, namespace: int, key: bytes) -> bool:
        """Whether some node is not to be asked for this block."""
        return (namespace, key) in self._nodes

    def lift(self, node: int, namespace: int, key: bytes) -> None:
        """The owner has looked: its block is good. Nothing happens if it was not distrusted."""
        if self._until.pop((node, namespace, key), None) is None:
            return
        self._nodes[namespace, key] -= 1
        if not self._nodes[namespace, key]:
            del self._nodes[namespace, key]

    def expire(self, now: float) -> list[tuple[int, int, bytes]]:
        """Forget what is old; returns it."""
        gone = []
        while self._until and next(iter(self._until.values())) <= now:
            gone.append(next(iter(self._until)))
            self.lift(*gone[-1])
        return gone
