"""Eviction policies: least recently used, and none at all. Pure; the contract is in :mod:`p2pkv.store.base`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from p2pkv.store.base import Block, EvictionPolicy


class Lru(EvictionPolicy):
    """Least recently used goes first.

    A held block that the search meets at the cold end is being read right now, which is a use: it moves to the hot
    end. So a long lease on many cold blocks is walked over once per round, not once per eviction.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Block, None] = OrderedDict()

    def insert(self, block: Block) -> None:
        self._order[block] = None

    def access(self, block: Block) -> None:
        self._order.move_to_end(block)

    def remove(self, block: Block) -> None:
        del self._order[block]

    def victims(self, held: Callable[[Block], bool]) -> Iterator[Block]:
        in_use: list[Block] = []
        try:
            for block in self._order:
                if held(block):
                    in_use.append(block)
                else:
                    yield block
        finally:
            # Runs when the caller drops the iterator, which is before it may change the policy.
            for block in in_use:
                self._order.move_to_end(block)

    def victim(self, held: Callable[[Block], bool]) -> Block | None:
        order = self._order
        for _ in range(len(order)):
            block = next(iter(order))
            if not held(block):
                return block
            order.move_to_end(block)
        return None

    def check_integrity(self, live: Collection[Block]) -> None:
        if len(self._order) != len(live) or any(block not in self._order for block in live):
            raise AssertionError(f"LRU tracks {len(self._order)} blocks, {len(live)} are live, or not the same ones")


class NoEviction(EvictionPolicy):
    """Keeps everything: a full store answers NO_SPACE. The null policy, for tests and for caches filled by hand."""

    __slots__ = ()

    def insert(self, block: Block) -> None:
        pass

    def access(self, block: Block) -> None:
        pass

    def remove(self, block: Block) -> None:
        pass

    def victims(self, held: Callable[[Block], bool]) -> Iterator[Block]:
        return iter(())

    def check_integrity(self, live: Collection[Block]) -> None:
        pass
