"""SIGTERM: goodbye to peers, reads under lease go on, nothing new, exit status 0, in bounded time whatever hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from p2pkv.errors import AgentUnavailable, Busy, DeadlineExceeded
from p2pkv.wire import engine
from tests.cluster.agents import Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.raw import engine_connection
from tests.cluster.test_peer_faults import Read
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

MIB = make_layout(1 << 20)
SMALL = make_layout(65_536)
BOUND_S = 12.0
"""5 s of draining, 2 s of HTTP, 3 s of transports, and a busy machine."""


@pytest.mark.parametrize("kind", [TCP, NIXL])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_agent_leaves_at_once_and_takes_everything_along(
    cluster: Cluster, kind: str, number: signal.Signals
) -> None:
    [agent] = cluster.start(1, **options(kind))
    client = agent.client()
    client.open(SMALL)
    children = agent.children()
    started = time.monotonic()
    agent.signal(number)
    assert agent.wait() == 0
    assert time.monotonic() - started < 5.0
    assert not os.path.exists(agent.socket)
    for pid in children:
        eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 2.0, why="the NIXL process is gone")  # type: ignore[misc]
    assert "Traceback" not in agent.log() and "nanobind" not in agent.log(), agent.log()


def test_a_peer_in_mid_read_gets_the_rest_of_what_it_holds(cluster: Cluster) -> None:
    with Proxy() as proxy:
        [owner] = cluster.start(1, **options(TCP, **{"peer.advertise": proxy.address}))
        proxy.target = owner.peer_port
        patient = {"transport.stall_ms": 10_000, "transport.streams": 1}
        [reader] = cluster.start(1, seeds=(proxy.address,), **options(TCP, **patient))
        cluster.connected()
        first, *keys = new_keys(25)
        assert all(owner.open(MIB).put([first, *keys], blocks_of([first, *keys], MIB.block_bytes)))
        cache = reader.open(MIB)
        visible(cache, [first, *keys])
        assert Read(cache, [first], 20_000).end() == 1  # the next ones are asked for in one request
        proxy.hold_after = 3 << 20
        read = Read(cache, keys, 20_000)
        assert proxy.holding.wait(10)
        owner.signal(signal.SIGTERM)
        eventually(lambda: owner.http("/readyz")[0] == 503, 4.0, why="the owner drains")
        proxy.let_go()
        assert read.end() == 24, read.statuses
        assert owner.wait() == 0


def test_new_work_is_refused_while_draining(cluster: Cluster) -> None:
    """A lease that an engine holds keeps the agent draining."""
    [agent] = cluster.start(1)
    cache = agent.open(SMALL)
    [key] = new_keys(1)
    assert cache.put([key], [block_of(key, SMALL.block_bytes)]) == [True]
    with engine_connection(agent, layout=SMALL) as holder:
        got = holder.ask(engine.Get(SMALL.namespace, [key], 100))
        assert isinstance(got, engine.Got) and got.lease
        started = time.monotonic()
        agent.signal(signal.SIGTERM)
        eventually(lambda: agent.http("/readyz")[0] == 503, 4.0, why="the agent drains")
        with pytest.raises((Busy, AgentUnavailable, DeadlineExceeded)):
            cache.put(new_keys(1), [bytes(SMALL.block_bytes)])
        assert cache.get_into(new_keys(1), [bytearray(SMALL.block_bytes)]) == [False]
        refused = holder.ask(engine.Get(SMALL.namespace, [key], 100))
        assert isinstance(refused, engine.EngineError) and refused.code == "draining"
        holder.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
        assert agent.wait() == 0
        assert time.monotonic() - started < 5.0, "it was waited for a lease that had been given back"


def test_an_engine_that_never_gives_a_lease_back_does_not_keep_the_agent(cluster: Cluster) -> None:
    [agent] = cluster.start(1, settings={"store.lease_ttl_ms": 60_000})
    cache = agent.open(SMALL)
    [key] = new_keys(1)
    assert cache.put([key], [block_of(key, SMALL.block_bytes)]) == [True]
    with engine_connection(agent, layout=SMALL) as holder:
        assert isinstance(holder.ask(engine.Get(SMALL.namespace, [key], 100)), engine.Got)
        assert agent.terminate(BOUND_S) == 0


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_pull_from_a_peer_that_stands_still_does_not_keep_the_agent(cluster: Cluster, kind: str) -> None:
    """However long the deadline of who waits for it."""
    owner, reader = cluster.start(2, **options(kind, **{"transport.stall_ms": 60_000}))
    cluster.connected()
    keys = new_keys(4)
    assert all(owner.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
    cache = reader.open(SMALL)
    visible(cache, keys)
    owner.stop_tree()
    read = Read(cache, keys, 60_000)
    eventually(lambda: reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
    assert reader.terminate(BOUND_S) == 0
    assert read.end() == 0
    assert read.seconds < BOUND_S + 2.0


def test_a_second_signal_changes_nothing(cluster: Cluster) -> None:
    [agent] = cluster.start(1)
    stop = threading.Event()

    def nag() -> None:
        while not stop.wait(0.000_2) and agent.alive:
            agent.signal(signal.SIGTERM)

    thread = threading.Thread(target=nag)
    thread.start()
    try:
        assert agent.wait() == 0
    finally:
        stop.set()
        thread.join()


def test_an_agent_that_is_told_to_stop_while_it_starts_does(cluster: Cluster) -> None:
    agent = cluster.launch()
    eventually(lambda: os.path.exists(agent.socket) or not agent.alive, 30.0, why="it is half way up")
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0
