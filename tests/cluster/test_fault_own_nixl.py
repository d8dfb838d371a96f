"""The reader's own NIXL process dies while it reads from two holders: what had not come comes over TCP, in time."""

from __future__ import annotations

import os
import signal

import pytest

from tests.cluster.agents import Cluster, all_have, eventually
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.test_peer_faults import COUNT, MIB, Read
from tests.cluster.transports import NIXL, options

pytestmark = [pytest.mark.cluster, *NIXL.marks]

IN_FLIGHT = "p2pkv_pulls_in_flight_blocks"
OVER_TCP = 'p2pkv_served_bytes_total{transport="tcp"}'


def test_a_pull_goes_on_over_tcp_when_our_own_nixl_process_dies(cluster: Cluster) -> None:
    first, second, reader = cluster.start(3, capacity="128MiB", **options("nixl"))
    cluster.connected()
    cache = reader.open(MIB)
    for _ in range(10):  # until one of them was under way when the process died
        keys = new_keys(COUNT)
        for holder in (first, second):
            assert all(holder.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=10_000))
        all_have(cache, keys, 2)
        eventually(lambda: len(reader.children()) == 1, 20.0, why="a NIXL process runs")
        [child] = reader.children()
        restarts, over_tcp = (
            reader.metric("p2pkv_nixl_restarts_total"),
            first.metric(OVER_TCP) + second.metric(OVER_TCP),
        )
        read = Read(cache, keys, 10_000)
        eventually(lambda read=read: read.over or reader.metric(IN_FLIGHT) > 0, why="the pull begins")  # type: ignore[misc]
        os.kill(child, signal.SIGKILL)
        assert read.end() == COUNT, read.statuses
        eventually(lambda n=restarts: reader.metric("p2pkv_nixl_restarts_total") > n, why="it is restarted")  # type: ignore[misc]
        if first.metric(OVER_TCP) + second.metric(OVER_TCP) > over_tcp:
            return
    raise AssertionError("it never died in the middle of a pull")
