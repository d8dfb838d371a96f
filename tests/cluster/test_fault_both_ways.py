"""Two agents pull from each other at the same time, as much as they can: all is right, and neither waits for ever."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pkv.client.cache import Cache
from tests.cluster.agents import AgentProcess, Cluster, eventually, visible
from tests.cluster.blocks import block_of
from tests.cluster.test_peer_faults import MIB, put
from tests.cluster.transports import NIXL, NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 32
READERS = 4
ROUNDS = 3
IN_TIME_S = 30.0


def read_all(cache: Cache, keys: list[bytes], seed: int) -> int:
    """Get all blocks in an order of one's own, again and again; how many came."""
    rng = random.Random(seed)
    buffers = [bytearray(MIB.block_bytes) for _ in range(8)]
    came = 0
    for _ in range(ROUNDS):
        mine = rng.sample(keys, len(keys))
        for first in range(0, len(mine), len(buffers)):
            some = mine[first : first + len(buffers)]
            for key, good, content in zip(some, cache.get_into(some, buffers, 20_000), buffers, strict=True):
                assert not good or content == block_of(key, MIB.block_bytes), "WRONG BYTES"
                came += good
    return came


def read_from_each_other(pair: list[AgentProcess]) -> list[int]:
    """Store at both, and have some readers of each get what the other one has, all at once; how many came to each."""
    keys = [put(agent, MIB, COUNT) for agent in pair]

    def tasks(agent: AgentProcess, wanted: list[bytes]) -> list[tuple[Cache, list[bytes], int]]:
        visible(agent.open(MIB), wanted)
        return [(agent.open(MIB), wanted, seed) for seed in range(READERS)]

    jobs = [job for pulls in (tasks(pair[0], keys[1]), tasks(pair[1], keys[0])) for job in pulls]
    with ThreadPoolExecutor(len(jobs)) as threads:
        running = [threads.submit(read_all, *job) for job in jobs]
        came = [reading.result(IN_TIME_S) for reading in running]
    for agent in pair:
        assert agent.metric("p2pkv_rejected_blocks_total") == 0
        eventually(lambda a=agent: a.metric("p2pkv_leases") == 0, why="nothing stays held")  # type: ignore[misc]
        assert agent.metric("p2pkv_pulls_in_flight_blocks") == 0
    return came


@pytest.mark.parametrize("kind", [TCP, NIXL, NIXL_TCP])
def test_two_agents_that_pull_from_each_other_all_the_time_both_get_everything(cluster: Cluster, kind: str) -> None:
    """Each may have a quarter of what it is asked for on its way: whoever holds slots while it waits for the other's
    would stand still here."""
    pair = cluster.start(2, capacity="128MiB", **options(kind, **{"transport.in_flight": "8MiB"}))
    cluster.connected()
    assert read_from_each_other(pair) == [ROUNDS * COUNT] * (2 * READERS)
    for agent in pair:
        assert agent.metric("p2pkv_pulled_blocks_total") == COUNT


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_two_agents_without_room_for_what_they_pull_from_each_other_go_on(cluster: Cluster, kind: str) -> None:
    """Each keeps less than all: whoever is first throws out what the other one has not got yet, and that is a miss."""
    pair = cluster.start(2, capacity="56MiB", **options(kind, **{"transport.in_flight": "8MiB"}))
    cluster.connected()
    assert min(read_from_each_other(pair)) > 0
    assert all(agent.metric("p2pkv_pulled_blocks_total") >= COUNT / 2 for agent in pair)
    assert sum(agent.metric("p2pkv_evictions_total") for agent in pair) > 0
