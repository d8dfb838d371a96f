"""The store's words and contracts: what a block is, which states it goes through, and what an eviction policy promises.

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

Values and contracts only: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator

import msgspec


class BlockState(enum.IntEnum):
    """Where in its life a block is; see the table above."""

    FREE = 0
    WRITING = 1
    LIVE = 2
    UNLISTED = 3
    PARKED = 4


class Block(msgspec.Struct, gc=False, eq=False):
    """One occupancy of one slot, from reservation to reuse. Owned by the store: read it, never write it.

    What is read through ``offset`` counts only under a lease (or within the same turn of the event loop that looked
    it up). Compared and hashed by identity. Not tracked by the garbage collector, because a million of these would
    make its full collections stop the agent for tenths of a second; hence it must never refer to a container.

    Attributes:
        offset, length: where the block's bytes lie in the arena, in bytes.
        generation: differs between any two occupancies in one arena's life, so (offset, generation) names these bytes.
        checksum: xxh3_128 of the bytes, 16 bytes; empty until committed.
        pins: how many leases hold the block; a key named twice under one lease counts twice.
        used_at: when the block was last committed, pinned or touched, on the caller's clock (seconds).
    """

    namespace: int
    key: bytes
    offset: int
    length: int
    generation: int
    used_at: float
    state: BlockState = BlockState.WRITING
    pins: int = 0
    checksum: bytes = b""


class Reservation(Block, gc=False, eq=False):
    """A block in state WRITING, in the hands of the one caller that may write its bytes.

    That caller must commit, abort or quarantine it, once. ``commit`` returns the same object as a :class:`Block`: one
    allocation per occupancy, and a reader's block still cannot be passed for a reservation.
    """


class Pinned(msgspec.Struct, frozen=True):
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
    blocks: list[Block | None]
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


class EvictionPolicy(ABC):
    """Which block should go first. The seam behind which S3-FIFO and others come to stand beside LRU.

    A policy orders the LIVE blocks of one slot size. It decides, it never frees: the store removes a victim by itself.
    One thread; no method may block; all but ``check_integrity`` are O(1), the search for victims amortised.
    """

    @abstractmethod
    def insert(self, block: Block) -> None:
        """A block was committed. It is not in the policy yet."""

    @abstractmethod
    def access(self, block: Block) -> None:
        """A block that is in the policy was used."""

    @abstractmethod
    def remove(self, block: Block) -> None:
        """A block that is in the policy is going away, as a victim or otherwise."""

    @abstractmethod
    def victims(self, held: Callable[[Block], bool]) -> Iterator[Block]:
        """Blocks in the order in which they should go, without those that are held.

        Any other call on the policy ends the iteration: take what is needed, drop the iterator, then evict.
        """

    def victim(self, held: Callable[[Block], bool]) -> Block | None:
        """The first of ``victims``, or None: what every eviction asks, so policies may answer it faster."""
        return next(self.victims(held), None)

    @abstractmethod
    def check_integrity(self, live: Collection[Block]) -> None:
        """Raise AssertionError unless the policy could offer exactly these blocks. For tests."""
