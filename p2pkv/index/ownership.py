"""A node's own ownership log: what it tells the others about its blocks. Sans-IO.

A log is a sequence of deltas over a set of (key, tier) entries. One writer, so no merging: at the start of an epoch the
set is empty and seq is 0; every delta raises seq by one and carries the checksum of the set after it; a key occurs once
in a delta. What others make of it is the gossip core's (``p2pkv/gossip/core/replica.hpp``).

``now`` is in seconds, monotonic. Not thread-safe: one event loop owns a log.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from p2pkv.errors import InvalidArgument
from p2pkv.index.hashing import pack_keys, unpack_keys
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

HOLD_MS: Final = 200
"""How long a change waits for others of the same key. Blocks that live shorter than this are never advertised."""

KEYS_PER_DELTA: Final = 156
"""What fits a frame of the gossip (``p2pkv/gossip/core/messages.hpp``)."""

_SELF: Final = 0
_TIER_MASK: Final = 0xFF
"""Of an entry of :class:`p2pkv.index.prefix.Holders`."""


class Delta(NamedTuple):
    """The next batch of a log. ``checksum`` is that of the set after it; keys are packed little-endian u64."""

    epoch: int
    seq: int
    checksum: int
    keys_by_tier: list[bytes]  # index = Tier; 0 = gone


class OwnershipLog:
    """This node's own log: record what happens to blocks, send what :meth:`poll` returns to every reader in order.

    Args:
        epoch: grows at every start of this node.
        hold_ms: how long a change is held back so that changes of one key become one; counted from the first of them.
        keys_per_delta: bound on the keys of one delta.
    """

    def __init__(self, epoch: int, *, hold_ms: int = HOLD_MS, keys_per_delta: int = KEYS_PER_DELTA) -> None:
        if hold_ms < 0 or not 1 <= keys_per_delta <= KEYS_PER_DELTA:
            raise InvalidArgument("hold or delta size out of range", hold_ms=hold_ms, keys_per_delta=keys_per_delta)
        self.epoch = epoch
        self.seq = 0
        self._hold_s = hold_ms / 1000
        self._keys_per_delta = keys_per_delta
        # Native: some 17 bytes an entry, its checksum kept as it changes, no pause as it grows.
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

    def restart(self, epoch: int) -> None:
        """Begin anew in a later epoch: the set is empty, and all that was in it is due at once."""
        before = self._published.snapshot(_SELF)
        self._published.remove_node(_SELF)
        self.epoch = epoch
        self.seq = 0
        for tier, keys in before:
            for key in unpack_keys(keys):
                held = self._held.pop(key, None)  # a later word on it stands
                self._urgent.setdefault(key, held[0] if held is not None else tier)
        # What is gone before it was ever told needs no word.
        for key in [key for key, tier in self._urgent.items() if tier is Tier.GONE]:
            del self._urgent[key]

    @property
    def entries(self) -> object:
        """The published set, for native code: slot 0 of a capsule as :attr:`PrefixIndex.entries` gives it."""
        return self._published.entries


def _trimmed(groups: list[bytes]) -> list[bytes]:
    """Without the empty groups at the end: a heartbeat has none at all."""
    while groups and not groups[-1]:
        groups.pop()
    return groups
