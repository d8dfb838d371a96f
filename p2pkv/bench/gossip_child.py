"""An agent's peer network in a process of its own, for ``p2pkv bench gossip``. One line in, one line out.

Its arguments: the key file, the processor to stay on (-1: any), its own changes per second.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from typing import Final

import msgspec
import uvloop

from p2pkv.bench.child import answer
from p2pkv.config import Peer
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.peer import Address, Card

CHANGE_S: Final = 0.1
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Told(msgspec.Struct, frozen=True):
    """What the child says of itself. ``cpu_s``: since its start, all threads."""

    port: int
    node: int
    epoch: int
    instance: int
    cpu_s: float
    rss_bytes: int
    alive: int
    entries: int
    index_bytes: int
    received: int
    sent: int
    nacks: int
    snapshots: int
    hidden: int


async def run(keys: str, changes_per_s: float) -> None:
    """Until standard input ends."""
    log, index = OwnershipLog(1), PrefixIndex()
    rng = random.Random(1)
    settings = Peer(port=0, keys=keys, members_max=1_024)
    card = Card(rng.getrandbits(63), 1, Address("", 0), "", "", [], ["tcp"])
    network = PeerNetwork(settings=settings, cell="bench", card=card, log=log, index=index, sources=[])
    await network.start()
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def on_line() -> None:
        if not os.read(0, 4_096):
            done.set()
            return
        counts, index_stats = network.stats(), index.stats()
        with open("/proc/self/statm", encoding="ascii") as statm:
            rss_bytes = int(statm.read().split()[1]) * PAGE_BYTES
        told = Told(
            port=network.port, node=network.card.node, epoch=1, instance=network.card.instance,
            cpu_s=time.process_time(), rss_bytes=rss_bytes, alive=counts["peers_alive"], entries=index_stats.entries,
            index_bytes=index_stats.memory_bytes, received=counts.get("frames_received", 0),
            sent=counts.get("frames_sent", 0), nacks=counts.get("nacks_out", 0),
            snapshots=counts.get("snapshots_in", 0), hidden=counts.get("hidden", 0),
        )  # fmt: skip
        answer(msgspec.json.encode(told).decode())

    loop.add_reader(sys.stdin, on_line)
    kept: list[int] = []
    while not done.is_set():
        count = int(changes_per_s * CHANGE_S / 2)
        added = [rng.getrandbits(64) for _ in range(count)]
        log.record(added, Tier.DRAM, time.monotonic())
        log.record(kept[:count], Tier.GONE, time.monotonic())
        kept = kept[count:] + added
        await asyncio.sleep(CHANGE_S)
    await network.stop(0.1)


if __name__ == "__main__":
    if int(sys.argv[2]) >= 0:
        os.sched_setaffinity(0, {int(sys.argv[2])})
    uvloop.run(run(sys.argv[1], float(sys.argv[3])))
