"""Whether the books of a reference store agree with each other: what tests ask after every sequence of operations.

Looks into the private state of :class:`~p2pkv.store.reference.ReferenceStore`, and only looks. O(everything).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from p2pkv.store.base import BlockState
from p2pkv.store.slots import slot_bytes_for
from p2pkv.types import CHECKSUM_BYTES

if TYPE_CHECKING:
    from p2pkv.store.reference import Block, ReferenceStore


def require(condition: bool, message: str) -> None:
    """``assert`` that python -O does not remove."""
    if not condition:
        raise AssertionError(message)


def check_reference(store: ReferenceStore) -> None:
    """Raise AssertionError unless slots, blocks, leases, policies and counters of the store agree."""
    store._slots.check_integrity()
    store._leases.check_integrity()
    _check_blocks(store)
    _check_sums(store)


def _check_blocks(store: ReferenceStore) -> None:
    """Every taken slot has one block, in a state that its surroundings confirm, with the pins of its leases."""
    pins: dict[Block, int] = {}
    for block in store._leases.pins():
        pins[block] = pins.get(block, 0) + 1
    parked = {block for blocks in store._parked.values() for block in blocks}
    live_by_size: dict[int, list[Block]] = {slot_bytes: [] for slot_bytes in store._sizes}
    for block in store._slots.occupants():
        space = store._spaces.get(block.namespace)
        require(block.pins == pins.pop(block, 0), f"pins are not those of the leases: {block}")
        match block.state:
            case BlockState.LIVE:
                require(space is not None and space.blocks.get(block.key) is block, f"live, but not listed: {block}")
                require(len(block.checksum) == CHECKSUM_BYTES, f"live without a checksum: {block}")
                live_by_size[slot_bytes_for(block.length)].append(block)
            case BlockState.WRITING:
                require(not block.pins, f"pinned before it was written: {block}")
            case BlockState.UNLISTED:
                require(block.pins > 0, f"unlisted, but nobody holds it: {block}")
            case BlockState.PARKED:
                require(block in parked, f"parked under no token: {block}")
            case BlockState.FREE:
                require(False, f"free, but it has a slot: {block}")
    require(not pins, "a leased block has lost its slot")
    sizes = Counter(space.size.slot_bytes for space in store._spaces.values())
    require(sizes == {n: size.namespaces for n, size in store._sizes.items()}, "slot sizes are not the layouts'")
    for slot_bytes, live in live_by_size.items():
        store._sizes[slot_bytes].policy.check_integrity(live)


def _check_sums(store: ReferenceStore) -> None:
    """Nothing is listed that has no slot, and the running sums are the sums."""
    blocks = list(store._slots.occupants())
    listed = [block for space in store._spaces.values() for block in space.blocks.values()]
    writing = [block for space in store._spaces.values() for block in space.writing.values()]
    parked = [block for each in store._parked.values() for block in each]

    def of(state: BlockState) -> list[Block]:
        return [block for block in blocks if block.state is state]

    require(len(listed) == len(of(BlockState.LIVE)), "a listed block has lost its slot")
    require(len(parked) == len(of(BlockState.PARKED)), "a quarantined block has lost its slot")
    require(all(block.state is BlockState.WRITING for block in writing), "a reservation has lost its slot")
    require(store._writing == len(of(BlockState.WRITING)), "reservations do not add up")
    require(store._unlisted == len(of(BlockState.UNLISTED)), "unlisted blocks do not add up")
    require(store._live_bytes == sum(block.length for block in listed), "live bytes do not add up")
    require(store._quarantine_bytes == sum(block.length for block in parked), "quarantined bytes do not add up")
    require(store._pinned_bytes == sum(b.length for b in blocks if b.pins), "pinned bytes do not add up")
