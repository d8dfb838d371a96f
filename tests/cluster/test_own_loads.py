"""Loads of what is in the arena: by the engine's own threads, and by the agent where something is not."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache, Region
from p2pkv.client.jobs import JobResult
from p2pkv.errors import AgentUnavailable
from p2pkv.types import Layout
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

SMALL = make_layout(65_536)
MIB = make_layout(1 << 20)
SLOTS = 16


class Engine:
    """A client with a region of one layout."""

    def __init__(self, agent: AgentProcess, layout: Layout) -> None:
        self.client: AgentClient = agent.client()
        self.layout = layout
        self.cache: Cache = self.client.open(layout)
        self.fd = os.memfd_create("test-engine")
        os.ftruncate(self.fd, SLOTS * layout.block_bytes)
        self.map = mmap.mmap(self.fd, SLOTS * layout.block_bytes)
        self.region: Region = self.cache.map_region(self.fd, slots=SLOTS)

    def load(self, keys: list[bytes], slots: list[int] | None = None) -> JobResult:
        job = self.cache.load(keys, self.region, slots or list(range(len(keys))), deadline_ms=5_000)
        [result] = self.client.poll(10_000)
        assert result.job_id == job
        return result

    def slot(self, slot: int) -> bytes:
        size = self.layout.block_bytes
        return self.map[slot * size : (slot + 1) * size]

    def close(self) -> None:
        self.client.close()
        self.map.close()
        os.close(self.fd)


Attach = Callable[[AgentProcess, Layout], Engine]


@pytest.fixture
def attach() -> Iterator[Attach]:
    engines: list[Engine] = []

    def attach_one(agent: AgentProcess, layout: Layout) -> Engine:
        engines.append(Engine(agent, layout))
        return engines[-1]

    yield attach_one
    for engine in engines:
        engine.close()


def put(agent: AgentProcess, layout: Layout, count: int) -> list[bytes]:
    keys = new_keys(count)
    assert all(agent.open(layout).put(keys, blocks_of(keys, layout.block_bytes), deadline_ms=10_000))
    return keys


@pytest.mark.parametrize("layout", [SMALL, MIB], ids=["64K", "1M"])
@pytest.mark.parametrize("count", [1, SLOTS])
def test_what_is_here_is_loaded_while_the_agent_stands_still(
    cluster: Cluster, layout: Layout, count: int, attach: Attach
) -> None:
    [agent] = cluster.start(1, http_on=False)
    keys = put(agent, layout, count)
    engine = attach(agent, layout)
    agent.stop_tree()
    result = engine.load(keys)
    assert result.ok == [True] * count and result.sources == ["local"] * count
    assert result.bytes_local == count * layout.block_bytes
    assert [engine.slot(i) for i in range(count)] == blocks_of(keys, layout.block_bytes)


def test_slots_are_filled_in_the_order_that_was_named(cluster: Cluster, attach: Attach) -> None:
    [agent] = cluster.start(1, http_on=False)
    keys = put(agent, SMALL, 3)
    engine = attach(agent, SMALL)
    assert engine.load(keys, [9, 2, 5]).ok == [True] * 3
    assert [engine.slot(i) for i in (9, 2, 5)] == blocks_of(keys, SMALL.block_bytes)
    assert engine.slot(0) == bytes(SMALL.block_bytes), "nothing else was touched"


def test_what_is_not_all_here_is_the_agents(pair: list[AgentProcess], attach: Attach) -> None:
    here, there = put(pair[1], MIB, 2), put(pair[0], MIB, 2)
    engine = attach(pair[1], MIB)
    visible(engine.cache, there)
    keys = [here[0], there[0], new_keys(1)[0], here[1], there[1]]
    result = engine.load(keys)
    assert result.ok == [True, True, False, True, True]
    assert result.sources == ["local", "peer", None, "local", "peer"]
    for slot in (0, 1, 3, 4):
        assert engine.slot(slot) == block_of(keys[slot], MIB.block_bytes)


def test_a_directory_that_is_not_given_out_leaves_all_loads_to_the_agent(cluster: Cluster, attach: Attach) -> None:
    [agent] = cluster.start(1, settings={"engine.directory": False})
    keys = put(agent, SMALL, 4)
    engine = attach(agent, SMALL)
    result = engine.load(keys)
    assert result.ok == [True] * 4 and result.sources == ["local"] * 4
    assert [engine.slot(i) for i in range(4)] == blocks_of(keys, SMALL.block_bytes)


def test_many_loads_at_once_all_end_and_are_right(cluster: Cluster, attach: Attach) -> None:
    [agent] = cluster.start(1, http_on=False)
    keys = put(agent, MIB, SLOTS)
    engine = attach(agent, MIB)
    jobs = [engine.cache.load(keys, engine.region, list(range(SLOTS))) for _ in range(20)]
    results: list[JobResult] = []
    eventually(lambda: len(results.extend(engine.client.poll(1_000)) or results) == 20, why="all end")  # type: ignore[func-returns-value]
    assert {result.job_id for result in results} == set(jobs) and all(all(result.ok) for result in results)
    assert [engine.slot(i) for i in range(SLOTS)] == blocks_of(keys, MIB.block_bytes)


def test_a_region_can_be_taken_back_while_loads_are_under_way(cluster: Cluster, attach: Attach) -> None:
    [agent] = cluster.start(1, http_on=False)
    keys = put(agent, MIB, SLOTS)
    engine = attach(agent, MIB)
    jobs = {engine.cache.load(keys, engine.region, list(range(SLOTS))) for _ in range(5)}
    engine.region.unmap()
    engine.map[:] = bytes(len(engine.map))
    ended: set[int] = set()

    def all_ended() -> bool:
        ended.update(result.job_id for result in engine.client.poll(100))
        return ended == jobs

    eventually(all_ended, why="all loads end")
    assert not any(engine.map[::4096]), "nobody writes into it any more"


def test_after_the_agents_death_loads_are_lost_and_found_again_with_the_next_one(
    cluster: Cluster, attach: Attach
) -> None:
    [agent] = cluster.start(1, http_on=False)
    keys = put(agent, SMALL, 2)
    engine = attach(agent, SMALL)
    assert engine.load(keys).ok == [True, True]
    agent.kill()
    eventually(lambda: not engine.client.connected or lost(engine, keys), 5.0, why="it is known to be gone")
    agent.launch()
    agent.ready()
    eventually(lambda: stored(engine, keys), why="the client reconnects")
    assert engine.load(keys).ok == [True, True]
    assert [engine.slot(i) for i in range(2)] == blocks_of(keys, SMALL.block_bytes)


def lost(engine: Engine, keys: list[bytes]) -> bool:
    engine.client.poll(1)
    return not any(engine.cache.get_into(keys, [bytearray(SMALL.block_bytes) for _ in keys], deadline_ms=200))


def stored(engine: Engine, keys: list[bytes]) -> bool:
    try:
        return all(engine.cache.put(keys, blocks_of(keys, SMALL.block_bytes)))
    except AgentUnavailable:
        return False
