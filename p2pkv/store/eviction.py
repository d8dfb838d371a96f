"""Eviction policies of the reference store: least recently used, and none at all. Pure; never looks into a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class EvictionPolicy(ABC, Generic[T]):
    """Which block should go first.

    A policy orders the LIVE blocks of one slot size. It decides, it never frees: the store removes a victim by itself.
    One thread; no method may block; all but ``check_integrity`` are O(1), the search for victims amortised.
    """

    @abstractmethod
    def insert(self, block: T) -> None:
        """A block was committed. It is not in the policy yet."""

    @abstractmethod
    def access(self, block: T) -> None:
        """A block that is in the policy was used."""

    @abstractmethod
    def remove(self, block: T) -> None:
        """A block that is in the policy is going away, as a victim or otherwise."""

    @abstractmethod
    def victims(self, held: Callable[[T], bool]) -> Iterator[T]:
        """Blocks in the order in which they should go, without those that are held.

        Any other call on the policy ends the iteration: take what is needed, drop the iterator, then evict.
        """

    def victim(self, held: Callable[[T], bool]) -> T | None:
        """The first of ``victims``, or None: what every eviction asks, so policies may answer it faster."""
        return next(self.victims(held), None)

    @abstractmethod
    def check_integrity(self, live: Collection[T]) -> None:
        """Raise AssertionError unless the policy could offer exactly these blocks. For tests."""


class Lru(EvictionPolicy[T]):
    """Least recently used goes first.

    A held block that the search meets at the cold end is being read right now, which is a use: it moves to the hot
    end. So a long lease on many cold blocks is walked over once per round, not once per eviction.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[T, None] = OrderedDict()

    def insert(self, block: T) -> None:
        self._order[block] = None

    def access(self, block: T) -> None:
        self._order.move_to_end(block)

    def remove(self, block: T) -> None:
        del self._order[block]

    def victims(self, held: Callable[[T], bool]) -> Iterator[T]:
        in_use: list[T] = []
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

    def victim(self, held: Callable[[T], bool]) -> T | None:
        order = self._order
        for _ in range(len(order)):
            block = next(iter(order))
            if not held(block):
                return block
            order.move_to_end(block)
        return None

    def check_integrity(self, live: Collection[T]) -> None:
        if len(self._order) != len(live) or any(block not in self._order for block in live):
            raise AssertionError(f"LRU tracks {len(self._order)} blocks, {len(live)} are live, or not the same ones")


class NoEviction(EvictionPolicy[T]):
    """Keeps everything: a full store answers NO_SPACE. The null policy, for tests and for caches filled by hand."""

    __slots__ = ()

    def insert(self, block: T) -> None:
        pass

    def access(self, block: T) -> None:
        pass

    def remove(self, block: T) -> None:
        pass

    def victims(self, held: Callable[[T], bool]) -> Iterator[T]:
        return iter(())

    def check_integrity(self, live: Collection[T]) -> None:
        pass
