"""Calls with a deadline of 0, or of a millisecond: what can be had without waiting, at once, and nothing else."""

from __future__ import annotations

import mmap
import os
import time

import pytest

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache
from p2pkv.errors import DeadlineExceeded
from p2pkv.types import Status
from tests.cluster.agents import Cluster, eventually, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.test_peer_faults import SLACK_S, SMALL, Read, owner_and_reader, put
from tests.cluster.transports import NIXL, NIXL_TCP, TCP

pytestmark = [pytest.mark.cluster]

BLOCK = SMALL.block_bytes
TURNS = 20
MAY_BE = {Status.OK, Status.MISS, Status.TIMEOUT, Status.UNREACHABLE}
LEASE_MS = 2_000


def get(cache: Cache, keys: list[bytes], deadline_ms: int) -> list[Status]:
    out = [bytearray(BLOCK) for _ in keys]
    statuses = cache.get_statuses(keys, out, deadline_ms)
    for key, status, content in zip(keys, statuses, out, strict=True):
        assert status is not Status.OK or content == block_of(key, BLOCK), "WRONG BYTES"
    return statuses


@pytest.mark.parametrize("kind", [TCP, NIXL, NIXL_TCP])
def test_gets_without_time_give_what_is_here_and_do_not_blame_a_peer(cluster: Cluster, kind: str) -> None:
    """That a caller had no time says nothing about the peer: if it counted, its breaker would be open by then."""
    owner, reader = owner_and_reader(cluster, kind, **{"store.lease_ttl_ms": LEASE_MS})
    own = put(reader, SMALL, 2)
    cache = reader.open(SMALL)
    for stopped in (False, True):
        keys = put(owner, SMALL, 2 * TURNS)
        visible(cache, keys)
        if stopped:
            owner.stop_tree()
        began = time.monotonic()
        for turn in range(TURNS):
            for deadline_ms in (0, -1, 1):
                assert set(get(cache, keys[turn : turn + 2], deadline_ms)) <= MAY_BE
            mixed = get(cache, [own[0], keys[-1 - turn], own[1]], 0)
            assert mixed[0] is mixed[2] is Status.OK, mixed
            assert get(cache, own, 0) == [Status.OK] * 2, "what is here needs no time"
            assert cache.get_into(own, [bytearray(BLOCK) for _ in own], deadline_ms=0) == [True] * 2
        assert time.monotonic() - began < TURNS * SLACK_S / 4
        owner.continue_tree()
        last = Read(cache, keys, 10_000)
        assert last.end() == len(keys) or stopped, last.statuses
        eventually(lambda k=keys: Read(cache, k, 10_000).end() == len(k), 10.0, why="all of it comes")  # type: ignore[misc]
    eventually(lambda: owner.metric("p2pkv_leases") == 0, LEASE_MS / 1000 / 2, why="the owner holds nothing for them")
    assert reader.metric("p2pkv_leases") == 0 and reader.metric("p2pkv_pulls_in_flight_blocks") == 0


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_every_other_call_without_time_ends_at_once_too(cluster: Cluster, kind: str) -> None:
    owner, reader = owner_and_reader(cluster, kind)
    keys, own = put(owner, SMALL, 4), put(reader, SMALL, 4)
    fd = os.memfd_create("test-engine")
    os.ftruncate(fd, 4 * BLOCK)
    with AgentClient(reader.socket) as client, mmap.mmap(fd, 4 * BLOCK) as memory:
        cache = client.open(SMALL)
        visible(cache, keys)
        region = cache.map_region(fd, slots=4)
        os.close(fd)
        began = time.monotonic()
        assert cache.put(new_keys(2), blocks_of(new_keys(2), BLOCK), deadline_ms=0) == [False] * 2
        with pytest.raises(DeadlineExceeded):
            cache.match(keys, deadline_ms=0)
        for wanted in (own, keys):
            job = cache.load(wanted, region, [0, 1, 2, 3], deadline_ms=0)
            [result] = eventually(lambda: client.poll(100), 5.0, why="the job ends")
            assert result.job_id == job
            for slot, (key, good) in enumerate(zip(wanted, result.ok, strict=True)):
                assert not good or memory[slot * BLOCK : (slot + 1) * BLOCK] == block_of(key, BLOCK), "WRONG BYTES"
        fresh = new_keys(4)
        job = cache.store(fresh, region, [0, 1, 2, 3], deadline_ms=0)
        [result] = eventually(lambda: client.poll(100), 5.0, why="the job ends")
        assert result.job_id == job
        assert time.monotonic() - began < 5 * SLACK_S
        assert cache.put(own, blocks_of(own, BLOCK)) == [True] * 4
        assert get(cache, keys, 10_000) == [Status.OK] * 4
