"""A peer dies, stands still, lies or leaves while it is read: the reader has misses in time and never a wrong byte."""

from __future__ import annotations

import threading
import time

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, alive_peers, all_have, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.transports import NIXL, NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

MIB = make_layout(1 << 20)
SMALL = make_layout(65_536)
COUNT = 40
SLACK_S = 0.7


class Read:
    """A get in a thread of its own."""

    def __init__(self, cache: Cache, keys: list[bytes], deadline_ms: int) -> None:
        self.keys = keys
        self.statuses: list[Status] = []
        self.seconds = 0.0
        self._out = [bytearray(cache.layout.block_bytes) for _ in keys]
        self._thread = threading.Thread(target=self._run, args=(cache, deadline_ms))
        self._thread.start()

    def _run(self, cache: Cache, deadline_ms: int) -> None:
        started = time.monotonic()
        self.statuses = cache.get_statuses(self.keys, self._out, deadline_ms)
        self.seconds = time.monotonic() - started

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def end(self) -> int:
        """How many blocks came; every byte of them is looked at."""
        self._thread.join(60.0)
        assert self.over
        good = 0
        for key, status, content in zip(self.keys, self.statuses, self._out, strict=True):
            if status is Status.OK:
                assert content == block_of(key, len(content)), "WRONG BYTES"
                good += 1
        return good


def owner_and_reader(cluster: Cluster, kind: str, **settings: object) -> tuple[AgentProcess, AgentProcess]:
    owner, reader = cluster.start(2, capacity="128MiB", **options(kind, **settings))
    cluster.connected()
    return owner, reader


def put(agent: AgentProcess, layout: object, count: int) -> list[bytes]:
    keys = new_keys(count)
    cache = agent.open(layout)  # type: ignore[arg-type]
    assert all(cache.put(keys, blocks_of(keys, cache.layout.block_bytes), deadline_ms=10_000))
    return keys


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_dead_peers_blocks_are_misses_at_once_and_soon_not_even_hoped_for(cluster: Cluster, kind: str) -> None:
    owner, reader = owner_and_reader(cluster, kind)
    keys = put(owner, SMALL, 8)
    cache = reader.open(SMALL)
    visible(cache, keys)
    assert Read(cache, keys[:4], 5_000).end() == 4
    owner.kill()
    first = Read(cache, keys[4:], 5_000)
    assert first.end() == 0
    assert first.seconds < SLACK_S
    eventually(lambda: cache.match(keys).anywhere == 4, 3.0, why="the dead peer's entries are hidden")
    second = Read(cache, keys, 5_000)
    assert second.end() == 4, "what was pulled before is ours"
    assert second.seconds < SLACK_S


@pytest.mark.parametrize(
    ("kind", "fault"), [(TCP, "kill"), (TCP, "stop_tree"), (*NIXL.values, "kill"), (*NIXL_TCP.values, "stop_tree")]
)
def test_a_peer_that_goes_in_mid_read_costs_what_had_not_come(cluster: Cluster, kind: str, fault: str) -> None:
    owner, reader = owner_and_reader(cluster, kind)
    keys = put(owner, MIB, COUNT)
    local = put(reader, SMALL, 4)
    cache, small = reader.open(MIB), reader.open(SMALL)
    visible(cache, keys)
    read = Read(cache, keys, 1_500)
    eventually(lambda: read.over or reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
    getattr(owner, fault)()
    read.end()
    assert read.seconds < 1.5 + SLACK_S
    assert Read(small, local, 500).end() == 4, "a local hit has nothing to do with it"
    if fault == "stop_tree":
        owner.continue_tree()
        eventually(lambda: owner.node in alive_peers(reader), 20.0, why="the peer is heard again")
        visible(cache, keys)
        eventually(lambda: Read(cache, keys, 10_000).end() == COUNT, 30.0, why="everything comes in the end")


@pytest.mark.parametrize(("kind", "fault"), [(TCP, "stop_tree"), (TCP, "kill"), (*NIXL.values, "stop_tree")])
def test_a_block_comes_from_another_holder_when_the_first_one_fails(cluster: Cluster, kind: str, fault: str) -> None:
    """Whichever holder is asked first, the other one is asked within the deadline."""
    first, second, reader = cluster.start(3, **options(kind))
    cluster.connected()
    keys = new_keys(6)
    for holder in (first, second):
        assert all(holder.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
    cache = reader.open(SMALL)
    all_have(cache, keys, 2)
    # Of equals the one with the lowest id is asked first (p2pkv/transport/plan.py).
    asked_first = min((first, second), key=lambda agent: int(agent.node, 16))
    getattr(asked_first, fault)()
    read = Read(cache, keys, 2_000)
    assert read.end() == 6, (read.statuses, read.seconds)
    asked_first.continue_tree()


def test_the_agent_that_leaves_says_so_and_its_blocks_are_forgotten(cluster: Cluster) -> None:
    owner, reader = owner_and_reader(cluster, TCP)
    keys = put(owner, SMALL, 4)
    cache = reader.open(SMALL)
    visible(cache, keys)
    assert owner.terminate() == 0
    eventually(lambda: cache.match(keys).anywhere == 0, 2.0, why="goodbye is heard")
    assert Read(cache, keys, 1_000).end() == 0


def test_a_byte_that_changes_on_the_wire_costs_one_block_and_is_counted(cluster: Cluster) -> None:
    """And where somebody else has the block, not even that."""
    with Proxy() as proxy:
        [liar] = cluster.start(1, **options(TCP, **{"peer.advertise": proxy.address}))
        proxy.target = liar.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,))
        cluster.connected(liar, reader)
        keys = put(liar, SMALL, 5)
        cache = reader.open(SMALL)
        visible(cache, keys)
        proxy.flip_at = 2 * 65_536 + 32_768  # in the third block
        read = Read(cache, keys, 5_000)
        assert read.end() == 4
        assert [i for i, status in enumerate(read.statuses) if status is not Status.OK] == [2]
        assert reader.metric("p2pkv_rejected_blocks_total") == 1
        assert proxy.flipped == 1

        [honest] = cluster.start(1, seeds=(proxy.address,))
        cluster.connected()
        assert all(honest.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
        more = put(liar, SMALL, 5)
        assert all(honest.open(SMALL).put(more, blocks_of(more, SMALL.block_bytes)))
        all_have(cache, more, 2)
        assert Read(cache, more, 5_000).end() == 5
        assert Read(cache, keys, 5_000).end() == 5


def test_a_peer_whose_answers_stop_in_mid_block_is_given_up_for_lack_of_progress(cluster: Cluster) -> None:
    """Long before the deadline: transfers that stand still are ended after ``transport.stall_ms``."""
    with Proxy() as proxy:
        [owner] = cluster.start(1, **options(TCP, **{"peer.advertise": proxy.address}))
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,), **options(TCP, **{"transport.stall_ms": 300}))
        cluster.connected()
        keys = put(owner, MIB, 8)
        cache = reader.open(MIB)
        visible(cache, keys)
        proxy.hold_after = 5 << 20
        read = Read(cache, keys, 20_000)
        came = read.end()
        assert proxy.holding.is_set()
        assert came < 8
        assert read.seconds < 5.0
        proxy.let_go()
        eventually(lambda: Read(cache, keys, 20_000).end() == 8, 2.0, why="a probe has gone through")


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_reader_that_is_killed_lets_go_of_what_it_held(cluster: Cluster, kind: str) -> None:
    owner, reader = owner_and_reader(cluster, kind, **{"store.lease_ttl_ms": 1_500})
    keys = put(owner, MIB, COUNT)
    cache = reader.open(MIB)
    visible(cache, keys)
    read = Read(cache, keys, 5_000)
    eventually(lambda: read.over or owner.metric("p2pkv_leases") > 0, why="the owner holds the blocks")
    reader.kill()
    read.end()
    eventually(lambda: owner.metric("p2pkv_leases") == 0, 4.0, why="leases end with their holder, or run out")
    assert owner.metric('p2pkv_arena_used_bytes{use="pinned"}') == 0
