"""Addresses to dial, and when: seeds from discovery, and what members say of each other.

Pure: the driver dials. One target per address, so that several names of one node cost one connection. Retries back
off exponentially with jitter; a seed is never given up, an address from hearsay is after ``purge_s`` without success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from p2pkv.gossip.membership import WILDCARDS
from p2pkv.wire.peer import Address

if TYPE_CHECKING:
    import random

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0
"""A peer that comes back is found within this. 500 dead members of a cell of 1,000 cost 250 tries a second."""
REFUSED_BACKOFF_S: Final = 15.0
"""After an answer that time alone will not change: another cell, a stale epoch, a full table."""
OWN_ADDRESS_S: Final = 300.0
"""An address that turned out to be this node's own is not tried again for so long (it may be given to another node)."""
DIALS_MAX: Final = 64
"""Connections being opened at the same time: a restarted cell does not open a thousand sockets in one tick."""


@dataclass(slots=True)
class Target:
    """One address. ``node`` is who answered there last."""

    address: Address
    added: float
    next_at: float
    sources: set[str] = field(default_factory=set)  # discovery sources that name it; empty = hearsay
    node: int | None = None
    conn: int | None = None
    failures: int = 0


class DialBook:
    """All targets; bounded to ``targets_max``. Not thread-safe."""

    def __init__(self, *, targets_max: int, purge_s: float, rng: random.Random) -> None:
        self._targets: dict[Address, Target] = {}
        self._by_conn: dict[int, Target] = {}
        self._own: dict[Address, float] = {}
        self._targets_max = targets_max
        self._purge_s = purge_s
        self._rng = rng

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def seed(self, now: float, source: str, addresses: Iterable[Address]) -> None:
        """Replace what one discovery source names."""
        named = dict.fromkeys(addresses)  # in their order: a set's would differ from run to run
        for target in list(self._targets.values()):
            if source in target.sources and target.address not in named:
                target.sources.discard(source)
                target.added = now
        for address in named:
            target_now = self.learn(now, address)
            if target_now is not None:
                target_now.sources.add(source)

    def learn(self, now: float, address: Address, *, urgent: bool = False) -> Target | None:
        """Note an address. ``urgent``: something was just heard from there, so try at once.

        Returns None when it is an own address or the book is full.
        """
        if self._own.get(address, 0.0) > now:
            return None
        target = self._targets.get(address)
        if target is None:
            if address.host in WILDCARDS or not address.port or len(self._targets) >= self._targets_max:
                return None
            target = Target(address=address, added=now, next_at=now)
            self._targets[address] = target
        elif urgent:
            target.added = now
            target.failures = 0
            target.next_at = min(target.next_at, now)
        return target

    def due(self, now: float, connected: Callable[[int], bool]) -> list[Target]:
        """Targets to dial now, the longest waiting first; forgets hearsay that never answered.

        A target whose node is ``connected`` rests.
        """
        room = DIALS_MAX - len(self._by_conn)
        found = []
        for target in list(self._targets.values()):
            if target.conn is not None or target.next_at > now:
                continue
            if target.node is not None and connected(target.node):
                continue
            if not target.sources and target.failures and now - target.added > self._purge_s:
                del self._targets[target.address]
            else:
                found.append(target)
        found.sort(key=lambda t: t.next_at)
        return found[: max(room, 0)]

    def dialing(self, target: Target, conn: int) -> None:
        """A connection to the target is being opened."""
        target.conn = conn
        self._by_conn[conn] = target

    def answered(self, now: float, conn: int, node: int) -> None:
        """WELCOME came: ``node`` is there."""
        if target := self._by_conn.pop(conn, None):
            target.conn, target.node, target.failures, target.added = None, node, 0, now

    def failed(self, now: float, conn: int, *, wait_s: float | None = None) -> None:
        """The connection did not get as far as WELCOME."""
        target = self._by_conn.pop(conn, None)
        if target is None:
            return
        target.conn = None
        target.failures += 1
        wait = wait_s or min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(target.failures - 1, 16))
        target.next_at = now + wait * self._rng.uniform(0.5, 1.0)

    def own(self, now: float, conn: int) -> Address | None:
        """The connection came back to this very process: forget the address."""
        target = self._by_conn.pop(conn, None)
        if target is None:
            return None
        del self._targets[target.address]
        if len(self._own) >= self._targets_max:
            del self._own[next(iter(self._own))]
        self._own[target.address] = now + OWN_ADDRESS_S
        return target.address

    def lost(self, now: float, node: int, *, wait_s: float = BACKOFF_FIRST_S) -> None:
        """The connection to ``node`` is gone: whatever led to it may be tried again after about ``wait_s``."""
        for target in self._targets.values():
            if target.node == node:
                target.node, target.failures, target.added = None, 0, now
                target.next_at = now + wait_s * self._rng.uniform(0.5, 1.0)

    def drop(self, node: int, address: Address) -> None:
        """``node`` has gone for good: forget its addresses, except those that a discovery source names."""
        for target in list(self._targets.values()):
            if target.node == node:
                target.node = None
            elif target.address != address:
                continue
            if target.conn is None and not target.sources:
                del self._targets[target.address]
