"""Leases: "these blocks stay where they are until released or T seconds pass". Pure bookkeeping.

Rules:

1. A lease is in force while ``now < expires_at``; the owner counts from when it answers (the reader, on its own
   clock, from before it asked, so the reader never believes in a lease that the owner has ended).
2. Every lease ends exactly once, by ``release``, ``release_holder`` or ``expire``; ``on_end`` is called then. It is
   the only place from which pins are taken off blocks.
3. ``release`` says True only if the lease was in force all along. Unknown, ended and expired leases say False.
4. Leases, leases per holder and bytes per holder are bounded: ``room`` says what a holder may still pin.

The table never looks into a block.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from p2pkv.errors import Busy
from p2pkv.store.base import LeaseLimits
from p2pkv.types import mix64

T = TypeVar("T")

COMPACT_SLACK: Final = 64
"""Released leases leave their entry in the expiry heap until it is due or more than half of the heap is such entries;
the slack keeps small tables from rebuilding theirs all the time."""


class RandomBits(Protocol):
    """Where lease ids come from: ``random.SystemRandom()`` in an agent, ``random.Random(seed)`` in a simulation."""

    def getrandbits(self, k: int, /) -> int:
        """A random integer of ``k`` bits."""
        ...


class CountedBits:
    """No randomness: distinct 64-bit numbers that anybody can compute. For tests, and where nobody is malicious."""

    __slots__ = ("_count",)

    def __init__(self, seed: int = 0) -> None:
        self._count = seed

    def getrandbits(self, k: int, /) -> int:
        self._count += 1
        return mix64(self._count) >> (64 - k)


class Lease(msgspec.Struct, Generic[T], frozen=True):
    """One lease. ``blocks`` has one entry per pin; ``length`` is their bytes."""

    lease_id: int
    holder: Hashable
    blocks: list[T]
    length: int
    expires_at: float


class _Holder:
    """What one holder has: its leases and their bytes. Exists only while it has any."""

    __slots__ = ("lease_ids", "length")

    def __init__(self) -> None:
        self.lease_ids: dict[int, None] = {}  # the oldest first
        self.length = 0


class LeaseTable(Generic[T]):
    """All leases in force, by id, by holder and by expiry. One thread.

    Args:
        limits: see :class:`LeaseLimits`.
        rng: where ids come from, 64 bits each, never 0. What keeps a reader from ending another's lease is the
            ``holder`` of ``release``; where callers do not name it, ids must be impossible to guess.
        on_end: called once with every lease that ends, after it has left the table. Must not call the table.
    """

    __slots__ = ("_due", "_holders", "_leases", "_limits", "_on_end", "_rng", "expired_total")

    def __init__(self, limits: LeaseLimits, rng: RandomBits, on_end: Callable[[Lease[T]], None]) -> None:
        limits.check()
        self._limits = limits
        self._rng = rng
        self._on_end = on_end
        self._leases: dict[int, Lease[T]] = {}
        self._due: list[tuple[float, int]] = []
        self._holders: dict[Hashable, _Holder] = {}
        self.expired_total = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def limits(self) -> LeaseLimits:
        """The bounds this table keeps."""
        return self._limits

    def room(self, holder: Hashable) -> int:
        """How many bytes this holder may pin with one more lease; 0 when it may have no further lease."""
        limits = self._limits
        if len(self._leases) >= limits.leases_max:
            return 0
        of = self._holders.get(holder)
        if of is None:
            return limits.bytes_per_holder_max
        if len(of.lease_ids) >= limits.leases_per_holder_max:
            return 0
        return max(0, limits.bytes_per_holder_max - of.length)

    def grant(self, holder: Hashable, blocks: list[T], length: int, ttl_s: float, now: float) -> Lease[T]:
        """Enter a lease of ``length`` bytes on blocks that the caller has pinned (the list is kept, not copied).

        Raises:
            Busy: the lease is over a limit; ask ``room`` first. Nothing was entered.
        """
        limits = self._limits
        of = self._holders.get(holder)
        if of is None:
            of = _Holder()
        if (
            of.length + length > limits.bytes_per_holder_max
            or len(of.lease_ids) >= limits.leases_per_holder_max
            or len(self._leases) >= limits.leases_max
        ):
            raise Busy("the holder's leases are at their limit", holder=holder, length=length)
        lease_id = self._rng.getrandbits(64)
        while lease_id == 0 or lease_id in self._leases:
            lease_id = self._rng.getrandbits(64)
        if ttl_s < limits.ttl_min_s:
            ttl_s = limits.ttl_min_s
        elif not ttl_s <= limits.ttl_max_s:  # NaN too
            ttl_s = limits.ttl_max_s
        expires_at = now + ttl_s
        lease = Lease(lease_id, holder, blocks, length, expires_at)
        self._leases[lease_id] = lease
        heapq.heappush(self._due, (expires_at, lease_id))
        self._holders[holder] = of
        of.lease_ids[lease_id] = None
        of.length += length
        return lease

    def release(self, lease_id: int, now: float, holder: Hashable | None = None) -> bool:
        """End a lease; True if it was in force all along, so that what was read under it was the pinned blocks.

        With ``holder`` given, a lease of somebody else is left alone and the answer is False.
        """
        lease = self._leases.get(lease_id)
        if lease is None or (holder is not None and lease.holder != holder):
            return False
        self._end(lease)
        if len(self._due) > 2 * len(self._leases) + COMPACT_SLACK:
            self._due = [(each.expires_at, each.lease_id) for each in self._leases.values()]
            heapq.heapify(self._due)
        return now < lease.expires_at

    def release_holder(self, holder: Hashable) -> int:
        """End every lease of a holder that is gone, the oldest first; how many there were."""
        of = self._holders.get(holder)
        lease_ids = [] if of is None else list(of.lease_ids)
        for lease_id in lease_ids:
            self.release(lease_id, 0.0)
        return len(lease_ids)

    def expire(self, now: float) -> list[Lease[T]]:
        """End the leases that are over at ``now``; returns them, the longest overdue first. O(1) when there is none."""
        due = self._due
        ended: list[Lease[T]] = []
        if not due or due[0][0] > now:
            return ended
        while due and due[0][0] <= now:
            lease = self._leases.get(heapq.heappop(due)[1])
            if lease is not None:
                self._end(lease)
                ended.append(lease)
        self.expired_total += len(ended)
        return ended

    def next_expiry(self) -> float | None:
        """No lease ends by itself before this time; None while there is nothing to wait for."""
        return self._due[0][0] if self._due else None

    def pins(self) -> list[T]:
        """Every pin in force, one entry each. For tests."""
        return [block for lease in self._leases.values() for block in lease.blocks]

    def _end(self, lease: Lease[T]) -> None:
        del self._leases[lease.lease_id]
        of = self._holders[lease.holder]
        del of.lease_ids[lease.lease_id]
        of.length -= lease.length
        if not of.lease_ids:
            del self._holders[lease.holder]
        self._on_end(lease)

    def check_integrity(self) -> None:
        """Raise AssertionError unless table, holders and heap agree. For tests."""
        by_holder: dict[Hashable, tuple[set[int], int]] = {}
        for lease in self._leases.values():
            ids, length = by_holder.get(lease.holder, (set(), 0))
            by_holder[lease.holder] = (ids | {lease.lease_id}, length + lease.length)
        if by_holder != {holder: (set(of.lease_ids), of.length) for holder, of in self._holders.items()}:
            raise AssertionError("holders do not add up to the leases")
        due = sorted((each.expires_at, each.lease_id) for each in self._leases.values())
        if due != sorted(entry for entry in self._due if entry[1] in self._leases):
            raise AssertionError("a lease would never expire, or at another time")
        if len(self._due) > 2 * len(self._leases) + COMPACT_SLACK + 1 + self.expired_total:
            raise AssertionError(f"{len(self._due)} expiry entries for {len(self._leases)} leases")
