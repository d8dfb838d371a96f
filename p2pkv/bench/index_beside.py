"""Lookups beside a writer: how much longer they take while another thread stores and drops a million entries a second.

In a process of its own. Its one argument is the number of lookups of each case; its answer is one line of JSON.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import deque
from typing import Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.bench.index_child import numbers
from p2pkv.bench.index_workloads import CHAIN, make, queries
from p2pkv.index.prefix import PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Tier

ENTRIES_PER_S: Final = 1_000_000
NODES: Final = 20
BLOCKS: Final = 20 * CHAIN
WRITERS_NODE: Final = NODES + 1
BATCH: Final = 8 * CHAIN
"""Keys of one call of the writer: what one delta of an ownership log has at most."""
KEPT: Final = 8
"""Batches that the writer's node has at a time while the index is not to grow."""


class Beside(msgspec.Struct, frozen=True):
    """Seconds of each lookup: alone, beside a writer that stores and drops, and beside one whose entries all stay.

    ``rates``: entries that were applied per second meanwhile. ``wrong``: answers that were not those of before, and,
    once the writer had ended, not the reference's.
    """

    idle: list[float]
    writer: list[float]
    growth: list[float]
    rates: dict[str, float]
    wrong: int


class Writer:
    """Stores batches at a steady rate, and drops that of ``kept`` batches ago, in a thread of its own."""

    def __init__(self, index: PrefixIndex, kept: int | None) -> None:
        self.entries = 0
        self.held: deque[bytes] = deque()
        self._index = index
        self._kept = kept
        self._begun = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._started = time.monotonic()

    def _run(self) -> None:
        rng = random.Random(7)
        while not self._over.is_set():
            self.held.append(rng.randbytes(8 * BATCH))
            self._index.apply(WRITERS_NODE, self.held[-1], Tier.DRAM)
            self.entries += BATCH
            if self._kept is not None and len(self.held) > self._kept:
                self._index.apply(WRITERS_NODE, self.held.popleft(), Tier.GONE)
                self.entries += BATCH
            self._begun.set()
            self._over.wait(max(0.0, self._started + self.entries / ENTRIES_PER_S - time.monotonic()))

    def __enter__(self) -> Writer:
        self._started = time.monotonic()
        self._thread.start()
        self._begun.wait(10.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def rate(self) -> float:
        """Entries per second so far."""
        return self.entries / (time.monotonic() - self._started)


def measure(samples: int) -> Beside:
    """All three cases, of one index each but for the first two."""
    workload = make("disjoint", NODES, BLOCKS)
    asked = [numbers(keys) for keys in queries(workload, "full", 64)]
    oracle = ReferenceIndex()
    wrong = 0
    rates: dict[str, float] = {}

    def fresh() -> PrefixIndex:
        index = PrefixIndex()
        for node, keys in workload.events:
            index.apply(node, keys, Tier.DRAM)
        return index

    def look(index: PrefixIndex) -> list[float]:
        nonlocal wrong
        expected = [index.match(keys) for keys in asked]
        taken = []
        for i in range(samples):
            keys = asked[i % len(asked)]
            began = time.perf_counter()
            found = index.match(keys)
            taken.append(time.perf_counter() - began)
            wrong += found != expected[i % len(asked)]
        return taken

    index = fresh()
    idle = look(index)
    with Writer(index, KEPT) as writer:
        beside = look(index)
        rates["writer"] = writer.rate
    for node, keys in [*workload.events, *((WRITERS_NODE, batch) for batch in writer.held)]:
        oracle.apply(node, keys, Tier.DRAM)
    for keys in [*asked, *map(numbers, writer.held)]:
        wrong += index.match(keys) != oracle.match(keys)
    wrong += index.checksum(WRITERS_NODE) != oracle.checksum(WRITERS_NODE)
    growing = fresh()
    with Writer(growing, None) as writer:
        growth = look(growing)
        rates["growth"] = writer.rate
    return Beside(idle, beside, growth, rates, wrong)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]))).decode())
