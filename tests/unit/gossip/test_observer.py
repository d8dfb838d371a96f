"""An observer has the whole index, and nobody takes it for a holder."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from p2pkv.config import Peer
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.gossip.observer import Observer
from p2pkv.index.hashing import pack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

QUICK = {"port": 0, "heartbeat_ms": 50, "flush_ms": 10, "silence_ms": 1_000}


async def test_an_observer_knows_who_holds_what(card: Any) -> None:
    owners: list[PeerNetwork] = []
    try:
        for node in (1, 2):
            log = OwnershipLog(1, hold_ms=0)
            seeds = tuple(f"127.0.0.1:{other.port}" for other in owners)
            network = PeerNetwork(
                settings=Peer(seeds=seeds, **QUICK), cell="default", card=card(node, host="", instance=0), log=log,
                index=PrefixIndex(), rng=random.Random(node),
            )  # fmt: skip
            await network.start()
            owners.append(network)
            log.record(range(100, 100 + 10 * node), Tier.DRAM, time.monotonic())
        async with Observer(Peer(seeds=(f"127.0.0.1:{owners[0].port}",), **QUICK)) as observer:
            chain = pack_keys(range(100, 130))
            async with asyncio.timeout(10.0):
                while observer.holders(chain) != {1: 10, 2: 20}:
                    await asyncio.sleep(0.01)
            me = observer.network.card.node
            async with asyncio.timeout(10.0):
                while (view := owners[1].peer(me)) is None or not view.alive:
                    await asyncio.sleep(0.01)
            assert view.entries == 0 and view.card.transports == []
            await owners[1].stop()
            async with asyncio.timeout(10.0):
                while observer.holders(chain) != {1: 10}:
                    await asyncio.sleep(0.01)
    finally:
        await asyncio.gather(*(network.stop() for network in owners))
