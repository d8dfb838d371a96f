"""A reader that stops or dies in mid pull: what its leases held is free again when they are over, all of it."""

from __future__ import annotations

import pytest

from tests.cluster.agents import Cluster, eventually, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.test_peer_faults import MIB, Read, put
from tests.cluster.test_slot_reuse import held_up
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 24
TTL_MS = 1_500
PINNED = 'p2pkv_arena_used_bytes{use="pinned"}'


@pytest.mark.parametrize("fate", ["stands still", "is killed"])
@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_memory_that_was_held_for_a_reader_returns(cluster: Cluster, kind: str, fate: str) -> None:
    """Without an end of leases the owner could store nothing there any more: here all of its arena is filled anew.

    The bytes are kept from arriving, so that the reader is in mid pull for certain when it stops.
    """
    patient = {"store.lease_ttl_ms": TTL_MS, "transport.stall_ms": 20_000}
    with Proxy() as proxy:
        advertised = {"peer.advertise": proxy.address} if kind == "tcp" else {}
        [owner] = cluster.start(1, capacity="64MiB", **options(kind, **patient, **advertised))
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, capacity="64MiB", seeds=(proxy.address,), **options(kind, **patient))
        cluster.connected()
        cache = reader.open(MIB)
        first = put(owner, MIB, 1)
        visible(cache, first)
        assert Read(cache, first, 10_000).end() == 1, "connected, over either transport"
        keys = put(owner, MIB, COUNT)
        visible(cache, keys)
        with held_up(kind, reader, proxy):
            read = Read(cache, keys, 3_000)
            eventually(lambda: owner.metric("p2pkv_leases") > 0, why="the owner holds the blocks")
            reader.stop_tree()
            assert not read.over and owner.metric("p2pkv_leases") > 0 and owner.metric(PINNED) > 0
            if fate == "is killed":
                reader.kill()
            eventually(lambda: owner.metric("p2pkv_leases") == 0, 4 * TTL_MS / 1000, why="the lease is over")
            assert owner.metric(PINNED) == 0
            filled = owner.open(MIB)
            room = int(owner.metric("p2pkv_arena_bytes")) // MIB.block_bytes
            fresh: list[bytes] = []
            while len(fresh) < room:
                more = new_keys(min(16, room - len(fresh)))
                stored = filled.put(more, blocks_of(more, MIB.block_bytes), deadline_ms=10_000)
                assert all(stored), f"after {len(fresh)} blocks"
                fresh += more
            here = filled.match(fresh).present.count("local")
            assert here >= room - 2, "every slot but those of another layout's extent"
            assert read.end() == 0
