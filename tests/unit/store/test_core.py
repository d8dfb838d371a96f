"""What only the C++ core can get wrong: threads, growing tables, objects shared with Python, packed answers."""

from __future__ import annotations

import gc
import random
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pkv import _native
from p2pkv.errors import InvalidArgument
from p2pkv.store.base import Block, BlockState, LeaseLimits, Pinned
from p2pkv.store.dram import TOKENS_FROM, DramStore
from p2pkv.types import Layout, Status, Tier, index_key
from tests.unit.store.twin import Twin

PAGE = 4096
SUM = bytes(range(16))
MakeLayout = Callable[..., Layout]
Key = Callable[[int], bytes]


def put(store: DramStore | Twin, namespace: int, key: bytes, now: float = 0.0) -> Block:
    got = store.reserve(namespace, key, now)
    assert not isinstance(got, Status), got
    block = store.commit(got, SUM, now)
    assert block is not None
    return block


# ---- threads


def stressed(layout: MakeLayout, seed: int, *, rounds: int = 40_000, hold: bool = True) -> dict[str, int | str]:
    """Four native threads in an arena of 60 pages, with blocks of one, two and five pages."""
    store = DramStore(60 * PAGE, extent_bytes=6 * PAGE, leases=LeaseLimits(leases_per_holder_max=8))
    spaces = [store.register(layout(pages * PAGE, model=f"m{pages}")) for pages in (1, 2, 5)]
    store.core.ignore_leases_for_tests(not hold)
    return store.core.stress_for_tests(spaces, 4, rounds, seed)


@pytest.mark.parametrize("seed", range(3))
def test_native_threads_never_meet_in_one_slot(seed: int, layout: MakeLayout) -> None:
    """Rules 1, 5 and 7, with nobody taking turns; the books and the events are checked at the end."""
    done = stressed(layout, seed)
    assert done["problem"] == ""
    assert min(int(done["puts"]), int(done["leases"]), int(done["refused"])) > 10_000


def test_without_the_hold_of_leases_native_threads_notice(layout: MakeLayout) -> None:
    assert stressed(layout, 0, hold=False)["problem"] == "a slot changed under a lease"


def test_python_threads_and_native_threads_share_one_store(layout: MakeLayout) -> None:
    """What the agent's loop does while I/O threads are at work, and from more than one thread at that."""
    store = DramStore(64 * PAGE, extent_bytes=8 * PAGE, leases=LeaseLimits())
    native, ours = (store.register(layout(PAGE, model=name)) for name in ("native", "ours"))

    def work(holder: int) -> None:
        rng = random.Random(holder)
        for step in range(4_000):
            key = rng.randrange(40).to_bytes(16, "little")
            got = store.core.reserve(ours, key, step / 1000)
            if isinstance(got, Block):
                assert (
                    store.core.abort(got) == 0 if rng.random() < 0.1 else store.core.commit(got, SUM, step / 1000) == 0
                )
            pinned: Pinned[Block] = Pinned(*store.core.pin(ours, [key], 1.0, step / 1000, holder))
            generations = [block.generation for block in pinned.blocks if block is not None]
            if pinned.lease_id:
                assert [block.generation for block in pinned.blocks if block is not None] == generations
                store.core.release(pinned.lease_id, step / 1000, holder)
            if rng.random() < 0.01:
                store.core.keys(ours, 100)
                store.core.index_keys()

    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(store.core.stress_for_tests, [native], 2, 40_000, 1, hear=False)
        for done in [pool.submit(work, 100 + i) for i in range(3)]:
            done.result()
        assert beside.result()["problem"] == ""
    store.check_integrity()
    assert store.stats().leases == 0
    replica: set[int] = set()
    for key, tier in store.take_events():
        (replica.discard if tier is Tier.GONE else replica.add)(key)
    assert replica == set(store.index_keys())


# ---- tables


def test_ten_thousand_keys_come_and_go(layout: MakeLayout) -> None:
    """The table of keys splits its buckets one by one; at every size all keys are found, and no others."""
    store = Twin(10_000 * PAGE, extent_bytes=100 * PAGE)
    namespace = store.register(layout(PAGE))
    rng = random.Random(3)
    names = [rng.randbytes(rng.randrange(8, 65)) for _ in range(10_000)]
    for i, name in enumerate(names):
        put(store, namespace, name)
        assert store.lookup(namespace, names[rng.randrange(i + 1)]) is not None
        assert store.lookup(namespace, names[i][:-1] + b"?") is None or names[i].endswith(b"?")
    assert store.tested.keys(namespace, 20_000) == names
    assert store.tested.present(namespace, [*names, b"12345678"]) == b"\x01" * 10_000 + b"\x00"
    for name in rng.sample(names, 9_990):
        assert store.delete(namespace, name)
    store.check_integrity()


def test_a_queue_of_events_that_nobody_takes_is_compacted_as_in_the_reference(layout: MakeLayout, key: Key) -> None:
    store = Twin(8 * PAGE, extent_bytes=8 * PAGE)
    namespace = store.register(layout(PAGE))
    rng = random.Random(1)
    for _ in range(40_000):
        got = store.reserve(namespace, key(rng.randrange(12)), 0.0)
        if not isinstance(got, Status):
            store.commit(got, SUM, 0.0)
    events = store.take_events()
    assert 0 < len(events) < 66_000
    replica: set[int] = set()
    for each, tier in events:
        (replica.discard if tier is Tier.GONE else replica.add)(each)
    assert replica == set(store.index_keys())


@pytest.mark.parametrize("changes", [1, 3, 16, 17, 500])
def test_changes_are_the_last_words_of_the_events(changes: int, layout: MakeLayout, key: Key) -> None:
    rng = random.Random(changes)
    twins = [DramStore(4 * PAGE, extent_bytes=4 * PAGE) for _ in range(2)]
    for store in twins:
        namespace = store.register(layout(PAGE))
    for _ in range(changes):
        i = rng.randrange(9)
        for store in twins:
            got = store.reserve(namespace, key(i), 0.0)
            if not isinstance(got, Status):
                store.commit(got, SUM, 0.0)
    last = dict(twins[0].take_events())
    told = twins[1].take_changes()
    assert told is not None
    assert len(told.gone) + len(told.dram) == len(last)
    assert last == dict.fromkeys(told.gone, Tier.GONE) | dict.fromkeys(told.dram, Tier.DRAM)
    assert isinstance(told.gone, array)
    assert twins[1].take_changes() is None


# ---- what Python and C++ share


def test_one_block_is_one_object_for_as_long_as_somebody_has_it(layout: MakeLayout, key: Key) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    namespace = store.register(layout(PAGE))
    block = put(store, namespace, key(1))
    pinned = store.pin(namespace, [key(1), key(1)], 1.0, 0.0, 7)
    assert pinned.blocks[0] is pinned.blocks[1] is store.lookup(namespace, key(1)) is block
    assert block.pins == 2


def test_a_block_can_be_read_when_its_slot_and_even_its_store_are_gone(layout: MakeLayout, key: Key) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    namespace = store.register(layout(PAGE))
    block, writing = put(store, namespace, key(1)), store.reserve(namespace, key(2), 0.0)
    assert not isinstance(writing, Status)
    store.delete(namespace, key(1))
    assert (block.state, block.checksum, block.key) == (BlockState.FREE, SUM, key(1))
    core = store.core
    del store
    gc.collect()
    assert core.commit(writing, SUM, 0.0) == 0  # the core is alive for as long as somebody has it
    del core
    gc.collect()
    assert (writing.length, writing.checksum) == (PAGE, SUM)
    assert "generation 2" in repr(writing)


def test_a_reservation_of_another_store_is_not_taken(layout: MakeLayout, key: Key) -> None:
    ours, theirs = (DramStore(4 * PAGE, extent_bytes=4 * PAGE) for _ in range(2))
    for store in (ours, theirs):
        namespace = store.register(layout(PAGE))
    reservation = theirs.reserve(namespace, key(1), 0.0)
    assert not isinstance(reservation, Status)
    put(ours, namespace, key(2))
    assert ours.core.commit(reservation, SUM, 0.0) == 2
    ours.check_integrity()
    assert theirs.commit(reservation, SUM, 0.0) is reservation


def test_blocks_are_read_only(layout: MakeLayout, key: Key) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    block = put(store, store.register(layout(PAGE)), key(1))
    for name in ("offset", "generation", "state", "pins", "checksum"):
        with pytest.raises(AttributeError):
            setattr(block, name, 0)
    with pytest.raises(TypeError):
        _native.Block()


def test_keys_that_are_not_bytes_and_holders_that_are_not_numbers_are_refused(layout: MakeLayout, key: Key) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    namespace = store.register(layout(PAGE))
    with pytest.raises(TypeError):
        store.pin(namespace, ["12345678"], 1.0, 0.0, 1)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        store.pin(namespace, [key(1)], 1.0, 0.0, "peer")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.reserve(namespace, "12345678", 0.0)  # type: ignore[arg-type]
    assert store.pin(namespace, (key(1),), 1.0, 0.0, (1 << 64) - 1).lease_id == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="smaller than one extent"):
        DramStore(PAGE, extent_bytes=2 * PAGE)
    with pytest.raises(InvalidArgument, match="multiple of 4096"):
        DramStore(16 * PAGE, extent_bytes=5000)
    with pytest.raises(InvalidArgument, match="ttl"):
        DramStore(16 * PAGE, leases=LeaseLimits(ttl_min_s=2.0, ttl_max_s=1.0))


# ---- what the agent adds


def test_lease_ids_cannot_be_guessed_unless_a_test_asks_for_that(layout: MakeLayout, key: Key) -> None:
    def ids(seed: int | None) -> list[int]:
        store = DramStore(4 * PAGE, extent_bytes=4 * PAGE, lease_seed=seed)
        namespace = store.register(layout(PAGE))
        put(store, namespace, key(1))
        out = []
        for _ in range(2_000):  # several batches from the kernel
            out.append(store.pin(namespace, [key(1)], 1.0, 0.0, 1).lease_id)
            assert store.release(out[-1], 0.0, 1)
        return out

    first, second = ids(None), ids(None)
    assert len({*first, *second}) == 4_000
    assert 0 not in first
    assert 900 < sum(each >> 63 for each in first) < 1_100
    assert ids(5) == ids(5) != ids(6)


def test_extents_are_told_when_memory_is_assigned_whoever_caused_it(layout: MakeLayout, key: Key) -> None:
    told: list[tuple[int, int]] = []
    store = DramStore(8 * PAGE, extent_bytes=2 * PAGE)
    store.watch_extents(lambda *extent: told.append(extent))
    namespace = store.register(layout(PAGE))
    for i in range(3):
        put(store, namespace, key(i))
    assert told == [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE)]
    for i in (3, 4):
        store.core.reserve(namespace, key(i), 0.0)  # as a native thread does
    assert len(told) == 2
    store.take_changes()
    assert told[2:] == [(4 * PAGE, 2 * PAGE)]


def test_quarantine_tokens_of_native_threads_are_not_ours(layout: MakeLayout, key: Key) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    namespace = store.register(layout(PAGE))
    mine, native = (store.reserve(namespace, key(i), 0.0) for i in (1, 2))
    assert not isinstance(mine, Status)
    assert not isinstance(native, Status)
    store.quarantine(mine, 1)
    assert store.core.park(native, 1) == 0
    assert store.clear_quarantine(1) == 1
    assert native.state == BlockState.PARKED
    assert store.core.clear(1) == 1
    assert store.core.clear(TOKENS_FROM) == 0
    assert store.stats().free_bytes == 4 * PAGE


def test_index_keys_are_those_of_the_index(layout: MakeLayout) -> None:
    store = DramStore(4 * PAGE, extent_bytes=4 * PAGE)
    namespace = store.register(layout(PAGE))
    name = bytes(range(200, 232))
    put(store, namespace, name)
    assert list(store.index_keys()) == [index_key(namespace, name)]


def test_a_store_is_not_kept_alive_by_what_watches_it() -> None:
    store = DramStore(4 * PAGE)
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None
