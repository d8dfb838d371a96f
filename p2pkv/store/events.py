"""Changes of ownership that wait for the ownership log: in order, and bounded. Pure."""

from __future__ import annotations

from typing import Final

from p2pkv.types import Tier

COMPACT_AT: Final = 65_536
"""Events that may wait before those that cancel out are dropped; at 2,500 changes/s that is 26 s of a stuck reader."""


class OwnershipEvents:
    """A queue of (index key, tier the block is in now), oldest first.

    Bounded without losing what matters: when it is long, only the last event of each key is kept, and none of a key
    that came and went, or went and came. What remains is at most one event per block in the store and per block that
    the reader knows of.
    """

    __slots__ = ("_compact_at", "_events")

    def __init__(self) -> None:
        self._events: list[tuple[int, Tier]] = []
        self._compact_at = COMPACT_AT

    def __len__(self) -> int:
        return len(self._events)

    def add(self, key: int, tier: Tier) -> None:
        """The block with this index key is in this tier from now on, or GONE."""
        self._events.append((key, tier))
        if len(self._events) > self._compact_at:
            self._compact()

    def take(self) -> list[tuple[int, Tier]]:
        """All waiting events, which no longer wait."""
        events = self._events
        self._events = []
        self._compact_at = COMPACT_AT
        return events

    def _compact(self) -> None:
        first: dict[int, Tier] = {}
        last: dict[int, Tier] = {}
        for key, tier in self._events:
            first.setdefault(key, tier)
            last.pop(key, None)  # so that the order is that of the last events
            last[key] = tier
        # One tier, so a key's events alternate: if first and last differ, the reader already believes the last.
        self._events = [(key, tier) for key, tier in last.items() if tier is first[key]]
        self._compact_at = max(COMPACT_AT, 2 * len(self._events))
