"""Lookups beside a writer: how much longer they take while another thread stores and drops a million entries a second.

In a process of its own. Its one argument is the number of lookups of each case; its answer is one line of JSON.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.bench.index_child import numbers
from p2pkv.bench.index_workloads import CHAIN, make, queries
from p2pkv.errors import P2PKVError
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
BATCHES: Final = 1_000
ROUNDS: Final = 10
"""Of each case, in turn with the others: what the machine does meanwhile meets all of them."""


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
    """Stores batches at a steady rate, and drops that of ``kept`` batches ago, in a thread of its own.

    The batches are made before, as making them would hold the interpreter's lock for longer than storing them does.
    """

    def __init__(self, index: PrefixIndex, kept: int | None, batches: Iterator[bytes]) -> None:
        self.entries = 0
        self.held: deque[bytes] = deque()
        self._batches = batches
        self._index = index
        self._kept = kept
        self._begun = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._started = time.monotonic()

    def _run(self) -> None:
        while not self._over.is_set():
            batch = next(self._batches, None)
            if batch is None:
                return
            self.held.append(batch)
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
        ended = not self._thread.is_alive()
        self._over.set()
        self._thread.join()
        if ended:
            raise P2PKVError("the writer had no more to write", hint="Make more batches, or ask for fewer lookups.")

    @property
    def rate(self) -> float:
        """Entries per second so far."""
        return self.entries / (time.monotonic() - self._started)


def batches_of(seed: int) -> list[bytes]:
    """Keys for one round's writer, more than it will need."""
    rng = random.Random(f"writer {seed}")  # not the workload's
    return [rng.randbytes(8 * BATCH) for _ in range(BATCHES)]


def measure(samples: int) -> Beside:
    """All three cases, in turn; one index for the first two, and one that grows for the third."""
    workload = make("disjoint", NODES, BLOCKS)
    asked = [numbers(keys) for keys in queries(workload, "full", 64)]
    steady, growing, oracle = PrefixIndex(), PrefixIndex(), ReferenceIndex()
    for node, keys in workload.events:
        for index in (steady, growing, oracle):
            index.apply(node, keys, Tier.DRAM)
    expected = [oracle.match(keys) for keys in asked]
    wrong = 0

    def look(index: PrefixIndex) -> list[float]:
        nonlocal wrong
        taken = []
        for i in range(samples // ROUNDS):
            keys = asked[i % len(asked)]
            began = time.perf_counter()
            found = index.match(keys)
            taken.append(time.perf_counter() - began)
            wrong += found != expected[i % len(asked)]
        return taken

    idle: list[float] = []
    beside: list[float] = []
    growth: list[float] = []
    rates: dict[str, list[float]] = {"writer": [], "growth": []}
    for turn in range(ROUNDS):
        idle += look(steady)
        with Writer(steady, KEPT, itertools.cycle(batches_of(0))) as writer:
            beside += look(steady)
            rates["writer"].append(writer.rate)
        # A quiescent point: what is there now is what the reference would have.
        for keys in writer.held:
            oracle.apply(WRITERS_NODE, keys, Tier.DRAM)
        for keys in [*asked, *map(numbers, writer.held)]:
            wrong += steady.match(keys) != oracle.match(keys)
        wrong += steady.checksum(WRITERS_NODE) != oracle.checksum(WRITERS_NODE)
        for index in (steady, oracle):
            index.remove_node(WRITERS_NODE)
        with Writer(growing, None, iter(batches_of(1 + turn))) as writer:
            growth += look(growing)
            rates["growth"].append(writer.rate)
    return Beside(idle, beside, growth, {case: sum(found) / ROUNDS for case, found in rates.items()}, wrong)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]))).decode())
