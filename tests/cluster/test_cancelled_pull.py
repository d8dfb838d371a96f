"""An engine goes while blocks are pulled for it: the pull ends with it, not with its deadline."""

from __future__ import annotations

import os

import pytest

from tests.cluster.agents import Cluster, eventually, visible
from tests.cluster.proxy import Proxy
from tests.cluster.test_peer_faults import MIB, Read, put
from tests.cluster.transports import TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 16
MINUTES_MS = 300_000


def test_a_pull_ends_with_the_engine_that_wanted_it(cluster: Cluster) -> None:
    """Another engine that waits for the same blocks gets them all the same."""
    with Proxy() as proxy:
        [owner] = cluster.start(1, **options(TCP, **{"peer.advertise": proxy.address}))
        proxy.target = owner.peer_port
        [reader] = cluster.start(
            1, seeds=(proxy.address,), **options(TCP, **{"transport.stall_ms": 60_000, "engine.directory": False})
        )
        cluster.connected(owner, reader)
        keys = put(owner, MIB, COUNT)
        engine = reader.client()
        cache = engine.open(MIB)
        visible(cache, keys)
        fd = os.memfd_create("region")
        os.ftruncate(fd, COUNT * MIB.block_bytes)
        region = cache.map_region(fd, slots=COUNT)
        os.close(fd)
        proxy.rate = MIB.block_bytes  # a block each second
        cache.load(keys, region, list(range(COUNT)), deadline_ms=MINUTES_MS)
        eventually(lambda: reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
        engine.close()
        eventually(lambda: reader.metric("p2pkv_pulls_in_flight_blocks") == 0, 5.0, why="nothing is pulled any more")
        eventually(lambda: owner.metric("p2pkv_leases") == 0, 15.0, why="nothing is leased any more")
        proxy.rate = None
        assert Read(reader.open(MIB), keys, 20_000).end() == COUNT
