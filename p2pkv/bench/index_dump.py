"""Loading a dump of many entries, in a process of its own. Arguments: entries in all, owners. One line of JSON out."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.index.dump import Word, dump, load
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

BATCH: Final = 512
PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Dumped(msgspec.Struct, frozen=True):
    """Wall-clock seconds, the file's and the loaded index's bytes, and whether it is what was dumped."""

    entries: int
    dump_s: float
    load_s: float
    file_bytes: int
    rss_bytes: int
    same: bool


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def measure(entries: int, owners: int) -> Dumped:
    """Chains of random keys, each owner's its own; dumped, forgotten, and loaded."""
    rng = random.Random(1)
    index = PrefixIndex()
    each = entries // owners
    for at in range(0, each, BATCH):
        for owner in range(1, owners + 1):
            index.apply(owner, rng.randbytes(8 * min(BATCH, each - at)), Tier.DRAM)
    words = [(owner, Word(owner, 1, 1, 0.0)) for owner in range(1, owners + 1)]
    checksums = [index.checksum(owner) for owner in range(1, owners + 1)]
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "index.dump")
        began = time.perf_counter()
        dump(path, index, words, taken_at=0.0)
        dump_s = time.perf_counter() - began
        del index
        loaded = PrefixIndex()
        before = resident()
        began = time.perf_counter()
        load(path, loaded, lambda word: word.node)
        load_s = time.perf_counter() - began
        same = [loaded.checksum(owner) for owner in range(1, owners + 1)] == checksums
        size = os.path.getsize(path)
        return Dumped(each * owners, dump_s, load_s, size, resident() - before, same and loaded.stats().entries > 0)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]), int(sys.argv[2]))).decode())
