"""The store's words: what a block is, which states it goes through, what a pin answers, what limits leases.

A block's place in the arena goes through these states, one :class:`Block` object per occupancy:

==========  =========================================  ============================================================
state       meaning                                    leaves it by
==========  =========================================  ============================================================
WRITING     reserved; its writer may touch the bytes   commit -> LIVE, abort -> FREE, quarantine -> PARKED
LIVE        written once, listed, can be pinned        evict or delete unpinned -> FREE, delete pinned -> UNLISTED
UNLISTED    deleted while leases still hold it         end of the last lease -> FREE
PARKED      given up, but bytes may still land in it   clear_quarantine -> FREE
FREE        over: the slot may belong to another block never
==========  =========================================  ============================================================

:class:`Block` is the C++ core's: owned by the store, read-only, compared and hashed by identity. What is read through
its ``offset`` counts only under a lease. See ``p2pkv/_native.pyi`` for its attributes.

Values only: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import enum
from typing import Generic, TypeAlias, TypeVar

import msgspec

from p2pkv._native import Block
from p2pkv.errors import InvalidArgument

__all__ = ["Block", "BlockState", "LeaseLimits", "Pinned", "Reservation", "StoreStats"]


class BlockState(enum.IntEnum):
    """Where in its life a block is; see the table above."""

    FREE = 0
    WRITING = 1
    LIVE = 2
    UNLISTED = 3
    PARKED = 4


Reservation: TypeAlias = Block
"""A block in state WRITING, in the hands of the one caller that may write its bytes.

That caller must commit, abort or quarantine it, once. ``commit`` returns the same object: one per occupancy.
"""


B = TypeVar("B")


class Pinned(msgspec.Struct, Generic[B], frozen=True):
    """Answer to a pin.

    Attributes:
        lease_id: to be given to ``release``; 0 when nothing was pinned.
        ttl_s: how long the lease holds, in seconds: what was asked, clamped to the store's limits.
        expires_at: end of the lease on the owner's clock.
        blocks: one entry per asked key, ``None`` for a miss.
        considered: keys from this position on were not looked at, because the holder's (or the store's) budget of
            pinned bytes or leases was spent: they are BUSY, not missing. Equal to ``len(blocks)`` normally.
    """

    lease_id: int
    ttl_s: float
    expires_at: float
    blocks: list[B | None]
    considered: int


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """The store in figures; counters grow from the start of the process. Sizes in bytes."""

    capacity_bytes: int
    free_bytes: int  # extents that belong to no layout, and free slots of those that do
    live_bytes: int
    pinned_bytes: int  # each block once, however many leases hold it
    quarantined_bytes: int
    namespaces: int
    blocks_live: int
    blocks_writing: int
    blocks_unlisted: int
    blocks_quarantined: int
    leases: int
    commits_total: int
    aborts_total: int
    evictions_total: int
    extents_reclaimed_total: int  # extents taken from one layout for another
    quarantines_total: int
    leases_expired_total: int
    no_space_total: int


class LeaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what readers may hold.

    Attributes:
        ttl_min_s: shorter asks are lengthened to this: a lease that ends before its answer arrives helps nobody.
        ttl_max_s: longer asks are shortened to this. A reader that died holds its slots for so long at worst.
        leases_max: leases of all holders together.
        leases_per_holder_max: leases of one holder.
        bytes_per_holder_max: bytes under lease by one holder; a block counts once per lease and mention.
    """

    ttl_min_s: float = 0.05
    ttl_max_s: float = 30.0
    leases_max: int = 65_536
    leases_per_holder_max: int = 4_096
    bytes_per_holder_max: int = 1 << 62

    def check(self) -> None:
        """Raise InvalidArgument when the limits contradict themselves."""
        if not 0 < self.ttl_min_s <= self.ttl_max_s:
            raise InvalidArgument("lease ttl limits must satisfy 0 < min <= max", limits=self)
        if min(self.leases_max, self.leases_per_holder_max, self.bytes_per_holder_max) < 1:
            raise InvalidArgument("lease limits must be positive", limits=self)
