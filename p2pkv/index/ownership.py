"""Ownership logs: what one node tells the others about its blocks, and what a reader keeps of it. Sans-IO.

An owner's log is a sequence of deltas over a set of (key, tier) entries. One writer, so no merging:

1. At the start of an epoch the set is empty and seq is 0. Every delta that is not empty raises seq by one and carries
   the checksum of the set after it. A key occurs once in a delta.
2. An empty delta repeats seq and checksum: the heartbeat, by which a reader learns that it missed something.
3. A reader applies delta seq + 1 and no other. It is *synced* while its checksum equals the owner's; then its view of
   the owner at (epoch, seq) is the owner's own set at that point (invariant 2 of the design).
4. A gap that does not close by itself, or a wrong checksum, makes the reader ask for a snapshot (RESYNC). Until it has
   one, it keeps what it knows as a hint and holds later deltas back.
5. A snapshot comes in parts and counts only when all parts are there and the checksum fits.
6. A higher epoch means that the owner has restarted: what it had is void. A lower one is a late message of the dead.

``now`` is in seconds, monotonic. Nothing here is thread-safe: one event loop owns a log or a replica.
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from p2pkv.errors import InvalidArgument, RemoteProtocolError
from p2pkv.index.hashing import KEY_BYTES, entries_checksum, pack_keys
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.peer import DELTA_KEYS_BYTES_MAX, Delta, Resync, Snapshot

HOLD_MS: Final = 200
"""How long a change waits for others of the same key. Blocks that live shorter than this are never advertised."""

KEYS_PER_DELTA: Final = 4_096
"""32 KiB of keys: so many that checksum and header do not count, so few that they are applied within a millisecond."""

KEYS_PER_PART: Final = 16_384
"""Per snapshot part: 128 KiB, so that a heartbeat never waits long behind one."""

ENTRIES_PER_OWNER_MAX: Final = 1 << 22
"""Ten times a node with 30 TB of SSD at 80 MiB a block. Bounds what one owner can make us keep."""

PARTS_MAX: Final = 1 << 16

_DELTA_OVERHEAD_BYTES: Final = 512
"""About what a held delta costs besides its keys, so that a flood of tiny ones is bounded too."""

_TIERS: Final = len(Tier)
_SELF: Final = 0
_TIER_MASK: Final = 0xFF
"""Of an entry of :class:`p2pkv.index.prefix.Holders`."""


class OwnershipLog:
    """This node's own log: record what happens to blocks, send what :meth:`poll` returns to every reader in order.

    Args:
        epoch: grows at every start of this node.
        hold_ms: how long a change is held back so that changes of one key become one; counted from the first of them.
        keys_per_delta: bound on the keys of one delta.
    """

    def __init__(self, epoch: int, *, hold_ms: int = HOLD_MS, keys_per_delta: int = KEYS_PER_DELTA) -> None:
        if hold_ms < 0 or not 1 <= keys_per_delta <= DELTA_KEYS_BYTES_MAX // KEY_BYTES:
            raise InvalidArgument("hold or delta size out of range", hold_ms=hold_ms, keys_per_delta=keys_per_delta)
        self.epoch = epoch
        self.seq = 0
        self._hold_s = hold_ms / 1000
        self._keys_per_delta = keys_per_delta
        # Native: 22 bytes an entry, its checksum kept as it changes, no pause as it grows.
        self._published = PrefixIndex(max_nodes=1)
        # OrderedDict: taking from the front of a plain dict costs a walk over all that was taken before.
        self._urgent: OrderedDict[int, Tier] = OrderedDict()  # due at once
        # The hold is the same for all, so insertion order is order of becoming due.
        self._held: OrderedDict[int, tuple[Tier, float]] = OrderedDict()

    def __len__(self) -> int:
        """Entries in the published set."""
        return self._published.count(_SELF)

    @property
    def checksum(self) -> int:
        """Of the published set, after delta ``seq``."""
        return self._published.checksum(_SELF)

    def tier_of(self, key: int) -> Tier:
        """Where the published set says ``key`` is; GONE when it is not in it."""
        return Tier(self._tiers_of([key])[0])

    def _tiers_of(self, keys: Sequence[int]) -> bytes:
        """Where the published set says that each key is."""
        found = memoryview(self._published.holders(pack_keys(keys), limit=1, start=_SELF).packed).cast("I")
        ends, entries = found[: len(keys) + 1], found[len(keys) + 1 :]
        if len(entries) == 0:
            return bytes(len(keys))
        return bytes(
            entries[end - 1] & _TIER_MASK if end > before else Tier.GONE for before, end in itertools.pairwise(ends)
        )

    def record(self, keys: Iterable[int], tier: Tier, now: float, *, urgent: bool = False) -> None:
        """These keys are in ``tier`` from now on (GONE: nowhere). The last word on a key within its hold wins.

        A key that is back where the readers believe it to be is not mentioned at all.

        Args:
            urgent: do not hold: the next :meth:`poll` gives it out. For slots that are about to be reused.
        """
        keys = list(keys)
        for key, published in zip(keys, self._tiers_of(keys), strict=True):
            if published == tier:
                self._held.pop(key, None)
                self._urgent.pop(key, None)
            elif urgent or key in self._urgent:
                self._held.pop(key, None)
                self._urgent[key] = tier
            else:
                held = self._held.get(key)
                # Replacing the value keeps the key's place: the first change of a key decides when it is due.
                self._held[key] = (tier, held[1] if held else now + self._hold_s)

    def flush(self) -> None:
        """Make everything that is held due at once (drain, tests)."""
        self._urgent.update((key, tier) for key, (tier, _) in self._held.items())
        self._held.clear()

    def next_due(self) -> float | None:
        """When :meth:`poll` will next have something: a time that may be past; ``None`` when nothing is pending."""
        if self._urgent:
            return float("-inf")
        return next((due for _, due in self._held.values()), None)

    def poll(self, now: float, *, deltas_max: int = 64) -> list[Delta]:
        """Publish what is due, at most ``deltas_max`` deltas; what is left over comes out of the next call."""
        deltas: list[Delta] = []
        while len(deltas) < deltas_max and (batch := self._take(now)):
            deltas.append(self._publish(batch))
        return deltas

    def _take(self, now: float) -> dict[int, Tier]:
        batch: dict[int, Tier] = {}
        while self._urgent and len(batch) < self._keys_per_delta:
            key, tier = self._urgent.popitem(last=False)
            batch[key] = tier
        while self._held and len(batch) < self._keys_per_delta:
            key, (tier, due) = next(iter(self._held.items()))
            if due > now:
                break
            del self._held[key]
            batch[key] = tier
        return batch

    def _publish(self, batch: dict[int, Tier]) -> Delta:
        after: list[list[int]] = [[] for _ in Tier]
        for key, tier in batch.items():
            after[tier].append(key)
        groups = [pack_keys(keys) for keys in after]
        for tier in Tier:
            if groups[tier]:
                self._published.apply(_SELF, groups[tier], tier)
        self.seq += 1
        return Delta(self.epoch, self.seq, self.checksum, _trimmed(groups))

    def heartbeat(self) -> Delta:
        """The empty delta: where the log stands now."""
        return Delta(self.epoch, self.seq, self.checksum, [])

    def snapshot(self, *, keys_per_part: int = KEYS_PER_PART) -> Iterator[Snapshot]:
        """The published set as it is at this call, in bounded parts. Later changes do not reach the iterator.

        Holds 8 bytes per entry until the iterator is done with.
        """
        if not 1 <= keys_per_part <= DELTA_KEYS_BYTES_MAX // KEY_BYTES:
            raise InvalidArgument("keys_per_part out of range", keys_per_part=keys_per_part)
        runs = self._published.snapshot(_SELF)
        step = keys_per_part * KEY_BYTES
        pieces = [(tier, at) for tier, keys in runs for at in range(0, len(keys), step)]
        keys_of = dict(runs)
        epoch, seq, checksum, parts = self.epoch, self.seq, self.checksum, max(1, len(pieces))

        def part(i: int) -> Snapshot:
            groups = [b""] * _TIERS
            if pieces:
                tier, at = pieces[i]
                groups[tier] = keys_of[tier][at : at + step]
            return Snapshot(epoch, seq, checksum, i, parts, _trimmed(groups))

        return map(part, range(parts))


def _trimmed(groups: list[bytes]) -> list[bytes]:
    """Without the empty groups at the end: a heartbeat has none at all."""
    while groups and not groups[-1]:
        groups.pop()
    return groups


class Sync(enum.Enum):
    """How a replica stands to its owner's log."""

    EMPTY = "empty"  # nothing of this epoch has been heard
    SYNCED = "synced"
    GAP = "gap"  # deltas are missing
    DIVERGED = "diverged"  # all were applied, and yet the set is another one


class Outcome(enum.Enum):
    """What became of one message."""

    APPLIED = "applied"
    HEARTBEAT = "heartbeat"
    DUPLICATE = "duplicate"  # of what is known already
    STALE = "stale"  # from an epoch that has ended
    HELD = "held"  # kept until what is missing before it has come
    DIVERGED = "diverged"  # the checksum does not fit
    PARTIAL = "partial"  # a snapshot is on its way
    INSTALLED = "installed"
    REJECTED = "rejected"  # a complete snapshot whose checksum does not fit


class _Assembly:
    """The parts of one snapshot that have come so far."""

    def __init__(self, first: Snapshot) -> None:
        self.identity = (first.epoch, first.seq, first.checksum, first.parts)
        self.missing = set(range(first.parts))
        self.groups: list[tuple[Tier, bytes]] = []
        self.keys = 0
        self.checksum = 0

    def add(self, part: Snapshot) -> None:
        if part.part not in self.missing:
            return
        self.missing.discard(part.part)
        for tier, keys in zip(Tier, part.keys_by_tier, strict=False):
            if keys:
                self.groups.append((tier, keys))
                self.keys += len(keys) // KEY_BYTES
                self.checksum ^= entries_checksum(keys, tier)


class OwnerReplica:
    """What a reader keeps about one owner: its entries in the shared index, and how far it has followed the log.

    Feed it the owner's messages; send what :meth:`poll` returns. A message that no owner may send raises
    RemoteProtocolError and changes nothing, except that one which carries too many entries forgets them all.
    OutOfSpace of the index passes through.

    Args:
        index: where the entries go; this replica is the only writer of ``slot``.
        slot: the owner's slot there.
        entries_max: bound on the owner's entries.
        held_bytes_max: bound on deltas that wait for a gap to close; the oldest are dropped first.
        gap_wait_ms: how long a gap may close by itself (reordering) before a snapshot is asked for.
        retry_ms: wait for a snapshot before asking again; doubles up to ``retry_max_ms``.
    """

    def __init__(
        self,
        index: Index,
        slot: int,
        now: float,
        *,
        entries_max: int = ENTRIES_PER_OWNER_MAX,
        held_bytes_max: int = 8 << 20,
        gap_wait_ms: int = 20,
        retry_ms: int = 500,
        retry_max_ms: int = 8_000,
    ) -> None:
        self._index = index
        self.slot = slot
        self.epoch = 0
        self.seq = 0
        self.sync = Sync.EMPTY
        self.synced_at: float | None = None
        """When the replica was last proven equal to the owner's set: its age is ``now - synced_at``."""
        self._entries_max = entries_max
        self._held_bytes_max = held_bytes_max
        self._gap_wait_s = gap_wait_ms / 1000
        self._retry_min_s = retry_ms / 1000
        self._retry_max_s = retry_max_ms / 1000
        self._retry_s = self._retry_min_s
        # The owner sends a snapshot unasked when the connection is made: ask only when it does not come.
        self._ask_at = now + self._retry_s
        self._held: dict[int, Delta] = {}
        self._held_bytes = 0
        self._assembly: _Assembly | None = None

    def on_delta(self, delta: Delta, now: float) -> Outcome:
        """Take one DELTA (or heartbeat) of this owner."""
        _check_groups(delta.keys_by_tier)
        if delta.epoch < self.epoch:
            return Outcome.STALE
        if delta.epoch > self.epoch or self.sync is Sync.EMPTY:
            self._begin(delta.epoch, now)
        empty = not any(delta.keys_by_tier)
        if delta.seq < self.seq or (delta.seq == self.seq and not empty):
            return Outcome.DUPLICATE
        if delta.seq == self.seq:
            if self.sync is Sync.GAP:  # the heartbeat of before the gap, come late
                return Outcome.DUPLICATE
            outcome = self._compare(delta.checksum, now, Outcome.HEARTBEAT)
            self._apply_held(now)
            return outcome
        if empty:  # the log has moved on without us
            self._want(Sync.GAP, now + self._gap_wait_s)
            return Outcome.HELD
        if delta.seq > self.seq + 1 or self.sync is Sync.DIVERGED:
            self._hold(delta)
            self._want(Sync.GAP, now + self._gap_wait_s)
            return Outcome.HELD
        outcome = self._apply(delta, now)
        self._apply_held(now)
        return outcome

    def on_snapshot(self, part: Snapshot, now: float) -> Outcome:
        """Take one part of a SNAPSHOT of this owner, in any order."""
        _check_groups(part.keys_by_tier)
        if not 0 <= part.part < part.parts <= PARTS_MAX or (part.keys_by_tier and part.keys_by_tier[0]):
            raise RemoteProtocolError("malformed snapshot part", part=part.part, parts=part.parts)
        if part.epoch < self.epoch:
            return Outcome.STALE
        if part.epoch > self.epoch or self.sync is Sync.EMPTY:
            self._begin(part.epoch, now)
        if part.seq < self.seq or (part.seq == self.seq and self.sync is Sync.SYNCED):
            return Outcome.DUPLICATE
        self._want(Sync.GAP, now + self._retry_s)
        assembly = self._assembly
        if assembly is None or assembly.identity != (part.epoch, part.seq, part.checksum, part.parts):
            if assembly is not None and part.seq < assembly.identity[1]:
                return Outcome.DUPLICATE  # a straggler of a snapshot that a younger one has replaced
            assembly = self._assembly = _Assembly(part)
        assembly.add(part)
        self._bound(assembly.keys)
        if assembly.missing:
            self._ask_at = now + self._retry_s  # it is coming: do not ask for another
            return Outcome.PARTIAL
        self._assembly = None
        if assembly.checksum != part.checksum:
            return Outcome.REJECTED  # and asked for again when the wait is over
        self._index.replace(self.slot, assembly.groups)
        self.seq = part.seq
        outcome = self._compare(part.checksum, now, Outcome.INSTALLED)
        self._apply_held(now)
        return outcome

    def poll(self, now: float) -> Resync | None:
        """A request for a snapshot when one is due. Asking doubles the wait for the next time."""
        if self.sync is Sync.SYNCED or now < self._ask_at:
            return None
        self._ask_at = now + self._retry_s
        self._retry_s = min(self._retry_s * 2, self._retry_max_s)
        return Resync(self.seq, self.sync.value)

    def next_wakeup(self) -> float | None:
        """When :meth:`poll` must next be called; ``None`` while synced."""
        return None if self.sync is Sync.SYNCED else self._ask_at

    def forget(self, now: float) -> None:
        """The owner is gone for good (LEAVE, purge): drop its entries. The slot may then be given to another node.

        Forgets the epoch too: throw this replica away rather than feed it what a dead owner may still have under way.
        """
        self._index.remove_node(self.slot)
        self._reset(0, Sync.EMPTY, now + self._retry_min_s)
        self.synced_at = None

    # --- inside

    def _begin(self, epoch: int, now: float) -> None:
        """Rules 1 and 6: at seq 0 of any epoch the set is empty, and that is known without being told."""
        if self._index.count(self.slot):
            self._index.replace(self.slot, [])
        self._reset(epoch, Sync.SYNCED, now)
        self.synced_at = now

    def _reset(self, epoch: int, sync: Sync, ask_at: float) -> None:
        self.epoch = epoch
        self.seq = 0
        self.sync = sync
        self._retry_s = self._retry_min_s
        self._ask_at = ask_at
        self._held.clear()
        self._held_bytes = 0
        self._assembly = None

    def _apply(self, delta: Delta, now: float) -> Outcome:
        for tier, keys in zip(Tier, delta.keys_by_tier, strict=False):
            if keys:
                self._index.apply(self.slot, keys, tier)
        self.seq = delta.seq
        self._bound(self._index.count(self.slot))
        return self._compare(delta.checksum, now, Outcome.APPLIED)

    def _compare(self, checksum: int, now: float, good: Outcome) -> Outcome:
        """Rule 3, at the point where this replica stands."""
        if self._index.checksum(self.slot) != checksum:
            self._want(Sync.DIVERGED, now)
            return Outcome.DIVERGED
        self.sync = Sync.SYNCED
        self.synced_at = now
        self._retry_s = self._retry_min_s
        if self._assembly is not None and self._assembly.identity[1] <= self.seq:
            self._assembly = None  # overtaken by the deltas themselves
        return good

    def _want(self, sync: Sync, ask_at: float) -> None:
        """Not synced (any more). One that waits already keeps its time, so that more bad news cannot put it off."""
        if self.sync is Sync.SYNCED:
            self._ask_at = ask_at
        if self.sync is not Sync.DIVERGED:
            self.sync = sync

    def _hold(self, delta: Delta) -> None:
        if delta.seq in self._held:
            return
        self._held[delta.seq] = delta
        self._held_bytes += _weight(delta)
        while self._held_bytes > self._held_bytes_max:
            # The youngest are the ones that a snapshot will not contain.
            self._held_bytes -= _weight(self._held.pop(min(self._held)))

    def _apply_held(self, now: float) -> None:
        """Go on with what came early, for as far as it reaches without a hole."""
        for seq in sorted(self._held):
            if seq > self.seq + 1 or self.sync is Sync.DIVERGED:
                break
            delta = self._held.pop(seq)
            self._held_bytes -= _weight(delta)
            if seq == self.seq + 1:
                self._apply(delta, now)
        if self._held:
            self._want(Sync.GAP, now + self._gap_wait_s)

    def _bound(self, entries: int) -> None:
        if entries > self._entries_max:
            self.forget(float("inf"))  # the driver closes the connection; only a new one may bring it back
            raise RemoteProtocolError(
                "owner has more entries than allowed", limit=self._entries_max,
                hint="Raise the limit on every node of the cell, or advertise less.",
            )  # fmt: skip


def _weight(delta: Delta) -> int:
    return _DELTA_OVERHEAD_BYTES + sum(map(len, delta.keys_by_tier))


def _check_groups(keys_by_tier: list[bytes]) -> None:
    if len(keys_by_tier) > _TIERS or any(len(keys) % KEY_BYTES for keys in keys_by_tier):
        raise RemoteProtocolError("malformed groups of keys", groups=[len(keys) for keys in keys_by_tier])
