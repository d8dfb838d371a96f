"""SlotAllocator: slots never overlap, come back warm, and extents move between sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from p2pkv.errors import InvalidArgument, LocalProtocolError, OutOfSpace
from p2pkv.store.slots import EXTENT_BYTES_MAX, SlotAllocator, extent_bytes_for, slot_bytes_for

PAGE = 4096
Make = Callable[..., SlotAllocator[str]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes allocators and checks their books when the test is over."""
    made: list[SlotAllocator[str]] = []

    def allocator(capacity_bytes: int, extent_bytes: int, *sizes: int) -> SlotAllocator[str]:
        slots: SlotAllocator[str] = SlotAllocator(capacity_bytes, extent_bytes)
        for slot_bytes in sizes:
            slots.open(slot_bytes)
        made.append(slots)
        return slots

    yield allocator
    for slots in made:
        slots.check_integrity()


def take_all(slots: SlotAllocator[str], slot_bytes: int) -> list[int]:
    taken = []
    while (offset := slots.take(slot_bytes, "x")) is not None:
        taken.append(offset)
    return taken


def test_a_slot_is_a_block_rounded_up_to_pages() -> None:
    assert [slot_bytes_for(n) for n in (1, 4096, 4097, 1 << 20)] == [4096, 4096, 8192, 1 << 20]


@pytest.mark.parametrize("capacity", [4096, 5000, 1 << 20, 3 << 20, 1 << 30, 1 << 40])
def test_the_unit_fits_the_arena_and_is_whole_huge_pages_when_it_can_be(capacity: int) -> None:
    unit = extent_bytes_for(capacity)
    assert 0 < unit <= min(capacity, EXTENT_BYTES_MAX)
    assert unit % PAGE == 0
    assert capacity < 2 << 20 or unit % (2 << 20) == 0


def test_slots_of_one_size_fill_the_arena_without_overlap(make: Make) -> None:
    slots = make(16 * PAGE, 4 * PAGE, PAGE)
    assert sorted(take_all(slots, PAGE)) == [i * PAGE for i in range(16)]
    assert slots.pool_bytes == slots.free_slot_bytes == 0


def test_the_slot_freed_last_is_taken_first(make: Make) -> None:
    slots = make(16 * PAGE, 4 * PAGE, PAGE)
    take_all(slots, PAGE)
    for page in (1, 0, 2):
        slots.free(page * PAGE)
    assert [slots.take(PAGE, "x") for _ in range(3)] == [2 * PAGE, 0, PAGE]
    slots.free(3 * PAGE)
    slots.free(9 * PAGE)  # its extent was full: it becomes the one to take from
    assert [slots.take(PAGE, "x") for _ in range(2)] == [9 * PAGE, 3 * PAGE]


def test_every_reuse_of_a_place_has_a_larger_generation_even_in_another_size(make: Make) -> None:
    slots = make(4 * PAGE, 4 * PAGE, PAGE, 2 * PAGE)
    last: dict[int, int] = {}
    for slot_bytes in (PAGE, PAGE, 2 * PAGE, PAGE, 2 * PAGE):
        offset = slots.take(slot_bytes, "x")
        assert offset is not None
        assert slots.generation > last.get(offset, 0)
        last[offset] = slots.generation
        slots.free(offset)


def test_an_empty_extent_goes_back_to_the_pool_and_serves_another_size(make: Make) -> None:
    slots = make(8 * PAGE, 4 * PAGE, PAGE, 2 * PAGE)
    taken = take_all(slots, PAGE)
    assert slots.take(2 * PAGE, "x") is None
    for offset in taken[:4]:
        slots.free(offset)
    assert slots.pool_bytes == 4 * PAGE
    assert take_all(slots, 2 * PAGE) == [0, 2 * PAGE]
    assert slots.take(PAGE, "x") is None


def test_an_extent_with_one_taken_slot_stays_with_its_size(make: Make) -> None:
    slots = make(4 * PAGE, 4 * PAGE, PAGE, 2 * PAGE)
    taken = take_all(slots, PAGE)
    for offset in taken[1:]:
        slots.free(offset)
    assert slots.pool_bytes == 0
    assert slots.take(2 * PAGE, "x") is None


def test_a_slot_larger_than_a_unit_takes_adjacent_units(make: Make) -> None:
    slots = make(8 * PAGE, 2 * PAGE, PAGE, 5 * PAGE)
    small = slots.take(PAGE, "small")
    large = slots.take(5 * PAGE, "large")
    assert (small, large) == (0, 2 * PAGE)  # the small one at the low end, the large one at the high end
    assert slots.take(5 * PAGE, "x") is None
    slots.free(2 * PAGE)
    assert slots.pool_bytes == 6 * PAGE


def test_a_large_slot_is_refused_while_no_units_are_adjacent(make: Make) -> None:
    slots = make(4 * PAGE, PAGE, PAGE, 2 * PAGE)
    taken = take_all(slots, PAGE)
    slots.free(taken[0])
    slots.free(taken[2])
    assert slots.pool_bytes == 2 * PAGE
    assert slots.take(2 * PAGE, "x") is None
    slots.free(taken[1])
    assert slots.take(2 * PAGE, "x") is not None


def test_a_size_that_packs_badly_into_one_unit_gets_longer_extents(make: Make) -> None:
    """80 MiB into 64 MiB units: 6 slots in 8 units, where extents of 2 units would give 4."""
    slots = make(8 * 16 * PAGE, 16 * PAGE, 20 * PAGE)
    assert len(take_all(slots, 20 * PAGE)) == 6


def test_longer_extents_are_given_up_for_shorter_ones_when_the_pool_is_in_pieces(make: Make) -> None:
    slots = make(5 * 16 * PAGE, 16 * PAGE, 20 * PAGE, 16 * PAGE)
    small = take_all(slots, 16 * PAGE)
    for offset in small[:2]:
        slots.free(offset)
    assert take_all(slots, 20 * PAGE) == [0]


def test_a_block_larger_than_the_arena_is_refused_by_name(make: Make) -> None:
    slots = make(4 * PAGE, PAGE)
    with pytest.raises(OutOfSpace, match="does not fit into the arena"):
        slots.open(5 * PAGE)


@pytest.mark.parametrize("slot_bytes", [0, -4096, 100])
def test_a_size_that_is_not_whole_pages_is_refused(make: Make, slot_bytes: int) -> None:
    with pytest.raises(InvalidArgument):
        make(4 * PAGE, PAGE).open(slot_bytes)


@pytest.mark.parametrize(("capacity", "extent"), [(4096, 8192), (8192, 100), (8192, 0)])
def test_an_impossible_geometry_is_refused(capacity: int, extent: int) -> None:
    with pytest.raises(InvalidArgument):
        SlotAllocator(capacity, extent)


@pytest.mark.parametrize("offset", [-PAGE, 0, PAGE, 3 * PAGE + 1, 64 * PAGE])
def test_freeing_what_is_not_taken_is_an_error_and_changes_nothing(make: Make, offset: int) -> None:
    slots = make(8 * PAGE, 2 * PAGE, PAGE)
    first, _, third, _ = (slots.take(PAGE, "x") for _ in range(4))
    assert (first, third) == (0, 2 * PAGE)
    slots.free(0)
    before = slots.pool_bytes, slots.free_slot_bytes
    if offset == PAGE:
        slots.free(PAGE)  # empties the extent: its place now belongs to nobody
        before = slots.pool_bytes, slots.free_slot_bytes
    with pytest.raises(LocalProtocolError, match="freed a slot"):
        slots.free(offset)
    assert (slots.pool_bytes, slots.free_slot_bytes) == before


def test_emptying_any_window_makes_room_for_the_size_it_was_asked_for(make: Make) -> None:
    for pick in range(3):
        slots = make(6 * PAGE, PAGE, PAGE, 3 * PAGE)
        names = {f"{i}": slots.take(PAGE, f"{i}") for i in range(6)}
        windows = [list(window) for window in slots.windows(3 * PAGE, 3 * PAGE)]
        assert windows == [["1", "2", "3"], ["2", "3", "4"], ["3", "4", "5"]]
        assert slots.take(3 * PAGE, "large") is None
        for name in windows[pick]:
            offset = names[name]
            assert offset is not None
            slots.free(offset)
        assert slots.take(3 * PAGE, "large") is not None


def test_windows_at_the_ends_of_the_arena_stay_inside(make: Make) -> None:
    slots = make(4 * PAGE, PAGE, PAGE, 3 * PAGE)
    for i in range(4):
        slots.take(PAGE, f"{i}")
    assert [list(window) for window in slots.windows(0, 3 * PAGE)] == [["0", "1", "2"]]
    assert [list(window) for window in slots.windows(3 * PAGE, 3 * PAGE)] == [["1", "2", "3"]]


@pytest.mark.parametrize("seed", range(4))
def test_random_takes_and_frees_of_many_sizes_never_overlap(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    sizes = [PAGE, 2 * PAGE, 3 * PAGE, 7 * PAGE, 20 * PAGE]
    slots = make(103 * PAGE, 8 * PAGE, *sizes)
    taken: dict[int, int] = {}
    for step in range(8_000):
        if rng.random() < (0.7 if step // 500 % 2 else 0.3):
            slot_bytes = rng.choice(sizes)
            offset = slots.take(slot_bytes, "x")
            if offset is not None:
                taken[offset] = slot_bytes
        elif taken:
            offset = rng.choice(list(taken))
            slots.free(offset)
            del taken[offset]
        if step % 50 == 0:
            slots.check_integrity()
            for (a, size), (b, _) in pairwise(sorted(taken.items())):
                assert a + size <= b
            assert all(offset + size <= 103 * PAGE for offset, size in taken.items())
    for offset in taken:
        slots.free(offset)
    assert slots.pool_bytes == 12 * 8 * PAGE
