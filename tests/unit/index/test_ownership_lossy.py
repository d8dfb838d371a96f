"""A log over a channel that loses, repeats, reorders and corrupts: whenever the replica says it is synced, it is right.

Invariant 2 of the design: a replica's view of an owner at (epoch, seq) equals the owner's own set at that point.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pkv.index.hashing import unpack_keys
from p2pkv.index.ownership import OwnerReplica, OwnershipLog, Sync
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import MASK64, Tier
from p2pkv.wire.peer import Delta, Snapshot

pytestmark = pytest.mark.deep

SLOT = 1
KEYS = st.lists(st.sampled_from([0, MASK64, *range(1, 20)]), max_size=8)


class LossyLog(RuleBasedStateMachine):
    """The owner works, the channel misbehaves, the replica asks for repairs which the channel may lose as well."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.channel: list[Delta | Snapshot] = []
        self.truth: dict[tuple[int, int], dict[int, Tier]] = {}

    @initialize(native=st.booleans(), hold_ms=st.sampled_from([0, 200]), per_delta=st.integers(1, 4))
    def begin(self, native: bool, hold_ms: int, per_delta: int) -> None:
        self.settings = (hold_ms, per_delta)
        self.index: Index = PrefixIndex() if native else ReferenceIndex()
        self.replica = OwnerReplica(self.index, SLOT, self.now)
        self.start_owner(1)

    def start_owner(self, epoch: int) -> None:
        hold_ms, per_delta = self.settings
        self.log = OwnershipLog(epoch, hold_ms=hold_ms, keys_per_delta=per_delta)
        self.published: dict[int, Tier] = {}
        self.truth[epoch, 0] = {}

    def publish(self) -> None:
        for delta in self.log.poll(self.now):
            for tier, keys in zip(Tier, delta.keys_by_tier, strict=False):
                for key in unpack_keys(keys):
                    self.published.pop(key, None)
                    if tier is not Tier.GONE:
                        self.published[key] = tier
            self.truth[delta.epoch, delta.seq] = dict(self.published)
            self.channel.append(delta)

    @rule(keys=KEYS, tier=st.sampled_from(list(Tier)), urgent=st.booleans())
    def owner_changes(self, keys: list[int], tier: Tier, urgent: bool) -> None:
        self.log.record(keys, tier, self.now, urgent=urgent)
        self.publish()

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.publish()
        self.channel.append(self.log.heartbeat())
        if self.replica.poll(self.now):
            self.channel += self.log.snapshot(keys_per_part=3)

    @rule()
    def owner_restarts(self) -> None:
        self.start_owner(self.log.epoch + 1)
        self.channel.append(self.log.heartbeat())

    def deliver(self, message: Delta | Snapshot) -> None:
        if isinstance(message, Delta):
            self.replica.on_delta(message, self.now)
        else:
            self.replica.on_snapshot(message, self.now)

    @precondition(lambda self: self.channel)
    @rule(data=st.data())
    def channel_delivers_any(self, data: st.DataObject) -> None:
        self.deliver(self.channel.pop(data.draw(st.integers(0, len(self.channel) - 1))))

    @precondition(lambda self: self.channel)
    @rule(count=st.integers(1, 10))
    def channel_delivers_in_order(self, count: int) -> None:
        for message in self.channel[:count]:
            self.deliver(message)
        del self.channel[:count]

    @precondition(lambda self: self.channel)
    @rule(data=st.data())
    def channel_repeats(self, data: st.DataObject) -> None:
        self.channel.insert(0, data.draw(st.sampled_from(self.channel)))

    @precondition(lambda self: self.channel)
    @rule(count=st.integers(1, 5))
    def channel_loses(self, count: int) -> None:
        del self.channel[:count]

    @precondition(lambda self: self.channel)
    @rule(data=st.data(), tier=st.sampled_from(list(Tier)[1:]))
    def channel_corrupts(self, data: st.DataObject, tier: Tier) -> None:
        """The keys of a message, in a way that still decodes: only the checksum can tell."""
        at = data.draw(st.integers(0, len(self.channel) - 1))
        message = self.channel[at]
        if any(message.keys_by_tier):
            groups = [b""] * len(Tier)
            groups[tier] = (77).to_bytes(8, "little")
            self.channel[at] = msgspec.structs.replace(message, keys_by_tier=groups)

    def view(self) -> dict[int, Tier]:
        return {key: tier for tier, keys in self.index.snapshot(SLOT) for key in unpack_keys(keys)}

    @invariant()
    def a_synced_replica_is_right(self) -> None:
        if hasattr(self, "replica") and self.replica.sync is Sync.SYNCED:
            assert self.view() == self.truth[self.replica.epoch, self.replica.seq]

    def teardown(self) -> None:
        """When the channel behaves again, the replica catches up within three requests."""
        if not hasattr(self, "replica"):
            return
        self.channel.clear()
        self.log.flush()
        self.publish()
        for _ in range(3):
            self.channel.append(self.log.heartbeat())
            while self.channel:
                self.deliver(self.channel.pop(0))
            self.now += 10
            if self.replica.poll(self.now):
                self.channel += self.log.snapshot(keys_per_part=3)
        assert self.replica.sync is Sync.SYNCED
        assert (self.replica.epoch, self.replica.seq) == (self.log.epoch, self.log.seq)
        assert self.view() == self.published


TestLossyLog = LossyLog.TestCase
TestLossyLog.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
