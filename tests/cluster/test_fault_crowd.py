"""Sixty-four engines want the same prefix at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, all_have, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.test_peer_faults import SMALL, put
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

CROWD = 64
BLOCKS = 24
DEADLINE_S = 20.0
SERVED_BYTES = 'p2pkv_served_bytes_total{transport="tcp"}'
PULLS = [f'p2pkv_pulls_total{{result="{result}"}}' for result in ("complete", "incomplete")]


@pytest.fixture
def clients() -> Iterator[list[AgentClient]]:
    made: list[AgentClient] = []
    yield made
    for client in made:
        client.close()


def crowd_of(agent: AgentProcess, clients: list[AgentClient]) -> list[Cache]:
    clients += [AgentClient(agent.socket) for _ in range(CROWD)]
    return [client.open(SMALL, deadline_ms=10_000) for client in clients]


def ask_at_once(caches: list[Cache], keys: list[bytes]) -> list[tuple[list[Status], list[bytearray]]]:
    """All get all, having waited for each other."""
    together = threading.Barrier(len(caches))

    def ask(cache: Cache) -> tuple[list[Status], list[bytearray]]:
        out = [bytearray(SMALL.block_bytes) for _ in keys]
        together.wait(30.0)
        return cache.get_statuses(keys, out, int(DEADLINE_S * 1000)), out

    with ThreadPoolExecutor(len(caches)) as threads:
        running = [threads.submit(ask, cache) for cache in caches]
        return [asking.result(DEADLINE_S / 2) for asking in running]


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_sixty_four_gets_of_one_prefix_pull_it_once(cluster: Cluster, clients: list[AgentClient], kind: str) -> None:
    """Single flight: without it the holders would send up to 64 times as much."""
    reader, *holders = cluster.start(3, **options(kind))
    cluster.connected()
    keys = new_keys(BLOCKS)
    for holder in holders:
        assert all(holder.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
    caches = crowd_of(reader, clients)
    all_have(caches[0], keys, 2)
    right = blocks_of(keys, SMALL.block_bytes)
    for statuses, out in ask_at_once(caches, keys):
        assert statuses == [Status.OK] * BLOCKS
        assert out == right
    over_tcp = sum(holder.metric(SERVED_BYTES) for holder in holders)
    if kind == "tcp":  # what the holders sent; the reader counts only what it kept
        assert over_tcp == BLOCKS * SMALL.block_bytes
    else:  # no holder sees what is read from its memory; the reader counts each pull, whatever it brought
        assert over_tcp == 0
        assert 0 < sum(reader.metric(name) for name in PULLS) <= BLOCKS < CROWD


def test_sixty_four_gets_from_a_holder_that_stands_still_wait_for_it_together(
    cluster: Cluster, clients: list[AgentClient]
) -> None:
    """Those that joined a pull do not each try again when it fails: 64 waits in a row would take half a minute."""
    reader, holder = cluster.start(2, **options(TCP))
    cluster.connected()
    keys = put(holder, SMALL, BLOCKS)
    caches = crowd_of(reader, clients)
    visible(caches[0], keys)
    holder.stop_tree()
    for statuses, _ in ask_at_once(caches, keys):
        assert Status.OK not in statuses
    holder.continue_tree()
