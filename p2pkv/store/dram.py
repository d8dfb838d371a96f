"""The DRAM tier: which block lies in which slot of the arena, who holds it, and what has to go for a new one.

Sans-IO: decides about offsets and never touches the bytes. The caller writes into a reserved slot and reads from a
pinned one. Nothing blocks; ``now`` is the caller's monotonic clock in seconds.

The books are kept in C++ (``p2pkv/store/core``), thread-safe, so that I/O threads can pin, reserve and commit without
Python; :attr:`DramStore.core` is what they get. What is here is for the agent's loop: layouts, tokens, typed answers
and errors. :mod:`p2pkv.store.reference` says in Python what the core does, and the tests demand equal answers.

Rules, each with a test that fails without its guard:

1. A slot that is being written, leased or quarantined is never handed out.
2. Every reuse of a slot has a new generation.
3. A block is written once: no second writer beside the first, no overwriting of a committed block.
4. Evicted is the least recently used block that no lease holds.
5. A lease that expired says so when released, whether or not its blocks are still there.
6. What was not committed was never visible, and an aborted reservation's slot is free.
7. GONE is queued for the ownership log before the slot can be handed out again, DRAM only at commit.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Final, NamedTuple

from p2pkv import _native
from p2pkv.errors import InvalidArgument, LayoutMismatch, LocalProtocolError, OutOfSpace
from p2pkv.store.base import Block, BlockState, LeaseLimits, Pinned, Reservation, StoreStats
from p2pkv.store.slots import extent_bytes_for, slot_bytes_for
from p2pkv.types import CHECKSUM_BYTES, Layout, Status, Tier, namespace_salt

NAMESPACES_MAX: Final = 1024
"""As many as one agent may advertise (wire.peer.LAYOUTS_MAX)."""

TOKENS_FROM: Final = 1 << 63
"""The core's quarantine tokens from here on stand for ours; native threads that park slots use smaller ones."""

BYTES_MAX: Final = 1 << 62
"""The core counts in 64 bits; no limit needs to be above this."""

_REFUSED: Final = (Status.OK, Status.EXISTS, Status.BUSY, Status.NO_SPACE, Status.INVALID)
"""Statuses by what ``_native.Store.reserve`` answers."""

_TIERS: Final = tuple(Tier)

_DONE: Final = 0
_DROPPED: Final = 1


class Changes(NamedTuple):
    """The last word on each index key that changed: packed 64-bit keys (``array('Q')``), each key in one of them."""

    gone: array[int]
    dram: array[int]


class HotLook(NamedTuple):
    """What one look at what was used last has found, and the place to go on from (empty: that was all)."""

    keys: list[bytes]
    place: bytes


class DramStore:
    """Blocks of all layouts in one arena. Its methods are for one thread (the agent's loop); ``core`` is for all.

    A *holder* is whoever has leases, as an integer of 64 bits: a peer is its node id, an engine a small number that its
    connection gave it. Limits apply per holder, and nobody can release a lease in another's name.

    Args:
        capacity_bytes: size of the arena.
        extent_bytes: unit in which memory moves between layouts; by default chosen for the capacity.
        evict: whether the least recently used block makes room; False: a full store answers NO_SPACE.
        leases: limits on leases. The default lets one holder pin half of the arena.
        pinned_bytes_max: what all leases together may hold, each block once; by default 3/4 of the arena, so that
            readers cannot stop all writing.
        quarantine_bytes_max: quarantined bytes above which :attr:`quarantine_full` asks for action; 1/4 by default.
        lease_seed: makes lease ids predictable, for tests. By default they come from the kernel, so that a peer cannot
            guess one.

    Attributes:
        core: the books themselves, for native threads. They may outlive this object.

    Raises:
        InvalidArgument: the sizes do not fit each other, or the limits contradict themselves.
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
        limits = LeaseLimits(bytes_per_holder_max=max(1, capacity_bytes // 2)) if leases is None else leases
        limits.check()
        try:
            self.core: Final = _native.Store(
                capacity_bytes=capacity_bytes,
                extent_bytes=extent_bytes_for(capacity_bytes) if extent_bytes is None else extent_bytes,
                evict=evict,
                ttl_min_s=limits.ttl_min_s,
                ttl_max_s=limits.ttl_max_s,
                leases_max=limits.leases_max,
                leases_per_holder_max=limits.leases_per_holder_max,
                bytes_per_holder_max=min(limits.bytes_per_holder_max, BYTES_MAX),
                pinned_bytes_max=_bytes(pinned_bytes_max, capacity_bytes * 3 // 4),
                quarantine_bytes_max=_bytes(quarantine_bytes_max, capacity_bytes // 4),
                lease_seed=lease_seed,
            )
        except ValueError as error:
            raise InvalidArgument(str(error), capacity_bytes=capacity_bytes, extent_bytes=extent_bytes) from error
        self._layouts: dict[int, Layout] = {}
        self._tokens: dict[Hashable, int] = {}
        self._next_token = count(TOKENS_FROM)
        self._on_extent: Callable[[int, int], None] = lambda offset, length: None

    def watch_extents(self, on_extent: Callable[[int, int], None]) -> None:
        """Have (offset, length) of every part of the arena told when it is assigned to a layout, to be written soon.

        Told from within ``reserve``, ``take_events`` and ``take_changes``: what a native thread caused, a little later.
        """
        self._on_extent = on_extent

    # ---- layouts

    def register(self, layout: Layout) -> int:
        """Make room in the books for a layout's blocks and return its namespace. Registering it again changes nothing.

        Raises:
            InvalidArgument: the layout is malformed.
            LayoutMismatch: another layout of the same cache is registered; names the fields that differ.
            OutOfSpace: one block is larger than the arena, or too many namespaces.
        """
        namespace = layout.namespace
        known = self._layouts.get(namespace)
        if known == layout:
            return namespace
        problems = layout.problems()
        if problems:
            raise InvalidArgument("the layout is malformed: " + "; ".join(problems))
        for other in self._layouts.values():
            fields = layout.conflicts(other)
            if fields or other is known:
                raise LayoutMismatch(
                    "a layout that describes the same cache differently is open",
                    fields=fields,
                    hint=f"Make all engines of this model agree on {', '.join(fields)}" if fields else "",
                )
        if len(self._layouts) >= NAMESPACES_MAX:
            raise OutOfSpace("too many namespaces", hint="Drop those that no engine uses", namespaces=NAMESPACES_MAX)
        slot_bytes = slot_bytes_for(layout.block_bytes)
        if not self.core.open(namespace, layout.block_bytes, namespace_salt(namespace), slot_bytes):
            raise OutOfSpace(
                "a block of this layout does not fit into the arena",
                hint="Give the agent a larger arena, or the engine smaller blocks",
                slot_bytes=slot_bytes,
            )
        self._layouts[namespace] = layout
        return namespace

    def block_bytes(self, namespace: int) -> int:
        """Of each of a namespace's blocks; 0: it is not registered."""
        layout = self._layouts.get(namespace)
        return 0 if layout is None else layout.block_bytes

    def layouts(self) -> list[Layout]:
        """The registered layouts, oldest first."""
        return list(self._layouts.values())

    def drop_namespace(self, namespace: int) -> int:
        """Forget a layout and its blocks; how many were dropped. Leases and writers keep their slots until they end.

        Native threads that ask the core wait meanwhile: 0.5 s for 300,000 blocks were measured.
        """
        self._layouts.pop(namespace, None)
        return self.core.drop(namespace)

    # ---- writing

    def reserve(self, namespace: int, key: bytes, now: float) -> Reservation | Status:
        """Take a slot for a block that is not there yet, evicting others if need be.

        Returns a reservation, which the caller must commit, abort or quarantine; it does not expire, since bytes may
        be landing in it. Or: EXISTS (counts as a use), BUSY (somebody is writing this very block), NO_SPACE (all
        that could go is held), INVALID (no such namespace, or a key that is not 8 to 64 bytes long).
        """
        got = self.core.reserve(namespace, key, now)
        if isinstance(got, int):
            return _REFUSED[got]
        if self.core.extents_waiting:
            self._tell_extents()
        return got

    def commit(self, reservation: Reservation, checksum: bytes, now: float) -> Block | None:
        """List a block whose bytes are all there, with the xxh3_128 of those bytes. From here on they never change.

        Returns the block, or None if its namespace was dropped meanwhile: then its slot is free and nothing was listed.

        Raises:
            InvalidArgument: the checksum is not 16 bytes long; the reservation stands.
            LocalProtocolError: the reservation is over already.
        """
        if len(checksum) != CHECKSUM_BYTES:
            raise InvalidArgument("a checksum has 16 bytes", length=len(checksum))
        ended = self.core.commit(reservation, checksum, now)
        if ended == _DONE:
            return reservation
        if ended == _DROPPED:
            return None
        raise _over(reservation)

    def abort(self, reservation: Reservation) -> None:
        """Give a slot back whose bytes will not come, and into which nothing can land any more.

        Raises:
            LocalProtocolError: the reservation is over already.
        """
        if self.core.abort(reservation) > _DROPPED:
            raise _over(reservation)

    def quarantine(self, reservation: Reservation, token: Hashable) -> bool:
        """Give a reservation up although bytes may still land in its slot; parked until ``clear_quarantine(token)``.

        The token names what must be over first: a transfer's handle, a connection, an incarnation of the NIXL
        process. The key can be reserved again at once, in another slot. Always parks; the answer is False when
        the quarantine is now fuller than it should be (see :attr:`quarantine_full`).

        Raises:
            LocalProtocolError: the reservation is over already.
        """
        number = self._tokens.get(token)
        if number is None:
            number = next(self._next_token)
        if self.core.park(reservation, number) > _DROPPED:
            raise _over(reservation)
        self._tokens[token] = number
        return not self.quarantine_full

    def clear_quarantine(self, token: Hashable) -> int:
        """Nothing can land any more in the slots parked under this token: free them; how many there were."""
        number = self._tokens.pop(token, None)
        return 0 if number is None else self.core.clear(number)

    @property
    def quarantine_full(self) -> bool:
        """Too much is parked: start no transfer, and end what it waits for (close, restart the NIXL process)."""
        return self.core.quarantine_full

    # ---- reading

    def pin(self, namespace: int, keys: Sequence[bytes], ttl_s: float, now: float, holder: int) -> Pinned[Block]:
        """Hold those of these blocks that are here, in one lease, until ``release`` or for ``ttl_s`` (clamped) seconds.

        Counts as a use; the last key as the earliest, so that of a chain of blocks the tail goes first and what is
        left is still a prefix. ``holder`` names whom the lease belongs to: limits apply per holder.
        """
        return Pinned(*self.core.pin(namespace, keys, ttl_s, now, holder))

    def release(self, lease_id: int, now: float, holder: int | None = None) -> bool:
        """End a lease. True: the blocks were held from ``pin`` until now, so what was read between was theirs.

        False for a lease that expired, is unknown, or (with ``holder`` given) belongs to somebody else.
        """
        return self.core.release(lease_id, now, holder)

    def release_holder(self, holder: int) -> int:
        """End all leases of a holder that is gone; how many there were."""
        return self.core.release_holder(holder)

    def expire(self, now: float) -> int:
        """End the leases that are over; how many. Cheap when there is none: call it every second or so.

        Otherwise they end when their room is needed, by a pin or a reserve.
        """
        return self.core.expire(now)

    def lookup(self, namespace: int, key: bytes) -> Block | None:
        """The block if it is here. No use is counted and nothing is held: its slot may be another's at any time."""
        return self.core.lookup(namespace, key)

    def lookup_many(self, namespace: int, keys: Sequence[bytes]) -> list[Block | None]:
        """``lookup`` of each key."""
        return self.core.lookup_many(namespace, keys)

    def present(self, namespace: int, keys: Sequence[bytes]) -> bytes:
        """One byte per key: 1 = here. Cheaper than ``lookup_many``."""
        return self.core.present(namespace, keys)

    def writing(self, namespace: int, key: bytes) -> bool:
        """Whether somebody has this block reserved (``reserve`` would say BUSY)."""
        return self.core.writing(namespace, key)

    def touch(self, namespace: int, keys: Sequence[bytes], now: float) -> int:
        """Count a use of these blocks, the last key as the earliest (see ``pin``); how many are here."""
        return self.core.touch(namespace, keys, now)

    def delete(self, namespace: int, key: bytes) -> bool:
        """Unlist a block; leases on it stay in force, and its slot is free once they end. False if it is not here."""
        return self.core.delete(namespace, key)

    # ---- the ownership log

    def take_events(self) -> list[tuple[int, Tier]]:
        """What changed since the last call, in order: (index key, DRAM) at commit, (index key, GONE) before reuse.

        If nobody takes them for long, blocks that came and went (or went and came) between two calls are left out.
        """
        if self.core.extents_waiting:
            self._tell_extents()
        keys, tiers = self.core.take_events()
        return [(key, _TIERS[tier]) for key, tier in zip(_words(keys), tiers, strict=True)]

    def take_changes(self) -> Changes | None:
        """As ``take_events``, but only the last word on each key; None when nothing changed."""
        if self.core.extents_waiting:
            self._tell_extents()
        changes = self.core.take_changes()
        return None if changes is None else Changes(_words(changes[0]), _words(changes[1]))

    def count(self, namespace: int) -> int:
        """How many blocks of a namespace are here."""
        return self.core.count(namespace)

    def keys(self, namespace: int, limit: int) -> list[bytes]:
        """Hashes of at most ``limit`` blocks of a namespace, oldest put first."""
        return self.core.keys(namespace, limit)

    def hot(self, namespace: int, limit: int, after: bytes = b"") -> list[bytes]:
        """At most ``limit`` of a namespace's hashes, the one used last first, a prefix before what follows it; after
        ``after``, if it is given. Empty: that was all (or ``after`` has gone, or only other namespaces come next:
        :meth:`look_hot` tells these apart)."""
        look = self.look_hot(namespace, limit, self.place_of(namespace, after) if after else b"")
        return [] if look is None else look.keys

    def look_hot(self, namespace: int, limit: int, place: bytes = b"") -> HotLook | None:
        """The next part of what was used last, from a place on (empty: from the beginning); None: the block at that
        place has gone.

        Namespaces whose blocks are of one size are listed together, and the store is locked for a few blocks per key
        only, so a look may find nothing and have a place to go on from.
        """
        found = self.core.hot(namespace, limit, place)
        return HotLook(found[:-1], found[-1]) if found else None

    @staticmethod
    def place_of(namespace: int, key: bytes) -> bytes:
        """Where :meth:`look_hot` goes on behind a block that it has told of."""
        return namespace.to_bytes(8, "little") + key

    def count_marks(self, namespace: int, from_key: bytes, most: int, now: float) -> bytes:
        """Count what engines have read by themselves as used, for ``most`` blocks, from ``from_key`` on (empty: from
        the beginning). Returns where to go on; empty: that was all."""
        return self.core.count_marks(namespace, from_key, most, now)

    def index_keys(self) -> Iterator[int]:
        """Index keys of all listed blocks, in no order: what an ownership log that starts now begins with."""
        return iter(_words(self.core.index_keys()))

    # ---- figures and checks

    def stats(self) -> StoreStats:
        """The store in figures. O(number of namespaces)."""
        return StoreStats(**self.core.stats())

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, blocks, leases and LRU agree. O(everything). For tests."""
        self.core.check_integrity()

    def _tell_extents(self) -> None:
        for offset, length in self.core.take_extents():
            self._on_extent(offset, length)


def _bytes(limit: int | None, default: int) -> int:
    return default if limit is None else min(limit, BYTES_MAX)


def _words(packed: bytes) -> array[int]:
    words = array("Q")
    words.frombytes(packed)
    return words


def _over(reservation: Reservation) -> LocalProtocolError:
    return LocalProtocolError("the reservation is over already", state=BlockState(reservation.state).name)
