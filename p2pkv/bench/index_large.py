"""An index of very many entries, in a process of its own. Arguments: entries in all, owners. One line of JSON out."""

from __future__ import annotations

import random
import sys
import time
from typing import Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.bench.index_child import numbers, rss
from p2pkv.bench.index_workloads import CHAIN
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

SAMPLES: Final = 10_000
KEPT_EVERY: Final = 50
"""Of the chains that are stored, one of so many is asked for afterwards."""


class Large(msgspec.Struct, frozen=True):
    """``store_s``: CPU seconds of storing. ``asked``: seconds of each lookup of a whole chain. ``wrong``: answers."""

    entries: int
    store_s: float
    rss_bytes: int
    memory_bytes: int
    asked: list[float]
    wrong: int


def measure(entries: int, owners: int) -> Large:
    """Chains of random keys, each owner's its own, made as they are stored."""
    rng = random.Random(1)
    kept: list[tuple[int, bytes]] = []
    before = rss()
    index = PrefixIndex()
    chains = -(-entries // CHAIN)
    store_s = 0.0
    for n in range(chains):
        owner, keys = n % owners + 1, rng.randbytes(8 * CHAIN)
        if n % KEPT_EVERY == 0 and len(kept) < SAMPLES:
            kept.append((owner, keys))
        began = time.process_time()
        index.apply(owner, keys, Tier.DRAM)
        store_s += time.process_time() - began
    grown = rss() - before - sum(len(keys) for _, keys in kept)
    asked, wrong = [], 0
    rng.shuffle(kept)
    for owner, keys in kept:
        chain = numbers(keys)
        began = time.perf_counter()
        found = index.match(chain)
        asked.append(time.perf_counter() - began)
        wrong += [(row.node, row.depth) for row in found] != [(owner, CHAIN)]
    stats = index.stats()
    wrong += stats.entries != chains * CHAIN
    return Large(stats.entries, store_s, grown, stats.memory_bytes, asked, wrong)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]), int(sys.argv[2]))).decode())
