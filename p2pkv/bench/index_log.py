"""An owner's log and a reader of it: what an event of so many blocks costs them, and on the wire. In its own process.

Its arguments: blocks per event, blocks in all. One line of JSON out.
"""

from __future__ import annotations

import random
import sys
import time

import msgspec

from p2pkv.bench.child import answer
from p2pkv.index.ownership import OwnerReplica, OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import CODEC, Delta


class Logged(msgspec.Struct, frozen=True):
    """CPU seconds of the owner (from a list of keys to frames) and of the reader (from frames to its index); bytes."""

    blocks: int
    events: int
    owner_s: float
    reader_s: float
    wire_bytes: int
    same: bool


def measure(event: int, blocks: int) -> Logged:
    """Every event is stored, sent, and later dropped and sent."""
    rng = random.Random(1)
    events = [[rng.getrandbits(64) for _ in range(event)] for _ in range(blocks // event)]
    log = OwnershipLog(1, hold_ms=0)
    index = PrefixIndex()
    replica = OwnerReplica(index, 1, 0.0)
    frames: list[bytes] = []
    began = time.process_time()
    for tier in (Tier.DRAM, Tier.GONE):
        for keys in events[: len(events) // 2] if tier is Tier.GONE else events:
            log.record(keys, tier, 0.0)
            frames += [CODEC.encode(delta) for delta in log.poll(0.0)]
    owner_s = time.process_time() - began
    decoder = FrameDecoder()
    began = time.process_time()
    for data in frames:
        for frame in decoder.feed(data):
            message = CODEC.decode(frame)
            assert isinstance(message, Delta)
            replica.on_delta(message, 0.0)
    reader_s = time.process_time() - began
    same = index.checksum(1) == log.checksum and index.count(1) == len(log)
    changes = len(events) + len(events) // 2
    return Logged(changes * event, changes, owner_s, reader_s, sum(map(len, frames)), same)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]), int(sys.argv[2]))).decode())
