"""Small gets from an owner on the same host, where NIXL is used: out of its memory, proven, and without asking it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.transports import NIXL

pytestmark = [pytest.mark.cluster, *NIXL.marks]

BLOCK = 64 << 10
LAYOUT = make_layout(BLOCK)
FROM_MEMORY = "p2pkv_neighbour_blocks_total"
SENT = "p2pkv_served_requests_total"
PINS = "p2pkv_served_pins_total"
REJECTED = "p2pkv_rejected_blocks_total"


def start(cluster: Cluster, count: int = 2, **settings: object) -> list[AgentProcess]:
    agents = cluster.start(count, transport="nixl", settings=settings)
    cluster.connected()
    return agents


def put(owner: AgentProcess, reader: AgentProcess, count: int) -> tuple[Cache, list[bytes]]:
    keys = new_keys(count)
    assert all(owner.open(LAYOUT).put(keys, blocks_of(keys, BLOCK)))
    cache = reader.open(LAYOUT)
    visible(cache, keys)
    return cache, keys


def get(cache: Cache, keys: list[bytes], deadline_ms: int = 10_000) -> list[Status]:
    out = [bytearray(BLOCK) for _ in keys]
    statuses = cache.get_statuses(keys, out, deadline_ms)
    for key, block, status in zip(keys, out, statuses, strict=True):
        assert status is not Status.OK or block == block_of(key, BLOCK)
    return statuses


def read_from_memory(owner: AgentProcess, reader: AgentProcess, count: int = 1) -> bool:
    """Whether the reader reads new blocks of the owner's out of its memory; they come in any case."""
    cache, keys = put(owner, reader, count)
    before = reader.metric(FROM_MEMORY)
    assert get(cache, keys) == [Status.OK] * count
    return reader.metric(FROM_MEMORY) == before + count


def soon(owner: AgentProcess, reader: AgentProcess) -> None:
    """Once they know each other, and their NIXL processes do."""
    eventually(lambda: read_from_memory(owner, reader), 20.0, why="the owner's memory is read")


def test_the_owner_is_not_asked(cluster: Cluster) -> None:
    owner, reader = start(cluster)
    soon(owner, reader)
    sent, pins = owner.metric(SENT), owner.metric(PINS)
    assert read_from_memory(owner, reader, 16)
    assert owner.metric(SENT) == sent and owner.metric(PINS) == pins
    assert reader.metric('p2pkv_get_blocks_total{source="peer"}') >= 16


def test_more_than_may_be_comes_as_before(cluster: Cluster) -> None:
    owner, reader = start(cluster, **{"transport.neighbour_max": "128KiB"})
    soon(owner, reader)
    assert read_from_memory(owner, reader, 2)
    assert not read_from_memory(owner, reader, 3)


@pytest.mark.parametrize("who", ["owner", "reader"])
def test_who_does_not_want_it_does_without(cluster: Cluster, who: str) -> None:
    off = {"transport.neighbour_max": "0"}
    [owner] = cluster.start(1, transport="nixl", settings=off if who == "owner" else {})
    [reader] = cluster.start(1, transport="nixl", settings=off if who == "reader" else {}, seeds=(owner.address,))
    cluster.connected()
    for _ in range(5):
        assert not read_from_memory(owner, reader)


def corrupt(owner: AgentProcess, content: bytes) -> None:
    """Flip a bit of a block where it lies in an agent's arena."""
    for number in os.listdir(f"/proc/{owner.pid}/fd"):
        link = Path(f"/proc/{owner.pid}/fd/{number}")
        if "arena" not in os.readlink(link):
            continue
        with link.open("r+b", buffering=0) as arena:
            at = arena.read().find(content)
            assert at >= 0
            arena.seek(at + BLOCK // 2)
            arena.write(bytes([content[BLOCK // 2] ^ 1]))
            return
    raise AssertionError("the agent has no arena")


def test_a_bit_that_flipped_in_its_memory_is_noticed(cluster: Cluster) -> None:
    owner, reader = start(cluster)
    soon(owner, reader)
    cache, keys = put(owner, reader, 3)
    corrupt(owner, block_of(keys[1], BLOCK))
    statuses = get(cache, keys)
    assert statuses[0] is Status.OK and statuses[2] is Status.OK and statuses[1] is not Status.OK
    assert reader.metric(REJECTED) == 1
    eventually(lambda: cache.match(keys).present[1] is None, 10.0, why="its owner was told, and has dropped it")


def test_an_owner_that_dies_is_a_miss_in_time_and_the_next_one_is_read(cluster: Cluster) -> None:
    owner, reader = start(cluster)
    soon(owner, reader)
    cache, keys = put(owner, reader, 4)
    owner.kill()
    began = time.monotonic()
    statuses = get(cache, keys, deadline_ms=2_000)  # until its connection is seen to have ended they can still be read
    assert time.monotonic() - began < 1.5
    assert set(statuses) <= {Status.OK, Status.MISS, Status.UNREACHABLE, Status.LOST, Status.TIMEOUT}
    [next_one] = cluster.start(1, transport="nixl", seeds=(reader.address,))
    cluster.connected(reader, next_one)
    soon(next_one, reader)


def test_what_the_owner_evicts_meanwhile_is_never_another_block(cluster: Cluster) -> None:
    """The long run of this is ``p2pkv bench stress --transport memory``."""
    [owner] = cluster.start(1, transport="nixl", capacity="2MiB")
    [reader] = cluster.start(1, transport="nixl", capacity="2MiB", seeds=(owner.address,))
    cluster.connected()
    soon(owner, reader)
    source, cache = owner.open(LAYOUT), reader.open(LAYOUT)
    before = reader.metric(FROM_MEMORY)
    for _ in range(30):
        keys = new_keys(24)
        source.put(keys, blocks_of(keys, BLOCK))
        get(cache, keys)
        get(cache, keys[::-1])
    assert reader.metric(FROM_MEMORY) > before
    assert reader.metric(REJECTED) == 0
