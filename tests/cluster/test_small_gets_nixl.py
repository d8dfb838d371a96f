"""Where NIXL is used, what is small comes over TCP: one round trip, and no other process."""

from __future__ import annotations

import pytest

from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.transports import NIXL, options

pytestmark = [pytest.mark.cluster, *NIXL.marks]

SMALL = make_layout(64 << 10)
PINS = "p2pkv_served_pins_total"
SENT = "p2pkv_served_requests_total"


def counters(owner: AgentProcess) -> tuple[float, float]:
    return owner.metric(PINS), owner.metric(SENT)


def test_small_gets_from_an_owner_on_this_host_are_sent_and_large_ones_read_one_sided(cluster: Cluster) -> None:
    owner, reader = cluster.start(2, **options("nixl", **{"transport.one_sided_min": "512KiB"}))
    cluster.connected()
    source, cache = owner.open(SMALL), reader.open(SMALL)

    def get(count: int) -> tuple[float, float]:
        """How many pins and sent answers one get of so many blocks was for the owner."""
        keys = new_keys(count)
        assert all(source.put(keys, blocks_of(keys, SMALL.block_bytes)))
        visible(cache, keys)
        out = [bytearray(SMALL.block_bytes) for _ in keys]
        before = counters(owner)
        assert all(cache.get_into(keys, out, deadline_ms=10_000))
        assert out == [block_of(key, SMALL.block_bytes) for key in keys]
        after = counters(owner)
        return after[0] - before[0], after[1] - before[1]

    eventually(lambda: get(16) == (1, 0), 20.0, why="the NIXL processes are connected, and native code knows")
    assert get(1) == (0, 1)
    assert get(7) == (0, 1)
    assert get(8) == (1, 0)
