"""The network between two agents goes, and comes back: nothing is closed, nothing is refused, nothing arrives.

Over NIXL the proxy parts the control connection, on which blocks are asked for; the bytes themselves go another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.agents import AgentProcess, Cluster, alive_peers, eventually, visible
from tests.cluster.proxy import Proxy
from tests.cluster.test_peer_faults import MIB, SLACK_S, SMALL, Read, put
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

DEADLINE_MS = 20_000
STALL_MS = 3_000
COUNT = 40


@contextmanager
def through_a_proxy(cluster: Cluster, kind: str) -> Iterator[tuple[AgentProcess, AgentProcess, Proxy]]:
    """An owner, a reader that reaches it through the proxy and is reached through another one, and the first proxy."""
    with Proxy() as proxy:
        [owner] = cluster.start(1, **options(kind, **{"peer.advertise": proxy.address}))
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,), **options(kind, **{"transport.stall_ms": STALL_MS}))
        cluster.connected(owner, reader)
        yield owner, reader, proxy
        proxy.heal()


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_source_that_cannot_be_reached_any_more_is_waited_for_once(cluster: Cluster, kind: str) -> None:
    """However often and for however much it is asked; and when it can be reached again it is asked again."""
    with through_a_proxy(cluster, kind) as (owner, reader, proxy):
        keys, own = put(owner, SMALL, 20), put(reader, SMALL, 4)
        cache = reader.open(SMALL)
        visible(cache, keys)
        assert Read(cache, keys[:4], DEADLINE_MS).end() == 4
        proxy.part()
        first = Read(cache, keys[4:12], DEADLINE_MS)
        assert first.end() == 0 and first.seconds < STALL_MS / 1000 / 2, "it is known to be quick"
        again = Read(cache, keys[4:], DEADLINE_MS)
        assert again.end() == 0 and again.seconds < SLACK_S
        assert Read(cache, own, 1_000).end() == 4 and Read(cache, keys[:4], 1_000).end() == 4
        proxy.heal()
        eventually(lambda: owner.node in alive_peers(reader), 20.0, why="the peer is heard again")
        visible(cache, keys)
        eventually(lambda: Read(cache, keys, 5_000).end() == 20, 20.0, why="everything comes in the end")


def test_a_source_that_is_cut_off_in_mid_read_costs_what_had_not_come(cluster: Cluster) -> None:
    """Long before the deadline: the lack of progress ends it."""
    with through_a_proxy(cluster, TCP) as (owner, reader, proxy):
        keys = put(owner, MIB, COUNT)
        cache = reader.open(MIB)
        visible(cache, keys)
        read = Read(cache, keys, DEADLINE_MS)
        eventually(lambda: read.over or reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
        proxy.part()
        came = read.end()
        assert read.seconds < DEADLINE_MS / 1000 / 4
        again = Read(cache, keys, DEADLINE_MS)
        assert again.end() >= came and again.seconds < STALL_MS / 1000 + SLACK_S, "it had sent something: one more try"
        third = Read(cache, keys, DEADLINE_MS)
        assert third.end() >= came and third.seconds < SLACK_S
        proxy.heal()
        eventually(lambda: owner.node in alive_peers(reader), 20.0, why="the peer is heard again")
        visible(cache, keys)
        eventually(lambda: Read(cache, keys, 10_000).end() == COUNT, 20.0, why="everything comes in the end")
        assert reader.metric("p2pkv_rejected_blocks_total") == 0
