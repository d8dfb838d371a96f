"""The store, rule by rule, and both implementations alike.

Each test's docstring names the rule of p2pkv/store/dram.py that it guards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import msgspec
import pytest

from p2pkv.errors import InvalidArgument, LayoutMismatch, LocalProtocolError, OutOfSpace
from p2pkv.store.base import Block, BlockState, LeaseLimits, Reservation
from p2pkv.store.dram import DramStore
from p2pkv.store.reference import ReferenceStore
from p2pkv.types import Layout, Status, Tier, index_key

PAGE = 4096
SUM = bytes(range(16))
MakeLayout = Callable[..., Layout]
Key = Callable[[int], bytes]
PEER, OTHER = 1, 2  # holders


class Bench:
    """A store with one namespace of one-page blocks, and short ways to say what tests say often."""

    def __init__(self, store: DramStore, namespace: int, key: Key) -> None:
        self.store, self.namespace, self.key = store, namespace, key

    def reserve(self, i: int, now: float = 0.0) -> Reservation:
        got = self.store.reserve(self.namespace, self.key(i), now)
        assert not isinstance(got, Status), got
        return got

    def refused(self, i: int, now: float = 0.0) -> Status:
        got = self.store.reserve(self.namespace, self.key(i), now)
        assert isinstance(got, Status)
        return got

    def put(self, i: int, now: float = 0.0) -> Block:
        block = self.store.commit(self.reserve(i, now), SUM, now)
        assert block is not None
        return block

    def has(self, i: int) -> bool:
        return self.store.lookup(self.namespace, self.key(i)) is not None

    def pin(self, *keys: int, ttl_s: float = 10.0, now: float = 0.0, holder: int = PEER) -> int:
        return self.store.pin(self.namespace, [self.key(i) for i in keys], ttl_s, now, holder).lease_id


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(implementation: type[DramStore], layout: MakeLayout, key: Key) -> Iterator[MakeBench]:
    """``bench(slots, ...)``: a store for so many one-page blocks; its books are checked when the test is over."""
    made: list[DramStore] = []

    def make(slots: int = 4, extent_slots: int = 0, **options: object) -> Bench:
        options.setdefault("pinned_bytes_max", slots * PAGE)
        options.setdefault("leases", LeaseLimits())
        store = implementation(
            slots * PAGE,
            extent_bytes=(extent_slots or slots) * PAGE,
            **options,  # type: ignore[arg-type]
        )
        made.append(store)
        return Bench(store, store.register(layout(PAGE)), key)

    yield make
    for store in made:
        store.check_integrity()


# ---- the life of a block


def test_a_committed_block_is_found_with_its_checksum_where_it_was_reserved(bench: MakeBench) -> None:
    b = bench()
    reservation = b.reserve(1)
    assert reservation.length == PAGE
    assert not b.has(1)
    assert b.store.writing(b.namespace, b.key(1))
    block = b.store.commit(reservation, SUM, 1.0)
    assert block is b.store.lookup(b.namespace, b.key(1))
    assert block is not None
    assert (block.checksum, block.state) == (SUM, BlockState.LIVE)
    assert not b.store.writing(b.namespace, b.key(1))
    assert b.store.lookup_many(b.namespace, [b.key(2), b.key(1)]) == [None, block]


def test_a_block_is_written_once(bench: MakeBench) -> None:
    """Rule 3."""
    b = bench()
    b.put(1)
    assert b.refused(1) is Status.EXISTS


def test_a_block_that_is_being_written_has_no_second_writer(bench: MakeBench) -> None:
    """Rule 3."""
    b = bench()
    reservation = b.reserve(1)
    assert b.refused(1) is Status.BUSY
    b.store.abort(reservation)
    b.put(1)


def test_an_aborted_reservation_leaves_nothing_behind(bench: MakeBench) -> None:
    """Rule 6."""
    b = bench(slots=1)
    reservation = b.reserve(1)
    b.store.abort(reservation)
    assert not b.has(1)
    assert b.store.take_events() == []
    assert b.store.stats().free_bytes == PAGE
    assert b.reserve(2).offset == reservation.offset


@pytest.mark.parametrize("first", ["commit", "abort", "quarantine"])
@pytest.mark.parametrize("second", ["commit", "abort", "quarantine"])
def test_a_reservation_ends_once(bench: MakeBench, first: str, second: str) -> None:
    b = bench()
    reservation = b.reserve(1)
    end = {
        "commit": lambda: b.store.commit(reservation, SUM, 0.0),
        "abort": lambda: b.store.abort(reservation),
        "quarantine": lambda: b.store.quarantine(reservation, "t"),
    }
    end[first]()
    before = b.store.stats()
    with pytest.raises(LocalProtocolError, match="over already"):
        end[second]()
    assert b.store.stats() == before


def test_a_checksum_of_the_wrong_size_is_refused_and_the_reservation_stands(bench: MakeBench) -> None:
    b = bench()
    reservation = b.reserve(1)
    with pytest.raises(InvalidArgument):
        b.store.commit(reservation, b"short", 0.0)
    assert b.store.commit(reservation, SUM, 0.0) is not None


@pytest.mark.parametrize("bad", [b"", b"seven77", bytes(65)])
def test_keys_outside_the_bounds_and_unknown_namespaces_are_invalid(bench: MakeBench, bad: bytes) -> None:
    b = bench()
    assert b.store.reserve(b.namespace, bad, 0.0) is Status.INVALID
    assert b.store.reserve(b.namespace + 1, b.key(1), 0.0) is Status.INVALID
    assert b.store.lookup(b.namespace + 1, b.key(1)) is None
    assert b.store.lookup_many(b.namespace + 1, [b.key(1)]) == [None]
    assert not b.store.delete(b.namespace + 1, b.key(1))
    assert b.store.touch(b.namespace + 1, [b.key(1)], 0.0) == 0
    assert b.store.pin(b.namespace + 1, [b.key(1)], 1.0, 0.0, PEER).blocks == [None]


def test_every_reuse_of_a_slot_has_a_new_generation(bench: MakeBench) -> None:
    """Rule 2."""
    b = bench(slots=1)
    seen = [b.put(i).generation for i in range(20)]
    assert len(set(seen)) == 20
    assert seen == sorted(seen)


# ---- eviction


def test_the_least_recently_used_block_makes_room(bench: MakeBench) -> None:
    """Rule 4; pin, touch and a repeated put are uses, lookup is none."""
    b = bench(slots=5)
    for i in range(5):
        b.put(i, now=float(i))
    b.store.release(b.pin(0, now=5.0), 5.0)
    b.store.touch(b.namespace, [b.key(1)], 6.0)
    b.refused(2, now=7.0)
    b.store.lookup(b.namespace, b.key(3))
    gone = []
    for i in range(5, 10):
        b.put(i, now=float(i))
        gone += [j for j in range(5) if not b.has(j) and j not in gone]
    assert gone == [3, 4, 0, 1, 2]
    assert b.store.stats().evictions_total == 5


def test_of_a_chain_that_was_used_together_the_tail_goes_first(bench: MakeBench) -> None:
    """What is left of a chain is worth something only if it is a prefix."""
    for use in ("pin", "touch"):
        b = bench(slots=3)
        for i in range(3):
            b.put(i)
        keys = [b.key(i) for i in range(3)]
        if use == "pin":
            b.store.release(b.store.pin(b.namespace, keys, 1.0, 1.0, PEER).lease_id, 1.0)
        else:
            assert b.store.touch(b.namespace, keys, 1.0) == 3
        b.put(10, now=2.0)
        assert [b.has(i) for i in range(3)] == [True, True, False]


def test_without_an_eviction_policy_a_full_store_says_so(bench: MakeBench) -> None:
    b = bench(slots=2, evict=False)
    b.put(1)
    b.put(2)
    assert b.refused(3) is Status.NO_SPACE
    assert b.has(1)
    assert b.store.stats().no_space_total == 1


# ---- leases


def test_a_leased_slot_is_never_reused(bench: MakeBench) -> None:
    """Rule 1."""
    b = bench(slots=2)
    held = b.put(1)
    b.put(2)
    b.pin(1)
    for i in range(3, 20):
        assert b.put(i).offset != held.offset
    assert b.has(1)


def test_when_everything_is_leased_there_is_no_space_until_a_lease_ends(bench: MakeBench) -> None:
    """Rule 1."""
    b = bench(slots=2)
    b.put(1)
    b.put(2)
    lease = b.pin(1, 2)
    assert b.refused(3) is Status.NO_SPACE
    assert b.store.release(lease, 1.0)
    b.put(3)


def test_a_block_under_two_leases_is_held_until_both_end(bench: MakeBench) -> None:
    """Rule 1."""
    b = bench(slots=1)
    b.put(1)
    first, second = b.pin(1), b.pin(1, 1)
    assert b.store.release(first, 1.0)
    assert b.refused(2) is Status.NO_SPACE
    assert b.store.release(second, 1.0)
    b.put(2)


def test_an_expired_lease_makes_room_by_itself_and_its_release_says_so(bench: MakeBench) -> None:
    """Rules 4 and 5."""
    b = bench(slots=1)
    b.put(1)
    lease = b.pin(1, ttl_s=10.0, now=0.0)
    assert b.refused(2, now=9.9) is Status.NO_SPACE
    b.put(2, now=10.0)
    assert not b.store.release(lease, 9.0)
    assert b.store.stats().leases_expired_total == 1


def test_a_lease_released_too_late_did_not_hold_even_if_its_blocks_are_still_there(bench: MakeBench) -> None:
    """Rule 5."""
    b = bench()
    b.put(1)
    lease = b.pin(1, ttl_s=10.0)
    assert not b.store.release(lease, 10.0)
    assert b.has(1)


def test_expire_ends_what_is_over_and_nothing_else(bench: MakeBench) -> None:
    b = bench()
    b.put(1)
    over, still = b.pin(1, ttl_s=1.0), b.pin(1, ttl_s=5.0)
    assert b.store.expire(0.5) == 0
    assert b.store.expire(2.0) == 1
    assert not b.store.release(over, 2.0)
    assert b.store.release(still, 2.0)


def test_pin_answers_per_key_and_holds_only_what_is_here(bench: MakeBench) -> None:
    b = bench()
    first, third = b.put(1), b.put(3)
    pinned = b.store.pin(b.namespace, [b.key(1), b.key(2), b.key(3)], 5.0, 100.0, PEER)
    assert pinned.blocks == [first, None, third]
    assert (pinned.ttl_s, pinned.expires_at, pinned.considered) == (5.0, 105.0, 3)
    nothing = b.store.pin(b.namespace, [b.key(2)], 5.0, 100.0, PEER)
    assert (nothing.lease_id, nothing.blocks) == (0, [None])
    assert b.store.stats().leases == 1


def test_a_block_that_is_being_written_cannot_be_pinned(bench: MakeBench) -> None:
    """Rule 6."""
    b = bench()
    b.reserve(1)
    assert b.pin(1) == 0


def test_a_holder_over_its_budget_gets_the_head_and_is_told_where_it_ends(bench: MakeBench) -> None:
    b = bench(slots=4, leases=LeaseLimits(bytes_per_holder_max=2 * PAGE))
    for i in (1, 3, 4):
        b.put(i)
    pinned = b.store.pin(b.namespace, [b.key(i) for i in (1, 2, 3, 4)], 5.0, 0.0, PEER)
    assert [block is not None for block in pinned.blocks] == [True, False, True, False]
    assert pinned.considered == 3
    refused = b.store.pin(b.namespace, [b.key(4)], 5.0, 0.0, PEER)
    assert (refused.lease_id, refused.considered) == (0, 0)
    assert b.pin(4, holder=OTHER) != 0
    assert b.pin(4, now=5.0) != 0  # the first lease is over by then, and ends because its room is needed


def test_all_readers_together_cannot_stop_all_writing(bench: MakeBench) -> None:
    b = bench(slots=4, pinned_bytes_max=3 * PAGE)
    for i in range(4):
        b.put(i)
    for i in range(3):
        assert b.pin(i, holder=i) != 0
    assert b.pin(3, holder=3) == 0
    assert b.pin(0, 1, 2, holder=3) != 0  # held already: costs nothing more
    b.put(9)


def test_a_holder_that_is_gone_holds_nothing(bench: MakeBench) -> None:
    b = bench(slots=2)
    b.put(1)
    b.put(2)
    b.pin(1, holder=OTHER)
    b.pin(2, holder=PEER)
    assert b.store.release_holder(OTHER) == 1
    assert b.put(3).generation == 3
    assert [b.has(i) for i in (1, 2)] == [False, True]


def test_nobody_can_release_the_lease_of_another(bench: MakeBench) -> None:
    b = bench(slots=1)
    b.put(1)
    lease = b.pin(1, holder=PEER)
    assert not b.store.release(lease, 1.0, OTHER)
    assert b.refused(2) is Status.NO_SPACE
    assert b.store.release(lease, 1.0, PEER)


# ---- deleting


def test_a_deleted_block_is_unlisted_at_once_but_keeps_its_slot_while_leased(bench: MakeBench) -> None:
    """Rules 1 and 7."""
    b = bench(slots=1)
    b.put(1)
    lease = b.pin(1)
    b.store.take_events()
    assert b.store.delete(b.namespace, b.key(1))
    assert not b.has(1)
    assert b.store.take_events() == [(index_key(b.namespace, b.key(1)), Tier.GONE)]
    assert b.refused(1) is Status.NO_SPACE
    b.store.check_integrity()
    assert b.store.release(lease, 1.0)
    b.put(1)


def test_a_deleted_block_whose_lease_expired_makes_room_without_costing_another_block(bench: MakeBench) -> None:
    b = bench(slots=2)
    b.put(1)
    b.put(2)
    b.pin(1, ttl_s=1.0)
    b.store.delete(b.namespace, b.key(1))
    b.put(3, now=2.0)
    assert b.has(2)


def test_deleting_what_is_not_here_says_so(bench: MakeBench) -> None:
    b = bench()
    b.reserve(1)
    assert not b.store.delete(b.namespace, b.key(1))


# ---- quarantine


def test_a_quarantined_slot_is_not_reused_until_its_token_is_cleared(bench: MakeBench) -> None:
    """Rule 1: bytes of a transfer that was given up may still land there."""
    b = bench(slots=2)
    parked = b.reserve(1)
    b.store.quarantine(parked, ("transfer", 7))
    assert not b.has(1)
    for i in range(2, 20):
        assert b.put(i).offset != parked.offset
    assert b.store.clear_quarantine(("transfer", 8)) == 0
    assert b.store.clear_quarantine(("transfer", 7)) == 1
    assert b.store.clear_quarantine(("transfer", 7)) == 0
    assert b.put(20).offset == parked.offset


def test_a_quarantined_key_can_be_written_anew_elsewhere(bench: MakeBench) -> None:
    b = bench(slots=2)
    parked = b.reserve(1)
    b.store.quarantine(parked, "t")
    block = b.put(1)
    assert block.offset != parked.offset
    assert b.store.clear_quarantine("t") == 1
    assert b.store.lookup(b.namespace, b.key(1)) is block


def test_a_quarantine_that_is_too_full_says_so_but_still_parks(bench: MakeBench) -> None:
    b = bench(slots=4, quarantine_bytes_max=2 * PAGE)
    assert b.store.quarantine(b.reserve(1), "t")
    assert b.store.quarantine(b.reserve(2), "t")
    assert not b.store.quarantine_full
    assert not b.store.quarantine(b.reserve(3), "u")
    assert b.store.quarantine_full
    stats = b.store.stats()
    assert (stats.quarantined_bytes, stats.blocks_quarantined, stats.quarantines_total) == (3 * PAGE, 3, 3)
    b.store.clear_quarantine("t")
    assert not b.store.quarantine_full


# ---- the ownership log


def test_events_tell_of_commits_and_evictions_in_order_and_of_nothing_else(bench: MakeBench) -> None:
    """Rule 7."""
    b = bench(slots=1)
    b.store.abort(b.reserve(9))
    b.put(1)
    b.pin(9)
    reservation = b.reserve(2)
    log = [(index_key(b.namespace, b.key(1)), Tier.DRAM), (index_key(b.namespace, b.key(1)), Tier.GONE)]
    assert b.store.take_events() == log  # GONE is there as soon as the slot is somebody else's to write
    b.store.commit(reservation, SUM, 0.0)
    assert b.store.take_events() == [(index_key(b.namespace, b.key(2)), Tier.DRAM)]
    assert b.store.take_events() == []


@pytest.mark.parametrize("implementation", [ReferenceStore], ids=["reference"])
def test_gone_is_queued_before_the_slot_is_free(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 7, for every way in which a listed block goes. In the core nobody can look in between: it has one mutex."""
    b = bench(slots=4)
    real = b.store._slots.free
    said: list[Tier] = []

    class Slots:
        """The allocator, noting what has been said by the time a slot is freed."""

        def __getattr__(self, name: str) -> object:
            return getattr(b_slots, name)

        def free(self, offset: int) -> None:
            said.extend(tier for _, tier in b.store.take_events())
            real(offset)

    b_slots = b.store._slots
    for i in range(4):
        b.put(i)
    b.store.take_events()
    monkeypatch.setattr(b.store, "_slots", Slots())
    b.store.delete(b.namespace, b.key(0))
    assert said == [Tier.GONE]
    b.put(5)
    b.put(6)
    assert said == [Tier.GONE, Tier.DRAM, Tier.GONE]
    b.store.drop_namespace(b.namespace)
    assert said.count(Tier.GONE) == 6
    monkeypatch.undo()


def test_the_set_of_index_keys_is_what_the_events_add_up_to(bench: MakeBench) -> None:
    b = bench(slots=3)
    for i in range(7):
        b.put(i)
    replica: set[int] = set()
    for key, tier in b.store.take_events():
        (replica.discard if tier is Tier.GONE else replica.add)(key)
    assert replica == set(b.store.index_keys()) == {index_key(b.namespace, b.key(i)) for i in (4, 5, 6)}


# ---- layouts


def test_a_layout_that_describes_the_same_cache_differently_is_refused_by_field(
    bench: MakeBench, layout: MakeLayout
) -> None:
    b = bench()
    assert b.store.register(layout(PAGE)) == b.namespace
    with pytest.raises(LayoutMismatch) as caught:
        b.store.register(layout(PAGE, block_tokens=32, order="HND"))
    assert set(caught.value.fields) == {"block_tokens", "order"}
    assert b.store.layouts() == [layout(PAGE)]
    b.store.drop_namespace(b.namespace)
    b.store.register(layout(PAGE, block_tokens=32, order="HND"))


def test_two_layouts_with_one_fingerprint_are_refused(
    bench: MakeBench, layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    monkeypatch.setattr(Layout, "namespace", property(lambda self: b.namespace))
    with pytest.raises(LayoutMismatch):
        b.store.register(layout(PAGE, tenant="another"))


def test_malformed_and_oversized_layouts_are_refused(bench: MakeBench, layout: MakeLayout) -> None:
    b = bench(slots=4)
    with pytest.raises(InvalidArgument, match="block_tokens"):
        b.store.register(layout(PAGE, model="other", block_tokens=0))
    with pytest.raises(OutOfSpace, match="does not fit"):
        b.store.register(layout(5 * PAGE, model="other"))
    assert len(b.store.layouts()) == 1


def test_namespaces_are_bounded(bench: MakeBench, layout: MakeLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    monkeypatch.setattr(sys.modules[type(b.store).__module__], "NAMESPACES_MAX", 2)
    b.store.register(layout(PAGE, tenant="a"))
    with pytest.raises(OutOfSpace):
        b.store.register(layout(PAGE, tenant="b"))
    b.store.drop_namespace(b.namespace)
    b.store.register(layout(PAGE, tenant="b"))


def test_the_same_key_in_two_namespaces_is_two_blocks(bench: MakeBench, layout: MakeLayout) -> None:
    b = bench()
    other = Bench(b.store, b.store.register(layout(PAGE, tenant="other")), b.key)
    assert b.put(1).offset != other.put(1).offset
    b.store.delete(b.namespace, b.key(1))
    assert other.has(1)
    assert list(b.store.index_keys()) == [index_key(other.namespace, b.key(1))]


def test_a_dropped_namespace_is_gone_but_its_leases_and_writers_end_in_peace(
    bench: MakeBench, layout: MakeLayout
) -> None:
    """Rules 1 and 6: neither a reader nor a late writer may find its slot in another's hands."""
    b = bench(slots=4)
    b.put(1)
    b.put(2)
    lease = b.pin(1)
    writer, aborted = b.reserve(3), b.reserve(4)
    b.store.take_events()
    assert b.store.drop_namespace(b.namespace) == 2
    assert b.store.drop_namespace(b.namespace) == 0
    assert len(b.store.take_events()) == 2
    b.store.check_integrity()
    again = Bench(b.store, b.store.register(layout(PAGE)), b.key)
    fresh = again.reserve(3)  # the same key, while the old writer still writes: another slot
    assert len({fresh.offset, writer.offset, aborted.offset}) == 3
    assert b.store.commit(writer, SUM, 0.0) is None
    assert not again.has(3)
    b.store.abort(aborted)
    assert b.store.commit(fresh, SUM, 0.0) is again.store.lookup(again.namespace, b.key(3))
    assert b.store.release(lease, 1.0)


# ---- several slot sizes in one arena


def two_sizes(bench: MakeBench, layout: MakeLayout, **options: object) -> tuple[Bench, Bench]:
    """An arena of 4 extents of 4 pages, full of one-page blocks 0..15, and a second layout with two-page blocks."""
    small = bench(slots=16, extent_slots=4, **options)
    large = Bench(small.store, small.store.register(layout(2 * PAGE, model="large")), small.key)
    for i in range(16):
        small.put(i, now=float(i))
    return small, large


def test_a_new_layout_takes_the_extent_of_the_coldest_blocks(bench: MakeBench, layout: MakeLayout) -> None:
    small, large = two_sizes(bench, layout)
    large.put(100, now=20.0)
    assert [small.has(i) for i in range(16)] == [False] * 4 + [True] * 12
    large.put(101, now=20.0)
    stats = small.store.stats()
    assert (stats.extents_reclaimed_total, stats.evictions_total) == (1, 4)


def test_of_several_layouts_the_one_with_the_coldest_block_gives(bench: MakeBench, layout: MakeLayout) -> None:
    small, large = two_sizes(bench, layout)
    large.put(100, now=20.0)  # extent 0 is the large one's now
    third = Bench(small.store, small.store.register(layout(4 * PAGE, model="third")), small.key)
    small.store.touch(small.namespace, [small.key(i) for i in range(4, 16)], 30.0)
    assert third.put(200, now=40.0).offset == 0
    assert not large.has(100)
    assert all(small.has(i) for i in range(4, 16))
    third.refused(200, now=50.0)
    small.store.touch(small.namespace, [small.key(i) for i in range(8, 16)], 50.0)
    assert large.put(101, now=60.0).offset == 4 * PAGE
    assert third.has(200)


@pytest.mark.parametrize("how", ["leased", "writing", "quarantined", "deleted while leased"])
def test_an_extent_with_one_held_slot_is_not_taken(bench: MakeBench, layout: MakeLayout, how: str) -> None:
    """Rule 1, for the second way in which slots change hands."""
    small, large = two_sizes(bench, layout)
    if how == "leased":
        small.pin(1, ttl_s=30.0, now=15.0)
    elif how == "deleted while leased":
        small.pin(1, ttl_s=30.0, now=15.0)
        small.store.delete(small.namespace, small.key(1))
    else:
        small.store.delete(small.namespace, small.key(1))
        reservation = small.reserve(50, now=15.0)
        assert reservation.offset < 4 * PAGE
        if how == "quarantined":
            small.store.quarantine(reservation, "t")
    assert large.put(100, now=16.0).offset >= 4 * PAGE
    assert [small.has(i) for i in (0, 2, 3)] == [True] * 3
    assert [small.has(i) for i in range(4, 8)] == [False] * 4


def test_when_every_extent_has_a_held_slot_there_is_no_space_for_another_size(
    bench: MakeBench, layout: MakeLayout
) -> None:
    small, large = two_sizes(bench, layout)
    small.pin(0, 5, 10, 15, now=16.0)
    assert large.refused(100, now=17.0) is Status.NO_SPACE
    assert sum(small.has(i) for i in range(16)) == 16


def test_a_busy_layout_does_not_take_from_one_that_is_about_as_busy(bench: MakeBench, layout: MakeLayout) -> None:
    small, large = two_sizes(bench, layout)
    for i in range(40):
        now = 20.0 + i
        large.put(100 + i, now=now)  # its two slots: the colder block is two seconds old
        if i % 3 == 0:
            small.store.touch(small.namespace, [small.key(j) for j in range(4, 16)], now)
    assert all(small.has(i) for i in range(4, 16))
    for i in range(40, 80):
        large.put(100 + i, now=20.0 + i)  # nobody uses the small ones any more
    assert not any(small.has(i) for i in range(4, 16))


def test_a_block_larger_than_an_extent_takes_adjacent_extents_from_another_layout(
    bench: MakeBench, layout: MakeLayout
) -> None:
    small, _ = two_sizes(bench, layout)
    huge = Bench(small.store, small.store.register(layout(7 * PAGE, model="huge")), small.key)
    block = huge.put(100, now=20.0)
    assert block.offset % (4 * PAGE) == 0
    assert sum(small.has(i) for i in range(16)) == 8
    for i in range(8):
        small.store.delete(small.namespace, small.key(i))
    assert huge.put(101, now=21.0).offset != block.offset


def test_memory_of_a_dropped_layout_serves_another(bench: MakeBench, layout: MakeLayout) -> None:
    small, large = two_sizes(bench, layout)
    small.store.drop_namespace(small.namespace)
    for i in range(8):
        large.put(i)
    assert large.store.stats().evictions_total == 0
    assert all(large.has(i) for i in range(8))


# ---- figures


def test_stats_add_up(bench: MakeBench) -> None:
    b = bench(slots=8)
    b.put(1)
    b.put(2)
    b.pin(1)
    b.pin(1)
    b.pin(2)
    b.store.delete(b.namespace, b.key(2))
    b.reserve(3)
    b.store.quarantine(b.reserve(4), "t")
    b.store.abort(b.reserve(5))
    stats = msgspec.structs.asdict(b.store.stats())
    assert {name: stats[name] for name in stats if stats[name]} == {
        "capacity_bytes": 8 * PAGE,
        "free_bytes": 4 * PAGE,
        "live_bytes": PAGE,
        "pinned_bytes": 2 * PAGE,
        "quarantined_bytes": PAGE,
        "namespaces": 1,
        "blocks_live": 1,
        "blocks_writing": 1,
        "blocks_unlisted": 1,
        "blocks_quarantined": 1,
        "leases": 3,
        "commits_total": 2,
        "aborts_total": 1,
        "quarantines_total": 1,
    }


def test_the_defaults_fit_any_capacity(implementation: type[DramStore], layout: MakeLayout, key: Key) -> None:
    for capacity in (PAGE, 3 << 20, 1 << 30):
        store = implementation(capacity)
        b = Bench(store, store.register(layout(PAGE)), key)
        b.put(1)
        b.pin(1)
        store.check_integrity()
