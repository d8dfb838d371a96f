"""Issue 2, done when 5: a peer's death is nothing that a local hit notices, and costs a remote one next to nothing.

The ratio that the issue promises is measured by ``p2pkv bench failover``; here the bound is one that a machine full of
other work keeps, too.
"""

from __future__ import annotations

import statistics
import threading
import time

import pytest

from p2pkv.client.cache import Cache
from tests.cluster.agents import Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 65_536
LAYOUT = make_layout(BLOCK)
GETS = 1_000


def local_gets(cache: Cache, keys: list[bytes], on_get: dict[int, threading.Event] | None = None) -> list[float]:
    """Seconds of each of :data:`GETS` gets, every byte looked at."""
    out = bytearray(BLOCK)
    seconds = []
    for i in range(GETS):
        if on_get and i in on_get:
            on_get[i].set()
        key = keys[i % len(keys)]
        started = time.perf_counter()
        assert cache.get_into([key], [out], deadline_ms=2_000) == [True]
        seconds.append(time.perf_counter() - started)
        assert out == block_of(key, BLOCK)
    return seconds


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]


def test_local_gets_do_not_notice_that_a_peer_dies(cluster: Cluster) -> None:
    serving, doomed, _ = cluster.start(3)
    cluster.connected()
    cache = serving.open(LAYOUT)
    mine, theirs = new_keys(32), new_keys(8)
    assert all(cache.put(mine, blocks_of(mine, BLOCK)))
    assert all(doomed.open(LAYOUT).put(theirs, blocks_of(theirs, BLOCK)))
    visible(cache, theirs)
    out = bytearray(BLOCK)
    assert cache.get_into(theirs[:1], [out]) == [True]

    before = local_gets(cache, mine)
    under_way = threading.Event()
    during: list[float] = []
    thread = threading.Thread(target=lambda: during.extend(local_gets(cache, mine, {100: under_way})))
    thread.start()
    assert under_way.wait(30)
    doomed.kill()
    started = time.monotonic()
    thread.join(60)
    assert len(during) == GETS
    assert p99(during) < max(3 * p99(before), 0.05), (p99(before), p99(during))

    started = time.monotonic()
    assert cache.get_into(theirs[1:2], [out], deadline_ms=2_000) == [False]
    assert time.monotonic() - started < 0.5
    eventually(lambda: cache.match(theirs).anywhere == 1, 3.0, why="the dead peer's entries are hidden")


def test_local_gets_do_not_notice_that_a_peer_stands_still_while_it_is_asked(cluster: Cluster) -> None:
    serving, stopped = cluster.start(2)
    cluster.connected()
    cache = serving.open(LAYOUT)
    mine, theirs = new_keys(32), new_keys(64)
    assert all(cache.put(mine, blocks_of(mine, BLOCK)))
    assert all(stopped.open(LAYOUT).put(theirs, blocks_of(theirs, BLOCK)))
    visible(cache, theirs)
    before = local_gets(cache, mine)
    stopped.stop_tree()
    others = serving.open(LAYOUT)
    waiting = threading.Thread(target=lambda: others.get_into(theirs, [bytearray(BLOCK) for _ in theirs], 1_000))
    waiting.start()
    during = local_gets(cache, mine)
    waiting.join(10)
    assert p99(during) < max(3 * p99(before), 0.05), (p99(before), p99(during))
