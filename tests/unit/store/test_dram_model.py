"""The store against a world in which bytes are really written: by writers and late transfers, and read under leases.

The model knows nothing of slots, extents or policies. It keeps a picture of the arena, page by page, of who wrote
there last, and lets every allowed writer write whenever it likes. If the store ever lends a place to two of them, a
reader under a lease finds somebody else's tag. One driver, three users: hypothesis (which shrinks), long seeded runs
(which are fast), and runs with a guard taken out (which must fail).

The first two drive the C++ core and its reference side by side (:mod:`tests.unit.store.twin`), which must agree in
every answer; the third each by itself.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pkv.store import reference
from p2pkv.store.base import Block, BlockState, LeaseLimits, Reservation
from p2pkv.store.dram import DramStore
from p2pkv.store.eviction import Lru
from p2pkv.store.reference import ReferenceStore
from p2pkv.store.slots import SlotAllocator, slot_bytes_for
from p2pkv.types import Layout, Status, Tier, index_key
from tests.unit.store.twin import Different, Twin

pytestmark = pytest.mark.deep

PAGE = 4096
EXTENT = 4 * PAGE
EXTENTS = 6
BLOCK_BYTES = (PAGE, 100 + 2 * PAGE, PAGE, 6 * PAGE)  # of the layouts: one page, three pages, one page, two extents
KEYS = 24
HOLDERS = (1, 2, (1 << 64) - 1)
Tag = tuple[int, bytes, int]
Place = tuple[int, bytes]


class Damage(AssertionError):
    """A slot was in two hands, or the store said something that is not so."""


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Damage(message)


class World:
    """A store, the bytes, and what everybody believes. Every method is one thing that can happen."""

    def __init__(self, layout: Callable[..., Layout], make: Callable[..., Any] = Twin) -> None:
        self.store = make(
            EXTENTS * EXTENT + PAGE,  # not whole extents
            extent_bytes=EXTENT,
            leases=LeaseLimits(ttl_min_s=0.1, ttl_max_s=4.0, leases_per_holder_max=3, bytes_per_holder_max=8 * PAGE),
            pinned_bytes_max=18 * PAGE,
        )
        self.layouts = [layout(size, model=f"m{i}") for i, size in enumerate(BLOCK_BYTES)]
        self.now = 0.0
        self.bytes: dict[int, Tag] = {}  # page -> what was last written there
        self.busy: Counter[int] = Counter()  # page -> hands that it is in: writers, late writers, leases in force
        self.live: dict[Place, Block] = {}
        self.replica: set[int] = set()  # fed by events alone
        self.writing: list[Reservation] = []
        self.orphans: list[Reservation] = []  # their namespace was dropped
        self.parked: dict[int, list[Reservation]] = {}
        self.leases: dict[int, tuple[int, float, list[tuple[Block, Tag]]]] = {}
        self.ended: list[int] = []
        self.generations: dict[int, int] = {}  # page -> generation of its last occupancy
        self.open: set[int] = set()
        for i in range(2):
            self.register(i)

    # -- bookkeeping of the model

    def pages(self, block: Block) -> range:
        return range(block.offset // PAGE, (block.offset + slot_bytes_for(block.length)) // PAGE)

    def hold(self, block: Block, hands: int) -> None:
        for page in self.pages(block):
            self.busy[page] += hands

    def write(self, block: Block, what: str = "whole") -> None:
        for page in self.pages(block):
            self.bytes[page] = (block.namespace, block.key + what.encode(), block.generation)

    def tag(self, block: Block) -> Tag:
        return (block.namespace, block.key + b"whole", block.generation)

    def read(self, block: Block, tag: Tag) -> None:
        demand(all(self.bytes.get(page) == tag for page in self.pages(block)), f"a reader of {block} read wrong bytes")

    def hear(self) -> None:
        """What the ownership log says has happened since: the only way in which the model learns of evictions."""
        for key, tier in self.store.take_events():
            if tier is Tier.DRAM:
                demand(key not in self.replica, "DRAM said twice")
                self.replica.add(key)
            else:
                demand(key in self.replica, "GONE said of what was not there")
                self.replica.remove(key)
        self.live = {place: block for place, block in self.live.items() if index_key(*place) in self.replica}
        demand(len(self.live) == len(self.replica), "the log knows of blocks that nobody committed")

    def leased(self) -> set[Block]:
        return {block for _, _, blocks in self.leases.values() for block, _ in blocks}

    # -- what can happen

    def register(self, i: int) -> None:
        self.open.add(self.store.register(self.layouts[i]))

    def reserve(self, i: int, key: bytes) -> None:
        place = (self.layouts[i].namespace, key)
        got = self.store.reserve(*place, self.now)
        gone = set(self.live)
        self.hear()
        gone -= set(self.live)
        if place[0] not in self.open:
            demand(got is Status.INVALID, f"reserved in a namespace that is not there: {got}")
        elif place in self.live:
            demand(got is Status.EXISTS, f"not EXISTS but {got}")
        elif any((each.namespace, each.key) == place for each in self.writing):
            demand(got is Status.BUSY, f"not BUSY but {got}")
        elif isinstance(got, Status):
            demand(got is Status.NO_SPACE, f"not NO_SPACE but {got}")
            demand(not gone, "evicted in vain")
            size = slot_bytes_for(BLOCK_BYTES[i])
            leased = self.leased()
            evictable = [b for b in self.live.values() if slot_bytes_for(b.length) == size and b not in leased]
            demand(not evictable, f"NO_SPACE although {len(evictable)} blocks could go")
        else:
            demand(got.offset + slot_bytes_for(got.length) <= EXTENTS * EXTENT, "a slot outside the arena")
            mine = set(self.pages(got))
            demand(not any(self.busy[page] for page in mine), f"{got} lies in somebody else's hands")
            listed = {page for block in self.live.values() for page in self.pages(block)}
            demand(not mine & listed, f"{got} was handed out before GONE was said")
            for page in mine:
                demand(got.generation > self.generations.get(page, 0), f"{got} has an old generation")
                self.generations[page] = got.generation
            self.writing.append(got)
            self.hold(got, 1)
            self.write(got, "torn")

    def commit(self, n: int) -> None:
        waiting = self.writing + self.orphans
        if not waiting:
            return
        reservation = waiting[n % len(waiting)]
        self.write(reservation)
        block = self.store.commit(reservation, bytes(16), self.now)
        self.hold(reservation, -1)
        if reservation in self.orphans:
            self.orphans.remove(reservation)
            demand(block is None, "committed into a namespace that was dropped")
        else:
            self.writing.remove(reservation)
            demand(block is reservation, "not committed")
            place = (reservation.namespace, reservation.key)
            demand(place not in self.live, "committed twice")
            self.live[place] = reservation
        self.hear()

    def give_up(self, n: int, token: int | None) -> None:
        """Abort, or (with a token) quarantine: then the transfer goes on writing when it likes."""
        waiting = self.writing + self.orphans
        if not waiting:
            return
        reservation = waiting[n % len(waiting)]
        (self.orphans if reservation in self.orphans else self.writing).remove(reservation)
        if token is None:
            self.store.abort(reservation)
            self.hold(reservation, -1)
        else:
            self.store.quarantine(reservation, token)
            self.parked.setdefault(token, []).append(reservation)

    def late_write(self) -> None:
        for parked in self.parked.values():
            for reservation in parked:
                self.write(reservation, "late")

    def clear(self, token: int) -> None:
        parked = self.parked.pop(token, [])
        for reservation in parked:
            self.write(reservation, "last")
            self.hold(reservation, -1)
        demand(self.store.clear_quarantine(token) == len(parked), "the quarantine has lost count")

    def pin(self, i: int, keys: list[bytes], ttl_s: float, holder: int) -> None:
        namespace = self.layouts[i].namespace
        pinned = self.store.pin(namespace, keys, ttl_s, self.now, holder)
        demand(len(pinned.blocks) == len(keys), "not one answer per key")
        for position, (key, block) in enumerate(zip(keys, pinned.blocks, strict=True)):
            expected = self.live.get((namespace, key)) if position < pinned.considered else None
            demand(block is expected, f"pinned {block}, there is {expected}")
        found = [(block, self.tag(block)) for block in pinned.blocks if block is not None]
        demand(bool(found) == (pinned.lease_id != 0), "a lease on nothing, or none on something")
        if found:
            demand(self.now + 0.1 <= pinned.expires_at <= self.now + 4.0, "ttl is not clamped")
            self.leases[pinned.lease_id] = (holder, pinned.expires_at, found)
        for block, tag in found:
            self.hold(block, 1)
            self.read(block, tag)

    def _end(self, lease_id: int) -> None:
        for block, tag in self.leases.pop(lease_id)[2]:
            self.hold(block, -1)
            self.read(block, tag)  # it was in force until now: nobody may have touched the bytes
        self.ended.append(lease_id)

    def release(self, n: int) -> None:
        known = [*self.leases, *self.ended[-3:]]
        if known:
            lease_id = known[n % len(known)]
            in_force = lease_id in self.leases
            if in_force:
                self._end(lease_id)
            demand(self.store.release(lease_id, self.now) == in_force, "a lease lied about whether it held")

    def disconnect(self, holder: int) -> None:
        for lease_id in [each for each, (whose, _, _) in self.leases.items() if whose == holder]:
            self._end(lease_id)
        self.store.release_holder(holder)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for lease_id in [each for each, (_, expires_at, _) in self.leases.items() if expires_at <= self.now]:
            self._end(lease_id)

    def expire(self) -> None:
        self.store.expire(self.now)
        demand(self.store.stats().leases == len(self.leases), "leases in force are not those that should be")

    def touch(self, i: int, keys: list[bytes]) -> None:
        namespace = self.layouts[i].namespace
        here = sum((namespace, key) in self.live for key in keys)
        demand(self.store.touch(namespace, keys, self.now) == here, "touch has lost count")

    def delete(self, i: int, key: bytes) -> None:
        place = (self.layouts[i].namespace, key)
        demand(self.store.delete(*place) == (place in self.live), "delete said what is not so")
        self.hear()
        demand(place not in self.live, "deleted and still there")

    def drop(self, i: int) -> None:
        namespace = self.layouts[i].namespace
        count = sum(place[0] == namespace for place in self.live)
        demand(self.store.drop_namespace(namespace) == count, "drop has lost count")
        self.open.discard(namespace)
        self.orphans += [each for each in self.writing if each.namespace == namespace]
        self.writing = [each for each in self.writing if each.namespace != namespace]
        self.hear()

    def check(self) -> None:
        """All that is believed is so, down to the bytes."""
        self.store.check_integrity()
        demand(set(self.store.index_keys()) == self.replica, "the log and the store differ")
        for place, block in self.live.items():
            demand(self.store.lookup(*place) is block and block.state == BlockState.LIVE, f"{block} is not there")
            self.read(block, self.tag(block))
        for _, _, blocks in self.leases.values():
            for block, tag in blocks:
                self.read(block, tag)
        stats = self.store.stats()
        demand(stats.blocks_writing == len(self.writing) + len(self.orphans), "reservations do not add up")
        demand(stats.blocks_quarantined == sum(map(len, self.parked.values())), "the quarantine does not add up")

    def step(self, rng: random.Random) -> None:
        """One random event; the weights keep the arena full and every kind of hand busy."""
        i = rng.choice((0, 0, 0, 1, 1, 2, 3))
        key = KEY[rng.randrange(KEYS)]
        dice = rng.random()
        if dice < 0.30:
            self.reserve(i, key)
        elif dice < 0.55:
            self.commit(rng.randrange(99))
        elif dice < 0.60:
            self.give_up(rng.randrange(99), rng.choice((None, None, 1, 2)))
        elif dice < 0.62:
            self.late_write()
        elif dice < 0.64:
            self.clear(rng.choice((1, 2)))
        elif dice < 0.76:
            self.pin(i, rng.choices(KEY, k=rng.randrange(1, 5)), rng.random() * 5, rng.choice(HOLDERS))
        elif dice < 0.84:
            self.release(rng.randrange(99))
        elif dice < 0.90:
            self.wait(rng.random())
        elif dice < 0.91:
            self.expire()
        elif dice < 0.95:
            self.touch(i, rng.choices(KEY, k=3))
        elif dice < 0.97:
            self.delete(i, key)
        elif dice < 0.98:
            self.disconnect(rng.choice(HOLDERS))
        elif dice < 0.985:
            self.drop(i)
        else:
            self.register(i)


KEY = [bytes([i]) * 16 for i in range(KEYS)]


def run(world: World, seed: int, steps: int, check_every: int = 0) -> World:
    """Random events; a failure names the seed and the step."""
    rng = random.Random(seed)
    step = 0
    try:
        for step in range(steps):
            world.step(rng)
            if check_every and step % check_every == 0:
                world.check()
    except AssertionError as error:
        error.add_note(f"seed {seed}, step {step}")
        raise
    return world


@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_of_events_puts_a_slot_into_two_hands(seed: int, layout: Callable[..., Layout]) -> None:
    """4 x 30,000 events, checked one by one, and all of the books now and then."""
    world = run(World(layout), seed, 30_000, check_every=250)
    world.check()
    stats = world.store.stats()
    assert min(stats.evictions_total, stats.extents_reclaimed_total, stats.quarantines_total) > 50  # it did happen
    assert min(stats.leases_expired_total, stats.no_space_total) > 50


def test_when_everybody_lets_go_all_memory_is_free_again(layout: Callable[..., Layout]) -> None:
    world = run(World(layout), 99, 5_000)
    for token in (1, 2):
        world.clear(token)
    for holder in HOLDERS:
        world.disconnect(holder)
    for reservation in world.writing + world.orphans:
        world.store.abort(reservation)
    for i in range(len(BLOCK_BYTES)):
        world.store.drop_namespace(world.layouts[i].namespace)
    world.store.check_integrity()
    stats = world.store.stats()
    assert stats.free_bytes == EXTENTS * EXTENT
    assert stats.live_bytes == stats.pinned_bytes == stats.quarantined_bytes == stats.leases == 0


# ---- the same runs with a guard taken out: each must be caught


def damage(layout: Callable[..., Layout], make: Callable[..., Any]) -> str:
    with pytest.raises(Damage) as caught:
        run(World(layout, make), 7, 20_000)
    return str(caught.value)


def test_without_the_hold_of_leases_slots_change_hands_under_readers(layout: Callable[..., Layout]) -> None:
    """``Store::held`` is the one guard between leases and reuse."""

    def make(*args: Any, **options: Any) -> DramStore:
        store = DramStore(*args, **options)
        store.core.ignore_leases_for_tests(True)
        return store

    assert "somebody else's hands" in damage(layout, make)


def test_without_the_hold_of_leases_the_reference_fails_too(
    layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceStore, "_held", staticmethod(lambda block: False))
    assert "somebody else's hands" in damage(layout, ReferenceStore)


def test_without_quarantine_late_bytes_land_in_others_blocks(
    implementation: type[DramStore], layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "quarantine", lambda store, reservation, token: store.abort(reservation))
    assert "somebody else's hands" in damage(layout, implementation)


def test_without_generations_a_slot_looks_the_same_after_its_reuse(
    layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SlotAllocator.take

    def take(slots: SlotAllocator[Any], slot_bytes: int, occupant: reference.Block) -> int | None:
        offset = real(slots, slot_bytes, occupant)
        slots.generation = 1
        return offset

    monkeypatch.setattr(SlotAllocator, "take", take)
    assert "old generation" in damage(layout, ReferenceStore)


def test_without_single_flight_two_writers_meet(layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(dict[bytes, reference.Block]):
        """Never says that somebody is writing."""

        def __contains__(self, key: object) -> bool:
            return False

    real = reference._Space.__init__

    def forgetful(space: reference._Space, *args: object) -> None:
        real(space, *args)  # type: ignore[arg-type]
        space.writing = Forgetful()

    monkeypatch.setattr(reference._Space, "__init__", forgetful)
    assert "not BUSY" in damage(layout, ReferenceStore)


@pytest.mark.parametrize("guard", ["generation", "eviction order"])
def test_a_core_that_answers_otherwise_than_the_reference_is_noticed(
    guard: str, layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself: a reference that is a little different must not agree."""
    if guard == "generation":
        real = SlotAllocator.take

        def take(slots: SlotAllocator[Any], slot_bytes: int, occupant: reference.Block) -> int | None:
            slots.generation += slots.generation == 500
            return real(slots, slot_bytes, occupant)

        monkeypatch.setattr(SlotAllocator, "take", take)
    else:
        monkeypatch.setattr(Lru, "access", lambda lru, block: None)
    with pytest.raises(Different):
        run(World(layout), 7, 20_000)


# ---- hypothesis: shorter sequences, but it looks for the nasty ones and shrinks them

layouts = st.integers(0, len(BLOCK_BYTES) - 1)
keys = st.sampled_from(KEY[:8])
numbers = st.integers(0, 20)
tokens = st.sampled_from([1, 2])
holders = st.sampled_from(HOLDERS)


def small_layout(block_bytes: int, model: str) -> Layout:
    return Layout(model=model, revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=block_bytes)


class DramMachine(RuleBasedStateMachine):
    """The world's events as rules."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(small_layout)

    @rule(i=layouts)
    def register(self, i: int) -> None:
        self.world.register(i)

    @rule(i=layouts, key=keys)
    def reserve(self, i: int, key: bytes) -> None:
        self.world.reserve(i, key)

    @rule(i=layouts, chain=st.lists(keys, max_size=8))
    def put(self, i: int, chain: list[bytes]) -> None:
        for key in chain:
            self.world.reserve(i, key)
            self.world.commit(len(self.world.writing) - 1)

    @rule(n=numbers)
    def commit(self, n: int) -> None:
        self.world.commit(n)

    @rule(n=numbers, token=st.none() | tokens)
    def give_up(self, n: int, token: int | None) -> None:
        self.world.give_up(n, token)

    @rule(token=tokens)
    def clear(self, token: int) -> None:
        self.world.late_write()
        self.world.clear(token)

    @rule(i=layouts, chain=st.lists(keys, min_size=1, max_size=5), ttl_s=st.floats(0, 6), holder=holders)
    def pin(self, i: int, chain: list[bytes], ttl_s: float, holder: int) -> None:
        self.world.pin(i, chain, ttl_s, holder)

    @rule(n=numbers)
    def release(self, n: int) -> None:
        self.world.release(n)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(holder=holders)
    def disconnect(self, holder: int) -> None:
        self.world.disconnect(holder)

    @rule()
    def expire(self) -> None:
        self.world.expire()

    @rule(i=layouts, chain=st.lists(keys, max_size=5))
    def touch(self, i: int, chain: list[bytes]) -> None:
        self.world.touch(i, chain)

    @rule(i=layouts, key=keys)
    def delete(self, i: int, key: bytes) -> None:
        self.world.delete(i, key)

    @rule(i=layouts)
    def drop(self, i: int) -> None:
        self.world.drop(i)

    @invariant()
    def all_is_well(self) -> None:
        self.world.late_write()
        self.world.check()


DramMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestDramMachine = DramMachine.TestCase


# ---- the exact order of eviction


@pytest.mark.parametrize("seed", range(2))
def test_with_one_layout_and_no_leases_the_store_is_exactly_an_lru_cache(
    seed: int, implementation: type[DramStore], layout: Callable[..., Layout]
) -> None:
    rng, slots = random.Random(seed), 40
    store = implementation(slots * PAGE, extent_bytes=8 * PAGE)
    namespace = store.register(layout(PAGE))
    model: OrderedDict[bytes, None] = OrderedDict()

    def use(used: Iterable[bytes]) -> None:
        for key in reversed([key for key in used if key in model]):
            model.move_to_end(key)

    for step in range(20_000):
        key = min(int(rng.expovariate(0.03)), 255).to_bytes(8, "little")
        if rng.random() < 0.5:
            got = store.reserve(namespace, key, step)
            assert (got is Status.EXISTS) == (key in model)
            if not isinstance(got, Status):
                store.commit(got, bytes(16), step)
                if len(model) == slots:
                    model.popitem(last=False)
                model[key] = None
            use([key])
        else:
            chain = [key, *(min(int(rng.expovariate(0.03)), 255).to_bytes(8, "little") for _ in range(2))]
            chain = list(dict.fromkeys(chain))
            pinned = store.pin(namespace, chain, 1.0, step, 1)
            assert [block is not None for block in pinned.blocks] == [key in model for key in chain]
            store.release(pinned.lease_id, step)
            use(chain)
    assert {key for key in model if store.lookup(namespace, key)} == set(model)
    store.check_integrity()
