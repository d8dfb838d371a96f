"""Readers beside a writer: never a torn answer, and at rest the same answer as the reference."""

from __future__ import annotations

import random
import threading

from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Tier

STABLE = 0
CHAIN = random.Random(7).sample(range(1 << 62), 256)


def test_readers_beside_a_writer_see_whole_rows_and_never_lose_what_does_not_change() -> None:
    core, oracle = PrefixIndex(), ReferenceIndex()
    packed = pack_keys(CHAIN)
    for index in (core, oracle):
        index.apply(STABLE, packed, Tier.SSD)
    stop = threading.Event()
    started = threading.Barrier(4)
    problems: list[object] = []
    rounds = [0, 0, 0]

    def read(me: int) -> None:
        started.wait(10)
        while not stop.is_set() or rounds[me] == 0:
            match = core.match(packed, beyond=True)
            mine = match.of(STABLE)
            if mine is None or mine.by_tier != (0, 0, 256, 0) or mine.held != 256:
                problems.append(mine)
            problems.extend(row for row in match if sum(row.by_tier) != row.depth or row.held < row.depth)
            if core.reach(packed) != 256 or any(not held for held in core.holders(packed)):
                problems.append("a stable block was not found")
            rounds[me] += 1

    readers = [threading.Thread(target=read, args=(me,), daemon=True) for me in range(3)]
    for reader in readers:
        reader.start()
    started.wait(10)
    rng = random.Random(3)
    noise = [rng.getrandbits(64) for _ in range(30_000)]  # makes the table grow and shrink under the readers
    for turn in range(60):
        node = rng.randint(1, 9)
        keys = pack_keys(CHAIN[: rng.randint(1, 256)] + rng.sample(noise, rng.choice((0, 500, 3000))))
        tier = rng.choice(list(Tier))
        for index in (core, oracle):
            index.apply(node, keys, tier)
            if turn % 10 == 9:
                index.remove_node(node)
            if turn % 13 == 5:
                index.replace(node, [(Tier.HBM, keys[:80])])
    stop.set()
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert problems == []
    assert min(rounds) > 0
    assert core.match(packed, beyond=True) == oracle.match(packed, beyond=True)


def test_writers_do_not_lose_each_others_changes() -> None:
    core = PrefixIndex()
    keys = pack_keys(CHAIN)

    def write(node: int) -> None:
        for turn in range(50):
            core.apply(node, keys, Tier.DRAM)
            core.apply(node, keys[: 8 * turn], Tier.GONE)

    writers = [threading.Thread(target=write, args=(node,)) for node in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(20)
    assert [core.count(node) for node in range(4)] == [256 - 49] * 4
    assert core.stats().entries == 4 * (256 - 49)
