"""A peer that stands still is waited for as long as its answers ever took, not for as long as any peer may take."""

from __future__ import annotations

import time

import pytest

from p2pkv.transport.patience import FACTOR
from p2pkv.types import Status
from tests.cluster.agents import Cluster, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.transports import NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

MIB = make_layout(1 << 20)
STALL_S = 20.0
"""What a pull is allowed to pause for here, so that it cannot be mistaken for what a known peer is."""
LITTLE_S = 1.0
"""docs/pulls.md says 80 ms (or a few times the slowest answer before); the rest is for a machine that is busy."""


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
@pytest.mark.parametrize("asked_before", [1, 3])
def test_a_known_peer_that_stands_still_costs_little_and_once(cluster: Cluster, kind: str, asked_before: int) -> None:
    """Once: the first get before is by the event loop, those after it by native code; either knows what both saw."""
    slow = {"transport.stall_ms": int(STALL_S * 1000)}
    owner, reader = cluster.start(2, **options(kind, **slow))
    cluster.connected()
    keys = new_keys(asked_before + 2)
    assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=10_000))
    cache = reader.open(MIB)
    visible(cache, keys)
    buffer = bytearray(MIB.block_bytes)
    slowest_s = 0.0
    for key in keys[:asked_before]:
        began = time.monotonic()
        assert cache.get_into([key], [buffer], deadline_ms=10_000) == [True] and buffer == block_of(
            key, MIB.block_bytes
        )
        slowest_s = max(slowest_s, time.monotonic() - began)
    little_s = LITTLE_S + FACTOR * slowest_s
    owner.stop_tree()
    began = time.monotonic()
    first = cache.get_statuses([keys[-1]], [buffer], deadline_ms=int(2 * STALL_S * 1000))
    assert first == [Status.TIMEOUT] and time.monotonic() - began < little_s
    assert cache.get_statuses([keys[-2]], [buffer], deadline_ms=int(2 * STALL_S * 1000)) == [Status.MISS]
    assert time.monotonic() - began < little_s
