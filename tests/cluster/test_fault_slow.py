"""A source at 1 % of its speed: with others beside it, it costs its share; alone, a get ends by its deadline.

Over TCP the wire is slow. Over NIXL, whose bytes pass no proxy, the source runs one millisecond in a hundred.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from p2pkv.client.cache import Cache
from tests.cluster.agents import AgentProcess, Cluster, all_have, eventually, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.test_peer_faults import MIB, SLACK_S, Read
from tests.cluster.transports import NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 48
SLOW = 0.01
PERIOD_S = 0.1


class Hiccups(threading.Thread):
    """Lets an agent and its children run for 1 % of the time."""

    def __init__(self, agent: AgentProcess) -> None:
        super().__init__(name="test-hiccups")
        self._pids = [agent.pid, *agent.children()]
        self._over = threading.Event()

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def run(self) -> None:
        while not self._over.wait(PERIOD_S * SLOW):
            self._signal(signal.SIGSTOP)
            self._over.wait(PERIOD_S * (1.0 - SLOW))
            self._signal(signal.SIGCONT)
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        self._over.set()
        self.join(30.0)


@contextmanager
def slowed(agent: AgentProcess, proxy: Proxy, kind: str, usual: float) -> Iterator[None]:
    """While this lasts the agent sends 1 % of ``usual`` bytes a second."""
    if kind == "tcp":
        proxy.rate = int(usual * SLOW)
        try:
            yield
        finally:
            proxy.rate = None
        return
    hiccups = Hiccups(agent)
    hiccups.start()
    try:
        yield
    finally:
        hiccups.end()


class Scene:
    """A source behind a proxy, perhaps one that is not, and a reader."""

    def __init__(self, cluster: Cluster, kind: str, proxy: Proxy, *, another: bool) -> None:
        advertised = {"peer.advertise": proxy.address} if kind == "tcp" else {}
        [self.slow] = cluster.start(1, capacity="160MiB", **options(kind, **advertised))
        proxy.target = self.slow.peer_port
        self.owners = [self.slow]
        if another:
            self.owners += cluster.start(1, capacity="160MiB", seeds=(self.slow.address,), **options(kind))
        [self.reader] = cluster.start(1, capacity="160MiB", seeds=(self.slow.address,), **options(kind))
        cluster.connected()
        self.cache: Cache = self.reader.open(MIB)

    def put(self, count: int) -> list[bytes]:
        """Blocks that every owner has."""
        keys = new_keys(count)
        for owner in self.owners:
            assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=20_000))
        all_have(self.cache, keys, len(self.owners))
        return keys


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
def test_one_of_two_sources_at_one_percent_costs_its_share(cluster: Cluster, kind: str) -> None:
    """Whoever is idle takes over from whoever is late: without that the slow one's half would take a hundred times as
    long."""
    with Proxy() as proxy:
        scene = Scene(cluster, kind, proxy, another=True)
        usual = Read(scene.cache, scene.put(COUNT), 20_000)
        assert usual.end() == COUNT
        keys = scene.put(COUNT)
        with slowed(scene.slow, proxy, kind, COUNT * MIB.block_bytes / usual.seconds):
            read = Read(scene.cache, keys, 20_000)
            assert read.end() == COUNT, read.statuses
        assert read.seconds < 20 * usual.seconds + SLACK_S


def test_the_only_source_at_one_percent_costs_no_more_than_the_deadline(cluster: Cluster) -> None:
    """What had come by then is right, and here; the source counts as slow, not as dead, once it is well."""
    with Proxy() as proxy:
        scene = Scene(cluster, TCP, proxy, another=False)
        usual = Read(scene.cache, scene.put(COUNT), 20_000)
        assert usual.end() == COUNT
        keys = scene.put(COUNT)
        with slowed(scene.slow, proxy, TCP, COUNT * MIB.block_bytes / usual.seconds):
            read = Read(scene.cache, keys, 1_000)
            came = read.end()
            assert came < COUNT
            assert read.seconds < 1.0 + SLACK_S
        visible(scene.cache, keys)
        eventually(lambda: Read(scene.cache, keys, 10_000).end() == COUNT, 20.0, why="everything comes in the end")
        assert scene.reader.metric("p2pkv_rejected_blocks_total") == 0
