"""Ownership logs by examples: what an owner says and when."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import InvalidArgument
from p2pkv.index.hashing import entries_checksum, pack_keys, unpack_keys
from p2pkv.index.ownership import Delta, OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier


def entries(delta: Delta) -> list[tuple[Tier, list[int]]]:
    return [(tier, sorted(unpack_keys(k))) for tier, k in zip(Tier, delta.keys_by_tier, strict=False) if k]


def log_with(keys: Iterable[int], tier: Tier = Tier.DRAM, epoch: int = 1) -> tuple[OwnershipLog, list[Delta]]:
    log = OwnershipLog(epoch)
    log.record(keys, tier, 0.0, urgent=True)
    return log, log.poll(0.0)


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


def test_settings_of_a_log_are_checked() -> None:
    for bad in ({"hold_ms": -1}, {"keys_per_delta": 0}, {"keys_per_delta": 157}):
        with pytest.raises(InvalidArgument):
            OwnershipLog(1, **bad)


def test_a_log_that_begins_anew_tells_all_that_it_has_once_more() -> None:
    log, _ = log_with([1, 2, 3])
    log.record([4], Tier.SSD, 1.0)  # held
    log.record([2], Tier.SSD, 1.0)  # held, and published as something else
    log.record([3], Tier.GONE, 1.0, urgent=True)  # not told yet
    log.restart(9)
    assert (log.epoch, log.seq, len(log), log.checksum) == (9, 0, 0, 0)
    (delta,) = log.poll(1.0)
    assert (delta.epoch, delta.seq) == (9, 1)
    assert entries(delta) == [(Tier.DRAM, [1]), (Tier.SSD, [2])]
    assert entries(log.poll(1.2)[0]) == [(Tier.SSD, [4])]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(list(Tier)), st.booleans(), st.floats(0, 0.3))),
    st.booleans(),
)
def test_the_deltas_of_a_log_add_up_to_the_last_words_on_every_key(
    words: list[tuple[int, Tier, bool, float]], anew: bool
) -> None:
    """Whoever applies them in order has what was recorded last, and the checksum that each says."""
    log, told, last, now = OwnershipLog(1, keys_per_delta=3), PrefixIndex(max_nodes=1), {}, 0.0

    def hear(deltas: list[Delta]) -> None:
        for delta in deltas:
            for tier, keys in zip(Tier, delta.keys_by_tier, strict=False):
                told.apply(0, keys, tier)
            assert told.checksum(0) == delta.checksum

    for key, tier, urgent, wait in words:
        log.record([key], tier, now, urgent=urgent)
        last[key] = tier
        now += wait
        hear(log.poll(now, deltas_max=2))
    if anew:
        log.restart(2)
        told.remove_node(0)
    log.flush()
    while deltas := log.poll(now):
        hear(deltas)
    found = {key: tier for tier, keys in told.snapshot(0) for key in unpack_keys(keys)}
    assert found == {key: tier for key, tier in last.items() if tier is not Tier.GONE}
