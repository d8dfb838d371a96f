"""Every holder of a chain goes: the get ends as misses, soon, and the next one does not even wait."""

from __future__ import annotations

import pytest

from tests.cluster.agents import Cluster, all_have, eventually, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.test_peer_faults import MIB, SLACK_S, SMALL, Read, put
from tests.cluster.transports import NIXL, NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

DEADLINE_S = 20.0
STALL_MS = 1_500
COUNT = 32
BEFORE, IN_MID_READ = False, True


@pytest.mark.parametrize(
    ("kind", "fault", "in_mid_read"),
    [
        (TCP, "kill", IN_MID_READ),
        (TCP, "stop_tree", BEFORE),
        pytest.param("nixl", "kill", BEFORE, marks=NIXL.marks),
        pytest.param("nixl-tcp", "stop_tree", IN_MID_READ, marks=NIXL_TCP.marks),
        pytest.param("nixl-tcp", "stop_tree", BEFORE, marks=NIXL_TCP.marks),
    ],
)
def test_when_all_holders_go_a_get_ends_long_before_its_deadline_and_the_next_one_at_once(
    cluster: Cluster, kind: str, fault: str, in_mid_read: bool
) -> None:
    """Each holder is waited for once, not once for each block, and nobody asks one whose breaker is open."""
    reader, *holders = cluster.start(3, capacity="128MiB", **options(kind, **{"transport.stall_ms": STALL_MS}))
    cluster.connected()
    keys = new_keys(COUNT)
    for holder in holders:
        assert all(holder.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=20_000))
    local = put(reader, SMALL, 4)
    cache, small = reader.open(MIB), reader.open(SMALL)
    all_have(cache, keys, 2)

    def begin() -> Read:
        return Read(cache, keys, int(DEADLINE_S * 1000))

    if in_mid_read:
        read = begin()
        eventually(lambda: read.over or reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
    for holder in holders:
        getattr(holder, fault)()
    if not in_mid_read:
        read = begin()
    came = read.end()
    assert in_mid_read or came == 0
    assert read.seconds < DEADLINE_S / 4, read.statuses
    again = begin()
    assert again.end() == came, "what came stays"
    assert again.seconds < SLACK_S
    assert Read(small, local, 1_000).end() == 4, "a local hit has nothing to do with it"
    if fault == "kill":
        eventually(lambda: cache.match(keys).anywhere <= came, 10.0, why="the holders' entries are hidden")
    if fault == "stop_tree":
        for holder in holders:
            holder.continue_tree()
        cluster.connected()
        visible(cache, keys)
        eventually(lambda: Read(cache, keys, 10_000).end() == COUNT, 30.0, why="everything comes in the end")
