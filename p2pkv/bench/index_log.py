"""An owner's log and a reader of it: what an event of so many blocks costs them, and on the wire. In its own process.

Its arguments: blocks per event, blocks in all. One line of JSON out. Two gossip cores, without sealing and sockets.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.gossip._gossip import Gossip
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

ADDRESSES: Final = {1: "10.0.0.1:1", 2: "10.0.0.2:1"}


class Logged(msgspec.Struct, frozen=True):
    """CPU seconds of the owner (from a list of keys to frames) and of the reader (from frames to its index); bytes."""

    blocks: int
    events: int
    owner_s: float
    reader_s: float
    wire_bytes: int
    same: bool


class Node:
    """A core with its log and index; times are given."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.log = OwnershipLog(1, hold_ms=0)
        self.index = PrefixIndex()
        self.core = Gossip(
            {"flush_s": 0.001, "silence_s": 1e9, "purge_s": 1e9},
            node,
            1,
            node,
            ADDRESSES[node],
            self.index.entries,
            self.log.entries,
            node,
            0.0,
        )
        self.core.set_card(0.0, 1, b"card")

    def flush(self, now: float) -> list[bytes]:
        """Frames of what is due."""
        for delta in self.log.poll(now, deltas_max=1 << 20):
            self.core.publish(delta.seq, delta.checksum, delta.keys_by_tier)
        self.core.on_timer(now)
        return [payload for payload, _ in self.core.take()[0]]

    def hear(self, other: Node, frames: list[bytes], now: float) -> None:
        """Frames of the other one."""
        for payload in frames:
            self.core.on_frame(now, other.node, 1, other.node, ADDRESSES[other.node], payload)


def introduce(one: Node, other: Node) -> None:
    """Each becomes a member of the other's cell."""
    one.core.on_seeds(0.0, 0, [ADDRESSES[other.node]])
    for turn in range(6):
        for speaker, listener in ((one, other), (other, one)):
            listener.hear(speaker, [payload for payload, _ in speaker.core.take()[0]], 0.2 * turn)
    assert one.core.member(other.node) and other.core.member(one.node)


def measure(event: int, blocks: int) -> Logged:
    """Every event is stored, sent, and later dropped and sent."""
    rng = random.Random(1)
    events = [[rng.getrandbits(64) for _ in range(event)] for _ in range(blocks // event)]
    owner, reader = Node(1), Node(2)
    introduce(owner, reader)
    frames: list[bytes] = []
    now = 10.0
    began = time.process_time()
    for tier in (Tier.DRAM, Tier.GONE):
        for keys in events[: len(events) // 2] if tier is Tier.GONE else events:
            owner.log.record(keys, tier, now)
            now += 0.002
            frames += owner.flush(now)
    owner_s = time.process_time() - began
    began = time.process_time()
    reader.hear(owner, frames, now)
    reader_s = time.process_time() - began
    slot = reader.core.slot_of(1)
    same = reader.index.checksum(slot) == owner.log.checksum and reader.index.count(slot) == len(owner.log)
    changes = len(events) + len(events) // 2
    return Logged(changes * event, changes, owner_s, reader_s, sum(map(len, frames)), same)


if __name__ == "__main__":
    answer(msgspec.json.encode(measure(int(sys.argv[1]), int(sys.argv[2]))).decode())
