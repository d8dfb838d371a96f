"""Which bytes of the arena reads that have ended may still write, for how long, and when that is too much.

Sans-IO: ``now`` is a parameter (seconds, monotonic). Entries are reads; their bytes are an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence


class Quarantine:
    """Bookkeeping with two bounds.

    Args:
        bytes_max: more than this at once is too much.
        age_max_s: a read held for longer than this is too much.
    """

    def __init__(self, bytes_max: int, age_max_s: float) -> None:
        self._bytes_max = bytes_max
        self._age_max_s = age_max_s
        self._held: dict[int, tuple[float, int]] = {}  # read id -> (since, bytes), oldest first
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def ids(self) -> frozenset[int]:
        """The reads that are held."""
        return frozenset(self._held)

    def hold(self, read_id: int, extents: Sequence[tuple[int, int]], now: float) -> None:
        """From now on these (offset, length) are not to be reused. A read is held once."""
        size = sum(length for _, length in extents)
        self._held[read_id] = (now, size)
        self.bytes += size

    def clear(self, read_id: int) -> bool:
        """Nothing of this read can be written any more; True when it was held."""
        held = self._held.pop(read_id, None)
        if held is None:
            return False
        self.bytes -= held[1]
        return True

    def excess(self, now: float) -> str:
        """Which bound is passed, in words; empty if none is."""
        if self.bytes > self._bytes_max:
            return f"{self.bytes} bytes in quarantine are more than {self._bytes_max}"
        due = self.due()
        if due is not None and now >= due:
            return f"bytes were in quarantine for more than {self._age_max_s} s"
        return ""

    def due(self) -> float | None:
        """When the oldest entry will be too old; None without entries."""
        if not self._held:
            return None
        return next(iter(self._held.values()))[0] + self._age_max_s
