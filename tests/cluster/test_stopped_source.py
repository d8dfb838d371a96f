"""Issue 2, done when 9: a source that stops in mid read and goes on after the reader gave up changes nothing there.

With whole agents: everything that the reader can reuse is filled with blocks of its own before the source goes on. (The
transports alone, and what happens without the quarantine: ``tests/contract/test_transport_faults.py``.)
"""

from __future__ import annotations

import pytest

from tests.cluster.agents import AgentProcess, Cluster, alive_peers, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.test_peer_faults import Read
from tests.cluster.transports import NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

MIB = make_layout(1 << 20)
COUNT = 40
ATTEMPTS = 8


def fill(agent: AgentProcess) -> list[bytes]:
    """Blocks of its own in every slot that the agent may use now; those that stayed."""
    cache = agent.open(MIB)
    keys: list[bytes] = []
    for _ in range(10):
        more = new_keys(10)
        stored = cache.put(more, blocks_of(more, MIB.block_bytes), deadline_ms=10_000)
        keys += [key for key, there in zip(more, stored, strict=True) if there]
    return [key for key, source in zip(keys, cache.match(keys).present, strict=True) if source == "local"]


def damaged(agent: AgentProcess, keys: list[bytes]) -> int:
    """How many of these local blocks have changed."""
    cache = agent.open(MIB)
    count = 0
    for key in keys:
        content = bytearray(MIB.block_bytes)
        if cache.get_into([key], [content], deadline_ms=2_000) == [True]:
            count += content != block_of(key, MIB.block_bytes)
    return count


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
def test_a_source_that_goes_on_later_writes_into_nothing_that_was_reused(cluster: Cluster, kind: str) -> None:
    owner, reader = cluster.start(2, capacity="96MiB", **options(kind))
    cluster.connected()
    keys = new_keys(COUNT)
    assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=10_000))
    cache = reader.open(MIB)
    visible(cache, keys)
    for _ in range(ATTEMPTS):
        read = Read(cache, keys, 1_000)
        eventually(lambda r=read: r.over or reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")  # type: ignore[misc]
        owner.stop_tree()
        came = read.end()
        if came < COUNT:
            break
        owner.continue_tree()
        fill(reader)  # and so evict what came: the next read is one again
        fill(reader)
    else:
        pytest.skip(f"{ATTEMPTS} reads were over before the source could be stopped")
    own = fill(reader)
    assert len(own) > 10
    owner.continue_tree()
    eventually(lambda: owner.node in alive_peers(reader), 20.0, why="the peer is heard again")
    eventually(lambda: reader.metric('p2pkv_arena_used_bytes{use="quarantined"}') == 0, 40.0, why="quarantine ends")
    assert damaged(reader, own) == 0
    visible(cache, keys)
    assert eventually(lambda: Read(cache, keys, 10_000).end() == COUNT, 30.0)
    assert damaged(reader, own) == 0
