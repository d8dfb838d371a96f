"""A reader that stops or dies in mid pull: what its leases held is free again when they are over, all of it."""

from __future__ import annotations

import pytest

from tests.cluster.agents import AgentProcess, Cluster, eventually, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.test_peer_faults import MIB, Read, put
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 24
TTL_MS = 800
ATTEMPTS = 10
PINNED = 'p2pkv_arena_used_bytes{use="pinned"}'


def stop_in_mid_pull(owner: AgentProcess, reader: AgentProcess) -> None:
    """Stop a reader that the owner holds blocks for, and will hold them for until the lease is over."""
    for _ in range(ATTEMPTS):
        cache = reader.open(MIB)
        keys = put(owner, MIB, COUNT)
        visible(cache, keys)
        read = Read(cache, keys, 300)
        eventually(lambda r=read: r.over or owner.metric("p2pkv_leases") > 0, why="the owner holds the blocks")  # type: ignore[misc]
        reader.stop_tree()
        read.end()
        if owner.metric("p2pkv_leases") > 0:
            return
        reader.continue_tree()
    pytest.skip(f"{ATTEMPTS} pulls were over before the reader could be stopped")


@pytest.mark.parametrize(
    ("kind", "fate"),
    [(TCP, "stands still"), (TCP, "is killed"), pytest.param("nixl", "stands still", marks=NIXL.marks)],
)
def test_memory_that_was_held_for_a_reader_returns(cluster: Cluster, kind: str, fate: str) -> None:
    """Without an end of leases the owner could store nothing there any more: here all of its arena is filled anew."""
    owner, reader = cluster.start(2, capacity="64MiB", **options(kind, **{"store.lease_ttl_ms": TTL_MS}))
    cluster.connected()
    stop_in_mid_pull(owner, reader)
    if fate == "is killed":
        reader.kill()
    eventually(lambda: owner.metric("p2pkv_leases") == 0, 4 * TTL_MS / 1000, why="the lease is over")
    assert owner.metric(PINNED) == 0
    cache = owner.open(MIB)
    room = int(owner.metric("p2pkv_arena_bytes")) // MIB.block_bytes
    keys: list[bytes] = []
    while len(keys) < room:
        more = new_keys(min(16, room - len(keys)))
        assert all(cache.put(more, blocks_of(more, MIB.block_bytes), deadline_ms=10_000)), f"after {len(keys)} blocks"
        keys += more
    assert cache.match(keys).present.count("local") >= room - 2, "every slot but those of another layout's extent"
