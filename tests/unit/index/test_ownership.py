"""Ownership logs by examples: what an owner says and when, and what a reader makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import pytest

from p2pkv.errors import InvalidArgument, RemoteProtocolError
from p2pkv.index.hashing import entries_checksum, pack_keys, unpack_keys
from p2pkv.index.ownership import Outcome, OwnerReplica, OwnershipLog, Sync
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Tier
from p2pkv.wire.peer import CODEC, Delta, Resync, Snapshot

SLOT = 3


def contents(index: Index) -> dict[int, Tier]:
    return {key: tier for tier, keys in index.snapshot(SLOT) for key in unpack_keys(keys)}


def entries(delta: Delta | Snapshot) -> list[tuple[Tier, list[int]]]:
    return [(tier, sorted(unpack_keys(k))) for tier, k in zip(Tier, delta.keys_by_tier, strict=False) if k]


def log_with(keys: Iterable[int], tier: Tier = Tier.DRAM, epoch: int = 1) -> tuple[OwnershipLog, list[Delta]]:
    log = OwnershipLog(epoch)
    log.record(keys, tier, 0.0, urgent=True)
    return log, log.poll(0.0)


# --- the owner


def test_a_change_is_held_200_ms_from_the_first_change_of_its_key() -> None:
    log = OwnershipLog(1)
    log.record([7], Tier.DRAM, 10.0)
    log.record([7], Tier.SSD, 10.15)
    assert log.next_due() == pytest.approx(10.2)
    assert log.poll(10.19) == []
    (delta,) = log.poll(10.2)
    assert entries(delta) == [(Tier.SSD, [7])]
    assert (delta.epoch, delta.seq) == (1, 1)
    assert log.next_due() is None


def test_what_comes_and_goes_within_the_hold_is_never_mentioned() -> None:
    log = OwnershipLog(1)
    log.record([7], Tier.DRAM, 0.0)
    log.record([7], Tier.GONE, 0.1)
    assert log.poll(1.0) == []
    assert (log.seq, log.next_due()) == (0, None)


def test_urgent_changes_do_not_wait_and_take_what_was_held_of_the_key_with_them() -> None:
    log, _ = log_with([7])
    log.record([7], Tier.SSD, 1.0)
    log.record([7], Tier.GONE, 1.01, urgent=True)
    log.record([8], Tier.DRAM, 1.02)
    assert log.next_due() == float("-inf")
    (delta,) = log.poll(1.02)
    assert entries(delta) == [(Tier.GONE, [7])]
    assert log.tier_of(7) is Tier.GONE
    log.flush()
    assert entries(log.poll(1.03)[0]) == [(Tier.DRAM, [8])]


def test_deltas_are_bounded_and_what_is_left_comes_next() -> None:
    log = OwnershipLog(1, keys_per_delta=10)
    log.record(range(35), Tier.DRAM, 0.0, urgent=True)
    first = log.poll(0.0, deltas_max=2)
    rest = log.poll(0.0)
    assert [len(d.keys_by_tier[Tier.DRAM]) // 8 for d in first + rest] == [10, 10, 10, 5]
    assert [d.seq for d in first + rest] == [1, 2, 3, 4]


def test_the_checksum_is_that_of_the_set_after_the_delta() -> None:
    log, (one,) = log_with([1, 2, 3])
    assert one.checksum == entries_checksum(pack_keys([1, 2, 3]), Tier.DRAM)
    log.record([2], Tier.GONE, 1.0, urgent=True)
    log.record([3], Tier.SSD, 1.0, urgent=True)
    (two,) = log.poll(1.0)
    assert two.checksum == entries_checksum(pack_keys([1]), Tier.DRAM) ^ entries_checksum(pack_keys([3]), Tier.SSD)
    assert len(log) == 2
    log.record([1, 3], Tier.GONE, 2.0, urgent=True)
    assert log.poll(2.0)[0].checksum == 0


def test_a_heartbeat_is_an_empty_delta_at_the_current_seq() -> None:
    log, (delta,) = log_with([1])
    assert log.heartbeat() == Delta(1, 1, delta.checksum, [])


def test_a_snapshot_is_of_the_moment_it_was_asked_for_in_bounded_parts() -> None:
    log, (delta,) = log_with(range(25))
    log.record([100, 101], Tier.SSD, 0.0, urgent=True)
    log.poll(0.0)
    log.record([200], Tier.HBM, 0.0)  # held: not published, not in it
    parts = log.snapshot(keys_per_part=10)
    log.record(range(25), Tier.GONE, 1.0, urgent=True)
    log.poll(1.0)
    parts = list(parts)
    assert [(p.part, p.parts, p.seq) for p in parts] == [(0, 4, 2), (1, 4, 2), (2, 4, 2), (3, 4, 2)]
    assert max(sum(map(len, p.keys_by_tier)) for p in parts) == 80
    assert sorted(key for p in parts for _, keys in entries(p) for key in keys) == [*range(25), 100, 101]
    assert delta.checksum != parts[0].checksum


def test_an_empty_log_has_a_snapshot_of_one_empty_part() -> None:
    assert list(OwnershipLog(9).snapshot()) == [Snapshot(9, 0, 0, 0, 1, [])]


def test_what_an_owner_says_fits_the_wire() -> None:
    log = OwnershipLog(2**32 - 1, keys_per_delta=65_536)
    log.record(range(65_536), Tier.SHARED, 0.0, urgent=True)
    (delta,) = log.poll(0.0)
    messages = [delta, log.heartbeat(), *log.snapshot(keys_per_part=65_536)]
    for message in messages:
        body = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(body, type=type(message)) == message
        assert len(CODEC.encode(message)) < 1 << 20


def test_settings_of_a_log_are_checked() -> None:
    for bad in ({"hold_ms": -1}, {"keys_per_delta": 0}, {"keys_per_delta": 65_537}):
        with pytest.raises(InvalidArgument):
            OwnershipLog(1, **bad)
    with pytest.raises(InvalidArgument):
        OwnershipLog(1).snapshot(keys_per_part=0)


# --- the reader


@pytest.fixture(params=[PrefixIndex, ReferenceIndex])
def index(request: pytest.FixtureRequest) -> Index:
    make: Callable[[], Index] = request.param
    return make()


@pytest.fixture
def replica(index: Index) -> OwnerReplica:
    return OwnerReplica(index, SLOT, 0.0)


def feed_snapshot(replica: OwnerReplica, log: OwnershipLog, now: float) -> list[Outcome]:
    return [replica.on_snapshot(part, now) for part in log.snapshot(keys_per_part=10)]


def test_a_log_followed_from_its_start_needs_no_snapshot(index: Index, replica: OwnerReplica) -> None:
    log, deltas = log_with(range(5))
    log.record([1], Tier.SSD, 0.0, urgent=True)
    deltas += log.poll(0.0)
    assert [replica.on_delta(d, 1.0) for d in deltas] == [Outcome.APPLIED, Outcome.APPLIED]
    assert replica.on_delta(log.heartbeat(), 2.0) is Outcome.HEARTBEAT
    assert contents(index) == {0: Tier.DRAM, 1: Tier.SSD, 2: Tier.DRAM, 3: Tier.DRAM, 4: Tier.DRAM}
    assert (replica.sync, replica.seq, replica.synced_at, replica.next_wakeup()) == (Sync.SYNCED, 2, 2.0, None)
    assert replica.poll(1e9) is None


def test_a_late_joiner_is_synced_by_the_snapshot_and_follows_from_there(index: Index, replica: OwnerReplica) -> None:
    log, _ = log_with(range(35))
    assert feed_snapshot(replica, log, 1.0) == [Outcome.PARTIAL] * 3 + [Outcome.INSTALLED]
    log.record([50], Tier.HBM, 1.0, urgent=True)
    assert replica.on_delta(log.poll(1.0)[0], 1.0) is Outcome.APPLIED
    assert contents(index) == {50: Tier.HBM} | dict.fromkeys(range(35), Tier.DRAM)


def test_an_owner_with_nothing_is_synced_at_once(replica: OwnerReplica) -> None:
    assert replica.sync is Sync.EMPTY
    assert replica.on_delta(OwnershipLog(1).heartbeat(), 1.0) is Outcome.HEARTBEAT
    assert replica.sync is Sync.SYNCED


def test_an_owner_that_says_nothing_is_asked(replica: OwnerReplica) -> None:
    assert replica.poll(0.4) is None
    assert replica.next_wakeup() == pytest.approx(0.5)
    assert replica.poll(0.5) == Resync(0, "empty")


def test_deltas_out_of_order_wait_and_are_applied_when_the_gap_closes(index: Index, replica: OwnerReplica) -> None:
    log = OwnershipLog(1, keys_per_delta=1)
    log.record(range(4), Tier.DRAM, 0.0, urgent=True)
    a, b, c, d = log.poll(0.0)
    assert replica.on_delta(a, 1.0) is Outcome.APPLIED
    assert replica.on_delta(d, 1.0) is Outcome.HELD
    assert replica.on_delta(c, 1.0) is Outcome.HELD
    assert replica.sync is Sync.GAP
    assert replica.poll(1.01) is None  # it may still close
    assert replica.on_delta(b, 1.015) is Outcome.APPLIED
    assert (replica.sync, replica.seq, len(contents(index))) == (Sync.SYNCED, 4, 4)
    assert replica.on_delta(c, 1.02) is Outcome.DUPLICATE


def test_a_gap_that_stays_asks_for_a_snapshot_and_asks_again_more_and_more_slowly(replica: OwnerReplica) -> None:
    log = OwnershipLog(1, keys_per_delta=1)
    log.record(range(3), Tier.DRAM, 0.0, urgent=True)
    a, _, c = log.poll(0.0)
    replica.on_delta(a, 1.0)
    replica.on_delta(c, 1.0)
    asked = []
    for _ in range(6):
        now = replica.next_wakeup()
        assert now is not None
        assert replica.poll(now - 0.001) is None
        assert replica.poll(now) == Resync(1, "gap")
        asked.append(round(now, 2))
    assert asked == [1.02, 1.52, 2.52, 4.52, 8.52, 16.52]  # 20 ms to close by itself, then doubling, at most 8 s
    assert feed_snapshot(replica, log, 17.0)[-1] is Outcome.INSTALLED
    assert replica.next_wakeup() is None


def test_a_heartbeat_shows_that_the_last_delta_was_lost(replica: OwnerReplica) -> None:
    log, (delta,) = log_with([1])
    replica.on_delta(delta, 1.0)
    log.record([2], Tier.DRAM, 1.0, urgent=True)
    log.poll(1.0)
    assert replica.on_delta(log.heartbeat(), 2.0) is Outcome.HELD
    assert replica.poll(2.02) == Resync(1, "gap")
    assert feed_snapshot(replica, log, 2.1) == [Outcome.INSTALLED]


def test_deltas_that_come_between_the_parts_of_a_snapshot_are_not_lost(index: Index, replica: OwnerReplica) -> None:
    log, _ = log_with(range(25))
    parts = list(log.snapshot(keys_per_part=10))
    log.record([3], Tier.GONE, 1.0, urgent=True)
    (delta,) = log.poll(1.0)
    assert replica.on_snapshot(parts[0], 1.0) is Outcome.PARTIAL
    assert replica.on_delta(delta, 1.0) is Outcome.HELD
    assert replica.on_snapshot(parts[2], 1.0) is Outcome.PARTIAL
    assert replica.on_snapshot(parts[1], 1.0) is Outcome.INSTALLED
    assert (replica.seq, replica.sync, 3 in contents(index)) == (2, Sync.SYNCED, False)


def test_a_snapshot_under_way_is_not_asked_for_again(replica: OwnerReplica) -> None:
    log, _ = log_with(range(35))
    for i, part in enumerate(log.snapshot(keys_per_part=10)):
        assert replica.poll(0.3 * i) is None
        replica.on_snapshot(part, 0.3 * i)
    assert replica.sync is Sync.SYNCED


def test_parts_of_two_snapshots_are_not_mixed(index: Index, replica: OwnerReplica) -> None:
    log, _ = log_with(range(20))
    old = list(log.snapshot(keys_per_part=10))
    log.record([5], Tier.GONE, 1.0, urgent=True)
    log.poll(1.0)
    new = list(log.snapshot(keys_per_part=10))
    assert replica.on_snapshot(old[0], 1.0) is Outcome.PARTIAL
    assert replica.on_snapshot(new[1], 1.0) is Outcome.PARTIAL
    assert replica.on_snapshot(old[1], 1.0) is Outcome.DUPLICATE
    assert replica.on_snapshot(new[0], 1.0) is Outcome.INSTALLED
    assert set(contents(index)) == set(range(20)) - {5}


def test_a_snapshot_with_a_wrong_checksum_changes_nothing_and_another_is_asked_for(
    index: Index, replica: OwnerReplica
) -> None:
    log, (delta,) = log_with(range(3))
    replica.on_delta(delta, 0.0)
    log.record([9], Tier.DRAM, 0.0, urgent=True)
    log.poll(0.0)
    (part,) = log.snapshot()
    forged = msgspec.structs.replace(part, keys_by_tier=[b"", b"", pack_keys([0, 1, 2, 8])])
    assert replica.on_snapshot(forged, 1.0) is Outcome.REJECTED
    assert set(contents(index)) == {0, 1, 2}
    assert replica.poll(2.0) == Resync(1, "gap")
    assert replica.on_snapshot(part, 2.1) is Outcome.INSTALLED


def test_a_diverged_replica_asks_at_once_and_keeps_its_entries_as_a_hint(index: Index, replica: OwnerReplica) -> None:
    log, (delta,) = log_with(range(3))
    replica.on_delta(delta, 1.0)
    index.apply(SLOT, pack_keys([1]), Tier.GONE)  # a bug, a cosmic ray
    assert replica.on_delta(log.heartbeat(), 2.0) is Outcome.DIVERGED
    assert (replica.sync, replica.synced_at) == (Sync.DIVERGED, 1.0)
    assert set(contents(index)) == {0, 2}
    assert replica.poll(2.0) == Resync(1, "diverged")
    log.record([4], Tier.DRAM, 2.0, urgent=True)
    (later,) = log.poll(2.0)
    (repair,) = log.snapshot()
    assert replica.on_delta(later, 2.1) is Outcome.HELD
    assert replica.on_snapshot(repair, 2.2) is Outcome.INSTALLED
    assert (set(contents(index)), replica.sync, replica.seq) == ({0, 1, 2, 4}, Sync.SYNCED, 2)


def test_an_entry_named_twice_cannot_pass_as_a_good_snapshot(index: Index, replica: OwnerReplica) -> None:
    """XOR cannot see what stands there twice; the index, which keeps one tier per key, can."""
    keys = pack_keys([1, 1, 1])
    forged = Snapshot(1, 5, entries_checksum(pack_keys([1]), Tier.DRAM) ^ 0, 0, 1, [b"", b"", keys])
    assert replica.on_snapshot(forged, 0.0) is Outcome.INSTALLED  # three times the same: truly that set
    both = entries_checksum(pack_keys([2]), Tier.DRAM) ^ entries_checksum(pack_keys([2]), Tier.SSD)
    forged = Snapshot(1, 6, both, 0, 1, [b"", b"", pack_keys([2]), pack_keys([2])])
    assert replica.on_snapshot(forged, 0.0) is Outcome.DIVERGED


def test_a_new_epoch_voids_what_the_old_one_had(index: Index, replica: OwnerReplica) -> None:
    log, (delta,) = log_with(range(3))
    replica.on_delta(delta, 1.0)
    reborn, (again,) = log_with([7], epoch=2)
    assert replica.on_delta(again, 2.0) is Outcome.APPLIED
    assert (contents(index), replica.epoch) == ({7: Tier.DRAM}, 2)
    assert replica.on_delta(log.heartbeat(), 3.0) is Outcome.STALE
    assert feed_snapshot(replica, log, 3.0) == [Outcome.STALE]
    assert replica.on_delta(reborn.heartbeat(), 3.0) is Outcome.HEARTBEAT


def test_a_repeated_snapshot_of_what_is_known_changes_nothing(replica: OwnerReplica) -> None:
    log, _ = log_with(range(3))
    assert feed_snapshot(replica, log, 1.0) == [Outcome.INSTALLED]
    assert feed_snapshot(replica, log, 1.0) == [Outcome.DUPLICATE]


def test_forgetting_an_owner_leaves_nothing(index: Index, replica: OwnerReplica) -> None:
    _, (delta,) = log_with(range(3))
    replica.on_delta(delta, 1.0)
    index.hide(SLOT, True)
    replica.forget(2.0)
    assert (index.count(SLOT), replica.sync, replica.epoch) == (0, Sync.EMPTY, 0)


@pytest.mark.parametrize(
    "message",
    [
        Delta(1, 1, 0, [b"", b"1234567"]),
        Delta(1, 1, 0, [b""] * 6),
        Snapshot(1, 1, 0, 0, 1, [b"12345678"]),
        Snapshot(1, 1, 0, 1, 1, []),
        Snapshot(1, 1, 0, 0, 0, []),
        Snapshot(1, 1, 0, 0, 1 << 17, []),
    ],
)
def test_what_no_owner_may_say_is_an_error_and_changes_nothing(
    index: Index, replica: OwnerReplica, message: Delta | Snapshot
) -> None:
    with pytest.raises(RemoteProtocolError):
        replica.on_delta(message, 1.0) if isinstance(message, Delta) else replica.on_snapshot(message, 1.0)
    assert (replica.sync, replica.epoch, index.count(SLOT)) == (Sync.EMPTY, 0, 0)


def test_an_owner_with_too_many_entries_is_thrown_out(index: Index) -> None:
    log, (delta,) = log_with(range(11))
    replica = OwnerReplica(index, SLOT, 0.0, entries_max=10)
    with pytest.raises(RemoteProtocolError, match="more entries"):
        replica.on_delta(delta, 1.0)
    assert index.count(SLOT) == 0
    with pytest.raises(RemoteProtocolError, match="more entries"):
        feed_snapshot(replica, log, 1.0)
    assert index.count(SLOT) == 0


def test_held_deltas_are_bounded_and_the_oldest_go_first(index: Index) -> None:
    log = OwnershipLog(1, keys_per_delta=1)
    log.record(range(10), Tier.DRAM, 0.0, urgent=True)
    deltas = log.poll(0.0)
    (snapshot,) = log.snapshot()
    log.record(range(100, 200), Tier.DRAM, 1.0, urgent=True)
    later = log.poll(1.0, deltas_max=100)
    replica = OwnerReplica(index, SLOT, 0.0, held_bytes_max=520 * 100)
    for delta in [*deltas[1:], *later]:
        assert replica.on_delta(delta, 1.0) is Outcome.HELD
    assert replica.on_snapshot(snapshot, 2.0) is Outcome.INSTALLED
    assert (replica.seq, replica.sync, len(contents(index))) == (110, Sync.SYNCED, 110)
