"""LeaseTable: a lease ends exactly once, on time, and says truthfully whether it held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import Busy, InvalidArgument
from p2pkv.store.base import LeaseLimits
from p2pkv.store.lease import CountedBits, Lease, LeaseTable


class Ended(list[Lease[str]]):
    """Collects what ``on_end`` was told."""

    def ids(self) -> list[int]:
        return [lease.lease_id for lease in self]


def table(ended: Ended | None = None, seed: int = 1, **limits: float) -> LeaseTable[str]:
    sink = Ended() if ended is None else ended
    return LeaseTable(LeaseLimits(**limits), random.Random(seed), sink.append)  # type: ignore[arg-type]


def test_a_lease_released_in_time_held_all_along() -> None:
    ended = Ended()
    leases = table(ended)
    lease = leases.grant("peer", ["a", "b"], 2, 5.0, now=100.0)
    assert lease.expires_at == 105.0
    assert leases.pins() == ["a", "b"]
    assert leases.release(lease.lease_id, now=104.999)
    assert ended.ids() == [lease.lease_id]
    assert len(leases) == 0


@pytest.mark.parametrize("late_s", [0.0, 0.001, 1e9])
def test_a_lease_released_at_its_expiry_or_later_did_not_hold_but_ends(late_s: float) -> None:
    ended = Ended()
    leases = table(ended)
    lease = leases.grant("peer", ["a"], 1, 5.0, now=100.0)
    assert not leases.release(lease.lease_id, now=105.0 + late_s)
    assert ended.ids() == [lease.lease_id]


def test_a_lease_cannot_be_released_twice_nor_after_it_expired_nor_made_up() -> None:
    ended = Ended()
    leases = table(ended)
    first = leases.grant("peer", ["a"], 1, 5.0, now=0.0)
    second = leases.grant("peer", ["b"], 1, 5.0, now=0.0)
    assert leases.release(first.lease_id, 1.0)
    assert not leases.release(first.lease_id, 1.0)
    assert leases.expire(5.0) == [second]
    assert not leases.release(second.lease_id, 1.0)  # even if the clock were wrong
    assert not leases.release(0, 1.0)
    assert not leases.release(12345, 1.0)
    assert ended.ids() == [first.lease_id, second.lease_id]


def test_only_its_holder_can_end_a_lease_when_the_holder_is_named() -> None:
    leases = table()
    lease = leases.grant("a", ["x"], 1, 5.0, now=0.0)
    assert not leases.release(lease.lease_id, 1.0, "b")
    assert len(leases) == 1
    assert leases.release(lease.lease_id, 1.0, "a")


def test_leases_expire_in_order_whatever_the_order_they_were_granted_in() -> None:
    leases = table()
    ttls = [9.0, 3.0, 7.0, 1.0, 5.0]
    ids = {ttl: leases.grant("peer", [str(ttl)], 1, ttl, now=0.0).lease_id for ttl in ttls}
    assert leases.next_expiry() == 1.0
    assert leases.expire(0.999) == []
    assert [lease.lease_id for lease in leases.expire(5.0)] == [ids[1.0], ids[3.0], ids[5.0]]
    assert leases.expired_total == 3
    assert leases.next_expiry() == 7.0
    leases.check_integrity()


def test_ttl_is_clamped_to_the_limits() -> None:
    leases = table(ttl_min_s=0.5, ttl_max_s=30.0)
    for asked, granted in [(-1.0, 0.5), (0.0, 0.5), (3.0, 3.0), (1e9, 30.0), (float("nan"), 30.0)]:
        assert leases.grant("p", ["a"], 1, asked, now=0.0).expires_at == granted


def test_a_holder_is_bounded_in_leases_and_in_bytes_and_gets_its_room_back() -> None:
    leases = table(leases_per_holder_max=2, bytes_per_holder_max=100)
    assert leases.room("p") == 100
    first = leases.grant("p", ["a"], 60, 5.0, now=0.0)
    assert leases.room("p") == 40
    with pytest.raises(Busy):
        leases.grant("p", ["b"], 41, 5.0, now=0.0)
    leases.grant("p", ["b"], 10, 5.0, now=0.0)
    assert leases.room("p") == 0  # two leases are all it may have, whatever their bytes
    with pytest.raises(Busy):
        leases.grant("p", ["c"], 1, 5.0, now=0.0)
    assert leases.room("q") == 100
    leases.release(first.lease_id, 1.0)
    assert leases.room("p") == 90
    leases.expire(5.0)
    assert leases.room("p") == 100
    leases.check_integrity()


def test_all_holders_together_are_bounded() -> None:
    leases = table(leases_max=3)
    for holder in "abc":
        leases.grant(holder, ["x"], 1, 5.0, now=0.0)
    assert leases.room("d") == 0
    with pytest.raises(Busy):
        leases.grant("d", ["x"], 1, 5.0, now=0.0)


def test_a_holder_that_is_gone_loses_all_its_leases_and_no_others() -> None:
    ended = Ended()
    leases = table(ended)
    mine = [leases.grant("a", ["x"], 1, 5.0, now=0.0).lease_id for _ in range(3)]
    other = leases.grant("b", ["y"], 1, 5.0, now=0.0)
    assert leases.release_holder("a") == 3
    assert leases.release_holder("a") == 0
    assert sorted(ended.ids()) == sorted(mine)
    assert leases.pins() == ["y"]
    assert leases.release(other.lease_id, 1.0)


def test_ids_are_never_zero_nor_in_use_and_come_from_the_given_rng() -> None:
    class Scripted(random.Random):
        """Says 0, then 7, then 7 again, then 8."""

        script = iter((0, 7, 7, 8))

        def getrandbits(self, k: int, /) -> int:
            assert k == 64
            return next(self.script)

    leases: LeaseTable[str] = LeaseTable(LeaseLimits(), Scripted(), Ended().append)
    assert [leases.grant("p", ["a"], 1, 5.0, now=0.0).lease_id for _ in range(2)] == [7, 8]


def test_without_randomness_ids_are_still_distinct() -> None:
    bits = CountedBits()
    drawn = {bits.getrandbits(64) for _ in range(10_000)}
    assert len(drawn) == 10_000
    assert all(0 < each < 1 << 64 for each in drawn)


def test_releasing_leaves_no_trail_of_expiry_entries() -> None:
    leases = table()
    for _ in range(10_000):
        leases.release(leases.grant("p", ["a"], 1, 30.0, now=0.0).lease_id, 1.0)
    assert leases.next_expiry() in (None, 30.0)
    leases.check_integrity()  # bounds the heap by the leases in force


@pytest.mark.parametrize(
    "limits", [{"ttl_min_s": 0.0}, {"ttl_min_s": 2.0, "ttl_max_s": 1.0}, {"leases_max": 0}, {"bytes_per_holder_max": 0}]
)
def test_limits_that_contradict_themselves_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        table(**limits)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("grant"), st.sampled_from("abc"), st.floats(0.05, 30.0)),
            st.tuples(st.just("release"), st.integers(0, 40), st.booleans()),
            st.tuples(st.just("wait"), st.floats(0.0, 10.0), st.none()),
            st.tuples(st.just("expire"), st.none(), st.none()),
            st.tuples(st.just("gone"), st.sampled_from("abc"), st.none()),
        ),
        max_size=80,
    )
)
def test_the_table_agrees_with_a_plain_list_of_leases(ops: list[tuple[str, object, object]]) -> None:
    ended = Ended()
    leases = table(ended)
    now = 0.0
    granted: list[Lease[str]] = []
    model: dict[int, Lease[str]] = {}
    for op, first, second in ops:
        if op == "grant":
            lease = leases.grant(first, [f"{len(granted)}"], 1, second, now)  # type: ignore[arg-type]
            granted.append(lease)
            model[lease.lease_id] = lease
        elif op == "release" and granted:
            lease = granted[first % len(granted)]  # type: ignore[operator]
            known = model.pop(lease.lease_id, None)
            assert leases.release(lease.lease_id, now, lease.holder if second else None) == (
                known is not None and now < known.expires_at
            )
        elif op == "wait":
            now += first  # type: ignore[operator]
        elif op == "expire":
            due = sorted((each.expires_at, each.lease_id) for each in model.values() if each.expires_at <= now)
            assert [(each.expires_at, each.lease_id) for each in leases.expire(now)] == due
            for _, lease_id in due:
                del model[lease_id]
        elif op == "gone":
            mine = [each.lease_id for each in model.values() if each.holder == first]
            assert leases.release_holder(first) == len(mine)
            for lease_id in mine:
                del model[lease_id]
        leases.check_integrity()
        assert sorted(leases.pins()) == sorted(each.blocks[0] for each in model.values())
    assert len(ended) == len(set(ended.ids())) == len(granted) - len(model)
