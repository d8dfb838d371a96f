"""The DRAM tier in plain Python: the oracle that the C++ core (``p2pkv/store/core``) is held against.

:class:`ReferenceStore` does what :class:`p2pkv.store.dram.DramStore` does, answer by answer: the same slots,
generations, leases and events in the same order. It is there to be read and to be compared with; no agent runs it. One
thread.

Sans-IO: decides about offsets and never touches the bytes. ``now`` is the caller's monotonic clock in seconds.

Rules of both, each with a test that fails without its guard:

1. A slot that is being written, leased or quarantined is never handed out.
2. Every reuse of a slot has a new generation.
3. A block is written once: no second writer beside the first, no overwriting of a committed block.
4. Evicted is the least recently used block that no lease holds.
5. A lease that expired says so when released, whether or not its blocks are still there.
6. What was not committed was never visible, and an aborted reservation's slot is free.
7. GONE is queued for the ownership log before the slot can be handed out again, DRAM only at commit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Final

import msgspec

from p2pkv.errors import InvalidArgument, LayoutMismatch, LocalProtocolError, OutOfSpace
from p2pkv.store.base import BlockState, LeaseLimits, Pinned, StoreStats
from p2pkv.store.events import OwnershipEvents
from p2pkv.store.eviction import EvictionPolicy, Lru, NoEviction
from p2pkv.store.integrity import check_reference
from p2pkv.store.lease import CountedBits, Lease, LeaseTable
from p2pkv.store.slots import SlotAllocator, extent_bytes_for, slot_bytes_for
from p2pkv.types import (
    BLOCK_HASH_BYTES_MAX,
    BLOCK_HASH_BYTES_MIN,
    CHECKSUM_BYTES,
    Layout,
    Status,
    Tier,
    index_hash,
    namespace_salt,
)

NAMESPACES_MAX: Final = 1024
"""As many as one agent may advertise (wire.peer.LAYOUTS_MAX)."""

RECLAIM_AGE_RATIO: Final = 2.0
"""A layout gives an extent up only if its coldest block has been idle this many times as long as the taker's.
1 would make two equally busy layouts trade extents for ever, each trade evicting hot blocks beside the cold one."""

RECLAIM_VICTIMS_TRIED: Final = 32
"""Coldest blocks of a layout whose extents are looked at for one without held slots; bounds the time of one reserve."""

FREE: Final = BlockState.FREE
WRITING: Final = BlockState.WRITING
LIVE: Final = BlockState.LIVE
UNLISTED: Final = BlockState.UNLISTED
PARKED: Final = BlockState.PARKED


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


class _SizeClass:
    """What the namespaces with one slot size share: slots, and the order of eviction among them."""

    __slots__ = ("namespaces", "policy", "slot_bytes")

    def __init__(self, slot_bytes: int, policy: EvictionPolicy[Block]) -> None:
        self.slot_bytes = slot_bytes
        self.policy = policy
        self.namespaces = 0


class _Space:
    """One namespace: its layout, its listed blocks, and those being written."""

    __slots__ = ("block_bytes", "blocks", "layout", "namespace", "salt", "size", "writing")

    def __init__(self, layout: Layout, size: _SizeClass) -> None:
        self.layout = layout
        self.namespace = layout.namespace
        self.salt = namespace_salt(self.namespace)
        self.block_bytes = layout.block_bytes
        self.size = size
        self.blocks: dict[bytes, Block] = {}
        self.writing: dict[bytes, Block] = {}


class _Counters(msgspec.Struct):
    commits: int = 0
    aborts: int = 0
    evictions: int = 0
    extents_reclaimed: int = 0
    quarantines: int = 0
    no_space: int = 0


class ReferenceStore:
    """Blocks of all layouts in one arena.

    Args:
        capacity_bytes: size of the arena.
        extent_bytes: unit in which memory moves between layouts; by default chosen for the capacity.
        evict: False: a full store answers NO_SPACE.
        leases: limits on leases. The default lets one holder pin half of the arena.
        pinned_bytes_max: what all leases together may hold, each block once; by default 3/4 of the arena, so that
            readers cannot stop all writing.
        quarantine_bytes_max: quarantined bytes above which :attr:`quarantine_full` asks for action; 1/4 by default.
        lease_seed: lease ids are predictable here, whatever it is; two stores with one seed give out the same.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        extent_bytes: int | None = None,
        evict: bool = True,
        leases: LeaseLimits | None = None,
        pinned_bytes_max: int | None = None,
        quarantine_bytes_max: int | None = None,
        lease_seed: int | None = None,
    ) -> None:
        self._slots: SlotAllocator[Block] = SlotAllocator(
            capacity_bytes, extent_bytes_for(capacity_bytes) if extent_bytes is None else extent_bytes
        )
        limits = LeaseLimits(bytes_per_holder_max=max(1, capacity_bytes // 2)) if leases is None else leases
        self._leases: LeaseTable[Block] = LeaseTable(limits, CountedBits(lease_seed or 0), self._unpin)
        self._new_policy: Callable[[], EvictionPolicy[Block]] = Lru if evict else NoEviction
        self._capacity_bytes = capacity_bytes
        self._pinned_bytes = 0
        self._pinned_bytes_max = capacity_bytes * 3 // 4 if pinned_bytes_max is None else pinned_bytes_max
        self._quarantine_bytes = 0
        self._quarantine_bytes_max = capacity_bytes // 4 if quarantine_bytes_max is None else quarantine_bytes_max
        self._spaces: dict[int, _Space] = {}
        self._sizes: dict[int, _SizeClass] = {}
        self._parked: dict[Hashable, list[Block]] = {}
        self._events = OwnershipEvents()
        self._counters = _Counters()
        self._live_bytes = 0
        self._writing = 0
        self._unlisted = 0

    def watch_extents(self, on_extent: Callable[[int, int], None]) -> None:
        """Have (offset, length) of every part of the arena told when it is assigned to a layout, to be written soon."""
        self._slots.on_extent = on_extent

    # ---- layouts

    def register(self, layout: Layout) -> int:
        """Make room in the books for a layout's blocks and return its namespace. Registering it again changes nothing.

        Raises:
            InvalidArgument: the layout is malformed.
            LayoutMismatch: another layout of the same cache is registered; names the fields that differ.
            OutOfSpace: one block is larger than the arena, or too many namespaces.
        """
        namespace = layout.namespace
        known = self._spaces.get(namespace)
        if known is not None and known.layout == layout:
            return namespace
        problems = layout.problems()
        if problems:
            raise InvalidArgument("the layout is malformed: " + "; ".join(problems))
        for space in self._spaces.values():
            fields = layout.conflicts(space.layout)
            if fields or space is known:
                raise LayoutMismatch(
                    "a layout that describes the same cache differently is open",
                    fields=fields,
                    hint=f"Make all engines of this model agree on {', '.join(fields)}" if fields else "",
                )
        if len(self._spaces) >= NAMESPACES_MAX:
            raise OutOfSpace("too many namespaces", hint="Drop those that no engine uses", namespaces=NAMESPACES_MAX)
        slot_bytes = slot_bytes_for(layout.block_bytes)
        self._slots.open(slot_bytes)
        size = self._sizes.get(slot_bytes)
        if size is None:
            size = self._sizes[slot_bytes] = _SizeClass(slot_bytes, self._new_policy())
        size.namespaces += 1
        self._spaces[namespace] = _Space(layout, size)
        return namespace

    def layouts(self) -> list[Layout]:
        """The registered layouts, oldest first."""
        return [space.layout for space in self._spaces.values()]

    def drop_namespace(self, namespace: int) -> int:
        """Forget a layout and its blocks; how many were dropped. Leases and writers keep their slots until they end."""
        space = self._spaces.pop(namespace, None)
        if space is None:
            return 0
        blocks = list(space.blocks.values())
        for block in blocks:
            self._drop(space, block)
        space.size.namespaces -= 1
        if not space.size.namespaces:
            del self._sizes[space.size.slot_bytes]
        return len(blocks)

    # ---- writing

    def reserve(self, namespace: int, key: bytes, now: float) -> Reservation | Status:
        """Take a slot for a block that is not there yet, evicting others if need be.

        Returns a reservation, which the caller must commit, abort or quarantine; it does not expire, since bytes may
        be landing in it. Or: EXISTS (counts as a use), BUSY (somebody is writing this very block), NO_SPACE (all
        that could go is held), INVALID (no such namespace, or a key that is not 8 to 64 bytes long).
        """
        space = self._spaces.get(namespace)
        if space is None or not BLOCK_HASH_BYTES_MIN <= len(key) <= BLOCK_HASH_BYTES_MAX:
            return Status.INVALID
        size = space.size
        present = space.blocks.get(key)
        if present is not None:
            present.used_at = now
            size.policy.access(present)
            return Status.EXISTS
        if key in space.writing:
            return Status.BUSY
        block = Reservation(namespace, key, -1, space.block_bytes, 0, now)
        slots = self._slots
        while (offset := slots.take(size.slot_bytes, block)) is None:
            if not self._make_room(size, now):
                self._counters.no_space += 1
                return Status.NO_SPACE
        block.offset = offset
        block.generation = slots.generation
        space.writing[key] = block
        self._writing += 1
        return block

    def commit(self, reservation: Reservation, checksum: bytes, now: float) -> Block | None:
        """List a block whose bytes are all there, with the xxh3_128 of those bytes. From here on they never change.

        Returns the block, or None if its namespace was dropped meanwhile: then its slot is free and nothing was listed.

        Raises:
            InvalidArgument: the checksum is not 16 bytes long; the reservation stands.
            LocalProtocolError: the reservation is over already.
        """
        if len(checksum) != CHECKSUM_BYTES:
            raise InvalidArgument("a checksum has 16 bytes", length=len(checksum))
        space = self._end_writing(reservation)
        block: Block = reservation
        if space is None:
            self._free(block)
            return None
        block.checksum = bytes(checksum)
        block.used_at = now
        block.state = LIVE
        space.blocks[block.key] = block
        space.size.policy.insert(block)
        self._live_bytes += block.length
        self._counters.commits += 1
        self._events.add(index_hash(block.key) ^ space.salt, Tier.DRAM)
        return block

    def abort(self, reservation: Reservation) -> None:
        """Give a slot back whose bytes will not come, and into which nothing can land any more.

        Raises:
            LocalProtocolError: the reservation is over already.
        """
        self._end_writing(reservation)
        self._counters.aborts += 1
        self._free(reservation)

    def quarantine(self, reservation: Reservation, token: Hashable) -> bool:
        """Give a reservation up although bytes may still land in its slot; parked until ``clear_quarantine(token)``.

        The token names what must be over first: a transfer's handle, a connection, an incarnation of the NIXL
        process. The key can be reserved again at once, in another slot. Always parks; the answer is False when
        the quarantine is now fuller than it should be (see :attr:`quarantine_full`).

        Raises:
            LocalProtocolError: the reservation is over already.
        """
        self._end_writing(reservation)
        reservation.state = PARKED
        self._parked.setdefault(token, []).append(reservation)
        self._quarantine_bytes += reservation.length
        self._counters.quarantines += 1
        return not self.quarantine_full

    def clear_quarantine(self, token: Hashable) -> int:
        """Nothing can land any more in the slots parked under this token: free them; how many there were."""
        parked = self._parked.pop(token, [])
        for block in parked:
            self._quarantine_bytes -= block.length
            self._free(block)
        return len(parked)

    @property
    def quarantine_full(self) -> bool:
        """Too much is parked: start no transfer, and end what it waits for (close, restart the NIXL process)."""
        return self._quarantine_bytes > self._quarantine_bytes_max

    # ---- reading

    def pin(self, namespace: int, keys: Sequence[bytes], ttl_s: float, now: float, holder: Hashable) -> Pinned[Block]:
        """Hold those of these blocks that are here, in one lease, until ``release`` or for ``ttl_s`` (clamped) seconds.

        Counts as a use; the last key as the earliest, so that of a chain of blocks the tail goes first and what is
        left is still a prefix. ``holder`` names whom the lease belongs to: limits apply per holder.
        """
        space = self._spaces.get(namespace)
        if space is None:
            return Pinned(0, 0.0, now, [None] * len(keys), len(keys))
        blocks = list(map(space.blocks.get, keys))
        hits = [block for block in blocks if block is not None]
        considered = len(keys)
        needed = len(hits) * space.block_bytes
        if needed > self._leases.room(holder) or needed + self._pinned_bytes > self._pinned_bytes_max:
            self.expire(now)
            considered = self._affordable(blocks, space.block_bytes, holder)
            blocks[considered:] = [None] * (len(keys) - considered)
            hits = [block for block in blocks if block is not None]
        if not hits:
            return Pinned(0, 0.0, now, blocks, considered)
        access = space.size.policy.access
        for block in reversed(hits):
            if not block.pins:
                self._pinned_bytes += block.length
            block.pins += 1
            block.used_at = now
            access(block)
        lease = self._leases.grant(holder, hits, len(hits) * space.block_bytes, ttl_s, now)
        return Pinned(lease.lease_id, lease.expires_at - now, lease.expires_at, blocks, considered)

    def release(self, lease_id: int, now: float, holder: Hashable | None = None) -> bool:
        """End a lease. True: the blocks were held from ``pin`` until now, so what was read between was theirs.

        False for a lease that expired, is unknown, or (with ``holder`` given) belongs to somebody else.
        """
        return self._leases.release(lease_id, now, holder)

    def release_holder(self, holder: Hashable) -> int:
        """End all leases of a holder that is gone; how many there were."""
        return self._leases.release_holder(holder)

    def expire(self, now: float) -> int:
        """End the leases that are over; how many. Cheap when there is none: call it every second or so.

        Otherwise they end when their room is needed, by a pin or a reserve.
        """
        return len(self._leases.expire(now))

    def lookup(self, namespace: int, key: bytes) -> Block | None:
        """The block if it is here. No use is counted and nothing is held: an answer for this turn of the loop only."""
        space = self._spaces.get(namespace)
        return None if space is None else space.blocks.get(key)

    def lookup_many(self, namespace: int, keys: Sequence[bytes]) -> list[Block | None]:
        """``lookup`` of each key."""
        space = self._spaces.get(namespace)
        return [None] * len(keys) if space is None else list(map(space.blocks.get, keys))

    def writing(self, namespace: int, key: bytes) -> bool:
        """Whether somebody has this block reserved (``reserve`` would say BUSY)."""
        space = self._spaces.get(namespace)
        return space is not None and key in space.writing

    def touch(self, namespace: int, keys: Sequence[bytes], now: float) -> int:
        """Count a use of these blocks, the last key as the earliest (see ``pin``); how many are here."""
        blocks = [block for block in self.lookup_many(namespace, keys) if block is not None]
        for block in reversed(blocks):
            block.used_at = now
            self._spaces[namespace].size.policy.access(block)
        return len(blocks)

    def delete(self, namespace: int, key: bytes) -> bool:
        """Unlist a block; leases on it stay in force, and its slot is free once they end. False if it is not here."""
        space = self._spaces.get(namespace)
        block = None if space is None else space.blocks.get(key)
        if space is None or block is None:
            return False
        self._drop(space, block)
        return True

    # ---- the ownership log

    def take_events(self) -> list[tuple[int, Tier]]:
        """What changed since the last call, in order: (index key, DRAM) at commit, (index key, GONE) before reuse.

        If nobody takes them for long, blocks that came and went (or went and came) between two calls are left out.
        """
        return self._events.take()

    def count(self, namespace: int) -> int:
        """How many blocks of a namespace are here."""
        space = self._spaces.get(namespace)
        return 0 if space is None else len(space.blocks)

    def keys(self, namespace: int, limit: int) -> list[bytes]:
        """Hashes of at most ``limit`` blocks of a namespace, oldest put first."""
        space = self._spaces.get(namespace)
        return [] if space is None else list(islice(space.blocks, limit))

    def hot(self, namespace: int, limit: int, after: bytes = b"") -> list[bytes]:
        """At most ``limit`` of a namespace's hashes, the one used last first; after ``after``, if it is given."""
        space = self._spaces.get(namespace)
        if space is None or (after and after not in space.blocks):
            return []
        order = list(space.size.policy.victims(lambda block: False))[::-1]
        if after:
            order = order[order.index(space.blocks[after]) + 1 :]
        return [block.key for block in order[: 4 * limit] if block.namespace == namespace][:limit]

    def present(self, namespace: int, keys: Sequence[bytes]) -> bytes:
        """One byte per key: 1 = here."""
        return bytes(block is not None for block in self.lookup_many(namespace, keys))

    def index_keys(self) -> Iterator[int]:
        """Index keys of all listed blocks, in no order: what an ownership log that starts now begins with."""
        for space in self._spaces.values():
            for key in space.blocks:
                yield index_hash(key) ^ space.salt

    # ---- figures and checks

    def stats(self) -> StoreStats:
        """The store in figures. O(number of namespaces)."""
        counters = self._counters
        return StoreStats(
            capacity_bytes=self._capacity_bytes,
            free_bytes=self._slots.pool_bytes + self._slots.free_slot_bytes,
            live_bytes=self._live_bytes,
            pinned_bytes=self._pinned_bytes,
            quarantined_bytes=self._quarantine_bytes,
            namespaces=len(self._spaces),
            blocks_live=sum(len(space.blocks) for space in self._spaces.values()),
            blocks_writing=self._writing,
            blocks_unlisted=self._unlisted,
            blocks_quarantined=sum(map(len, self._parked.values())),
            leases=len(self._leases),
            commits_total=counters.commits,
            aborts_total=counters.aborts,
            evictions_total=counters.evictions,
            extents_reclaimed_total=counters.extents_reclaimed,
            quarantines_total=counters.quarantines,
            leases_expired_total=self._leases.expired_total,
            no_space_total=counters.no_space,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, blocks, leases and policies agree. O(everything). For tests."""
        check_reference(self)

    # ---- holding and letting go

    @staticmethod
    def _held(block: Block) -> bool:
        """Whether a lease keeps this block in its slot. The one guard between leases and reuse: all paths ask here."""
        return block.pins > 0

    def _unpin(self, lease: Lease[Block]) -> None:
        for block in lease.blocks:
            block.pins -= 1
            if not block.pins:
                self._pinned_bytes -= block.length
                if block.state is UNLISTED:
                    self._unlisted -= 1
                    self._free(block)

    def _affordable(self, blocks: Sequence[Block | None], block_bytes: int, holder: Hashable) -> int:
        """How many of these entries, from the first on, can be pinned within the budgets."""
        room = self._leases.room(holder)
        unpinned_room = self._pinned_bytes_max - self._pinned_bytes
        fresh: set[Block] = set()
        for position, block in enumerate(blocks):
            if block is None:
                continue
            room -= block_bytes
            if not block.pins:
                fresh.add(block)
            if room < 0 or len(fresh) * block_bytes > unpinned_room:
                return position
        return len(blocks)

    def _end_writing(self, reservation: Reservation) -> _Space | None:
        """Take a reservation off the list of those being written; its namespace, or None if that is gone."""
        if reservation.state is not WRITING:
            raise LocalProtocolError("the reservation is over already", state=reservation.state.name)
        self._writing -= 1
        space = self._spaces.get(reservation.namespace)
        if space is None or space.writing.get(reservation.key) is not reservation:
            return None  # dropped, and perhaps registered anew since
        del space.writing[reservation.key]
        return space

    def _drop(self, space: _Space, block: Block) -> None:
        """Unlist a live block and free its slot, now or when the last lease on it ends."""
        del space.blocks[block.key]
        space.size.policy.remove(block)
        self._live_bytes -= block.length
        self._events.add(index_hash(block.key) ^ space.salt, Tier.GONE)
        if self._held(block):
            block.state = UNLISTED
            self._unlisted += 1
        else:
            self._free(block)

    def _free(self, block: Block) -> None:
        block.state = FREE
        self._slots.free(block.offset)

    def _evict(self, block: Block) -> None:
        self._counters.evictions += 1
        self._drop(self._spaces[block.namespace], block)

    # ---- making room

    def _make_room(self, size: _SizeClass, now: float) -> bool:
        """Let something go so that a slot of this size may be free; False if nothing can go."""
        if self._leases.expire(now):
            return True  # a deleted block's slot may have come free; otherwise we are called again
        own = size.policy.victim(self._held)
        if len(self._sizes) > 1 and self._reclaim_extent(size, None if own is None else now - own.used_at, now):
            return True
        if own is None:
            return False
        self._evict(own)
        return True

    def _reclaim_extent(self, size: _SizeClass, own_idle_s: float | None, now: float) -> bool:
        """Empty an extent of the slot size whose coldest block is the coldest, if it is cold enough to give one up."""
        coldest: tuple[float, _SizeClass] | None = None
        for other in self._sizes.values():
            if other is not size:
                victim = other.policy.victim(self._held)
                if victim is not None and (coldest is None or victim.used_at < coldest[0]):
                    coldest = victim.used_at, other
        if coldest is None or (own_idle_s is not None and now - coldest[0] <= RECLAIM_AGE_RATIO * own_idle_s):
            return False
        window = self._empty_window(coldest[1], size)
        for block in window:
            self._evict(block)
        self._counters.extents_reclaimed += bool(window)
        return bool(window)

    def _empty_window(self, donor: _SizeClass, size: _SizeClass) -> list[Block]:
        """The blocks to evict so that units around one of the donor's coldest blocks come free; [] = there are none."""
        tried: set[int] = set()
        for victim in islice(donor.policy.victims(self._held), RECLAIM_VICTIMS_TRIED):
            unit = victim.offset // self._slots.extent_bytes
            if unit in tried:
                continue
            tried.add(unit)
            for occupants in self._slots.windows(victim.offset, size.slot_bytes):
                window: list[Block] = []
                for block in occupants:
                    if block.state is not LIVE or self._held(block):
                        break
                    window.append(block)
                else:
                    return window
        return []
