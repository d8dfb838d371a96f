"""Which bytes of the arena are whose: extents, slots, generations. Pure arithmetic on offsets; touches no memory.

The arena is cut into *units* of ``extent_bytes``. An *extent* is a run of adjacent units that serves slots of one
size; all layouts with that slot size share it. An extent whose last slot is freed goes back to the pool at once, from
where any other size may take it. (The slab allocator of Bonwick 1994; pages that move between classes as in memcached.)

Rules:

1. Two taken slots never overlap; a slot lies within one extent, an extent within the arena.
2. Slots come back warm: within an extent the slot freed last is taken first, and slots never used come last.
3. One counter numbers every ``take``, so a slot's generation grows at each reuse, whatever its extent served between.

Memory: 8 bytes per slot that was ever used since its extent was assigned, 40 more while it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

from p2pkv.errors import InvalidArgument, LocalProtocolError, OutOfSpace

T = TypeVar("T")

PAGE_BYTES: Final = 4096
"""Slots begin and end on pages: sendfile, O_DIRECT and registration for RDMA all want that."""

EXTENT_BYTES_MIN: Final = 2 << 20
EXTENT_BYTES_MAX: Final = 64 << 20
EXTENTS_WANTED: Final = 256
"""Enough extents for several layouts to share an arena in fair parts; few enough that one holds many slots."""

UNITS_TRIED: Final = 16
"""How many extent lengths above the shortest possible one are compared for a slot size that packs badly into units."""


def slot_bytes_for(block_bytes: int) -> int:
    """Bytes that a block of ``block_bytes`` occupies: rounded up to whole pages."""
    return -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


def extent_bytes_for(capacity_bytes: int) -> int:
    """A good unit for an arena of this size: a multiple of 2 MiB (one huge page), at most 64 MiB, if it fits at all."""
    wanted = capacity_bytes // EXTENTS_WANTED // EXTENT_BYTES_MIN * EXTENT_BYTES_MIN
    best = min(max(wanted, EXTENT_BYTES_MIN), EXTENT_BYTES_MAX)
    return best if best <= capacity_bytes else capacity_bytes // PAGE_BYTES * PAGE_BYTES


class _Extent(Generic[T]):
    """Slots of one size in a run of units. ``occupants[i]`` is None: slot i is free; beyond its end: never used yet."""

    __slots__ = ("base", "free", "occupants", "slot_bytes", "slots", "unit", "units")

    def __init__(self, unit: int, units: int, extent_bytes: int, slot_bytes: int) -> None:
        self.unit = unit
        self.units = units
        self.base = unit * extent_bytes
        self.slot_bytes = slot_bytes
        self.slots = units * extent_bytes // slot_bytes
        self.free: list[int] = []
        self.occupants: list[T | None] = []


class _SlotSize(Generic[T]):
    """One slot size: how long its extents should be, and those that have a free slot (the one to take from is last)."""

    __slots__ = ("partial", "units", "units_min")

    def __init__(self, units: int, units_min: int) -> None:
        self.units = units
        self.units_min = units_min
        self.partial: dict[_Extent[T], None] = {}


class SlotAllocator(Generic[T]):
    """Hands out slots of an arena. A slot is named by its offset in bytes. One thread; nothing blocks.

    Args:
        capacity_bytes: size of the arena; what remains beyond whole units is never used.
        extent_bytes: the unit in which memory moves between slot sizes; a multiple of 4096.
    """

    __slots__ = (
        "_by_unit",
        "_pool",
        "_pool_units",
        "_sizes",
        "extent_bytes",
        "free_slot_bytes",
        "generation",
        "on_extent",
        "units",
    )

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        if extent_bytes < PAGE_BYTES or extent_bytes % PAGE_BYTES:
            raise InvalidArgument("extent_bytes must be a positive multiple of 4096", extent_bytes=extent_bytes)
        if capacity_bytes < extent_bytes:
            raise InvalidArgument(
                "the arena is smaller than one extent", capacity_bytes=capacity_bytes, extent_bytes=extent_bytes
            )
        self.extent_bytes = extent_bytes
        self.units = capacity_bytes // extent_bytes
        self.generation = 0
        """Generation of the slot that was taken last."""
        self.free_slot_bytes = 0
        """Bytes of free slots in extents that are assigned to a size."""
        self.on_extent: Callable[[int, int], None] = lambda offset, length: None
        """Called with (offset, length) when memory is assigned to a slot size: it is about to be written."""
        self._by_unit: list[_Extent[T] | None] = [None] * self.units
        self._pool = bytearray(b"\x01") * self.units  # 1 = belongs to no size; bytes, so that runs are found by memmem
        self._pool_units = self.units
        self._sizes: dict[int, _SlotSize[T]] = {}

    @property
    def pool_bytes(self) -> int:
        """Bytes that are assigned to no slot size."""
        return self._pool_units * self.extent_bytes

    def open(self, slot_bytes: int) -> None:
        """Prepare for slots of this size (idempotent). Takes no memory yet.

        Raises:
            InvalidArgument: not a positive multiple of 4096.
            OutOfSpace: one such slot is larger than the whole arena.
        """
        if slot_bytes in self._sizes:
            return
        if slot_bytes < PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise InvalidArgument("slot_bytes must be a positive multiple of 4096", slot_bytes=slot_bytes)
        units_min = -(-slot_bytes // self.extent_bytes)
        if units_min > self.units:
            raise OutOfSpace(
                "a block of this layout does not fit into the arena",
                hint="Give the agent a larger arena, or the engine smaller blocks",
                slot_bytes=slot_bytes,
                arena_bytes=self.units * self.extent_bytes,
            )
        # A 40 MiB slot wastes 24 MiB of a 64 MiB unit but only 8 MiB of two: take the shortest extent that comes
        # within 1/16 of the most slots that an empty arena can hold.
        choices = range(units_min, min(units_min + UNITS_TRIED, self.units + 1))
        slots = [self.units // n * (n * self.extent_bytes // slot_bytes) for n in choices]
        units = next(n for n, count in zip(choices, slots, strict=True) if 16 * count >= 15 * max(slots))
        self._sizes[slot_bytes] = _SlotSize(units, units_min)

    def take(self, slot_bytes: int, occupant: T) -> int | None:
        """Offset of a slot that was free and is now ``occupant``'s, or None if there is none.

        Its generation is in :attr:`generation`. The size must have been opened.
        """
        size = self._sizes[slot_bytes]
        partial = size.partial
        if partial:
            extent = next(reversed(partial))
        else:
            assigned = self._assign(slot_bytes, size)
            if assigned is None:
                return None
            extent = assigned
        if extent.free:
            index = extent.free.pop()
            extent.occupants[index] = occupant
        else:
            index = len(extent.occupants)
            extent.occupants.append(occupant)
        if not extent.free and len(extent.occupants) == extent.slots:
            del partial[extent]
        self.free_slot_bytes -= slot_bytes
        self.generation += 1
        return extent.base + index * slot_bytes

    def free(self, offset: int) -> None:
        """Give a taken slot back. Its bytes must not change any more.

        Raises:
            LocalProtocolError: no taken slot begins there (a double free).
        """
        unit = offset // self.extent_bytes
        extent = self._by_unit[unit] if 0 <= unit < self.units else None
        if extent is None:
            raise LocalProtocolError("freed a slot of an extent that is not in use", offset=offset)
        index, inside = divmod(offset - extent.base, extent.slot_bytes)
        occupants, free = extent.occupants, extent.free
        if inside or index >= len(occupants) or occupants[index] is None:
            raise LocalProtocolError("freed a slot that is not taken", offset=offset)
        occupants[index] = None
        free.append(index)
        self.free_slot_bytes += extent.slot_bytes
        partial = self._sizes[extent.slot_bytes].partial
        if len(free) == len(occupants):
            partial.pop(extent, None)
            self._unassign(extent)
        else:
            partial[extent] = None  # an extent that was full goes last, so that this warm slot is the next to be taken

    def windows(self, offset: int, slot_bytes: int) -> Iterator[Iterator[T]]:
        """Ways to make room for a slot of ``slot_bytes`` around ``offset``: each yields the occupants that must go.

        Each window is the shortest run of units that such a slot needs and contains the unit of ``offset``. Once
        all its occupants are freed, ``take`` succeeds. Free nothing before the iteration is over.
        """
        units = self._sizes[slot_bytes].units_min
        at = offset // self.extent_bytes
        for first in range(max(0, at - units + 1), min(at, self.units - units) + 1):
            yield self._occupants(first, first + units)

    def occupants(self) -> Iterator[T]:
        """Everything that has a slot, in order of offset."""
        return self._occupants(0, self.units)

    def _occupants(self, first: int, end: int) -> Iterator[T]:
        unit = first
        while unit < end:
            extent = self._by_unit[unit]
            if extent is None:
                unit += 1
                continue
            yield from (each for each in extent.occupants if each is not None)
            unit = extent.unit + extent.units

    def _assign(self, slot_bytes: int, size: _SlotSize[T]) -> _Extent[T] | None:
        """Move a run of units from the pool to this size; a shorter one than it wants if the pool is in pieces."""
        if self._pool_units < size.units_min:
            return None  # what a full arena answers to every first try
        for units in range(size.units, size.units_min - 1, -1):
            # Single units from the low end, runs from the high end: small sizes leave the place of large ones whole.
            at = self._pool.find(1) if units == 1 else self._pool.rfind(b"\x01" * units)
            if at >= 0:
                break
        else:
            return None
        extent: _Extent[T] = _Extent(at, units, self.extent_bytes, slot_bytes)
        self._pool[at : at + units] = bytes(units)
        self._pool_units -= units
        self.on_extent(at * self.extent_bytes, units * self.extent_bytes)
        self._by_unit[at : at + units] = [extent] * units
        self.free_slot_bytes += extent.slots * slot_bytes
        size.partial[extent] = None
        return extent

    def _unassign(self, extent: _Extent[T]) -> None:
        self._pool[extent.unit : extent.unit + extent.units] = b"\x01" * extent.units
        self._pool_units += extent.units
        self._by_unit[extent.unit : extent.unit + extent.units] = [None] * extent.units
        self.free_slot_bytes -= extent.slots * extent.slot_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError unless the rules at the top hold and all counts add up. For tests."""
        unit, free_slot_bytes = 0, 0
        partial: dict[int, set[_Extent[T]]] = {slot_bytes: set() for slot_bytes in self._sizes}
        while unit < self.units:
            extent = self._by_unit[unit]
            _require(self._pool[unit] == (extent is None), f"unit {unit} is assigned and in the pool, or neither")
            if extent is None:
                unit += 1
                continue
            run = self._by_unit[extent.unit : extent.unit + extent.units]
            _require(extent.unit == unit and run == [extent] * extent.units, f"extents overlap at unit {unit}")
            _require(not any(self._pool[unit : unit + extent.units]), f"extent at unit {unit} is partly in the pool")
            _require(extent.slots * extent.slot_bytes <= extent.units * self.extent_bytes, "slots exceed their extent")
            _require(len(extent.occupants) <= extent.slots, "an extent has more slots than fit")
            vacant = [index for index, occupant in enumerate(extent.occupants) if occupant is None]
            _require(sorted(extent.free) == vacant, f"free list of extent at unit {unit} is not its free slots")
            _require(len(vacant) < len(extent.occupants), f"extent at unit {unit} is empty but not in the pool")
            free = extent.slots - len(extent.occupants) + len(vacant)
            free_slot_bytes += free * extent.slot_bytes
            if free:
                partial[extent.slot_bytes].add(extent)
            unit += extent.units
        _require(self._pool_units == self._pool.count(1), "the pool does not add up")
        _require(free_slot_bytes == self.free_slot_bytes, "free slots do not add up")
        _require(partial == {n: set(size.partial) for n, size in self._sizes.items()}, "free slots cannot be found")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
