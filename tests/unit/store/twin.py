"""The C++ core beside its reference: the same calls to both, and every answer must be the same, to the last offset."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from p2pkv.store import reference
from p2pkv.store.base import Block, Pinned, Reservation, StoreStats
from p2pkv.store.dram import DramStore
from p2pkv.store.reference import ReferenceStore
from p2pkv.types import Layout, Status, Tier

ATTRIBUTES = ("namespace", "key", "offset", "length", "generation", "used_at", "state", "pins", "checksum")


class Different(AssertionError):
    """The core and the reference disagree."""


def same(core: object, expected: object, what: str) -> None:
    """Raise Different unless both said the same."""
    if core != expected:
        raise Different(f"{what}: the core says {core!r}, the reference {expected!r}")


class Twin:
    """A DramStore and a ReferenceStore under one hat. Gives out the core's blocks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.tested = DramStore(*args, **options, lease_seed=0)
        self.reference = ReferenceStore(*args, **options, lease_seed=0)
        self._twins: dict[Block, reference.Block] = {}

    def _same_block(self, block: Block | None, expected: reference.Block | None) -> None:
        if block is None or expected is None:
            same(block, expected, "a block")
            return
        if self._twins.setdefault(block, expected) is not expected:
            raise Different(f"{block} stands for {self._twins[block]} and {expected}")
        for name in ATTRIBUTES:
            same(getattr(block, name), getattr(expected, name), name)

    def register(self, layout: Layout) -> int:
        same(namespace := self.tested.register(layout), self.reference.register(layout), "register")
        return namespace

    def drop_namespace(self, namespace: int) -> int:
        same(count := self.tested.drop_namespace(namespace), self.reference.drop_namespace(namespace), "drop")
        return count

    def reserve(self, namespace: int, key: bytes, now: float) -> Reservation | Status:
        got, expected = self.tested.reserve(namespace, key, now), self.reference.reserve(namespace, key, now)
        if isinstance(got, Status) or isinstance(expected, Status):
            same(got, expected, "reserve")
        else:
            self._same_block(got, expected)
        return got

    def commit(self, block: Reservation, checksum: bytes, now: float) -> Block | None:
        done = self.tested.commit(block, checksum, now)
        self._same_block(done, self.reference.commit(self._reservation(block), checksum, now))
        return done

    def abort(self, block: Reservation) -> None:
        self.tested.abort(block)
        self.reference.abort(self._reservation(block))

    def quarantine(self, block: Reservation, token: Hashable) -> bool:
        fine = self.tested.quarantine(block, token)
        same(fine, self.reference.quarantine(self._reservation(block), token), "quarantine")
        return fine

    def _reservation(self, block: Reservation) -> reference.Reservation:
        found = self._twins[block]
        assert isinstance(found, reference.Reservation)
        return found

    def clear_quarantine(self, token: Hashable) -> int:
        same(count := self.tested.clear_quarantine(token), self.reference.clear_quarantine(token), "clear")
        return count

    def pin(self, namespace: int, keys: Sequence[bytes], ttl_s: float, now: float, holder: int) -> Pinned[Block]:
        got = self.tested.pin(namespace, keys, ttl_s, now, holder)
        expected = self.reference.pin(namespace, keys, ttl_s, now, holder)
        for name in ("lease_id", "ttl_s", "expires_at", "considered"):
            same(getattr(got, name), getattr(expected, name), name)
        for block, twin in zip(got.blocks, expected.blocks, strict=True):
            self._same_block(block, twin)
        return got

    def release(self, lease_id: int, now: float, holder: int | None = None) -> bool:
        held = self.tested.release(lease_id, now, holder)
        same(held, self.reference.release(lease_id, now, holder), "release")
        return held

    def release_holder(self, holder: int) -> int:
        same(count := self.tested.release_holder(holder), self.reference.release_holder(holder), "release_holder")
        return count

    def expire(self, now: float) -> int:
        same(count := self.tested.expire(now), self.reference.expire(now), "expire")
        return count

    def lookup(self, namespace: int, key: bytes) -> Block | None:
        block = self.tested.lookup(namespace, key)
        self._same_block(block, self.reference.lookup(namespace, key))
        same(self.tested.writing(namespace, key), self.reference.writing(namespace, key), "writing")
        return block

    def touch(self, namespace: int, keys: Sequence[bytes], now: float) -> int:
        same(count := self.tested.touch(namespace, keys, now), self.reference.touch(namespace, keys, now), "touch")
        return count

    def delete(self, namespace: int, key: bytes) -> bool:
        same(found := self.tested.delete(namespace, key), self.reference.delete(namespace, key), "delete")
        return found

    def take_events(self) -> list[tuple[int, Tier]]:
        same(events := self.tested.take_events(), self.reference.take_events(), "events")
        return events

    def index_keys(self) -> Iterator[int]:
        keys = sorted(self.tested.index_keys())
        same(keys, sorted(self.reference.index_keys()), "index keys")
        return iter(keys)

    def stats(self) -> StoreStats:
        same(stats := self.tested.stats(), self.reference.stats(), "stats")
        return stats

    def check_integrity(self) -> None:
        self.tested.check_integrity()
        self.reference.check_integrity()
        for layout in self.tested.layouts():
            namespace = layout.namespace
            keys = self.tested.keys(namespace, 1_000_000)
            same(keys, self.reference.keys(namespace, 1_000_000), "keys")
            same(self.tested.count(namespace), len(keys), "count")
            same(self.tested.present(namespace, keys), b"\x01" * len(keys), "present")
            hot = self.tested.hot(namespace, 3)
            same(hot, self.reference.hot(namespace, 3), "hot")
            if hot:
                same(self.tested.hot(namespace, 2, hot[-1]), self.reference.hot(namespace, 2, hot[-1]), "hot, further")
        for block, twin in self._twins.items():
            self._same_block(block, twin)
        self._twins = {block: twin for block, twin in self._twins.items() if twin.state}  # FREE never changes again
